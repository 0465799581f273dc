"""Each benchmark's files, arithmetic and picture layout, on small copies in the official formats; and `evaluate`."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage_ray.cli import main
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.base import Benchmark, find_benchmark
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.evaluation.wise import FirstWise
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.records import Prompt, ScoredGroup
from stage_ray.rewards import build_rewards, check_rewards
from stage_ray.rewards.grounding import fault
from tests.plain import FAMILY, plain_checkpoint
from tests.rewards.services import chat, service

pytestmark = pytest.mark.usefixtures("one_thread")

DPG = [  # header and lines of dpg_bench.csv
    ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple"],
    ["a1", "A dog on a red mat.", "", "1", "0", "entity", "whole", "entity - whole (dog)", "Is there a dog?"],
    ["a1", "A dog on a red mat.", "", "2", "0", "entity", "whole", "entity - whole (mat)", "Is there a mat?"],
    ["a1", "A dog on a red mat.", "", "3", "2", "attribute", "color", "attribute - color (mat, red)", "Is it red?"],
    ["a1", "A dog on a red mat.", "", "4", "1, 2", "relation", "spatial", "relation - spatial (on)", "Is it on it?"],
    ["b7", "An old town.", "", "1", "0", "global", "", "global - (old town)", "Is it an old town?"],
]
DPG[0].append("question_natural_language")
ATOMS = {
    "prompt": "two green pigs",
    "atom_count": 3,
    "vqa_list": [
        ["How many pigs are in the image?", "two"],
        ["Are the pigs green?", "Yes"],
        ["Are there pigs?", "Yes"],
    ],
    "skills": ["count", "attribute", "object"],
}
POINTS = {"Testpoints": ["Style", "Attribute - Color"], "Testpoint Description": ["ink", "a red seal"]}
WISE = {"Prompt": "the pastry of the Mid-Autumn Festival", "Explanation": "mooncakes", "Category": "Cultural knowledge"}


def table(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def small(monkeypatch: pytest.MonkeyPatch, benchmark: Benchmark, counts: Mapping[str, int]) -> Benchmark:
    """The benchmark as if it had few prompts."""
    monkeypatch.setattr(type(benchmark), "counts", counts)
    return benchmark


def judged(group_id: int, scores: Sequence[float], name: str = "vlm_questions", answers: Any = None) -> ScoredGroup:
    column = np.asarray(scores, np.float32)[:, None]
    details = tuple({name: {"answers": one}} for one in answers or [[]] * len(scores))
    return ScoredGroup(group_id, (name,), column, np.isfinite(column), details, 0.0)


def values(metrics: Mapping[str, MetricValue]) -> dict[str, float]:
    return {name: pytest.approx(metric.value) for name, metric in metrics.items()}


def layout(benchmark: Benchmark, directory: Path, prompt: Prompt, count: int) -> list[str]:
    benchmark.save_pictures(directory, prompt, np.zeros((count, 4, 4, 3), np.uint8))
    assert benchmark.has_pictures(directory, prompt, count)
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*.*"))


def test_dpg_counts_a_question_only_where_its_parents_are_answered_yes(tmp_path, monkeypatch):
    benchmark = small(monkeypatch, find_benchmark("dpg"), {"all": 2})
    prompts = benchmark.load(str(table(tmp_path / "dpg.csv", DPG)), load_prompts)
    assert [(prompt.index, prompt.text) for prompt in prompts] == [(0, "A dog on a red mat."), (1, "An old town.")]
    questions = prompts[0].record["questions"]
    assert [one["parents"] for one in questions] == [[], [], [1], [0, 1]]
    assert questions[2] == {"question": "Is it red? Answer yes or no.", "kind": "attribute - color", "parents": [1]}
    first = judged(0, [0.25], answers=[[1.0, 0.0, 1.0, 1.0]])  # no mat: of four questions only the dog counts
    metrics = benchmark.aggregate(prompts, [first, judged(1, [1.0, 0.0], answers=[[1.0], [0.0]])])
    # The headline is over images, kinds over questions as they were answered.
    assert values(metrics) == {
        "attribute": 100,
        "entity": 50,
        "relation": 100,
        "global": 50,
        "DPG-Bench": (25 + 100 + 0) / 3,
        "attribute - color": 100,
        "entity - whole": 50,
        "relation - spatial": 100,
    }
    assert layout(benchmark, tmp_path / "pictures", prompts[0], 4) == ["a1.png"]
    with pytest.raises(ConfigError, match=r"dpg.csv, line 2: KeyError\('proposition_id'\) in .* is it dpg_bench.csv"):
        benchmark.load(str(table(tmp_path / "dpg.csv", [["item_id", "text"], ["a", "b"]])), load_prompts)


def test_geneval2_is_soft_tifa_by_atoms_and_by_skill(tmp_path, monkeypatch):
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps(ATOMS))
    benchmark = small(monkeypatch, find_benchmark("geneval2"), {"3 atoms": 1})
    (prompt,) = benchmark.load(str(tmp_path / "geneval2_data.jsonl"), load_prompts)
    question = {"question": "How many pigs are in the image? Answer in one word.", "answer": "two"}
    assert prompt.record["questions"][0] == question
    metrics = benchmark.aggregate([prompt], [judged(0, [0.7], answers=[[0.25, 1.0, 0.85]])])
    geometric = (0.25 * 0.85) ** (1 / 3)
    assert values(metrics) == {
        "3 atoms": geometric,
        "Soft-TIFA GM": geometric,
        "Soft-TIFA AM": 0.7,
        "count": 0.25,
        "attribute": 1.0,
        "object": 0.85,
    }
    assert layout(benchmark, tmp_path / "p", prompt, 1) == ["00000-0.png", "image_paths.json"]
    paths = json.loads((tmp_path / "p" / "image_paths.json").read_text())
    assert paths == {"two green pigs": str((tmp_path / "p" / "00000-0.png").resolve())}
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps({"prompt": "a pig"}))
    with pytest.raises(ConfigError, match=r"geneval2_data.jsonl, line 1: needs a vqa_list"):
        benchmark.load(str(tmp_path / "geneval2_data.jsonl"), load_prompts)


def test_unigenbench_is_the_mean_over_dimensions_of_the_points_that_are_met(tmp_path, monkeypatch):
    benchmark = small(monkeypatch, find_benchmark("unigenbench"), {"all": 1})
    rows = [["index", "prompt_en", "sub_dims_en"], ["5", "an ink drawing with a red seal", json.dumps(POINTS)]]
    (prompt,) = benchmark.load(str(table(tmp_path / "en.csv", rows)), load_prompts)
    asked = prompt.record["questions"][1]["question"]
    assert "Attribute - Color: a red seal." in asked and '"an ink drawing with a red seal"' in asked
    metrics = benchmark.aggregate([prompt], [judged(0, [0.5, 1.0], answers=[[1.0, 0.0], [1.0, 1.0]])])
    assert values(metrics) == {"Attribute": 0.5, "Style": 1.0, "UniGenBench": 0.75, "Attribute - Color": 0.5}
    assert layout(benchmark, tmp_path / "p", prompt, 2) == ["5_0.png", "5_1.png"]
    table(tmp_path / "en.csv", [["index", "prompt_en"], ["5", "an ink drawing"]])
    with pytest.raises(ConfigError, match=r"line 2: sub_dims_en holds no test points .* is it UniGenBench's"):
        benchmark.load(str(tmp_path / "en.csv"), load_prompts)


@pytest.mark.parametrize(("kind", "suffix"), [(type(find_benchmark("wise")), "_verified"), (FirstWise, "")])
def test_wise_asks_by_the_explanation_and_weighs_its_points(kind, suffix, tmp_path, monkeypatch):
    benchmark = small(monkeypatch, kind(), {"culture": 1, "time": 1, "space": 1})
    parts = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
    for number, part in enumerate(parts, start=1):
        (tmp_path / f"{part}{suffix}.json").write_text(json.dumps([WISE | {"prompt_id": number}]))
    prompts = benchmark.load(str(tmp_path), load_prompts)
    assert [benchmark.category(prompt) for prompt in prompts] == ["culture", "time", "space"]
    assert all("mooncakes" in one["question"] for one in prompts[0].record["questions"])
    answers = [[1.0], [0.0], [1.0]] if suffix else [[1.0, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    expected = [1.0, 0.0, 1.0] if suffix else [0.7 * 1 + 0.2 * 0.5, 0.1, 1.0]
    groups = [judged(number, [0.5], answers=[one]) for number, one in enumerate(answers)]
    found = benchmark.aggregate(prompts, groups)
    fields = dict(zip(("culture", "time", "space"), expected, strict=True))
    assert values(found) == {**fields, "WiScore": sum(expected) / 3}
    assert layout(benchmark, tmp_path / "p", prompts[1], 1) == ["2.png"]
    (tmp_path / f"natural_science{suffix}.json").write_text('[{"Prompt": "ice"}]')
    with pytest.raises(ConfigError, match='natural_science.*: has no "Explanation"'):
        benchmark.load(str(tmp_path), load_prompts)


def test_hpsv2_averages_styles_and_all_images(tmp_path, monkeypatch):
    benchmark = small(monkeypatch, find_benchmark("hpsv2"), {"anime": 1, "concept-art": 1, "paintings": 1, "photo": 2})
    for style in benchmark.files:
        (tmp_path / f"{style}.json").write_text(json.dumps(["a cat", "a dog"][: 1 + (style == "photo")]))
    prompts = benchmark.load(str(tmp_path), load_prompts)
    groups = [judged(number, [20.0 + number], "hps") for number in range(5)]
    styles = {"anime": 20, "concept-art": 21, "paintings": 22, "photo": 23.5}
    assert values(benchmark.aggregate(prompts, groups)) == {**styles, "HPSv2.1": 22}
    assert layout(benchmark, tmp_path / "p", prompts[4], 1) == ["photo/00001.jpg"]
    (tmp_path / "photo.json").write_text('["a cat"]')
    with pytest.raises(ConfigError, match=r"has 1 of category 'photo' and not 2, .* from https://huggingface.co"):
        benchmark.load(str(tmp_path), load_prompts)


def test_drawbench_has_image_reward_by_category_and_the_other_scorers_beside_it(tmp_path, monkeypatch):
    benchmark = small(monkeypatch, find_benchmark("drawbench"), {"Colors": 1, "Gary Marcus et al.": 1})
    rows = [["Prompts", "Category"], ["A red car.", "Colors"], ["A pear.", "Gary Marcus et al. "]]
    prompts = benchmark.load(str(table(tmp_path / "DrawBench.csv", rows)), load_prompts)
    names = ("image_reward", "hps", "aesthetic")
    scores = np.asarray([[[0.5, 25, 5], [np.nan, 27, 7]], [[-1.5, 26, 6], [-0.5, 26, 6]]], np.float32)
    groups = [ScoredGroup(i, names, one, np.isfinite(one), ({}, {}), 0.0) for i, one in enumerate(scores)]
    expected = {"Colors": 0.5, "Gary Marcus et al.": -1.0, "ImageReward": -0.5, "hps": 26, "aesthetic": 6}
    assert values(benchmark.aggregate(prompts, groups)) == expected
    assert layout(benchmark, tmp_path / "p", prompts[1], 2) == ["00001-0.png", "00001-1.png"]


def test_ocr_is_the_mean_score_and_a_partial_list_is_refused(tmp_path):
    benchmark = find_benchmark("ocr")
    prompt = Prompt(0, 'a sign "Open"')
    assert values(benchmark.aggregate([prompt], [judged(0, [1.0, 0.5], "ocr")])) == {"OCR accuracy": 0.75, "exact": 0.5}
    (tmp_path / "test.txt").write_text('a sign "Open"\n')
    with pytest.raises(ConfigError, match=r"has 1 of category 'all' and not 1018, .*flow_grpo"):
        benchmark.load(str(tmp_path / "test.txt"), load_prompts)


def test_t2i_compbench_scores_what_it_can_and_lays_all_out(tmp_path, monkeypatch):
    benchmark = find_benchmark("t2i_compbench")
    texts = dict.fromkeys(benchmark.files, "a green bench and a blue bowl")
    texts["spatial"], texts["numeracy"] = "a girl on the top of a frog", "Two women and three tomatoes sat near boxes."
    for kind, file in benchmark.files.items():
        (tmp_path / file).write_text(texts[kind])
    small(monkeypatch, benchmark, dict.fromkeys(texts, 1))
    prompts = {str(one.record["kind"]): one for one in benchmark.load(str(tmp_path), load_prompts)}
    spatial = {"obj1": "girl", "obj2": "frog", "locality": "on the top of"}
    counted = [{"obj_name": "woman", "num": 2}, {"obj_name": "tomato", "num": 3}]
    assert prompts["spatial"].record["spatial_info"] == spatial
    assert prompts["numeracy"].record["numeracy_info"] == counted
    assert [fault(prompt.record) for prompt in prompts.values()] == [""] * 8
    scores = np.asarray([[0.3, 0.9]], np.float32)
    groups = [ScoredGroup(i, ("clip", "grounding"), scores, scores > 0, ({},), 0.0) for i in range(8)]
    found = values(benchmark.aggregate(list(prompts.values()), groups))
    assert found == {"non_spatial": 0.3, "spatial (not UniDet)": 0.9, "numeracy (not UniDet)": 0.9}
    place = "spatial/samples/a girl on the top of a frog_00000"
    assert layout(benchmark, tmp_path / "p", prompts["spatial"], 2) == [f"{place}{number}.png" for number in (0, 1)]


def test_geneval_has_its_prompts_and_shapeworld_its_own():
    official, shapes = find_benchmark("geneval"), find_benchmark("shapeworld")
    assert len(official.load(official.prompts, load_prompts)) == 553
    assert len(shapes.load(shapes.prompts, load_prompts)) == 100
    binding = find_benchmark("binding")
    assert len(binding.load(binding.prompts, load_prompts)) == 96
    assert "detector" not in official.rewards[0].options and "Shape" in shapes.rewards[0].options["detector"]


def test_the_judge_of_questions_reads_words_points_and_log_probabilities():
    questions = [
        {"question": "Is there a dog?"},
        {"question": "How many pigs?", "answer": "two"},
        {"question": "How real?", "highest": 2},
    ]
    says = {"Is there a dog?": "**Yes**, there is.", "How many pigs?": "2", "How real?": "I would say: 1"}
    prompts = [Prompt(0, "p", {"questions": questions}), Prompt(1, "q", {"questions": [{"question": "Odd?"}]})]
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with service(chat(lambda shown, text: says.get(text, "Perhaps."))) as url:
        (_, judge), *_ = build_rewards([config(f"{url}/v1")])
        output = judge.score(images, prompts)
    assert output.scores[0] == pytest.approx((1 + 1 + 0.5) / 3) and output.valid.tolist() == [True, False]
    assert output.details[0]["answers"] == [1.0, 1.0, 0.5] and "cannot be read" in output.details[1]["error"]
    logs = {"Yes": np.log(0.5), " yes": np.log(0.25), "No": np.log(0.1)}
    with service(chat(lambda shown, text: logs)) as url:
        (_, judge), *_ = build_rewards([config(f"{url}/v1", mode="logprobs")])
        assert judge.score(images[:1], [Prompt(0, "p", {"questions": questions[:1]})]).scores[0] == pytest.approx(0.75)
    wrong = [{}, {"questions": [{"question": 3}]}, {"questions": [{"question": "A?", "parents": [4]}]}]
    refused = check_rewards([config("http://x")], [Prompt(i, "p", record) for i, record in enumerate(wrong)])
    assert [prompt.index for prompt, _ in refused] == [0, 1, 2]


def config(url: str, **options: Any) -> Any:
    from stage_ray.config import RewardConfig

    return RewardConfig(type="vlm_questions", options={"model": "m", "url": url, **options})


def stops(*_: Any) -> None:
    raise RunError("the disk is gone")


def test_two_suites_are_compared_with_another_model_prompt_by_prompt(plain, tmp_path, monkeypatch, capsys):
    small(monkeypatch, find_benchmark("ocr"), {"all": 2})
    small(monkeypatch, find_benchmark("dpg"), {"all": 2})
    (tmp_path / "test.txt").write_text('a sign that says "Open"\na neon "Bar"\n')
    other = plain_checkpoint(tmp_path / "other", seed=1)
    file, pictures = tmp_path / "both.json", tmp_path / "pictures"
    command = ["evaluate", str(plain), "--suite", "ocr,dpg", "--engine", "torch", "--set", f"policy.family={FAMILY}"]
    command += ["--prompts", f"ocr={tmp_path / 'test.txt'}", "--against", str(other), "--json", str(file)]
    command += ["--prompts", f"dpg={table(tmp_path / 'dpg.csv', DPG)}", "--pictures", str(pictures)]
    assert main(command) == 2 and "give --judge MODEL@URL" in capsys.readouterr().err
    with service(chat(lambda shown, text: "yes" if shown[0].mean() > 120 else "no")) as url:
        command += ["--judge", f"m@{url}/v1"]
        with monkeypatch.context() as broken:
            broken.setattr(type(find_benchmark("dpg")), "save_pictures", stops)
            assert main(command) == 1 and "the disk is gone" in capsys.readouterr().err
        assert main(command) == 0
    printed = capsys.readouterr().out
    assert "ocr: 2 of 2 prompts are there already" in " ".join(printed.split()), "the command went on"
    assert "\nocr\n" in printed and "\ndpg\n" in printed and " difference " in printed and "is mPLUG" in printed
    both = json.loads(file.read_text())
    assert both["model"] == str(plain) and both["against"] == str(other) and list(both["suites"]) == ["ocr", "dpg"]
    for suite in both["suites"].values():
        headline = suite["result"]["headline"]
        was, now = suite["against"]["metrics"][headline], suite["result"]["metrics"][headline]
        paired = [now["by_prompt"][key] - was["by_prompt"][key] for key in now["by_prompt"]]
        change = suite["changes"][headline]
        assert change["value"] == pytest.approx(np.mean(paired)) == pytest.approx(now["value"] - was["value"])
        assert change["error"] == pytest.approx(np.std(paired, ddof=1) / np.sqrt(2))
        assert suite["result"]["note"] and suite["result"]["conditions"]["evaluation.seed"] == 20
    assert sorted(path.name for path in (pictures / "dpg").iterdir()) == ["a1.png", "b7.png"]
    assert len(list((pictures / "ocr").iterdir())) == 2 and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--suite", "ocr,dpg", "--prompts", "x.txt"], "--prompts x.txt: of which of ocr, dpg?"),
        (["--suite", "ocr", "--prompts", "orc=x.txt"], "--prompts orc=x.txt: no such suite is evaluated; did you mean"),
        (["--suite", "ocr,ocr"], "--suite names ocr twice"),
        (["--suite", "dpg"], "benchmark dpg ships no prompts; get the whole from https://github.com/TencentQQGYLab"),
        (["--suite", "geneval,shapeworld", "--set", "rewards=[]"], "--set rewards: of which suite?"),
        (["--suite", "geneval,shapeworld", "--judge", "m"], "--judge m is no MODEL@URL"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(options, sentence, plain, capsys):
    assert main(["evaluate", str(plain), "--engine", "torch", "--set", f"policy.family={FAMILY}", *options]) == 2
    assert sentence in capsys.readouterr().err
