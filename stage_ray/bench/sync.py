"""Weight sync: a version from the learner to two rollout workers, by each transport, against one memory copy of it."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from stage_ray.bench.base import Bench, Row, bench_run, median
from stage_ray.bench.limits import timed
from stage_ray.bench.models import FIFTY_MILLION, SMALL, model_of
from stage_ray.bench.sync_actors import ROW, TENSORS, SyncCluster
from stage_ray.bench.timing import Measurement, Trial, Variant
from stage_ray.cluster.runtime import start_ray
from stage_ray.config import PolicyConfig, RolloutConfig, RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine

WORKERS = 2
GIGABYTE, QUICK_BYTES = 7813 * ROW, 500 * ROW
TARGET = 0.5
FRESH = 2  # publishes until there is memory to use again: one version is served while the next one is stored
FREE_S = 1.2  # Ray frees objects up to a second after their last use; a training step gives it that time
CPU = torch.device("cpu")


class SyncBench(Bench):
    """One publish of a gigabyte by each transport, and apart from it what vLLM does to weights that have arrived."""

    def rows(self) -> list[Row]:
        """A row for each transport; vLLM's repacking is in the first one's details."""
        nbytes, transports = QUICK_BYTES if self.quick else GIGABYTE, available(self.device)
        variants = [
            Variant(name, publish, {"nbytes": nbytes, "device": self.device, "transport": name}) for name in transports
        ]
        trials = self.interleave("sync", variants, repeats=3 if self.quick else 9, warmups=FRESH)
        rows = [row_of(name, nbytes, trials[name]) for name in transports]
        if importlib.util.find_spec("vllm"):
            with model_of(SMALL if self.quick else FIFTY_MILLION) as model:
                variant = Variant("vllm", repack, {"model": model, "device": self.device})
                repacked = self.interleave("vLLM's repacking", [variant], repeats=3)["vllm"]
            more = {"vllm_repacking_s_per_gb": 1e9 * median(repacked, "seconds") / repacked[0]["nbytes"]}
            rows[0] = dataclasses.replace(rows[0], details={**rows[0].details, **more})
        return rows


def available(device: str) -> list[str]:
    """Transports that this machine has what they need for: NCCL wants a GPU for each process.

    Example:
        >>> available("cpu")
        ['object_store', 'gloo']
    """
    nccl = device == "cuda" and torch.cuda.device_count() > 1 and torch.distributed.is_nccl_available()
    return ["object_store", "gloo", *(["nccl"] if nccl else [])]


def row_of(transport: str, nbytes: int, trials: Sequence[Measurement]) -> Row:
    """What the trials of one transport say.

    The limit: every byte is copied once into shared memory, or once into each worker, and read by each worker, with
    work and bandwidth spread evenly over all cores.
    """
    copy_s, read_s, seconds = (median(trials, name) for name in ("copy_s", "read_s", "seconds"))
    stages = {name: median(trials, name) for name in ("pack_s", "store_s", "load_s", "first_s")}
    stored, workers, cpus = transport == "object_store", trials[0]["workers"], trials[0]["cpus"]
    copies = 1 if stored else workers
    return Row(
        name="sync/publish" if stored else f"sync/publish/{transport}",
        target=TARGET,
        baseline=copy_s,
        ours=seconds,
        ratio_is="bandwidth to each worker as a share of a memory copy's",
        baseline_is="numpy copy of the same bytes into memory that is mapped already",
        limit=(copies * copy_s + workers * read_s) / cpus,
        limit_is=f"one copy into {'shared memory' if stored else 'each worker'}, checksummed on its way, and one "
        f"checksum in each worker ({read_s:.3g} s on a core), all spread evenly over the cores",
        details={**stages, "gb_per_s_per_worker": nbytes / seconds / 1e9, "copy_gb_per_s": nbytes / copy_s / 1e9},
        notes=(
            f"{nbytes / 1e9:g} GB in {TENSORS} tensors to {workers} workers on one machine; every byte is checked to "
            "be finite and checksummed on both sides; first_s is a run's first publish",
            "vLLM's repacking of weights is not in it; vllm_repacking_s_per_gb is what it takes",
        ),
    )


def publish(nbytes: int, device: str, transport: str) -> Trial:
    """Ray with one learner and two workers; a trial copies the bytes once, then publishes them."""
    run = run_of(nbytes, transport)
    source = np.ones(nbytes, np.uint8)
    target = np.zeros_like(source)
    runner = asyncio.Runner()
    scratch = tempfile.TemporaryDirectory(prefix="stage-ray-bench-")
    atexit.register(scratch.cleanup)
    start_ray(run, Path(scratch.name))
    cluster = SyncCluster(run, None, nbytes, device)
    runner.run(cluster.setup())
    first: list[float] = []

    def trial() -> Measurement:
        version = runner.run(cluster.advance())
        time.sleep(FREE_S)
        copy_s, _ = timed(CPU, np.copyto, target, source)
        read_s, _ = timed(CPU, xxhash.xxh3_64_intdigest, source.data)
        seconds, _ = timed(CPU, lambda: runner.run(cluster.publish(version)))
        first.append(seconds)
        pack_s, loads = runner.run(cluster.loaded())
        values = [numbers for _, numbers in loads]
        if len(values[0]) != 1 or values != [values[0]] * len(loads):
            raise RuntimeError(f"the workers hold {values} instead of one published version")
        load_s = max(load_s for load_s, _ in loads)
        stages = {"pack_s": pack_s, "load_s": load_s, "store_s": seconds - pack_s - load_s, "first_s": first[0]}
        machine = {"copy_s": copy_s, "read_s": read_s, "workers": len(loads), "cpus": usable_cpus()}
        return {"seconds": seconds, **stages, **machine}

    return trial


def run_of(nbytes: int, transport: str) -> RunConfig:
    """A synchronous run of two rollout workers, with room for three versions in the object store."""
    gpus, workers = 0, WORKERS
    if transport == "nccl":
        gpus, workers = 1, min(WORKERS, torch.cuda.device_count() - 1)
    store = 200 + 3 * nbytes // 2**20
    return bench_run(
        rollout={"workers": workers, "gpus": gpus},
        learner={"gpus": gpus},
        cluster={"object_store_mb": store, "num_cpus": WORKERS + 2, "weight_transport": transport},
    )


def repack(model: str, device: str) -> Trial:
    """A vLLM engine that is given its own weights again and again."""
    settings = {"engine": "vllm", "images_per_batch": 2, "cpus": usable_cpus(), "gpus": float(device == "cuda")}
    rollout = RolloutConfig.model_validate(settings)
    engine = build_engine(PolicyConfig.model_validate({"path": model}), rollout, worker="bench")
    assert isinstance(engine, ImageEngine)
    tensors = {name: torch.zeros(shape) for name, shape in engine.weight_shapes().items()}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return lambda: {"seconds": timed(torch.device(device), engine.install, tensors)[0], "nbytes": nbytes}
