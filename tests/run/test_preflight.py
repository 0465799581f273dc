"""What a run would fail on is found before anything is started, as a user meets it: `train --dry-run`, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stage_ray.cli import main
from stage_ray.config.load import load_config
from stage_ray.evaluation.suites import resolve_suites
from stage_ray.policies import policy_class
from stage_ray.run.preflight import preflight

CONFIG = "configs/stage_shapeworld.yaml"
RING = {"tag": "single_object", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"}


def dry_run(*overrides: str) -> int:
    root = Path(__file__).parents[2]
    settings = [part for override in overrides for part in ("--set", override)]
    return main(["train", str(root / CONFIG), *settings, "--set", "rollout.engine=torch", "--dry-run"])


@pytest.mark.parametrize(
    ("rewards", "sentence"),
    [
        ("[{type: genevall}]", "did you mean 'geneval'"),
        ("[{type: clip}]", "rewards.0.options.path is missing"),
        ("[{type: geneval, options: {detector: nowhere.Detector}}]", "no module named 'nowhere'"),
        ("[{type: clip, options: {path: ./nowhere}}]", "./nowhere does not exist"),
        ("[{type: clip, options: {path: ./nowhere, scale: large}}]", "rewards.0.options.scale = 'large'"),
        ("[{type: my.Scorer}]", "no module named 'my'"),
    ],
)
def test_a_scorer_that_cannot_be_built_is_found(rewards, sentence, capsys):
    assert dry_run(f"rewards={rewards}") == 2
    assert sentence in capsys.readouterr().err


def test_a_samplers_options_are_checked_and_printed_with_its_defaults(capsys):
    assert dry_run("rollout.sampler=entropy_informed", "rollout.sampler_options.b=0.5") == 0
    assert "sampler_options:\n    a: 2.5\n    b: 0.5\n    c: 0.6\n" in capsys.readouterr().out
    assert dry_run("rollout.sampler=entropy_informed", "rollout.sampler_options.t=1") == 2
    assert "rollout.sampler_options.t = 1 is no option of sampler entropy_informed" in capsys.readouterr().err


def test_what_pools_of_scorers_are_started_is_shown_and_one_with_packages_of_its_own_is_not_looked_for_here(capsys):
    own = "{type: my.Scorer, workers: 2, gpus: 0.5, runtime_env: {pip: [my]}}"
    assert dry_run(f"rewards=[{own}, {{type: tests.scorers.Brightness}}]") == 0
    said = capsys.readouterr().out
    assert "reward: 1 x 0.5 CPU, 0 GPU; scorers Brightness\n" in said
    assert "reward-Scorer: 2 x 0.5 CPU, 0.5 GPU; scorers Scorer\n" in said


@pytest.mark.parametrize("key", ["prompts.train", "prompts.heldout"])
@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"include": [{"class": "kettle", "count": 1}]}, "asks in include[0] for class 'kettle'"),
        ({"include": [{"class": "rings"}]}, "did you mean 'ring'?"),
        ({"exclude": [{"class": "spoon", "count": 3}]}, "asks in exclude[0] for class 'spoon'"),
        ({"tag": ["colors", "counting"]}, "\"tag\" ['colors', 'counting'] is not one text"),
        ({"include": [{"class": "ring", "count": 2.5}]}, "include[0]: count 2.5 is not a whole number"),
        ({"include": None, "nouns": ["ring"], "task_type": "single"}, 'has no "include"'),
    ],
)
def test_a_prompt_that_a_scorer_cannot_judge_is_found_by_line(key, record, sentence, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(RING) + "\n" + json.dumps(RING | record) + "\n")
    assert dry_run(f"{key}={path}") == 2
    said = capsys.readouterr().err
    assert "1 of " in said and f"{path}, line 2: geneval: " in said and sentence in said


def test_what_tables_fill_in_for_nothing_hinders_no_prompt(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    nothing = {"class": "ring", "count": "1", "color": float("nan"), "position": "None"}
    path.write_text(json.dumps(RING | {"include": [nothing], "exclude": None}) + "\n")
    assert dry_run(f"prompts.train={path}") == 0
    assert "1 to train on, 100 held out" in capsys.readouterr().out


def test_prompts_of_several_files_are_counted_by_file_and_found_by_line(tmp_path, capsys):
    rings, more = tmp_path / "rings.jsonl", tmp_path / "more.jsonl"
    rings.write_text((json.dumps(RING) + "\n") * 3)
    more.write_text(json.dumps(RING) + "\n")
    both = f"prompts.train=[{{path: {rings}, weight: 3}}, {{path: {more}}}]"
    assert dry_run(both, "prompts.train.0.weight=2.5") == 0
    said = capsys.readouterr().out
    assert f"prompts: 3 of {rings} (weight 2.5), 1 of {more} (weight 1) to train on, 100 held out" in said
    more.write_text(json.dumps(RING | {"include": [{"class": "kettle", "count": 1}]}))
    assert dry_run(both) == 2
    assert f"{more}, line 1: geneval: " in capsys.readouterr().err
    assert dry_run(both.replace(more.name, "none.txt")) == 2
    assert "none.txt does not exist" in capsys.readouterr().err


def test_a_file_of_several_whose_prompts_are_all_too_long_is_refused(tmp_path, capsys):
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("a photo of a ring\n" + LONG)
    long.write_text(LONG)
    scorer, drop = "rewards=[{type: tests.scorers.Brightness}]", "prompts.too_long=drop"
    assert dry_run(f"prompts.train=[{{path: {short}}}, {{path: {long}}}]", scorer, drop) == 2
    assert f"1 of 1 prompts cannot be drawn: {long}, line 1" in capsys.readouterr().err
    assert dry_run(f"prompts.train=[{{path: {short}}}]", scorer, drop) == 0
    assert f"1 of {short} (weight 1) to train on" in capsys.readouterr().out


LONG = "a photo of " + "a red ring and " * 300 + "a blue cross"


def test_a_prompt_that_is_too_long_is_found_by_line_or_dropped(tmp_path, capsys, caplog):
    path = tmp_path / "prompts.txt"
    path.write_text(f"a photo of a ring\n{LONG}\n")
    scorer = "rewards=[{type: tests.scorers.Brightness}]"
    assert dry_run(f"prompts.train={path}", scorer) == 2
    said = capsys.readouterr().err
    assert "1 of 2 prompts cannot be drawn" in said and f"{path}, line 2: prompt of 12" in said
    assert "fit (the model's positions less its image tokens)" in said and "prompts.too_long=drop" in said
    assert dry_run(f"prompts.train={path}", scorer, "rollout.max_prompt_tokens=9") == 2
    assert "at most 9 fit (rollout.max_prompt_tokens)" in capsys.readouterr().err
    assert dry_run(f"prompts.train={path}", scorer, "prompts.too_long=drop") == 0
    assert "1 to train on, 100 held out" in capsys.readouterr().out and "1 of 2 prompts are dropped" in caplog.text
    path.write_text(LONG)
    assert dry_run(f"prompts.train={path}", scorer, "prompts.too_long=drop") == 2, "none is left"


def test_a_prompt_is_refused_where_the_model_has_no_room_for_it_whatever_the_config_says(tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text(LONG)
    scorer = "rewards=[{type: tests.scorers.Brightness}]"
    assert dry_run(f"prompts.train={path}", scorer, "rollout.max_prompt_tokens=100000") == 2
    assert "fit (the model's positions less its image tokens)" in capsys.readouterr().err


def test_a_prompt_with_the_token_that_begins_an_image_is_refused(tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of <begin_of_image> a ring")
    assert dry_run(f"prompts.train={path}", "rewards=[{type: tests.scorers.Brightness}]") == 2
    assert "holds the token that begins an image" in capsys.readouterr().err


def test_the_reference_is_checked_and_shown(model, capsys):
    assert dry_run(f"policy.reference={model}") == 2
    said = capsys.readouterr().err
    assert f"policy.reference = {model} is not of the model that policy.path = package:" in said
    assert "trained tensors and sizes and image tokens and prompt tokens differ" in said
    shipped = "package:stage_ray/shapeworld/assets/janus"
    assert dry_run(f"policy.reference={shipped}") == 0
    assert "#   reference: " in capsys.readouterr().out


def test_what_would_be_fetched_is_listed_and_refused_only_if_that_is_wanted(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scorer = "rewards=[{type: clip, options: {path: nobody/no-such-clip}}]"
    assert dry_run("policy.path=nobody/no-such-janus", scorer) == 0
    printed = capsys.readouterr().out
    for key in ("policy.path = nobody/no-such-janus", "rewards.0.options.path = nobody/no-such-clip"):
        assert f"#   not checked: would be fetched: {key}" in printed
    root = Path(__file__).parents[2]
    command = ["train", str(root / CONFIG), "--set", "policy.path=nobody/no-such-janus", "--dry-run", "--strict"]
    assert main([*command, "--set", "rollout.engine=torch"]) == 2
    assert "--strict: not checked, since it would be fetched: policy.path = nobody" in capsys.readouterr().err


def test_memory_is_reserved_for_the_longest_prompt_of_all_that_a_run_draws_and_for_any_where_a_transform_writes_them(
    tmp_path,
):
    train, heldout, suite = (tmp_path / name for name in ("train.txt", "heldout.txt", "suite.txt"))
    for path, rings in ((train, 1), (heldout, 3), (suite, 2)):
        path.write_text(f"a photo of a ring\na photo of {'a ring and ' * rings}a cross\n")
    scorer = "rewards=[{type: tests.scorers.Brightness}]"
    overrides = [scorer, f"prompts.train={train}", f"prompts.heldout={heldout}", "rollout.engine=torch"]
    bright, named = "rewards: [{type: tests.scorers.Brightness}]", "tests.evaluation.test_geneval.BrightnessBenchmark"
    own = f"{{benchmark: {named}, name: own, prompts: {suite}, images_per_prompt: 1, {bright}}}"
    root = Path(__file__).parents[2]

    def reserved(*more: str) -> int:
        run = resolve_suites(load_config(str(root / CONFIG), [*overrides, *more]))
        return preflight(run).reserve(run).rollout.max_prompt_tokens

    run = load_config(str(root / CONFIG), overrides)
    codec = policy_class(run.policy).check(run.policy)
    assert codec is not None
    three, four = (codec.encode_prompt(f"a photo of {'a ring and ' * n}a cross").longest for n in (3, 4))
    assert reserved() == three < four
    suite.write_text(f"a photo of {'a ring and ' * 4}a cross\n")
    assert reserved(f"evaluation.suites=[{own}]") == four
    assert reserved("rollout.prompt_transform=template") == run.rollout.max_prompt_tokens
