"""The learner actor: groups in, metrics and a new policy version out."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage_ray.actors.client import Client
from stage_ray.actors.worker import Worker
from stage_ray.config import RunConfig
from stage_ray.observability.logs import redirect_output
from stage_ray.observability.worker_metrics import WorkerMetrics
from stage_ray.records import GroupRefs, Update, WeightManifest

if TYPE_CHECKING:
    from torch import Tensor

    from stage_ray.weights.broadcast_group import BroadcastGroup, GroupMember
    from stage_ray.weights.manifest import Chunk


class LearnerWorker(Worker):
    """The STAGE update and the weights it makes, or one rank's share of that."""

    _group: BroadcastGroup | None = None
    _offered: Sequence[tuple[str, Tensor]] = ()

    def __init__(self, name: str, run: RunConfig, log: str | None, rank: int = 0) -> None:
        """Load nothing yet: `setup` does."""
        redirect_output(log, "learner", name)
        self._metrics = WorkerMetrics("learner", name)
        self._run, self._rank = run, rank
        self._chunks: list[Chunk] = []
        self._batch: tuple[Any, ...] = ()

    def setup(self, address: str = "") -> None:
        """Load the model, or this rank's share of it after it has met the others at ``address``."""
        from stage_ray.learner.learner import Learner
        from stage_ray.learner.ranks import Ranks
        from stage_ray.policies.base import device_for

        learner = self._run.learner
        device = device_for(learner.gpus, "learner.gpus")
        self._ranks = Ranks.init_process_group(self._rank, learner.ranks, address, device, timeout_s=learner.timeout_s)
        self._learner = Learner(self._run, threads=learner.threads, ranks=self._ranks)

    def set_batch(self, *objects: Any) -> None:
        """Hold the rollout groups and scored groups, alternating, of the next update.

        Apart from `update`, so that an object that is lost keeps no rank from an update that others are in.
        """
        self._batch = objects

    def update(self) -> Update:
        """Train on the groups of `set_batch`."""
        groups = self._batch[::2]
        self._metrics.begin((group.group_id for group in groups), step=self._learner.version + 1)
        metrics = self._learner.update(groups, self._batch[1::2])
        # Each rank counts the groups that it ran, so that the counts of all add up to the work done.
        self._metrics.done(groups[self._ranks.rows(len(groups))], version=self._learner.version)
        return Update(self._learner.version, metrics)

    def save_batch(self, directory: str) -> None:
        """Write the groups of the last `set_batch`."""
        self.save_groups(directory, *self._batch)

    def pack(self) -> WeightManifest:
        """Pack the current version; its chunks, views of the weights, wait for `chunks` before the next update."""
        from stage_ray.weights.manifest import pack

        manifest, self._chunks = pack(self._learner.version, self._learner.weights())
        return manifest

    def chunks(self) -> tuple[Any, ...]:
        """The version, then the packed bytes, one object a chunk, handed over once.

        Ray copies them before this actor does anything else; the version says that all of them are stored.
        """
        chunks, self._chunks = self._chunks, []
        return (self._learner.version, *chunks)

    def offer(self) -> WeightManifest:
        """Describe the current version, which waits for `send` before the next update."""
        from stage_ray.weights.broadcast_group import device_of
        from stage_ray.weights.manifest import describe

        device = device_of(self._run.cluster.weight_transport)
        self._offered = self._learner.weights(in_place=device.type == "cuda")
        return describe(self._learner.version, self._offered, device)

    def open_group(self) -> str:
        """Listen for rollout workers that `send` is to reach; HOST:PORT."""
        from stage_ray.weights.broadcast_group import BroadcastGroup

        self._group = self._group or BroadcastGroup()
        return self._group.open(self._run.cluster.sync_timeout_s)

    def send(self, member: GroupMember) -> str:
        """Pass what was offered to the rollout workers; why some may not have it, "" where all have."""
        from stage_ray.weights.broadcast_group import BroadcastFailed

        assert self._group is not None, "the broadcast group was not opened"
        offered, self._offered = self._offered, ()
        try:
            self._group.send(member, offered)
        except BroadcastFailed as broken:
            return str(broken)
        return ""

    def version(self) -> int:
        """The current version."""
        return self._learner.version

    def save_state(self, directory: str) -> None:
        """Weights, optimizer, schedule and random states, for an exact resume."""
        self._learner.save_state(Path(directory))

    def load_state(self, directory: str) -> int:
        """Take a saved state; its version."""
        self._learner.load_state(Path(directory))
        return self._learner.version

    def save_groups(self, directory: str, *objects: Any) -> None:
        """Write rollout groups and scored groups, alternating: those a checkpoint has in flight, or a recording's."""
        from stage_ray.workers.group_files import save_group

        for group, scored in zip(objects[::2], objects[1::2], strict=True):
            save_group(Path(directory), group, scored)

    def load_groups(self, directory: str, group_ids: Sequence[int]) -> tuple[Any, ...]:
        """The versions of saved groups, then each group and its scores, alternating."""
        from stage_ray.workers.group_files import group_file, load_group

        pairs = [load_group(group_file(Path(directory), group_id)) for group_id in group_ids]
        return ([group.policy_version for group, _ in pairs], *(item for pair in pairs for item in pair))

    def export(self, directory: str) -> None:
        """A Hugging Face checkpoint that plain transformers loads."""
        self._learner.export(Path(directory))


class LearnerClient(Client):
    """The learner as the driver asks it; each method is the worker's. Directories are absolute."""

    def set_batch(self, groups: Sequence[GroupRefs]) -> Awaitable[None]:
        """Hand over the groups of the next update."""
        return self.ask(LearnerWorker.set_batch, *_objects(groups))

    def update(self) -> Awaitable[Update]:
        """Train on them."""
        return self.ask(LearnerWorker.update)

    def version(self) -> Awaitable[int]:
        """The current version."""
        return self.ask_first(LearnerWorker.version)

    def pack(self) -> Awaitable[WeightManifest]:
        """Pack the current version for `chunks`."""
        return self.ask(LearnerWorker.pack)

    def chunks(self, count: int) -> tuple[Awaitable[int], list[Any]]:
        """The packed version's number, once all is stored, and references to its ``count`` chunks."""
        return self.ask_objects(LearnerWorker.chunks, count, ranks=1)

    def offer(self) -> Awaitable[WeightManifest]:
        """Describe the current version for `send`."""
        return self.ask(LearnerWorker.offer)

    def open_group(self) -> Awaitable[str]:
        """Listen for rollout workers; HOST:PORT."""
        return self.ask_first(LearnerWorker.open_group)

    def send(self, member: GroupMember) -> Awaitable[str]:
        """Send what was offered; why some may not have it."""
        return self.ask_first(LearnerWorker.send, member)

    def save_state(self, directory: str) -> Awaitable[None]:
        """Write the state of every rank."""
        return self.ask(LearnerWorker.save_state, directory)

    def load_state(self, directory: str) -> Awaitable[int]:
        """Take a saved state; its version."""
        return self.ask(LearnerWorker.load_state, directory)

    def save_batch(self, directory: str) -> Awaitable[None]:
        """Write the groups of the last `set_batch`."""
        return self.ask_first(LearnerWorker.save_batch, directory)

    def save_groups(self, directory: str, groups: Sequence[GroupRefs]) -> Awaitable[None]:
        """Write groups."""
        return self.ask_first(LearnerWorker.save_groups, directory, *_objects(groups))

    async def load_groups(self, directory: str, group_ids: Sequence[int]) -> list[GroupRefs]:
        """Read saved groups back into the object store, in the order of ``group_ids``."""
        if not group_ids:
            return []
        asked, refs = self.ask_objects(LearnerWorker.load_groups, 2 * len(group_ids), directory, group_ids, ranks=1)
        loaded = zip(group_ids, await asked, refs[::2], refs[1::2], strict=True)  # groups and scores alternate
        return [GroupRefs(i, version, tokens, scores=scores) for i, version, tokens, scores in loaded]

    def export(self, directory: str) -> Awaitable[None]:
        """Write a Hugging Face checkpoint."""
        return self.ask(LearnerWorker.export, directory)


def _objects(groups: Sequence[GroupRefs]) -> list[Any]:
    """Rollout groups and scored groups, alternating: Ray resolves references only where they are arguments."""
    return [ref for group in groups for ref in (group.tokens, group.scores)]
