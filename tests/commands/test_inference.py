"""`stage-ray evaluate` and `generate` take what `train` takes, and say beforehand what they cannot draw or judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage_ray.cli import main

RING = {"tag": "single_object", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"}


def generate(model: Path | str, out: Path, *more: str) -> int:
    command = ["generate", str(model), "--prompt", "a photo of a red circle", "--images", "1", "--engine", "torch"]
    return main([*command, "--out", str(out), *more])


def pictures(directory: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(directory.glob("0*.png"))])


def test_settings_of_sampling_and_policy_reach_the_engine(model, tmp_path):
    settings = {
        "a": [],
        "b": ["rollout.top_k=1"],
        "c": ["rollout.top_k=1", "policy.template=paper"],
        "d": ["rollout.sampler=entropy_informed", "rollout.sampler_options.b=2"],
        "e": ["rollout.sampler=tests.rules.NoRepeats"],
    }
    for name, more in settings.items():
        assert generate(model, tmp_path / name, *(part for key in more for part in ("--set", key))) == 0
    drawn = [pictures(tmp_path / name) for name in settings]
    assert (drawn[0] != drawn[1]).any() and (drawn[1] != drawn[2]).any()
    assert (drawn[0] != drawn[3]).any() and (drawn[0] != drawn[4]).any()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.engin=torch", "did you mean 'rollout.engine'?"),
        ("rollout.top_p=2", "rollout.top_p = 2"),
        ("rollout.sampler=entropy", "did you mean 'entropy_informed'"),
        ("rollout.sampler_options.b=2", "rollout.sampler_options.b = 2 is no option of sampler guided: it has none"),
        ("policy.family=janos", "did you mean 'janus'"),
        ("rollout.max_prompt_tokens=3", "prompts cannot be drawn: --prompt: prompt of"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_nothing_is_drawn(model, tmp_path, capsys, override, sentence):
    assert generate(model, tmp_path / "out", "--set", override) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_measures_stand_beside_a_suite_and_drift_needs_a_reference(model, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(json.dumps(RING | {"prompt": f"a {w} ring"}) for w in ("red", "blue"))
    )
    command = ["evaluate", str(model), "--suite", "tests.run.test_suites.LightBenchmark", "--engine", "torch"]
    command += ["--prompts", str(tmp_path / "prompts.jsonl"), "--images-per-prompt", "2", "--measure", "drift"]
    command += ["--set", "rewards=[{type: tests.scorers.Brightness}]"]
    assert main(command) == 2
    assert "measure drift compares with a reference: name it with --against" in capsys.readouterr().err
    bright = "evaluation.measures=[{measure: mean, scorer: tests.scorers.Bright, name: bright}]"
    out = tmp_path / "both.json"
    assert main([*command, "--against", str(model), "--set", bright, "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text())["suites"].values()
    metrics = found["result"]["metrics"]
    drift = [name for name in metrics if "KL" in name or "entropy" in name]
    assert len(drift) == 6 and all(metrics[name]["value"] == 0 for name in drift), "a model is its own reference"
    assert set(metrics) == {"mean light", "bright", *drift} and set(found["result"]["scores"]) == {"Brightness"}
    assert set(found["against"]["metrics"]) == {"mean light", "bright"}
    assert metrics["bright"]["by_prompt"] == metrics["mean light"]["by_prompt"], "a suite sees its own scorer alone"


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_drawn(model, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert generate(model, tmp_path / "file" / "out") == 2
    assert main(["evaluate", str(model), "--json", str(tmp_path / "file" / "result.json")]) == 2
    assert capsys.readouterr().err.count(f"cannot be written: {tmp_path / 'file'} is no directory; name another") == 2
    assert main(["evaluate", str(model), "--json", str(tmp_path)]) == 2
    assert "is a directory; name a file in it" in capsys.readouterr().err


def test_prompts_that_are_too_long_are_left_out_where_that_is_wanted(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("circle " * 300 + "\na photo of a ring\n")
    options = ["--prompts", str(tmp_path / "prompts.txt")]
    assert generate(model, tmp_path / "out", *options) == 2
    assert generate(model, tmp_path / "out", *options, "--set", "prompts.too_long=drop") == 0
    assert sorted(file.name for file in (tmp_path / "out").glob("0*.png")) == ["0000-0.png", "0002-0.png"]


def evaluate(model: Path, records: list[dict], tmp_path: Path, *more: str) -> tuple[int, dict | None]:
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    command = ["evaluate", str(model), "--prompts", str(tmp_path / "prompts.jsonl"), "--images-per-prompt", "1"]
    file = tmp_path / "result.json"
    code = main([*command, "--engine", "torch", "--json", str(file), *more])
    return code, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"include": [{"class": "kettle", "count": 1}]}, "asks in include[0] for class 'kettle', unknown here"),
        ({"include": [{"class": "ring", "count": float("inf")}]}, "count inf is not a whole number"),
        ({"tag": ["colors", "counting"]}, "is not one text"),
        ({"include": None, "nouns": ["ring"]}, 'has no "include"'),
    ],
)
def test_what_cannot_be_judged_is_no_failure_of_the_model(model, tmp_path, capsys, record, why):
    code, result = evaluate(model, [RING | record], tmp_path)
    assert code == 1 and result is None
    said = capsys.readouterr().err
    assert "prompts.jsonl, line 1: geneval: " in said and why in said
    assert "none of 1 prompts can be judged" in said
    code, result = evaluate(model, [RING, RING | record], tmp_path)
    assert code == 0 and result is not None and result["metrics"]["GenEval"]["images"] == 1
    printed = capsys.readouterr()
    assert "1 images could not be judged and count in no score" in printed.out and why in printed.err


def test_other_scorers_than_the_benchmarks_can_be_asked(model, tmp_path, capsys):
    rewards = "[{type: tests.scorers.Brightness}, {type: geneval, options: {detector: tests.scorers.Blind}}]"
    code, result = evaluate(model, [RING], tmp_path, "--set", f"rewards={rewards}")
    assert code == 0 and result is not None
    assert set(result["scores"]) == {"Brightness", "geneval"} and result["metrics"]["GenEval"]["value"] == 0


def test_a_scorer_that_fails_on_every_image_is_no_result(model, tmp_path, capsys):
    code, _ = evaluate(model, [RING], tmp_path, "--set", "rewards=[{type: tests.scorers.Raises}]")
    assert code == 1 and "no image could be judged, so there is no GenEval" in capsys.readouterr().err
