"""Every tracker gets the same numbers and pictures by the same names, also of a run that goes on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.errors import ConfigError, RunError
from stage_ray.observability.metrics_logger import read_steps
from stage_ray.observability.progress import Progress
from stage_ray.observability.trackers import check_trackers
from stage_ray.run.recording import StepRecorder
from tests.flaky import timed_run


def tracked_run(directory: Path, *trackers: str, **options: dict[str, Any]) -> RunConfig:
    data = timed_run(directory).model_dump(mode="json")
    data["logs"] |= {"trackers": list(trackers), "tracker_options": options}
    return validate_config(data)


def draw(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(path)
    return path


def record(run: RunConfig, *, resume_step: int = 0, to: int = 3) -> None:
    """The updates after ``resume_step``; a picture before the first one, and of the second one, after the third."""
    directory = Path(run.run_dir)
    with closing(StepRecorder(run, directory, 9, Progress(), resume_step=resume_step)) as recorder:
        if not resume_step:
            recorder.image("evaluation/before", 0, draw(directory / "evaluation" / "before.png"))
        for step in range(resume_step + 1, to + 1):
            metrics = {"kl": 0.01 * step, "grad_norm": float("nan"), "entropy/policy": 3.0, "entropy/reference": 3.0}
            recorder.step(step, metrics)
        recorder.image("samples", 2, draw(directory / "samples" / "step-000002.png"))


class OwnTracker:
    """A user's own: it remembers."""

    opened: list[OwnTracker] = []

    def __init__(self, run: Any, *, color: str = "red") -> None:
        self.run, self.color, self.closed = run, color, False
        self.told: list[tuple[Any, ...]] = []
        self.opened.append(self)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.told.append((step, dict(metrics)))

    def image(self, name: str, step: int, path: Path) -> None:
        self.told.append((name, step, path.name))

    def close(self) -> None:
        self.closed = True


class WandbRun:
    """What ``wandb.init`` gives."""

    offline, url = True, None

    def __init__(self, **settings: Any) -> None:
        self.settings, self.rows, self.finished = settings, list[dict[str, Any]](), False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.step_metric = (name, step_metric)

    def log(self, row: dict[str, Any]) -> None:
        assert not self.finished
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[WandbRun]:
    """A stand-in of the package wandb; the runs that it was asked for."""
    runs: list[WandbRun] = []

    def init(**settings: Any) -> WandbRun:
        runs.append(WandbRun(**settings))
        return runs[-1]

    module: Any = ModuleType("wandb")
    module.init, module.Settings, module.Error = init, dict, type("Error", (Exception,), {})
    module.Image = lambda path: Path(path).name
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


@pytest.fixture
def own() -> list[OwnTracker]:
    OwnTracker.opened.clear()
    return OwnTracker.opened


OWN = f"{__name__}.OwnTracker"


def test_a_tracker_of_the_users_own_gets_finite_numbers_pictures_config_and_its_options(tmp_path, own):
    record(tracked_run(tmp_path, OWN, **{OWN: {"color": "blue"}}), to=1)
    (tracker,) = own
    assert (tracker.color, tracker.closed, tracker.run.run_dir) == ("blue", True, tmp_path)
    assert tracker.run.config["steps"] == 9 and not tracker.run.history
    numbers = {"kl": 0.01, "entropy/policy": 3.0, "entropy/reference": 3.0, "alarms": 0}
    assert tracker.told == [
        ("evaluation/before", 0, "before.png"),
        (1, numbers),
        ("samples", 2, "step-000002.png"),
    ]
    assert not (tmp_path / "tensorboard").exists()


def test_a_run_that_goes_back_opens_its_trackers_anew_with_what_stays(tmp_path, own):
    run = tracked_run(tmp_path, OWN)
    record(run)
    with closing(StepRecorder(run, tmp_path, 9, Progress(), resume_step=3)) as recorder:
        recorder.step(4, {"kl": 0.5})
        recorder.rewind(2)
        recorder.step(3, {"kl": 0.25})
    _, resumed, back = own
    assert [step for step, _ in resumed.run.history] == [1, 2, 3] and resumed.closed
    assert [metrics["kl"] for _, metrics in back.run.history] == [0.01, 0.02] and back.told == [
        (3, {"kl": 0.25, "alarms": 0})
    ]
    assert [(name, step) for name, step, _ in back.run.pictures] == [("evaluation/before", 0), ("samples", 2)]


def test_tensorboard_shows_the_pictures_beside_the_numbers_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tracked_run(tmp_path, "tensorboard")
    record(run)
    record(run, resume_step=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("kl")] == [(1, 0.01), (2, 0.02), (3, 0.03)]
    assert {name: [event.step for event in events.Images(name)] for name in events.Tags()["images"]} == {
        "evaluation/before": [0],
        "samples": [2],
    }
    assert [(event.width, event.height) for event in events.Images("samples")] == [(6, 4)]


def test_wandb_gets_what_metrics_jsonl_holds_by_the_same_names(tmp_path, wandb_runs):
    run = tracked_run(tmp_path / "mine", "wandb", wandb={"project": "pictures", "mode": "offline"})
    Path(run.run_dir).mkdir()
    check_trackers(run.logs)
    record(run)
    record(run, resume_step=2)
    first, second = wandb_runs
    for one in wandb_runs:
        wanted = {"project": "pictures", "mode": "offline", "name": "mine", "group": "mine", "dir": run.run_dir}
        assert one.settings.items() >= wanted.items() and one.settings["config"]["steps"] == 9
        assert one.finished and one.step_metric == ("*", "step")
    numbers = [
        {name: 0 if name == "alarms" else value for name, value in row.items() if value is not None}
        for row in read_steps(Path(run.run_dir) / "metrics.jsonl")
    ]
    before, samples = {"step": 0, "evaluation/before": "before.png"}, {"step": 2, "samples": "step-000002.png"}
    assert first.rows == [before, *numbers, samples]
    assert second.rows == [*numbers[:2], before, samples, numbers[2], samples]


def test_wandb_itself_keeps_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tracked_run(tmp_path, "wandb")
    check_trackers(run.logs)
    record(run)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    data = kept.read_bytes()
    assert all(name in data for name in (b"entropy/policy", b"evaluation/before", b"samples"))


def test_wandb_that_is_not_installed_or_has_no_key_or_does_not_start_is_said_before_it_costs_time(
    tmp_path, wandb_runs, monkeypatch
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tracked_run(tmp_path, "wandb")
    with pytest.raises(ConfigError, match=r"set WANDB_API_KEY, or logs\.tracker_options\.wandb\.mode=offline$"):
        check_trackers(run.logs)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    check_trackers(run.logs)

    def refuse(**settings: Any) -> None:
        raise sys.modules["wandb"].Error("no such entity")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(RunError, match=r"did not start a run \(no such entity\); check WANDB_API_KEY"):
        record(run)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"not installed here; pip install 'stage-ray\[wandb\]'"):
        check_trackers(run.logs)


@pytest.mark.parametrize(
    ("trackers", "options", "said"),
    [
        (["tensorbord"], {}, "logs.trackers = 'tensorbord' is no known tracker; did you mean 'tensorboard'"),
        (["pathlib.Path"], {}, "logs.trackers = 'pathlib.Path' is not a class with the methods step, image and close"),
        (["tensorboard"], {"tensorboard": {"flush": 1}}, r"logs.tracker_options.tensorboard = .* 'flush'; allowed: no"),
        (["wandb"], {"wandb": {"projct": "a"}}, "unexpected keyword argument 'projct'; allowed: project, entity, name"),
        (["wandb"], {"wandb": {"project": 3}}, "wandb.project = 3 is no text; put it in quotes"),
        (["wandb"], {"wandb": {"mode": "of"}}, "wandb.mode = 'of': known are online, offline and disabled"),
        (["tensorboard", "tensorboard"], {}, "logs.trackers: 'tensorboard' stands there twice; remove one"),
        (["tensorboard"], {"wandb": {}}, r"logs.tracker_options.wandb: logs.trackers = \['tensorboard'\] has no such"),
    ],
)
def test_a_tracker_or_option_that_leads_nowhere_is_refused_by_its_name(tmp_path, wandb_runs, trackers, options, said):
    with pytest.raises(ConfigError, match=said):
        check_trackers(tracked_run(tmp_path, *trackers, **options).logs)


@pytest.mark.parametrize(
    "options", [{"api_key": "very"}, {"token": "very"}, {"name": "0123456789abcdef0123456789abcdef01234567"}]
)
def test_a_key_in_a_config_is_refused_and_not_repeated(tmp_path, options):
    with pytest.raises(ConfigError, match="looks like a key.*WANDB_API_KEY") as refused:
        tracked_run(tmp_path, "wandb", wandb=options)
    assert not any(value in str(refused.value) for value in options.values())
