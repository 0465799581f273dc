"""Every role is killed in every phase of an asynchronous run, disks fill, bytes change; no group is lost or repeated.

Real Ray, real processes, real signals. What must not change the outcome at all (the loss of a scorer, a learner or the
driver, in strict order) is held to metrics and weights of an undisturbed run, bit for bit. A rollout worker's
successor draws its groups with the newest weights, which may be other ones: there the ledger is the judge.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file

from stage_ray.actors.client import Client
from stage_ray.bench.pipeline import TimedCluster
from stage_ray.cluster.cluster import Cluster
from stage_ray.cluster.transport import ObjectStore
from stage_ray.commands.train import replay_run
from stage_ray.config import RunConfig
from stage_ray.config.load import load_config
from stage_ray.errors import RunError
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.ledger import Ledger
from stage_ray.pipeline.prompts import PromptCursor
from stage_ray.pipeline.stream import GroupStream
from stage_ray.records import GroupRefs, Prompt
from stage_ray.run.checkpoint import CheckpointStore
from stage_ray.run.state import RunState
from stage_ray.train import train
from stage_ray.workers.rollout import RolloutWorker
from tests.audit import Audit
from tests.chaos import WORKERS, audited, end_session, start_driver
from tests.runs import lines, tiny_run, without_clocks
from tests.scorers import FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_ray")]

PHASES = {  # phase -> the driver's call that lasts as long as it does
    "generating": (Cluster, "generate"),
    "scoring": (Cluster, "score"),
    "publishing": (Cluster, "publish"),
    "checkpointing": (RunState, "_save"),
}
STEPS, EVERY, SEED = 40, 4, 20
RECOVERIES = ("scoring/", "rollout/reissued", "workers/")


def kill_run(directory: Path, model: Path, scorer: str = "Brightness", **changes: Any) -> RunConfig:
    """An asynchronous run with many checkpoints, recorded, so that the learner's own files tell what it trained."""
    settings = {
        "steps": STEPS,
        "pipeline": {"max_staleness": 1, "record": True},
        "checkpoint": {"every": EVERY},
        "evaluation": {"enabled": False, "sample_every": 1000},
    }
    return tiny_run(directory, model, scorer, **(settings | changes))


def sound(run: RunConfig, *, ended: bool = True) -> Audit:
    """The audit of a run, after making sure that it found nothing wrong."""
    found = audited(Path(run.run_dir), ended=ended)
    assert found.sound, found
    if ended:
        assert found.trained == run.steps * run.rollout.groups_per_step
        assert [row["step"] for row in lines(Path(run.run_dir) / "metrics.jsonl")] == list(range(1, run.steps + 1))
    return found


def same_outcome(first: RunConfig, second: RunConfig) -> bool:
    """Whether two runs have the same metrics, but for clocks and the count of recoveries, and ended with the same
    model, bit for bit."""
    one, other = (
        [
            {name: value for name, value in row.items() if not name.startswith(RECOVERIES)}
            for row in without_clocks(lines(Path(run.run_dir) / "metrics.jsonl"))
        ]
        for run in (first, second)
    )
    weights = [load_file(Path(run.run_dir) / "final" / "model.safetensors") for run in (first, second)]
    return one == other and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> RunConfig:
    run = kill_run(tmp_path_factory.mktemp("undisturbed"), plain)
    train(run)
    sound(run)
    return run


def test_a_replay_of_recorded_groups_repeats_every_update(tmp_path, undisturbed):
    recorded = Path(undisturbed.run_dir)
    again = replay_run(undisturbed.model_copy(update={"run_dir": str(tmp_path / "again")}), recorded, Progress())
    rows = [lines(directory / "metrics.jsonl") for directory in (recorded, again)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    weights = [load_file(directory / "final" / "model.safetensors") for directory in (recorded, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Faults:
    """What happens in the midst of which phase, one after another; a new checkpoint must be whole before the next.

    Moments are drawn from a seed. A phase that was over before its moment came is injected sooner the next time.
    """

    def __init__(self, phases: list[str], inject: Callable[[int], object]) -> None:
        self.done = 0
        self._phases, self._inject = phases, inject
        self._choice = random.Random(SEED)
        self._delay = self._draw()
        self._armed = False

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for phase, (owner, name) in PHASES.items():
            patch.setattr(owner, name, self._watched(phase, getattr(owner, name)))

    def _watched(self, phase: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def watched(*arguments: Any, **more: Any) -> Any:
            due = self._armed and self.done < len(self._phases) and self._phases[self.done] == phase
            moment = asyncio.create_task(self._wait()) if due else None
            try:
                result = await method(*arguments, **more)
            finally:
                if moment is not None and moment.cancel():
                    self._delay /= 2
            self._armed = self._armed or phase == "checkpointing"
            return result

        return watched

    async def _wait(self) -> None:
        await asyncio.sleep(self._delay)
        if self._armed:  # of calls that overlap, the first
            self._armed, self._delay = False, self._draw()
            self._inject(self.done)
            self.done += 1

    def _draw(self) -> float:
        return self._choice.choice((0.0, self._choice.uniform(0, 0.04)))


def kill_worker(role: str) -> None:
    """SIGKILL to every worker of a role that this process has."""
    for process in workers(role):
        process.kill()


def workers(role: str) -> list[psutil.Process]:
    """The processes of a role that this process has."""
    title = f"ray::{WORKERS[role]}"
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # nor is a zombie one
            found += [process] if title in " ".join(process.cmdline()) else []
    return found


class DiesWhenAsked:
    """The learner as its driver sees it, killed just when it is asked for something for the n-th time."""

    def __init__(self, **methods: int) -> None:
        self._at, self.asked = methods, Counter[str]()

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("ask", "ask_objects"):
            patch.setattr(Client, name, self._watched(getattr(Client, name)))

    def _watched(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        def watched(client: Client, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            self.ask(method.__name__)
            return ask(client, method, *arguments, **named)

        return watched

    def ask(self, method: str) -> None:
        self.asked[method] += 1
        if self.asked[method] == self._at.get(method):
            kill_worker("learner")

    @property
    def done(self) -> bool:
        return all(self.asked[method] > n for method, n in self._at.items())


def test_scorers_and_learners_killed_in_every_phase_do_not_change_a_bit(tmp_path, plain, undisturbed, monkeypatch):
    schedule = [(role, phase) for role in ("reward", "learner") for phase in PHASES]
    random.Random(SEED).shuffle(schedule)
    faults = Faults([phase for _, phase in schedule], lambda n: kill_worker(schedule[n][0]))
    faults.watch(monkeypatch)
    narrow = DiesWhenAsked(save_state=6, chunks=STEPS)  # moments too short to be hit by chance
    narrow.watch(monkeypatch)
    run = kill_run(tmp_path, plain)
    train(run)
    assert faults.done == len(schedule) and narrow.done
    sound(run)
    assert same_outcome(run, undisturbed)


def test_learners_killed_while_they_broadcast_a_version_do_not_change_a_bit(tmp_path, plain, undisturbed, monkeypatch):
    faults = Faults(["publishing"], lambda n: kill_worker("learner"))  # the other phases know nothing of the transport
    faults.watch(monkeypatch)
    narrow = DiesWhenAsked(offer=5, send=12)
    narrow.watch(monkeypatch)
    run = kill_run(tmp_path, plain, cluster={"weight_transport": "gloo", "sync_timeout_s": 10.0})
    train(run)
    assert faults.done == 1 and narrow.done
    sound(run)
    assert same_outcome(run, undisturbed), "another way for the same bytes"


class CorruptWeights:
    """Damages the weights that a rollout worker is given: those of versions ``flip`` and ``cut`` once, from ``ruin`` on
    for good."""

    def __init__(self, flip: int, cut: int, ruin: int) -> None:
        self._once = {flip: flipped_array, cut: lambda array: array[:-1]}
        self._ruin = ruin

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(ObjectStore, "newest", lambda store, name, worker: self._load(store.published, worker))

    def _load(self, published: Any, worker: Any) -> Any:
        if published is None:
            return asyncio.sleep(0)
        damage = flipped_array if published.version >= self._ruin else self._once.pop(published.version, None)
        chunks = list(published.chunks)
        if damage is not None:
            chunks[0] = ray.put(damage(ray.get(chunks[0])))
        return worker.ask(RolloutWorker.load_weights, published.manifest, *chunks)


def flipped(data: bytes) -> bytes:
    """With one bit changed, in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def flipped_array(array: np.ndarray) -> np.ndarray:
    """A copy with one bit changed, in the middle."""
    return np.frombuffer(flipped(array.tobytes()), array.dtype)


def test_rollout_workers_killed_in_every_phase_or_given_corrupt_weights_are_replaced(
    tmp_path, plain, monkeypatch, caplog
):
    faults = Faults(list(PHASES), lambda n: kill_worker("rollout"))
    faults.watch(monkeypatch)
    CorruptWeights(flip=STEPS - 12, cut=STEPS - 8, ruin=STEPS - 4).watch(monkeypatch)
    run = kill_run(tmp_path, plain, cluster={"attempts": 2})
    with pytest.raises(RunError, match=r"WeightError: tensor '.+' of version 36 has checksum"):
        train(run)
    assert faults.done == len(PHASES)
    assert "of version 28 has checksum" in caplog.text
    assert "of version 32 is bytes" in caplog.text and "truncated" in caplog.text
    found = sound(run, ended=False)
    assert found.steps >= STEPS - 5
    restarts = lines(Path(run.run_dir) / "metrics.jsonl")[-1]["workers/restarts"]
    assert restarts == len(PHASES) + 2


def test_a_scorer_with_every_fault_costs_another_attempt_and_no_group(tmp_path, plain):
    marks = tmp_path / "marks"
    marks.mkdir()
    changes = {"steps": 8, "options": {"marks": str(marks)}, "scoring": {"timeout_s": 6.0}}
    run = kill_run(tmp_path, plain, "Faulty", **changes)
    train(run)
    rows = lines(Path(run.run_dir) / "metrics.jsonl")
    assert sorted(path.name for path in marks.iterdir()) == sorted(FAULTS)
    scored = len(FAULTS) - 1  # who is killed has not scored
    assert sum(row["scoring/rescored"] + row["scoring/replaced"] for row in rows) == scored
    assert sound(run).dropped == sum(row["scoring/replaced"] for row in rows)


def drive_until(config: str, phase: str) -> None:
    """A driver that is killed in the midst of a phase: what `test_a_driver_...` runs in a process of its own."""
    faults = Faults([phase], lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.MonkeyPatch.context() as patch:
        faults.watch(patch)
        train(load_config(Path(config)), resume=Path(load_config(Path(config)).run_dir).exists())


def newest_weights(run: RunConfig) -> tuple[int, Path]:
    """Step and weights of the newest checkpoint."""
    newest = CheckpointStore(Path(run.run_dir) / "checkpoints", keep=2).latest()
    assert newest is not None
    (shard,) = (newest.path / "shards").iterdir()
    return newest.step, shard


def kill_driver(run: RunConfig, phase: str) -> None:
    """Let a driver begin a run or go on with it, and kill it in the midst of a phase."""
    config = Path(run.run_dir).with_name("config.yaml")
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    code = "import sys; from tests.test_kill import drive_until; drive_until(*sys.argv[1:])"
    driver = start_driver([sys.executable, "-c", code, str(config), phase], stderr=subprocess.DEVNULL)
    try:
        assert driver.wait(240) == -signal.SIGKILL
    finally:
        end_session(driver.pid)
    sound(run, ended=False)


def test_a_driver_killed_twice_goes_on_bit_for_bit_even_from_an_older_checkpoint(tmp_path, plain, undisturbed):
    run = kill_run(tmp_path, plain)
    damages: dict[str, Callable[[bytes], bytes]] = {"scoring": lambda data: data[:-1], "checkpointing": flipped}
    for phase, damage in damages.items():
        kill_driver(run, phase)
        step, weights = newest_weights(run)
        whole = weights.read_bytes()
        weights.write_bytes(damage(whole))
        older = CheckpointStore(Path(run.run_dir) / "checkpoints", keep=2).latest()
        if older is None:  # it was the first
            with pytest.raises(RunError, match="no checkpoint of the 1 in .* can be read; nothing was changed"):
                train(run, resume=True)
            weights.write_bytes(whole)
        assert older is None or older.step < step
    train(run, resume=True)
    sound(run)
    assert same_outcome(run, undisturbed)


def test_a_driver_killed_in_a_synchronous_run_goes_on_bit_for_bit(tmp_path, plain):
    # One generation batch a step: with several, the scoring of one and the drawing of the next have no order.
    one_batch = {"images_per_batch": 8}
    changes = {"steps": 3 * EVERY, "pipeline": {"max_staleness": 0, "record": True}, "rollout": one_batch}
    whole, run = kill_run(tmp_path / "whole", plain, **changes), kill_run(tmp_path / "broken", plain, **changes)
    train(whole)
    kill_driver(run, "publishing")
    train(run, resume=True)
    sound(run)
    assert same_outcome(run, whole)
    histories = [
        [{name: value for name, value in event.items() if name != "time"} for event in lines(ledger)]
        for ledger in (Path(one.run_dir) / "ledger.jsonl" for one in (whole, run))
    ]
    assert histories[0] == histories[1]


def test_a_driver_killed_in_a_run_in_order_of_arrival_loses_no_group_and_repeats_none(tmp_path, plain):
    run = kill_run(tmp_path, plain, steps=4 * EVERY, pipeline={"max_staleness": 2, "order": "arrival", "record": True})
    kill_driver(run, "generating")
    train(run, resume=True)
    sound(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """A directory on a disk of 12 MB, where this user may mount one; and whether it is such."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", bytes(directory), b"tmpfs", 0, b"size=12m") == 0
    yield directory, mounted
    if mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


class AtStep(Progress):
    """Does something once when a step is done."""

    def __init__(self, at: int, act: Callable[[], object]) -> None:
        super().__init__()
        self._at, self._act = at, act

    def step(self, step: int, total: int, metrics: Any) -> None:
        super().step(step, total, metrics)
        if step == self._at:
            self._act()


def forbid_large_files() -> None:
    """From now on the learner can write no file of more than 100 kB (its weights have more)."""
    for process in workers("learner"):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))


def fill(directory: Path, but: int) -> None:
    """Leave so many bytes free."""
    space = os.statvfs(directory)
    with (directory / "filler").open("ab") as file:
        file.write(bytes(space.f_bavail * space.f_frsize - but))


def test_a_full_disk_stops_the_run_with_its_checkpoints_whole_and_with_room_it_goes_on_bit_for_bit(
    small_disk, plain, undisturbed
):
    disk, mounted = small_disk
    run = kill_run(disk, plain)
    why = "No space left" if mounted else "File too large"
    room = 300_000  # for ledger, metrics and report, not for a checkpoint
    with pytest.raises(RunError, match=rf"checkpoint of step 8 could not .*{why}.*the ones before it are whole"):
        train(run, progress=AtStep(6, lambda: fill(disk, room) if mounted else forbid_large_files()))
    assert sound(run, ended=False).steps >= 8
    if mounted:
        fill(disk, 0)
        with pytest.raises(RunError, match="disk/run cannot be written any more .*No space left.*go on with --resume"):
            train(run, resume=True)
        (disk / "filler").unlink()
    train(run, resume=True)
    sound(run)
    assert same_outcome(run, undisturbed)


def test_groups_of_a_checkpoint_are_as_old_as_they_were_when_the_run_goes_on(tmp_path, plain):
    run = kill_run(tmp_path, plain, pipeline={"max_staleness": 2, "order": "arrival"})
    versions = {8: 3, 9: 2, 10: 2, 11: 3}  # group 8 was drawn again after its first worker was lost
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.note("admitted", versions, step=2)

    async def next_groups() -> list[int]:
        stream = GroupStream(
            TimedCluster(run, (0, 0, 0)), run, PromptCursor([Prompt(0, "x")], SEED), ledger, 12, step=4
        )
        stream.restore({group: GroupRefs(group, version, None) for group, version in versions.items()})
        return [group.group_id for group in await stream.next_batch()]

    assert asyncio.run(next_groups()) == [9, 10]
