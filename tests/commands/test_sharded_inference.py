"""`evaluate` and `generate` over several workers are as in one process, and go on where a signal stopped them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from stage_ray.cli import main
from stage_ray.cluster import cluster as clusters
from stage_ray.config import RewardConfig, RunConfig
from stage_ray.engines import build_engine
from stage_ray.evaluation import Benchmark
from stage_ray.evaluation.loop import EngineBackend
from stage_ray.records import RolloutGroup
from stage_ray.rewards import build_rewards, score_groups
from tests.actors.local_actor import Roles, local_actors  # noqa: F401
from tests.plain import FAMILY, plain_checkpoint
from tests.runs import PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "policy.family": FAMILY,
    "rewards": "[{type: tests.scorers.Bright}]",
    "rollout.images_per_batch": "2",
    "rollout.dtype": "float32",
}


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """These tests too may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A prompt a batch."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture
def call(plain: Path, prompts: Path, tmp_path: Path) -> Callable[..., int]:
    """Call one of the commands, which writes to a name in the test's directory; its exit code."""

    def call(command: str, name: str, *more: str, model: Path = plain) -> int:
        where = {"evaluate": ["--json", "--images-per-prompt"], "generate": ["--out", "--images"]}[command]
        options = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
        words = [command, str(model), "--prompts", str(prompts), "--engine", "torch", where[0], str(tmp_path / name)]
        return main([*words, where[1], "2", *options, *more])

    return call


def content(path: Path) -> dict[str, bytes]:
    """Every file of a result, by its name."""
    return {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}


def same(one: Path, other: Path) -> bool:
    return list(content(one).values()) == list(content(other).values()) and len(content(one)) > 0


class Drawn:
    """Which prompts were drawn, in this process or by whatever worker; may send this process a signal after some."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.stop: tuple[int, int] | None = None  # after how many prompts, which signal

    def note(self, requests: Any) -> None:
        if self.stop is not None and len(self.prompts) == self.stop[0]:
            os.kill(os.getpid(), self.stop[1])
        self.prompts += [request.prompt.text for request in requests]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    drawn, judge = Drawn(), EngineBackend.judge

    async def judge_and_note(self: EngineBackend, requests: Any, **wanted: bool) -> Any:
        drawn.note(requests)
        return await judge(self, requests, **wanted)

    monkeypatch.setattr(EngineBackend, "judge", judge_and_note)
    return drawn


class Draws:
    """A rollout worker; the first one dies over its first batch."""

    def __init__(self, workers: Workers, name: str) -> None:
        self._workers, self._name = workers, name

    async def setup(self) -> None:
        run = self._workers.run
        self._engine = build_engine(run.policy, run.rollout, worker=self._name)

    async def generate(self, *requests: Any) -> tuple[Any, ...]:
        if self._name == "rollout-0":
            self._workers.actors[self._name].kill()
            await asyncio.sleep(60)
        self._workers.drawn.note(requests)
        self._workers.busy.add(self._name)
        await asyncio.sleep(0)  # here the driver sees a signal
        groups = self._engine.generate(requests, pictures=False)
        return (0, 0.0, None, *[""] * len(groups)), *groups

    async def show(self, tokens: np.ndarray, shown: float) -> np.ndarray:
        return self._engine.decode(torch.from_numpy(tokens).long(), shown).numpy()

    async def decode(self, *groups: RolloutGroup) -> tuple[Any, ...]:
        return None, *(self._engine.decode(torch.from_numpy(group.tokens).long()).numpy() for group in groups)


class Scores:
    """A reward worker."""

    def __init__(self, workers: Workers, name: str) -> None:
        workers.busy.add(name)
        self._run = workers.run

    async def setup(self) -> None:
        suites = {str(suite.name): suite.rewards or [] for suite in self._run.evaluation.suites}
        scorers = {None: self._run.rewards, **suites}
        self._scorers = {name: build_rewards(rewards) for name, rewards in scorers.items()}

    async def score(self, *objects: Any, suite: str | None = None) -> tuple[Any, ...]:
        groups = [replace(group, images=images) for group, images in zip(objects[::2], objects[1::2], strict=True)]
        return (("", False),) * len(groups), *score_groups(self._scorers[suite], groups)


class Workers(Roles):
    """The actors of a cluster: real engines and scorers in this process."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__(lambda name: (Draws if name.startswith("rollout") else Scores)(self, name))
        self.drawn, self.busy = drawn, set[str]()

    def __call__(self, run: RunConfig, logs: Path | None) -> Workers:
        """In place of `stage_ray.cluster.placement.Actors`."""
        self.run = run
        return self


@pytest.fixture
def workers(local_actors: None, drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:  # noqa: F811
    workers = Workers(drawn)
    monkeypatch.setattr(clusters, "start_ray", lambda run, run_dir, weights: True)
    monkeypatch.setattr(clusters, "Actors", workers)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    yield workers


SEARCH = ("--set", "rollout.search=best_of", "--set", "rollout.search_options.candidates=3")
LOOKS = (
    "rollout.search_options={candidates: 3, potential: {type: tests.scorers.Brightness}, looks: [0.5], enough: 0.53}"
)


@pytest.mark.parametrize("search", [(), SEARCH, ("--set", "rollout.search=parm", "--set", LOOKS)])
@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_workers_that_share_the_prompts_make_what_one_process_makes(call, drawn, workers, tmp_path, command, search):
    assert call(command, "alone", "--set", "rollout.images_per_batch=64", *search) == 0 and not workers.busy
    drawn.prompts.clear()
    assert call(command, "shared", "--workers", "2", *search) == 0
    assert sorted(drawn.prompts) == sorted(PROMPTS) and same(tmp_path / "alone", tmp_path / "shared")
    used = {"rollout-0-restart-1", "rollout-1"} | ({"reward-0"} if command == "evaluate" or search else set())
    assert workers.busy <= used and "rollout-1" in workers.busy
    assert ("reward-0" in workers.busy) is ("reward-0" in used)


class LightBenchmark(Benchmark):
    """One suite."""

    name, headline, images_per_prompt, rewards = "light", "all", 2, (RewardConfig(type="tests.scorers.Brightness"),)


class SameBenchmark(LightBenchmark):
    """Another, with another scorer."""

    name, rewards = "same", (RewardConfig(type="tests.scorers.Constant"),)


def test_suites_share_the_workers_and_each_has_its_own_scorers(plain, prompts, drawn, workers, tmp_path):
    suites = ",".join(f"tests.commands.test_sharded_inference.{name}Benchmark" for name in ("Light", "Same"))
    words = ["evaluate", str(plain), "--suite", suites, "--engine", "torch", "--set", f"policy.family={FAMILY}"]
    words += [word for name in ("light", "same") for word in ("--prompts", f"{name}={prompts}")]
    words += ["--set", "rollout.dtype=float32", "--against", str(plain_checkpoint(tmp_path / "other", seed=1))]
    assert main([*words, "--json", str(tmp_path / "alone")]) == 0 and not workers.busy
    assert main([*words, "--json", str(tmp_path / "shared"), "--workers", "2"]) == 0
    assert workers.busy >= {"rollout-1", "reward-0"} and same(tmp_path / "alone", tmp_path / "shared")
    found = json.loads((tmp_path / "shared").read_text())["suites"]
    assert list(found["light"]["result"]["scores"]) == ["Brightness"] and found["same"]["result"]["scores"] == {
        "Constant": 1.0
    }


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
CASES = [("evaluate", number, ()) for number in SIGNALS] + [("generate", signal.SIGTERM, ())]
CASES += [(command, signal.SIGTERM, ("--workers", "2")) for command in ("evaluate", "generate")]


@pytest.mark.parametrize(("command", "number", "more"), CASES)
def test_after_a_signal_the_same_command_goes_on(call, drawn, workers, tmp_path, capsys, command, number, more):
    before = signal.getsignal(number)
    assert call(command, "whole") == 0
    drawn.prompts.clear()
    drawn.stop = (2, number)
    assert call(command, "part", *more) == 128 + number
    error = capsys.readouterr().err
    assert error == f"stage-ray: stopped by {number.name}; go on with the same command\n"
    assert signal.getsignal(number) == before
    assert (command == "generate") or not (tmp_path / "part").exists(), "no result is written that is not whole"
    drawn.stop = None
    drawn.prompts.clear()
    assert call(command, "part") == 0  # in this process, wherever it was begun
    assert more or drawn.prompts == PROMPTS[2:]  # workers were at others too
    assert same(tmp_path / "whole", tmp_path / "part") and not (tmp_path / "part.partial").exists()


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_search_goes_on_after_the_prompts_whose_images_it_has_kept(call, drawn, tmp_path, capsys, command):
    assert call(command, "whole", *SEARCH) == 0
    drawn.prompts.clear()
    drawn.stop = (2, signal.SIGTERM)
    assert call(command, "part", *SEARCH) == 128 + signal.SIGTERM
    drawn.stop = None
    drawn.prompts.clear()
    capsys.readouterr()
    assert call(command, "part") == 2 and "rollout.search" in capsys.readouterr().err
    assert call(command, "part", *SEARCH) == 0 and drawn.prompts == PROMPTS[2:]
    assert same(tmp_path / "whole", tmp_path / "part")


@pytest.fixture
def half(call: Callable[..., int], drawn: Drawn, tmp_path: Path) -> list[tuple[str, str, Path]]:
    """Command, name and progress of results of which two prompts are there."""
    files = [("evaluate", "half.json", tmp_path / "half.json.partial"), ("generate", "half", tmp_path / "half")]
    for command, name, _ in files:
        drawn.prompts.clear()
        drawn.stop = (2, signal.SIGTERM)
        assert call(command, name) == 128 + signal.SIGTERM
    drawn.stop = None
    drawn.prompts.clear()
    return files


CHANGES = {
    "--seed": ["--seed", "21"],
    "rollout.guidance_scale": ["--guidance", "4"],
    "rollout.top_k": ["--set", "rollout.top_k=3"],
    "policy.path was 'files of xxh3": [],
    "prompts was '4 of xxh3": [],
}


@pytest.mark.parametrize("key", CHANGES)
def test_other_inputs_are_refused_by_their_name(call, half, drawn, plain, prompts, tmp_path, capsys, key):
    model = plain_checkpoint(tmp_path / "other", seed=1) if key.startswith("policy.path") else plain
    if key.startswith("prompts"):
        prompts.write_text("\n".join(PROMPTS[::-1]))
    for command, name, kept in half:
        before = content(kept)
        capsys.readouterr()
        assert call(command, name, *CHANGES[key], model=model) == 2
        error = capsys.readouterr().err
        assert f"holds a part of another evaluation: {key}" in error and "use the same value to go on" in error
        assert content(kept) == before and not drawn.prompts


def test_scorers_and_numbers_of_images_are_inputs_too_and_speed_and_place_are_none(call, half, plain, tmp_path, capsys):
    assert call("evaluate", "half.json", "--set", "rewards=[{type: tests.scorers.Brightness}]") == 2
    assert call("evaluate", "half.json", "--images-per-prompt", "3") == call("generate", "half", "--images", "3") == 2
    error = capsys.readouterr().err
    assert all(f": {key} was " in error for key in ("rewards", "--images-per-prompt", "--images"))
    moved = shutil.copytree(plain, tmp_path / "plain")
    for command, name, _ in half:
        assert call(command, name, "--set", "rollout.images_per_batch=8", "--set", "rollout.cpus=1", model=moved) == 0


def test_a_line_that_was_cut_short_does_not_count_nor_do_pictures_that_are_gone(call, half, drawn, tmp_path, capsys):
    (evaluate, json_name, lines), (generate, name, out) = half
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-20])
    assert call(evaluate, json_name) == 0 and drawn.prompts == PROMPTS[1:]
    drawn.prompts.clear()
    (out / "0000-1.png").unlink()
    assert call(generate, name) == 0 and drawn.prompts == [PROMPTS[0], *PROMPTS[2:]]
    for damage in (b"{}\n", whole + b"\n[]\n"):
        lines.write_bytes(damage)
        assert call(evaluate, json_name) == 1
        assert "half.json.partial is damaged" in capsys.readouterr().err


def test_a_score_that_failed_is_asked_for_again(call, drawn, tmp_path):
    rewards = (
        "--set",
        "rewards=[{type: tests.scorers.Bright}, {type: tests.scorers.CannotJudge, options: {word: rings}}]",
    )
    drawn.stop = (3, signal.SIGTERM)
    assert call("evaluate", "half.json", *rewards) == 128 + signal.SIGTERM
    drawn.stop = None
    drawn.prompts.clear()
    assert call("evaluate", "half.json", *rewards) == 0 and drawn.prompts == [PROMPTS[1], PROMPTS[3]]


def test_without_a_file_nothing_is_kept_and_the_sentence_says_so(plain, prompts, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn.stop = (0, signal.SIGTERM)
    words = ["evaluate", str(plain), "--prompts", str(prompts), "--engine", "torch", "--images-per-prompt", "2"]
    assert main([*words, *(part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}"))]) == 143
    assert "stopped by SIGTERM; nothing is kept without --json FILE" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.txt"]
