"""A real run with measures: they stand beside the headline, in the metrics, the report and the comparison."""

from __future__ import annotations

import json

import pytest

from stage_ray.evaluation.base import read_result
from stage_ray.report.compare import write_comparison
from stage_ray.train import train
from tests.rewards.checkpoints import save_dino
from tests.runs import lines, tiny_run

MEASURES = [
    "Frechet distance", "precision", "recall", "diversity", "light", "KL to the reference", "KL on reference images",
    "entropy drift", "guided KL to the reference", "guided KL on reference images", "guided entropy drift",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_a_run_measures_its_pictures_and_how_far_the_policy_has_moved(tmp_path, plain):
    dino = {"path": str(save_dino(tmp_path / "dino")), "reference": "tests.evaluation.test_measures.grey"}
    measures = [
        {"measure": "features", "options": dino},
        {"measure": "mean", "scorer": "tests.scorers.Brightness", "name": "light"},
        "drift",
    ]
    benchmark = "tests.run.test_suites.LightBenchmark"
    evaluation = {"benchmark": benchmark, "measures": measures, "every": 2}
    summary = train(tiny_run(tmp_path, plain, evaluation=evaluation, learner={"lr": 1e-3}))
    results = summary.run_dir / "evaluation"
    before, after = (read_result(results / f"{name}.json") for name in ("before", "after"))
    assert before is not None and after is not None
    assert list(before.metrics) == list(after.metrics) == ["mean light", *MEASURES]
    assert all(it.error is not None for it in after.metrics.values())
    for name in MEASURES[5:]:
        assert before.metrics[name].value == 0, "the policy is its reference before the first update"
        assert after.metrics[name].value != 0 and after.metrics[name].images == 2 * 4
    assert after.metrics["light"].by_prompt == pytest.approx(after.metrics["mean light"].by_prompt)
    assert set(after.scores) == {"Brightness"}, "scorers of measures are none of the benchmark's"
    row = lines(summary.run_dir / "metrics.jsonl")[1]
    middle = read_result(results / "step-000002.json")
    assert middle is not None
    for name in MEASURES:
        assert row[f"eval/light/{name}"] == middle.metrics[name].value
    page = summary.report.read_text()
    assert all(f"<td>{name}</td>" in page for name in MEASURES)
    assert page.count("± one standard error</figcaption>") == 1 + len(MEASURES)
    write_comparison([summary.run_dir], tmp_path / "page.html", tmp_path / "numbers.json")
    found = json.loads((tmp_path / "numbers.json").read_text())["suites"][""]["metrics"]
    assert found["Frechet distance"]["all runs"]["low"] < found["Frechet distance"]["all runs"]["high"]
    assert "Held-out: KL to the reference" in (tmp_path / "page.html").read_text()
