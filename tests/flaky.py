"""A whole run without Ray: real stream, ledger and checkpoints over actors that only wait, for a time that varies."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from stage_ray.bench.pipeline import TimedCluster
from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.files import FileDigest
from stage_ray.observability.progress import Progress
from stage_ray.records import GroupRefs, Prompt, RolloutRequest
from stage_ray.run.state import RunState
from tests.audit import read_ledger

PROMPTS = [Prompt(i, f"prompt {i}") for i in range(7)]


def timed_run(
    directory: Path, *, steps: int = 9, groups: int = 2, staleness: int = 1, order: str = "strict", every: int = 2
) -> RunConfig:
    """A run of two rollout workers that draw a group at a time; it keeps one checkpoint."""
    data = {
        "steps": steps,
        "run_dir": str(directory),
        "prompts": {"train": "none"},
        "policy": {"path": "none"},
        "rollout": {"group_size": 2, "groups_per_step": groups, "images_per_batch": 2, "workers": 2},
        "rewards": [{"type": "geneval"}],
        "scoring": {"workers": 4, "groups_per_call": 1, "attempts": 1},
        "pipeline": {"max_staleness": staleness, "order": order},
        "checkpoint": {"every": every, "keep": 1},
        "evaluation": {"enabled": False},
        "cluster": {"metrics_port": None},
    }
    return validate_config(data)


class FlakyCluster(TimedCluster):
    """Its scorers take a time drawn from a seed, and some groups are beyond them. Its learner keeps files only."""

    def __init__(self, run: RunConfig, seed: int = 0, fails: Callable[[int], bool] = lambda group_id: False) -> None:
        super().__init__(run, (0.0005, 0.0, 0.0005))
        self.prompts: dict[int, int] = {}
        self.guided: dict[int, bool] = {}
        self.asked: set[int] = set()
        self.gates: dict[int, asyncio.Event] = {}  # a group that has one is scored when it is open
        self.published = False
        self._choice, self._fails = random.Random(seed), fails

    @property
    def version(self) -> int:
        """Updates done."""
        return self._version

    async def generate(self, requests: Sequence[RolloutRequest], **more: Any) -> list[GroupRefs]:
        """Remembers which prompt a group has, and whether it is guided."""
        self.prompts |= {request.group_id: request.prompt.index for request in requests}
        self.guided |= {request.group_id: request.guided for request in requests}
        groups = await super().generate(requests, **more)
        return [GroupRefs(group.group_id, group.policy_version, "tokens") for group in groups]

    async def score(self, groups: Sequence[GroupRefs]) -> list[GroupRefs]:
        """Waits, then tells which groups are beyond it."""
        (group,) = groups
        await asyncio.sleep(self._choice.choice((0, 0.001, 0.004)))
        self.asked.add(group.group_id)
        if group.group_id in self.gates:
            await self.gates[group.group_id].wait()
        error = "it is beyond me" if self._fails(group.group_id) else ""
        return [replace(group, scores=("scores",), error=error)]

    def accept(self) -> None:
        """There is only one learner."""

    async def save_state(self, directory: Path) -> dict[str, FileDigest]:
        """Keep the version."""
        (directory / "learner.json").write_text(json.dumps({"version": self._version}))
        return {}

    async def load_state(self, directory: Path) -> int:
        """Take the version."""
        self._version = json.loads((directory / "learner.json").read_text())["version"]
        return self._version

    async def save_groups(self, directory: Path, groups: Sequence[GroupRefs]) -> None:
        """Keep the groups' versions."""
        directory.mkdir(exist_ok=True)
        for group in groups:
            (directory / str(group.group_id)).write_text(str(group.policy_version))

    async def load_groups(self, directory: Path, group_ids: Sequence[int]) -> list[GroupRefs]:
        """Groups of the kept versions."""
        versions = {group_id: int((directory / str(group_id)).read_text()) for group_id in group_ids}
        return [GroupRefs(group_id, version, "tokens", scores=("scores",)) for group_id, version in versions.items()]


async def drive(run: RunConfig, cluster: Any, *, resume: bool = False, until: int | None = None) -> None:
    """The loop of `stage_ray.train` without pictures and metrics; gives up in the middle of things after a step."""
    Path(run.run_dir).mkdir(parents=True, exist_ok=True)
    with closing(run_state(run, resume=resume)) as state:
        await state.restore(cluster)
        async with state.stream(cluster) as stream:
            for step in range(state.step, run.steps):
                groups = await stream.next_batch()
                update = await cluster.learner.update(groups)
                await cluster.publish(update.version)
                stream.mark_trained(groups, step)
                await state.checkpoint(step + 1, cluster, stream)
                if step + 1 == until:
                    return
                if step + 1 < run.steps:
                    stream.release(groups)
            await state.saved()


def run_state(run: RunConfig, *, resume: bool = False) -> RunState:
    """The state of a run in its directory."""
    return RunState(run, Path(run.run_dir), PROMPTS, resume=resume, note=Progress().note)


def history(run: RunConfig) -> list[tuple[int, int, int]]:
    """(group, version, step) of what was trained, in its order."""
    events = read_ledger(Path(run.run_dir) / "ledger.jsonl")
    return [(e["group_id"], e["policy_version"], e["step"]) for e in events if e["event"] == "trained"]


async def until(happened: Callable[[], bool]) -> None:
    """Wait for something."""
    while not happened():
        await asyncio.sleep(0.001)
