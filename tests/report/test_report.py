"""A report is one file that tells the truth about whatever a run directory holds."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.base import write_result
from stage_ray.observability.metrics_logger import MetricsLogger
from stage_ray.report.report import changes, write_report
from tests.fake_run import PROMPTS, TASKS, result, scored, write_fake_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    write_fake_run(run_dir)
    return write_report(run_dir).read_text(encoding="utf-8")


class Links(HTMLParser):
    """Everything a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "xlink:href", "data"}]


def test_nothing_in_it_is_fetched_from_anywhere(finished: str) -> None:
    links = Links()
    links.feed(finished)
    assert links.found
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.found)
    assert not re.search(r"https?://|@import|<script|url\((?!#)", finished)


def test_it_shows_score_tasks_pictures_alarms_curves_and_config(finished: str) -> None:
    assert "Held-out GenEval 0." in finished and " → 0." in finished
    overview = finished.split("Before and after training")[1].split("</table>")[0]
    assert "training reward, first and last" in overview and "<td>held-out: GenEval</td>" in overview
    for metric in (*TASKS, "GenEval", "soft score"):
        assert f"<td>{metric.replace('_', ' ')}</td>" in finished
    assert finished.count("<img ") == 2 + 6
    assert finished.count("<svg") == 10
    assert "entropy_collapse" in finished and "<td>3</td><td>7</td><td>30</td>" in finished
    for text in ("Each scorer", "Seconds a step, by stage", "steps: 60", "torch"):
        assert text in finished


def test_it_shows_how_idle_each_role_was_and_what_of_the_gpus_the_model_used(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 2\n")
    recorder = MetricsLogger(tmp_path, port=None, host="127.0.0.1")
    recorder.step(1, {"busy/rollout": 0.9, "busy/reward": 0.25, "busy/learner": 1.01, "mfu/learner": 0.4})
    recorder.step(2, {"busy/rollout": 0.7, "busy/reward": 0.25, "busy/learner": 0.9, "mfu/learner": 0.5})
    recorder.close()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>(\w+)</td><td>([^<]*)</td><td>([^<]*)</td></tr>", text)
    assert rows[:3] == [("rollout", "20%", "not known"), ("reward", "75%", "not known"), ("learner", "5%", "45%")]
    captions = re.findall(r"<figcaption>([^<]*)</figcaption><svg", text)
    assert captions == ["Idle share of each role", "Model FLOPs utilisation while working"]


def test_only_changes_of_which_more_is_better_are_coloured(finished: str) -> None:
    tones = dict(re.findall(r'<td>([^<]+)</td>(?:<td>[^<]*</td>){3}<td class="(\w*)">[+-]', finished))
    assert tones["GenEval"] == "good" and tones["soft score"] == ""


def test_what_models_and_people_wrote_is_escaped(finished: str) -> None:
    assert "&lt;raise&gt; beta" in finished
    assert "<raise>" not in finished


@pytest.mark.parametrize(
    ("steps", "examined", "state", "headline"),
    [
        (23, ("before",), "23 of 60 steps so far", "before training"),
        (60, ("before",), "60 steps, not evaluated afterwards", "before training"),
        (0, (), "0 of 60 steps so far", "No held-out evaluation"),
        (1, (), "1 of 60 steps so far", "No held-out evaluation"),
    ],
)
def test_a_run_that_stopped_early_still_has_a_report(
    steps: int, examined: tuple[str, ...], state: str, headline: str, tmp_path: Path
) -> None:
    write_fake_run(tmp_path / "run", steps=steps, examined=examined)
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert state in text and headline in text
    assert ("No step was recorded" in text) == (steps == 0)


def test_it_is_written_with_nothing_but_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 5\n")
    assert "0 of 5 steps so far" in write_report(tmp_path).read_text()


def test_a_directory_without_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    write_fake_run(tmp_path / "run", steps=1)
    (tmp_path / "run" / "evaluation" / "after.json").write_text('{"overall"')
    with pytest.raises(RunError, match=r"after\.json is not readable JSON"):
        write_report(tmp_path / "run")


def test_a_change_is_judged_prompt_by_prompt() -> None:
    import numpy as np

    noise = np.random.default_rng(1)
    groups = [scored(i, prompt, 0.5, noise) for i, prompt in enumerate(PROMPTS)]
    same = result(groups)
    found = changes(same, same)
    assert {task: found[task].value for task in TASKS} == dict.fromkeys(TASKS, 0.0)
    overall, before = found["GenEval"], same.metrics["GenEval"]
    assert overall.error == 0.0, "equal evaluations differ by nothing, for certain"
    assert before.error is not None and before.error > 0.0


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"conditions": {"evaluation.seed": 21}}, "evaluation.seed was 20 and is 21."),
        ({"conditions": {"evaluation.seed": 20, "rewards": []}}, "rewards was None and is []."),
        ({"conditions": {"evaluation.seed": 20, "rewards": 50 * ["long"]}}, "rewards was another."),
        ({"conditions": {}}, "an earlier version wrote one of them, and not what it was made with."),
    ],
)
def test_evaluations_that_were_made_otherwise_are_shown_but_not_compared(after, said, tmp_path: Path) -> None:
    write_fake_run(tmp_path / "run", steps=0, **after)
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert f"Before and after cannot be compared: {said}" in text
    title = re.search(r"<h1>(.*)</h1>", text)
    assert title and re.fullmatch(r"Held-out GenEval 0.\d+ before training, GenEval 0.\d+ after it", title[1])
    rows = re.findall(r"<td>([^<]+)</td><td>144</td><td>[^<]+</td><td>[^<]+</td><td class=\"\"></td></tr>", text)
    assert rows == ["GenEval", "soft score"]
    assert "→" not in title[1] and "change of held-out" not in text and "same prompts and seeds" not in text


def test_each_suite_has_its_metrics_and_its_curve_and_the_best_step_is_named(tmp_path: Path) -> None:
    tmp_path = tmp_path / "run"
    write_fake_run(tmp_path, examined=())
    noise = np.random.default_rng(1)
    for name, step in (("before", 0), ("step-000030", 30), ("after", 60)):
        found = result([scored(i, prompt, 0.4, noise) for i, prompt in enumerate(PROMPTS)])
        write_result(tmp_path / "evaluation" / "rings" / f"{name}.json", found, policy_version=step)
    (tmp_path / "best.json").write_text('{"suite": "rings", "step": 30, "headline": "GenEval", "value": 0.41}')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Suite rings, every metric" in page and "rings: GenEval, ± one standard error" in page
    assert "<b>step 30</b><span>best GenEval of suite rings, 0.410" in page and page.count("<svg") == 11


def test_an_evaluation_of_another_benchmark_or_with_none_before_has_its_own_rows(tmp_path: Path) -> None:
    beauty = {"headline": "beauty", "metrics": {"beauty": {"value": 0.25, "images": 288}}, "conditions": {"a": 1}}
    for name, examined in (("both", ("before", "after")), ("one", ("after",))):
        write_fake_run(tmp_path / name, steps=0, examined=examined, **beauty)
        text = write_report(tmp_path / name).read_text(encoding="utf-8")
        assert "<td>beauty</td><td>288</td><td></td><td>0.250</td>" in text
        assert (", beauty 0.250 after it</h1>" if name == "both" else "<h1>Held-out beauty 0.250 after it</h1>") in text
        assert ("<td>GenEval</td>" in text) is (name == "both")
