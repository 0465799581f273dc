"""What an actor reports of its work through Ray: on its node's metrics endpoint, by role and worker."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

from stage_ray.observability.logs import bind_context
from stage_ray.observability.registry import WORKER
from stage_ray.records import RolloutGroup


class WorkerMetrics:
    """Lives in an actor and nowhere else: an engine or a learner without an actor around it reports nothing."""

    def __init__(self, role: str, worker: str) -> None:
        labels = {"role": role, "worker": worker}
        self._metrics: dict[str, Any] = {}
        for metric in WORKER:
            kind = Counter if metric.kind == "counter" else Gauge
            made = kind(metric.name, metric.help, tuple(labels)).set_default_tags(labels)
            self._metrics[metric.name.removeprefix("stage_ray_worker_")] = made
        self._began = time.perf_counter()

    def begin(self, group_ids: Iterable[int], **fields: int) -> None:
        """A call begins: on these groups, and with what else its log lines are about (``step``)."""
        bind_context(group_id=list(group_ids), **fields)
        self._began = time.perf_counter()

    def done(self, groups: Sequence[RolloutGroup], version: int | None = None) -> None:
        """The call is done with these groups; ``version`` is the policy's that drew them or that was made of them."""
        seconds = time.perf_counter() - self._began
        tokens, images = sum(group.tokens.size for group in groups), sum(len(group.tokens) for group in groups)
        sums = {"calls": 1, "busy_seconds": seconds, "groups": len(groups), "images": images, "tokens": tokens}
        for name, value in sums.items():
            if value:  # Ray's counters refuse 0
                self._metrics[name].inc(value)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        levels = {"tokens_per_second": tokens / max(seconds, 1e-9), "peak_memory_bytes": peak}
        if version is not None:
            levels["policy_version"] = version
        torch = sys.modules.get("torch")  # a scorer without torch must not import it for this
        if torch is not None and torch.cuda.is_initialized():
            levels["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
        for name, value in levels.items():
            self._metrics[name].set(value)
