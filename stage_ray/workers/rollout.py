"""The rollout actor: requests in, groups out, tokens and pictures as separate objects."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stage_ray.actors.client import Client, Worker, WorkerFailed, loading
from stage_ray.config import RunConfig
from stage_ray.config.flops import sampling_flops
from stage_ray.observability.logs import redirect_output
from stage_ray.observability.worker_metrics import WorkerMetrics
from stage_ray.policies.devices import device_for, peak_flops
from stage_ray.records import RECORDED, GroupRefs, RolloutGroup, RolloutRequest, WeightManifest
from stage_ray.weights.manifest import Chunk, WeightError, unpack
from stage_ray.weights.process_groups import BroadcastGroup, GroupMember
from stage_ray.workers.threads import use_own_threads


class RolloutWorker(Worker):
    """One image engine, or one rank's share of it.

    Updates its weights between generation batches only, so every image has one policy version (promise 2). Pictures are
    decoded after sampling, or by a thread of its own while the next batch is sampled.
    """

    threads = {**Worker.threads, "pictures": 1}
    _group: BroadcastGroup | None = None

    def __init__(self, name: str, run: RunConfig, log: str | None, rank: int = 0) -> None:
        redirect_output(log, "rollout", name)
        self._metrics = WorkerMetrics("rollout", name)
        self._name, self._run, self._rank = name, run, rank

    @loading()
    def setup(self, address: str = "") -> None:
        """Start the engine, or this rank's share of it after it has met the others at ``address``."""
        from stage_ray.engines import build_engine  # after the redirection: importing vLLM talks

        run = self._run
        use_own_threads(run, run.rollout)
        self._engine = build_engine(run.policy, run.rollout, worker=self._name, rank=self._rank, address=address)

    def weight_dtype(self) -> str:
        """The dtype that the engine holds its weights in, and so the one in which a version need come."""
        return str(self._engine.dtype).removeprefix("torch.")

    def generate(self, *requests: RolloutRequest) -> tuple[Any, ...]:
        """The answer, then for each request its group, whose ``images`` are empty: `decode` makes them of it.

        The answer: policy version, seconds, MFU, and what of each group's records is not finite, "" if nothing. The
        learner never reads pictures and the driver reads neither: each object goes only where it is used. Of several
        ranks the first one answers; the others' objects are None.
        """
        start = time.perf_counter()
        self._metrics.begin(request.group_id for request in requests)
        groups = self._engine.generate(requests, pictures=False)
        seconds = time.perf_counter() - start
        if len(groups) != len(requests):
            raise RuntimeError(f"{len(groups)} groups where {len(requests)} were asked for")
        for request, group in zip(requests, groups, strict=True):
            if fault := _fault(request, group, self._engine.codebook_size):
                raise RuntimeError(f"group {request.group_id} {fault}")
        self._metrics.done(groups if self._rank == 0 else (), version=self._engine.policy_version)
        mfu = self._utilisation(groups, seconds)
        answer = (self._engine.policy_version, seconds, mfu, *map(_not_finite, groups))
        return (answer, *(group if self._rank == 0 else None for group in groups))

    def decode(self, *groups: RolloutGroup) -> tuple[Any, ...]:
        """None, then the pictures of each group that `generate` made, uint8 [G, H, W, 3]."""
        tokens = np.concatenate([group.tokens for group in groups])
        images = self._engine.decode(torch.from_numpy(tokens).long()).numpy()
        if images.dtype != np.uint8 or images.ndim != 4 or (len(images), images.shape[3]) != (len(tokens), 3):
            raise RuntimeError(f"images are {images.dtype} {list(images.shape)}, not uint8 [{len(tokens)}, H, W, 3]")
        ends = np.cumsum([len(group.tokens) for group in groups])
        return (None, *np.split(images, ends[:-1]))

    def show(self, tokens: np.ndarray, shown: float) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3] of tokens int32 [B, T], grey below this share of their rows."""
        return self._engine.decode(torch.from_numpy(tokens).long(), shown).numpy()

    def _utilisation(self, groups: Sequence[RolloutGroup], seconds: float) -> float | None:
        """Model FLOPs utilisation of a batch that took so long, on all of this worker's GPUs; None if not known."""
        rollout = self._run.rollout
        peak = rollout.gpus and peak_flops(device_for(rollout.gpus, "rollout.gpus"), self._engine.dtype)
        if not peak or (sizes := self._engine.codec.sizes()) is None:
            return None
        flops = 0
        for group in groups:
            prompt = self._engine.encode_prompt(group.prompt.drawn_text)
            guided = self._engine.params.guided and group.guided
            branches = (prompt.conditional, prompt.unconditional)[: 1 + guided]
            flops += len(group.seeds) * sum(sampling_flops(sizes, len(branch)) for branch in branches)
        return flops / (seconds * peak * rollout.tensor_parallel)

    def sleep(self) -> None:
        """Leave the GPU's memory to the learner until the next generation batch or version."""
        self._engine.sleep()

    def load_weights(self, manifest: WeightManifest, *chunks: Chunk) -> None:
        """Verify a version and take it; a WeightError where it does not verify, and the old version stays."""
        self._engine.load_weights(manifest.version, unpack(manifest, chunks), known_finite=True)

    def receive(self, manifest: WeightManifest, member: GroupMember) -> str:
        """Take a version that the learner sends; why the old one stays, "" where it does not."""
        self._group = self._group or BroadcastGroup()
        try:
            tensors = self._group.receive(member, manifest)
        except WeightError as error:
            return str(error)
        self._engine.load_weights(manifest.version, tensors, known_finite=True)
        return ""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A generation batch that was sampled; awaiting ``decoded`` waits for its pictures, and raises as any call does."""

    groups: list[GroupRefs]
    decoded: Awaitable[None]


class RolloutClient(Client):
    """A rollout worker as the driver asks it."""

    async def generate(self, requests: Sequence[RolloutRequest], *, last: bool = False, beside: bool = True) -> Drawn:
        """Sample one generation batch, and begin to decode it: ``beside`` what is asked for next, or before it.

        Groups that are not finite raise WorkerFailed; in a ``last`` attempt they come with that ``error``.
        """
        answer, groups = self.ask_objects(RolloutWorker.generate, len(requests), *requests)
        version, seconds, mfu, *errors = await answer
        if not last and any(errors):
            raise WorkerFailed(f"{self._name} failed: {next(filter(None, errors))}")
        # Only now: behind a call that waits for its arguments Ray would hold back pings too.
        first, *_ = self._ranks
        thread = {"concurrency_group": "pictures"} if beside else {}
        decoded, *pictures = first.decode.options(num_returns=1 + len(groups), **thread).remote(*groups)
        refs = [
            GroupRefs(request.group_id, version, group, images, error=error, generate_s=seconds, mfu=mfu)
            for request, group, images, error in zip(requests, groups, pictures, errors, strict=True)
        ]
        return Drawn(refs, decoded)


def _fault(request: RolloutRequest, group: RolloutGroup, codebook_size: int) -> str:
    """Why a group cannot be used, "" where it can (`RolloutGroup` says what is right); the driver never sees arrays."""
    if (group.group_id, group.seeds) != (request.group_id, request.seeds):
        return f"was asked for with seeds {request.seeds}, and answered is {group.group_id} with {group.seeds}"
    count, tokens = len(request.seeds), group.tokens
    if tokens.dtype != np.int32 or tokens.ndim != 2 or len(tokens) != count or not tokens.size:
        return f"has tokens {tokens.dtype} {list(tokens.shape)}, not int32 [{count}, T]"
    if tokens.min() < 0 or tokens.max() >= codebook_size:
        return f"has tokens {tokens.min()} to {tokens.max()} of a codebook of {codebook_size}"
    for name in RECORDED:
        values = getattr(group, name)
        if values.dtype != np.float32 or values.shape != tokens.shape:
            return f"has {name} {values.dtype} {list(values.shape)}, not float32 {list(tokens.shape)}"
    return ""


def _not_finite(group: RolloutGroup) -> str:
    """Which of a group's records are not finite, "" where all are. Another engine may do better, or none."""
    names = (name for name in RECORDED if not np.isfinite(getattr(group, name)).all())
    return next((f"group {group.group_id} has {name} that are not finite" for name in names), "")
