"""Weight sync: a version from the learner to two rollout workers, by each transport, against one memory copy of it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from stage_ray.actors.client import Client
from stage_ray.bench.base import Bench, Measurement, Row, Trials, Variant, bench_run, interleave, median
from stage_ray.bench.inputs import GIGABYTE, SMALL, model_of
from stage_ray.bench.machine import timed
from stage_ray.cluster.cluster import Cluster
from stage_ray.cluster.runtime import start_ray
from stage_ray.config.hardware import usable_cpus
from stage_ray.config.model_sizes import FLOAT32
from stage_ray.policies.janus.builder import checkpoint_sizes

WORKERS = 2
FRESH = 2  # publishes until there is memory to use again: one version is served while the next one is stored
FREE_S = 1.2  # Ray frees objects up to a second after their last use; a training step gives it that time
CPU = torch.device("cpu")


class SyncBench(Bench):
    """One publish of a gigabyte by each transport."""

    def rows(self) -> list[Row]:
        """A row for each transport."""
        repeats, rows = 3 if self.quick else 9, list[Row]()
        with model_of(SMALL if self.quick else GIGABYTE) as model:
            for name in available(self.device):  # one after the other: each needs ten times the model's memory
                variant = Variant(name, publish, {"model": model, "device": self.device, "transport": name})
                title = f"sync, {name}"
                trials = interleave([variant], repeats=repeats, warmups=FRESH, progress=self.progress, title=title)
                rows.append(row_of(name, trials[name]))
        return rows


def available(device: str) -> list[str]:
    """Transports that this machine has what they need for: NCCL wants a GPU for each process."""
    nccl = device == "cuda" and torch.cuda.device_count() > 1 and torch.distributed.is_nccl_available()
    return ["object_store", "gloo", *(["nccl"] if nccl else [])]


def row_of(transport: str, trials: Sequence[Measurement]) -> Row:
    """What the trials of one transport say.

    The limit: every byte is copied once into shared memory, or once into each worker, and read by each worker, with
    work and bandwidth spread evenly over all cores.
    """
    copy_s, read_s, seconds = (median(trials, name) for name in ("copy_s", "read_s", "seconds"))
    stages = {name: median(trials, name) for name in ("pack_s", "store_s", "load_s", "first_s")}
    stored, workers, gigabytes = transport == "object_store", trials[0]["workers"], trials[0]["nbytes"] / 1e9
    return Row(
        "sync/publish" if stored else f"sync/publish/{transport}",
        *(0.5, copy_s, seconds),
        ratio_is="bandwidth to each worker as a share of a memory copy's",
        baseline_is="numpy copy of the same bytes into memory that is mapped already",
        limit=((1 if stored else workers) * copy_s + workers * read_s) / usable_cpus(),
        limit_is=f"one copy into {'shared memory' if stored else 'each worker'}, checksummed on its way, and one "
        f"checksum in each worker ({read_s:.3g} s on a core), all spread evenly over the cores",
        details=stages,
        notes=(f"{gigabytes:.3g} GB of a float32 model to {workers} workers; vLLM's repacking is not in it",),
    )


def publish(model: str, device: str, transport: str) -> Trials:
    """A run's learner and rollout workers; a trial copies as many bytes as they share, then publishes a version."""
    source = np.ones(FLOAT32 * checkpoint_sizes(model).trained, np.uint8)
    target, nccl = np.zeros_like(source), transport == "nccl"
    gpus = 0.0 if device == "cpu" else 1.0 if nccl else 0.3
    workers = min(WORKERS, torch.cuda.device_count() - 1) if nccl else WORKERS
    store_mb = 200 + 3 * source.nbytes // 2**20  # room for three versions
    run = bench_run(
        model,
        # The torch engine takes the weights where they lie: what vLLM does with them then is no part of the way there.
        rollout={"workers": workers, "gpus": gpus, "dtype": "float32", "engine": "torch"},
        learner={"gpus": gpus},
        scoring={"resources": {"none": 1.0}},  # no node has it, so no scorer is started
        cluster={"object_store_mb": store_mb, "num_cpus": WORKERS + 2, "weight_transport": transport},
    )
    with tempfile.TemporaryDirectory(prefix="stage-ray-bench-") as scratch:
        start_ray(run, Path(scratch))
    cluster, runner = Cluster(run, None), asyncio.Runner()

    async def ready() -> None:
        await asyncio.gather(cluster.rollouts.ready(), cluster.learner.actor.ready(None))

    runner.run(ready())
    packs, loads = watch(cluster.learner.actor.client), [watch(actor.client) for actor in cluster.rollouts.actors]
    pack, load = ("pack", "load_weights") if transport == "object_store" else ("offer", "receive")
    first_s = 0.0
    while True:
        for answers in loads:
            answers.clear()
        time.sleep(FREE_S)
        copy_s, _ = timed(CPU, np.copyto, target, source)
        read_s, _ = timed(CPU, xxhash.xxh3_64_intdigest, source.data)
        seconds, _ = timed(CPU, runner.run, cluster.publish(0))  # the weights that the learner loaded, every time
        first_s = first_s or seconds
        if cluster.restarts() or any(list(answers) != [load] for answers in loads):
            raise RuntimeError(f"a worker did not take the version by {transport}: {loads}")
        pack_s, load_s = packs[pack], max(answers[load] for answers in loads)
        stages = {"pack_s": pack_s, "load_s": load_s, "store_s": seconds - pack_s - load_s, "first_s": first_s}
        size = {"nbytes": source.nbytes, "workers": len(loads)}
        yield {"seconds": seconds, "copy_s": copy_s, "read_s": read_s, **stages, **size}


def watch(client: Client) -> dict[str, float]:
    """Seconds of the last call of each of a worker's methods, from the question to the answer, as they come."""
    seconds, ask = dict[str, float](), client.ask

    async def watched(method: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        answer = await ask(method, *arguments)
        seconds[method.__name__] = time.perf_counter() - began
        return answer

    client.__dict__["ask"] = watched  # in place of the method
    return seconds
