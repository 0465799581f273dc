"""`stage-ray score`: pictures in every layout, what scorers say, how far that agrees with a column of a user's."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from stage_ray.cli import main
from stage_ray.evaluation.agreement import cohens_kappa, correlation, fitted_agreement, inside_prompts
from stage_ray.shapeworld.scene import Scene, Shape, render
from tests.pages import README, command_lines
from tests.rewards.test_ocr import page as text_page

DETECTOR = "rewards.0.options={detector: stage_ray.shapeworld.detector.ShapeDetector}"
RING = {"tag": "single_object", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"}
RED = {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "a photo of a red ring"}
JUDGE = ("--scorer", "geneval", "--set", DETECTOR)
DARK = ("--scorer", "tests.scorers.Brightness")


def drawn(kind: str, color: str, seed: int = 0) -> np.ndarray:
    return render(Scene((Shape(kind, color, cx=32.0, cy=32.0, size=30.0),), seed=seed))


# Picture, its prompt, GenEval's verdict on it, and what a person says.
PICTURES = [
    (drawn("ring", "blue"), RING, True, "yes"),
    (drawn("ring", "pink"), RING, True, "yes"),
    (drawn("circle", "blue"), RING, False, "yes"),
    (drawn("square", "red"), RING, False, "no"),
    (drawn("ring", "red"), RED, True, "yes"),
    (drawn("ring", "green"), RED, False, "no"),
    (drawn("ring", "blue", 1), RED, False, "no"),
    (drawn("cross", "red"), RED, False, ""),
]


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


@pytest.fixture
def rings(tmp_path: Path) -> Path:
    """The pictures in a directory, and ``prompts.jsonl`` that names them."""
    lines = []
    for number, (image, record, verdict, person) in enumerate(PICTURES):
        name = f"deep/{number}.{('png', 'jpg', 'webp')[number % 3]}"
        save(tmp_path / "rings" / name, image)
        lines.append({"file": name, **record, "correct": verdict, "person": person, "liked": 7 - number})
    (tmp_path / "rings" / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "rings"


def score(directory: Path, *options: str) -> tuple[int, dict]:
    out = directory.parent / "out"
    files = ("--page", str(out / "page.html"), "--json", str(out / "all.json"), "--csv", str(out / "all.csv"))
    code = main(["score", str(directory), *files, *options])
    return code, json.loads((out / "all.json").read_text()) if (out / "all.json").exists() else {}


def test_verdicts_of_pictures_are_summed_up_by_task_and_agree_with_a_column_as_reckoned_by_hand(rings, capsys):
    code, result = score(rings, *JUDGE, *DARK, "--column", "person")
    assert code == 0
    geneval, brightness = result["scorers"]
    assert (geneval["asked"], geneval["valid"], geneval["right"]) == (8, 8, 3 / 8)
    assert geneval["tasks"].keys() == {"single_object", "colors"} and brightness["right"] is None
    # Seven labels: 3 said yes by both, 3 no by both, 1 missed. Chance: (3 * 4 + 4 * 3) / 49.
    verdicts = geneval["verdicts"]
    assert (verdicts["count"], verdicts["missed"], verdicts["wrong"], verdicts["threshold"]) == (7, 1, 0, None)
    assert verdicts["share"] == 6 / 7 and verdicts["kappa"] == pytest.approx((6 / 7 - 24 / 49) / (1 - 24 / 49))
    assert brightness["verdicts"] is None and brightness["fitted"]["threshold"] is not None
    printed = capsys.readouterr().out
    assert "geneval verdict" in printed and "(fitted)" in printed and re.search(r"colors +0\.", printed)
    with (rings.parent / "out" / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["1.0", "1.0", "1.0", "0.0", "1.0", "0.0", "0.0", ""]
    assert rows[0]["file"].endswith("deep/0.png") and 0 < float(rows[0]["Brightness"]) < 1
    page = (rings.parent / "out" / "page.html").read_text()
    assert "geneval against person" in page and page.count("<img") > 8 and "http" not in page.replace("http-equiv", "")


def test_official_verdicts_are_read_with_the_records_that_they_were_made_from(tmp_path, capsys):
    lines = []
    for number, (image, record, verdict, _) in enumerate(PICTURES):
        name = f"outputs/{number:05d}/samples/0000.png"
        save(tmp_path / name, image)
        metadata = {"metadata": json.dumps(record), "prompt": record["prompt"], "tag": record["tag"]}
        lines.append({"filename": f"/elsewhere/{name}", **metadata, "correct": verdict})
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    official = ("--prompts", str(tmp_path / "results.jsonl"), "--column", "correct")
    code, result = score(tmp_path / "outputs", *JUDGE, *official)
    assert code == 0 and (result["scorers"][0]["verdicts"]["share"], result["scorers"][0]["verdicts"]["kappa"]) == (
        1,
        1,
    )


def test_pictures_are_found_by_number_and_in_genevals_layout_and_by_one_prompt(tmp_path, capsys):
    for number, (image, record, _, _) in enumerate(PICTURES[3:5]):
        save(tmp_path / "official" / f"{number:05d}" / "samples" / "00000.png", image)
        (tmp_path / "official" / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(record))
        save(tmp_path / "drawn" / f"{number:04d}-0.png", image)
    save(tmp_path / "drawn" / "sheet.png", PICTURES[0][0])
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(record) for _, record, _, _ in PICTURES[3:5]))
    answers = [
        score(tmp_path / "official", *JUDGE),
        score(tmp_path / "drawn", *JUDGE, "--prompts", str(tmp_path / "prompts.jsonl")),
    ]
    for code, result in answers:
        assert code == 0 and [image["details"]["geneval"]["verdict"] for image in result["images"]] == [False, True]
    code, result = score(tmp_path / "drawn", *DARK, "--prompt", "anything")
    assert code == 0 and {image["prompt"] for image in result["images"]} == {"anything"}
    capsys.readouterr()
    assert score(tmp_path / "drawn", *DARK)[0] == 2
    assert "2 of 2 pictures of" in (said := capsys.readouterr().err) and "--prompts FILE or --prompt TEXT" in said


def test_text_is_read_and_a_win_rate_compares_the_pictures_of_one_prompt(tmp_path, capsys):
    prompts = []
    for number, line in enumerate(["OPEN", "OVEN", ""]):
        save(tmp_path / "signs" / f"{number}.png", text_page(line))
        prompts.append(f'{number}.png,"a sign that says ""Open"""')
    (tmp_path / "signs" / "prompts.csv").write_text("image,prompt\n" + "\n".join(prompts))
    wins = "rewards=[{type: ocr}, {type: win_rate, options: {scorer: ocr}}]"
    code, result = score(tmp_path / "signs", "--set", wins)
    assert code == 0
    assert [image["scores"] for image in result["images"]] == [
        {"ocr": 1.0, "win_rate": 1.0},
        {"ocr": 0.75, "win_rate": 0.5},
        {"ocr": 0.0, "win_rate": 0.0},
    ]
    (pair,) = result["correlations"]
    assert pair["overall"]["spearman"] == pair["inside"]["spearman"] == 1.0 and pair["overall"]["count"] == 3


def test_the_line_of_the_readme_scores_what_generate_has_drawn(tmp_path, monkeypatch, capsys):
    for number, (image, *_) in enumerate(PICTURES[:3]):
        save(tmp_path / "pictures" / f"0000-{number}.png", image)
    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in command_lines(README) if line.startswith("stage-ray score ")]
    assert main(shlex.split(line)[1:]) == 0
    assert re.search(r"clip +3 +1\.000", capsys.readouterr().out) and "Best by clip" in Path("scores.html").read_text()


def test_what_fails_is_named_and_never_a_number(rings, capsys):
    (rings / "deep" / "1.jpg").write_bytes(b"no picture")
    code, result = score(rings, "--scorer", "tests.scorers.CannotJudge", *DARK, "--set", "rewards.0.options.word=red")
    said = capsys.readouterr()
    assert code == 0 and "1.jpg: cannot be read" in said.err and "1 of 8 pictures cannot be read" in said.err
    assert "CannotJudge: 4 of 7 scores failed" in said.err and "the score is nan" in said.err
    summary = result["scorers"][0]
    known = [image["scores"]["CannotJudge"] for image in result["images"] if image["prompt"] == RING["prompt"]]
    assert (summary["asked"], summary["valid"]) == (7, 3) and known[1] is None
    assert summary["mean"] == pytest.approx(np.mean([score for score in known if score is not None]))
    code, result = score(rings, *DARK, "--scorer", "tests.scorers.Raises")
    assert code == 1 and "no picture has a score of Raises" in capsys.readouterr().err
    assert result["scorers"][1]["mean"] is None and result["correlations"][0]["overall"]["count"] == 0


def test_batches_hold_pictures_of_every_size_and_each_is_judged_by_its_own_line(tmp_path, capsys):
    lines = []
    for number in range(70):
        save(tmp_path / "many" / f"{number}.png", np.full((16, 16 + number % 3, 3), 3 * number, np.uint8))
        lines.append({"file": f"{number}.png", "prompt": "grey", "level": "high" if number > 34 else "low"})
    (tmp_path / "many" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, result = score(tmp_path / "many", *DARK, "--set", "rewards.0.when={level: high}", "--column", "level")
    assert code == 2 and "'low' is neither a number" in capsys.readouterr().err
    code, result = score(tmp_path / "many", *DARK, "--set", "rewards.0.when={level: high}")
    found = [image["scores"]["Brightness"] for image in result["images"]]
    assert code == 0 and found[:35] == [None] * 35
    assert found[35:] == pytest.approx([3 * number / 255 for number in range(35, 70)])


def test_a_config_names_the_scorers_and_their_routes(rings, capsys):
    rewards = "rewards=[{type: tests.scorers.Brightness, when: {tag: colors}}]"
    code, result = score(rings, "--config", "stage_shapeworld", "--set", rewards)
    assert code == 0 and result["scorers"][0]["asked"] == result["scorers"][0]["valid"] == 4
    assert "no scorer is asked about it" in capsys.readouterr().err


def test_numbers_are_correlated(rings, capsys):
    code, result = score(rings, *DARK, "--column", "liked")
    found = result["scorers"][0]["labels"]
    values = [image["scores"]["Brightness"] for image in result["images"]]
    assert code == 0 and found["count"] == 8
    assert found["spearman"] == pytest.approx(stats.spearmanr(values, range(7, -1, -1)).statistic, abs=1e-6)
    assert "with liked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "no scorer is named; give --scorer NAME"),
        (["--scorer", "clop"], "did you mean 'clip'?"),
        (["--scorer", "clip", "--config", "stage_shapeworld"], "both name scorers"),
        (["--scorer", "clip", "--set", "rewards.0.options.path=./nowhere"], "./nowhere does not exist"),
        ([*DARK, "--column", "persn"], "--column 'persn' has no value in any line; did you mean 'person'?"),
        ([*DARK, "--column", "prompt"], "'a photo of a ring' is neither a number nor one of"),
        ([*DARK, "--prompt", "a", "--prompts", "b"], "give one of them"),
        ([*DARK, "--json", "/dev/null/x"], "--json"),
    ],
)
def test_wrong_usage_is_one_sentence_before_anything_is_scored(rings, capsys, monkeypatch, options, sentence):
    monkeypatch.chdir(rings)
    assert main(["score", str(rings), *options]) == 2
    assert sentence in capsys.readouterr().err and not (rings / "scores.html").exists()


def test_a_directory_without_pictures_and_a_line_without_its_picture_are_refused(tmp_path, rings, capsys):
    (tmp_path / "empty").mkdir()
    assert score(tmp_path / "empty", *DARK)[0] == 2 and score(tmp_path / "none", *DARK)[0] == 2
    assert "holds no pictures" in (said := capsys.readouterr().err) and "is no directory of pictures" in said
    (rings / "deep" / "3.png").unlink()
    assert score(rings, *DARK)[0] == 2
    assert "prompts.jsonl, line 4: file = 'deep/3.png' is no file below" in capsys.readouterr().err


def test_kappa_is_chance_corrected_and_undefined_without_two_answers():
    yes, no = np.array([True, True, True, False]), np.array([False, True, True, True])
    assert cohens_kappa(yes, no) == pytest.approx((0.5 - 0.625) / (1 - 0.625))
    assert cohens_kappa(yes, yes) == 1 and cohens_kappa(np.ones(3, bool), np.ones(3, bool)) is None
    assert cohens_kappa(np.zeros(0, bool), np.zeros(0, bool)) is None


def test_the_fitted_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.integers(0, 6, 30) / 5, rng.random(30) < 0.4
        found = fitted_agreement(scores, labels)
        middles = (np.unique(scores)[1:] + np.unique(scores)[:-1]) / 2
        assert found is not None and found.kappa == pytest.approx(
            max(cohens_kappa(scores > t, labels) for t in middles)
        )
    assert fitted_agreement(np.ones(4), np.array([True, False, True, False])) is None
    assert fitted_agreement(np.ones(0), np.ones(0, bool)) is None


def test_correlation_inside_prompts_does_not_see_that_prompts_differ():
    easy, hard = np.array([0.0, 1.0, 2.0]), np.array([10.0, 11.0, 12.0])
    first, second = np.concatenate([easy, hard]), np.concatenate([easy[::-1], hard[::-1]])
    prompts = np.array([0, 0, 0, 1, 1, 1])
    assert (correlation(first, second).pearson or 0) > 0.9
    assert inside_prompts(first, second, prompts).pearson == -1
    assert inside_prompts(first, second, np.arange(6)).count == 0
    assert correlation(first, np.ones(6)).pearson is None
