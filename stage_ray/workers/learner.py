"""The learner actor: groups in, metrics and a new policy version out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from torch import Tensor

from stage_ray.actors.client import Worker, loading
from stage_ray.config import RunConfig
from stage_ray.files import FileDigest
from stage_ray.observability.logs import redirect_output
from stage_ray.observability.worker_metrics import WorkerMetrics
from stage_ray.records import RolloutGroup, ScoredGroup, Update, WeightManifest
from stage_ray.rewards import merge_scores
from stage_ray.weights.manifest import DTYPES, Chunk, WeightError, describe, stream
from stage_ray.weights.process_groups import DEVICES, BroadcastGroup, GroupMember
from stage_ray.workers.group_files import group_file, load_group, save_group
from stage_ray.workers.threads import use_own_threads

Drift = dict[int, np.ndarray]  # prompt index -> what `Learner.drift` gives for its images


class LearnerWorker(Worker):
    """The STAGE update and the weights it makes, or one rank's share of that."""

    _group: BroadcastGroup | None = None
    _offered: Iterator[tuple[str, Tensor]] = iter(())

    def __init__(self, name: str, run: RunConfig, log: str | None, rank: int = 0) -> None:
        """Load nothing yet: `setup` does."""
        redirect_output(log, "learner", name)
        self._metrics = WorkerMetrics("learner", name)
        self._run, self._rank = run, rank
        self._stream: Iterator[Chunk | WeightManifest] = iter(())
        self._batch: list[tuple[RolloutGroup, ScoredGroup]] = []

    @loading()
    def setup(self, address: str = "") -> None:
        """Load the model, or this rank's share of it after it has met the others at ``address``."""
        from stage_ray.learner.learner import Learner
        from stage_ray.learner.ranks import Ranks
        from stage_ray.policies.devices import device_for

        learner = self._run.learner
        use_own_threads(self._run, learner)
        device = device_for(learner.gpus, "learner.gpus")
        self._ranks = Ranks.init_process_group(self._rank, learner.ranks, address, device, timeout_s=learner.timeout_s)
        self._learner = Learner(self._run, threads=learner.threads, ranks=self._ranks)

    def set_batch(self, *objects: Any) -> None:
        """Hold the rollout groups of the next update, each followed by its scored groups, one of each pool."""
        self._batch = self._merged(objects)

    def update(self) -> Update:
        groups, scored = [group for group, _ in self._batch], [scored for _, scored in self._batch]
        self._metrics.begin((group.group_id for group in groups), step=self._learner.version + 1)
        metrics = self._learner.update(groups, scored)
        # Each rank counts the groups that it ran, so that the counts of all add up to the work done.
        self._metrics.done(groups[self._ranks.rows(len(groups))], version=self._learner.version)
        return Update(self._learner.version, metrics)

    def _merged(self, objects: Sequence[RolloutGroup | ScoredGroup]) -> list[tuple[RolloutGroup, ScoredGroup]]:
        """Each rollout group with the scores that follow it."""
        columns, batch = [reward.column for reward in self._run.rewards], list[tuple[RolloutGroup, list[ScoredGroup]]]()
        for item in objects:
            if isinstance(item, RolloutGroup):
                batch.append((item, []))
            else:
                batch[-1][1].append(item)
        return [(group, merge_scores(parts, columns)) for group, parts in batch]

    def pack(self, dtype: str) -> int:
        """In how many chunks the current version travels in the dtype of the engines; then `chunks` makes them."""
        wanted = DTYPES[dtype]
        count, self._stream = stream(self._learner.version, self._learner.weights(wanted), dtype=wanted)
        return count

    def chunks(self) -> Iterator[Any]:
        """The version, then each packed chunk, once, and their manifest; Ray stores one before the next is made."""
        packed, self._stream = self._stream, iter(())
        yield self._learner.version
        yield from packed

    def offer(self, dtype: str) -> WeightManifest:
        """Describe the current version in the dtype of the engines; it waits for `send` before the next update."""
        wanted, device = DTYPES[dtype], DEVICES[self._run.cluster.weight_transport]
        weights = self._learner.weights(wanted)
        self._offered = ((name, tensor.to(wanted)) for name, tensor in weights)  # each is cast when it is sent
        return describe(self._learner.version, weights, device, wanted)

    def open_group(self) -> str:
        """Listen for rollout workers that `send` is to reach; HOST:PORT."""
        self._group = BroadcastGroup()
        return self._group.open(ray.util.get_node_ip_address(), self._run.cluster.sync_timeout_s)

    def send(self, member: GroupMember) -> str:
        """Pass what was offered to the rollout workers; why some may not have it, "" where all have."""
        assert self._group is not None, "the broadcast group was not opened"
        offered, self._offered = self._offered, iter(())
        try:
            self._group.send(member, offered)
        except WeightError as broken:
            return str(broken)
        return ""

    def version(self) -> int:
        return self._learner.version

    def save_state(self, directory: Path) -> dict[str, FileDigest]:
        """Weights, optimizer, schedule and random states, for an exact resume; what went into shards, by path."""
        return self._learner.save_state(directory)

    def load_state(self, directory: Path) -> int:
        self._learner.load_state(directory)
        return self._learner.version

    def drift(self, directory: Path, images: int, anchor: bool, *groups: RolloutGroup) -> tuple[Drift, Drift]:
        """How far the policy has moved, by the index of each prompt: on ``groups`` of its own, and on the reference's.

        The latter lie in ``directory``; with ``anchor`` they are those of ``groups``, which are written there.
        """
        if anchor and self._rank == 0:
            for group in groups:
                empty = np.empty((len(group.tokens), 0), np.float32)
                scored = ScoredGroup(group.group_id, (), empty, empty.astype(bool), ({},) * len(empty), 0.0)
                save_group(directory, group, scored)
        known = [] if anchor else [load_group(path)[0] for path in sorted(directory.glob("group-*.safetensors"))]
        sets = [list(groups)] + [known] * bool(known)
        found = [self._learner.drift(some, images) for some in sets]
        by_prompt = [
            {group.prompt.index: rows for group, rows in zip(some, drift, strict=True)}
            for some, drift in zip(sets, found, strict=True)
        ]
        return by_prompt[0], by_prompt[-1] if anchor or known else {}

    def save_groups(self, directory: Path, *objects: Any) -> None:
        """Write rollout groups, each followed by its scored groups; without any, those of the last `set_batch`."""
        for group, scored in self._merged(objects) if objects else self._batch:
            save_group(directory, group, scored)

    def load_groups(self, directory: Path, group_ids: Sequence[int]) -> tuple[Any, ...]:
        """The versions of saved groups, then each group and its scores, alternating."""
        pairs = [load_group(group_file(directory, group_id)) for group_id in group_ids]
        return ([group.policy_version for group, _ in pairs], *(item for pair in pairs for item in pair))

    def export(self, directory: Path) -> None:
        self._learner.export(directory)
