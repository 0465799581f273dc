"""A comparison groups runs into arms by their configs, and its intervals are those of runs and prompts."""

import json
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from stage_ray.cli import main
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import EvaluationResult, read_result, write_result
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.report.arms import difference, estimate
from stage_ray.report.charts import banded_chart, banded_figure
from stage_ray.study.small_copy import export_runs
from tests.fake_run import write_fake_run
from tests.pages import README, command_lines

ALIKE = {"steps": 60, "learner": {"lr": 1e-4}}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two seeds of GRPO and of STAGE, which reached a quarter more in every prompt."""
    found = []
    for recipe in ("grpo", "stage"):
        for seed in (20, 21):
            found.append(run_dir := tmp_path / f"{recipe}-{seed}")
            write_fake_run(run_dir)
            configure(run_dir, seed=seed, recipe=recipe, algorithm={"beta": 0.01 if recipe == "grpo" else 0.03})
            if recipe == "stage":
                raise_values(run_dir / "evaluation" / "after.json", 0.25)
    return found


def configure(run_dir: Path, **changes: object) -> None:
    (run_dir / "config.yaml").write_text(yaml.safe_dump(ALIKE | {"run_dir": str(run_dir)} | changes))


def raise_values(path: Path, by: float) -> None:
    data = json.loads(path.read_text())
    for metric in data["metrics"].values():
        metric["value"] += by
        metric["by_prompt"] = {prompt: value + by for prompt, value in metric["by_prompt"].items()}
    path.write_text(json.dumps(data))


def compared(runs: list[Path], tmp_path: Path) -> tuple[str, dict]:
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    assert main(["compare", *map(str, runs), "--page", str(page), "--json", str(numbers)]) == 0
    return page.read_text(encoding="utf-8"), json.loads(numbers.read_text())


def test_runs_that_differ_in_their_seed_are_one_arm_named_by_what_tells_it_apart(runs, tmp_path):
    page, numbers = compared(runs, tmp_path)
    assert numbers["arms"] == {"grpo": [*map(str, runs[:2])], "stage": [*map(str, runs[2:])]}
    assert "<h1>grpo · stage</h1>" in page and "seeds 20, 21" in page
    assert '<td class="text">algorithm.beta</td><td class="text">0.01</td><td class="text">0.03</td>' in page
    assert "learner.lr" not in page.partition("What was run")[2]  # alike in both
    assert page.count("<img ") == 3 * 2 * 2, "three steps, two arms, two seeds that both have"
    assert "After step 60, seed 21, same prompts" in page and numbers["seeds"]["stage"] == [20, 21]
    for title in ("KL to the reference", "entropy lost against the reference", "training reward"):
        assert f"<td>{title}" in page


def test_what_every_prompt_gained_is_the_difference_and_excludes_zero(runs, tmp_path):
    page, numbers = compared(runs, tmp_path)
    suite = numbers["suites"][""]
    found = suite["difference to grpo"]["GenEval"]["stage"]
    assert found["value"] == pytest.approx(0.25) and found["low"] == pytest.approx(0.25) == found["high"]
    before, after = (suite["metrics"]["GenEval"][arm] for arm in ("grpo", "stage"))
    assert after["value"] - before["value"] == pytest.approx(0.25)
    assert before["low"] < before["value"] < before["high"]
    assert '<td class="good">+0.250 [0.250, 0.250]</td>' in page


def test_every_number_of_the_page_is_in_its_json(runs, tmp_path):
    for run_dir in runs[2:]:
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        raised = [row | {"kl": row["kl"] + 0.5} for row in rows]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raised))
    page, numbers = compared(runs, tmp_path)
    (training,) = (found for name, found in numbers.items() if name.startswith("training"))
    found = training["KL to the reference, nats a token"]["difference to grpo"]["stage"]
    assert found == {"value": pytest.approx(0.5), "low": pytest.approx(0.5), "high": pytest.approx(0.5)}
    assert "<td>+0.500 [0.500, 0.500]</td>".replace("<td>", '<td class="">') in page
    images = numbers["suites"][""]["images"]
    assert images == {"grpo": 2 * 36 * 4, "stage": 2 * 36 * 4} and "<td>images</td><td>288</td>" in page
    assert numbers["configs"]["algorithm.beta"] == {"grpo": 0.01, "stage": 0.03}
    curve = numbers["curves"]["training reward"]["stage"]
    assert curve["step"] == [*range(1, 61)] and len(curve["mean"]) == len(curve["half"]) == 60
    assert set(numbers["curves"]) == set(re.findall(r"<figcaption>([^<]*)</figcaption><svg", page))


def test_exported_runs_are_small_and_say_the_same(runs, tmp_path):
    _, whole = compared(runs, tmp_path)
    small = [tmp_path / "small" / run_dir.name for run_dir in runs]
    export_runs(dict(zip(runs, small, strict=True)))
    _, numbers = compared(small, tmp_path)
    assert {**numbers, "arms": None} == {**whole, "arms": None}
    sizes = [sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) for run in (runs[0], small[0])]
    assert sizes[1] < min(sizes[0] / 5, 30_000)
    with pytest.raises(ConfigError, match="grpo-20 exists"):
        export_runs({runs[0]: small[0]})


def test_the_curves_are_one_picture_in_the_format_that_its_name_says(runs, tmp_path, capsys):
    command, drawn = ["compare", *map(str, runs), "--page", str(tmp_path / "page.html")], tmp_path / "new" / "curves"
    for suffix, head in ((".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")):
        assert main([*command, "--figure", f"{drawn}{suffix}"]) == 0
        assert Path(f"{drawn}{suffix}").read_bytes().startswith(head)
    titles = re.findall(r"<figcaption>([^<]*)</figcaption><svg", (tmp_path / "page.html").read_text())
    svg = Path(f"{drawn}.svg").read_text()
    assert len(titles) > 3 and all(f">{title}</text>" in svg for title in [*titles, "grpo", "stage"])
    assert len([*drawn.parent.iterdir()]) == 3
    chosen = ["--curve", titles[2], "--curve", titles[0]]
    assert main([*command, "--figure", f"{drawn}.svg", *chosen]) == 0
    places = [Path(f"{drawn}.svg").read_text().find(f">{title}</text>") for title in titles]
    assert -1 < places[2] < places[0] and places.count(-1) == len(titles) - 2
    capsys.readouterr()
    assert main([*command, *chosen]) == 2 and "give --figure FILE too" in capsys.readouterr().err
    assert main([*command, "--figure", f"{drawn}.svg", "--curve", titles[0][:-1]]) == 2
    assert f"title of no curve of these runs; did you mean '{titles[0]}'?" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--figure", f"{drawn}.jpgg"]) == 2
    assert "is in no format that can be written; end its name in one of " in " ".join(capsys.readouterr().err.split())


def evaluation(by_prompt: dict[int, float]) -> EvaluationResult:
    return EvaluationResult("b", "m", {"m": MetricValue(float(np.mean([*by_prompt.values()])), by_prompt=by_prompt)})


def test_an_interval_covers_the_mean_of_the_population_as_often_as_it_says():
    """Many small studies of runs and prompts with known spreads: about 95 % of the intervals hold the truth."""
    noise, held, studies = np.random.default_rng(0), 0, 150
    for _ in range(studies):
        prompts, seeds = noise.normal(0, 0.3, 60), noise.normal(0, 0.05, 8)
        runs = [evaluation(dict(enumerate(0.5 + prompts + seed + noise.normal(0, 0.1, 60)))) for seed in seeds]
        found = estimate(runs, "m")
        held += found.low <= 0.5 <= found.high
    assert 0.88 <= held / studies <= 1.0


def test_a_difference_between_like_runs_is_narrower_than_their_own_intervals():
    noise = np.random.default_rng(1)
    prompts = noise.normal(0.5, 0.3, 80)
    pairs = [
        tuple(evaluation(dict(enumerate(prompts + gain + noise.normal(0, 0.02, 80)))) for gain in (0, 0.05))
        for _ in range(3)
    ]
    own, paired = estimate([first for first, _ in pairs], "m"), difference(pairs, "m")
    assert paired.high - paired.low < (own.high - own.low) / 4
    assert paired.excludes_zero and paired.value == pytest.approx(0.05, abs=0.01)


def test_a_metric_that_is_no_mean_over_prompts_is_compared_over_the_same_draws():
    noise = np.random.default_rng(2)
    shared = noise.normal(0, 1.0, 100)  # what the prompts of a draw add to every run

    def measured(value: float, seed: int) -> EvaluationResult:
        draws = value + shared + np.random.default_rng(seed).normal(0, 0.05, 100)
        return EvaluationResult("b", "m", {"f": MetricValue(value, better="smaller", draws=tuple(draws))})

    pairs = [(measured(5.0 + 0.1 * seed, seed), measured(4.0 + 0.1 * seed, 10 + seed)) for seed in range(3)]
    own, paired = estimate([first for first, _ in pairs], "f"), difference(pairs, "f")
    assert own.value == pytest.approx(5.1) and paired.value == pytest.approx(-1.0)
    assert own.high - own.low > 3 and paired.high - paired.low < 0.3 and paired.excludes_zero
    without = EvaluationResult("b", "m", {"m": MetricValue(0.5)})
    assert difference([(without, pairs[0][0])], "f") is None and estimate([without], "f") is None


def test_less_is_good_where_less_is_better_and_neither_has_no_colour(runs, tmp_path):
    for run_dir in runs:
        path, low = run_dir / "evaluation" / "after.json", 1.0 if "stage" in run_dir.name else 2.0
        result = read_result(path)
        further = {
            name: MetricValue(low, 0.1, 4, {0: low, 1: low}, better=better)
            for name, better in (("moved", "smaller"), ("drift", "neither"), ("spread", "larger"))
        }
        write_result(path, result.with_metrics(further))
    page, numbers = compared(runs, tmp_path)
    for name, tone in (("moved", "good"), ("drift", ""), ("spread", "bad")):
        row = page.partition(f"<td>{name}</td>")[2].partition("</tr>")[0]
        assert f'<td class="{tone}">-1.000 [-1.000, -1.000]</td>' in row
    better = numbers["suites"][""]["better"]
    assert better["moved"] == "smaller" and better["GenEval"] == "larger" and "drift" not in better


def test_evaluations_made_otherwise_are_shown_and_not_subtracted(runs, tmp_path):
    path = runs[2] / "evaluation" / "after.json"
    result = read_result(path)
    write_result(
        path, EvaluationResult(result.benchmark, result.headline, result.metrics, conditions={"rollout.top_k": 5})
    )
    page, numbers = compared(runs, tmp_path)
    suite = numbers["suites"][""]
    assert "rollout.top_k" in suite["unlike"] and "cannot be compared" in page
    assert not any(suite["difference to grpo"].values()) and suite["metrics"]["GenEval"]["stage"]


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda runs: (runs[1] / "config.yaml").unlink(), 2, "grpo-21 holds no run"),
        (lambda runs: configure(runs[1], seed=20, recipe="grpo", algorithm={"beta": 0.01}), 2, "one seed (20)"),
        (lambda runs: (runs[0] / "evaluation" / "after.json").write_text("{"), 1, "after.json"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(runs, tmp_path, capsys, spoil, code, message):
    spoil(runs)
    assert main(["compare", *map(str, runs), "--page", str(tmp_path / "page.html")]) == code
    assert message in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_the_line_of_the_readme_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for recipe in ("grpo", "stage"):
        write_fake_run(tmp_path / "runs" / f"{recipe}_shapeworld")
        configure(tmp_path / "runs" / f"{recipe}_shapeworld", recipe=recipe)
    (line,) = [line for line in command_lines(README) if line.startswith("stage-ray compare ")]
    assert main(shlex.split(line)[1:]) == 0
    assert "<h1>grpo · stage</h1>" in Path("compare.html").read_text()


def test_a_single_run_that_was_never_evaluated_has_a_page(tmp_path):
    write_fake_run(tmp_path / "run", steps=3, examined=())
    page, numbers = compared([tmp_path / "run"], tmp_path)
    assert numbers["suites"] == {} and "<h1>all runs</h1>" in page


def test_a_curve_with_a_spike_is_drawn_on_a_logarithmic_scale():
    """One token's k3 can be thousands of times the usual KL, which would be a flat line beside it."""
    calm, spike = [(0.1, 0.01)] * 9, [(0.1, 0.01)] * 8 + [(100.0, 0.0)]
    assert set(labels(banded_chart(range(9), {"kl": spike}))) >= {"0.01", "0.1", "1", "10", "100"}
    assert "10" not in labels(banded_chart(range(9), {"kl": calm}))
    assert banded_chart(range(9), {"kl": [None] * 9}).startswith("<svg")


def test_long_names_of_arms_leave_the_curves_their_room(tmp_path):
    names = [f"stage, entropy_reward=0.4, reweight_advantage=True, reweight_kl={i}" for i in range(7)]
    curves = {name: [(0.1, 0.01)] * 3 for name in names}
    with warnings.catch_warnings(action="error"):  # matplotlib's, of axes that have shrunk to nothing
        svg = banded_chart(range(3), curves)
        banded_figure(tmp_path / "figure.svg", {"kl": (range(3), curves)})
    assert names[0] not in labels(banded_chart(range(3), {names[0]: curves[names[0]]})), "a curve alone needs no legend"
    assert set(names) <= {*labels(svg)} & {*labels((tmp_path / "figure.svg").read_text())}


def test_an_arm_is_not_named_by_what_it_lacks(tmp_path):
    runs = [tmp_path / name for name in ("with", "without", "grpo")]
    for run_dir, options in zip(runs, ({"entropy_reward": 0.4}, {"entropy_reward": 0.0}, {}), strict=True):
        write_fake_run(run_dir, steps=3)
        configure(run_dir, recipe="stage" if options else "grpo", algorithm=options)
    _, numbers = compared(runs, tmp_path)
    assert [*numbers["arms"]] == ["stage, entropy_reward=0.4", "stage, entropy_reward=0.0", "grpo"]


def labels(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)
