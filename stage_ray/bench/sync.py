"""Weight sync: a version from the learner to two rollout workers, by each transport, against one memory copy of it."""

from __future__ import annotations

import asyncio
import atexit
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from stage_ray.bench.limits import synchronize
from stage_ray.bench.models import FIFTY_MILLION, SMALL, model_of
from stage_ray.bench.rows import Row, median
from stage_ray.bench.sync_actors import ROW, TENSORS, SyncCluster, SyncLearner, SyncRolloutWorker
from stage_ray.bench.timing import Facts, Trial, Variant, compare
from stage_ray.cluster.runtime import start_ray
from stage_ray.config import PolicyConfig, RolloutConfig, RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.config.load import validate_config
from stage_ray.engines.batching import BatchEngine
from stage_ray.observability.progress import Progress

WORKERS = 2
GIGABYTE, QUICK_BYTES = 7813 * ROW, 500 * ROW
TARGET = 0.5
STORED = (
    ", and read by all workers where it lies in shared memory; beyond the limit: pack_s reads all bytes twice "
    "(checksum, finite) before store_s copies them, which Ray does little faster than one core; each stage waits for "
    "the one before, and calls take some ms; first_s is a run's first publish: it and the second touch fresh shared "
    "memory, which later ones use again"
)
PASSED = (
    "; beyond the limit: pack_s reads all bytes twice before load_s begins, in which one tensor after another goes "
    "through a socket and the kernel copies it twice; first_s is a run's first publish, which connects the processes"
)
FRESH = 2  # publishes until there is memory to use again: one version is served while the next one is stored
FREE_S = 1.2  # Ray frees objects up to a second after their last use; a training step gives it that time


def bench(*, device: str, quick: bool, progress: Progress) -> list[Row]:
    """One publish of a gigabyte by each transport, and apart from it what vLLM does to weights that have arrived."""
    size = QUICK_BYTES if quick else GIGABYTE
    transports = available(device)
    sides = [Variant(name, sync_side, {"nbytes": size, "device": device, "transport": name}) for name in transports]
    repeats = 3 if quick else 9
    facts = compare(sides, repeats=repeats, progress=progress, title="sync", warmups=FRESH)
    repack = repacking(device, quick, progress) if importlib.util.find_spec("vllm") else {}
    return [row_of(name, size, facts[name], repack if name == transports[0] else {}) for name in transports]


def available(device: str) -> list[str]:
    """Transports that this machine has what they need for: NCCL wants a GPU for each process.

    Example:
        >>> available("cpu")
        ['object_store', 'gloo']
    """
    nccl = device == "cuda" and torch.cuda.device_count() > 1 and torch.distributed.is_nccl_available()
    return ["object_store", "gloo", "nccl"] if nccl else ["object_store", "gloo"]


def row_of(transport: str, size: int, facts: Sequence[Facts], repack: Mapping[str, float]) -> Row:
    """What the turns of one transport say."""
    copy, read, seconds = (median(facts, name) for name in ("copy_s", "read_s", "seconds"))
    stages = {f"{name}_s": median(facts, f"{name}_s") for name in ("pack", "store", "load", "first")}
    stored, workers, cpus = transport == "object_store", facts[0]["workers"], facts[0]["cpus"]
    return Row(
        name="sync/publish" if stored else f"sync/publish/{transport}",
        ratio=copy / seconds,
        target=TARGET,
        ratio_is="bandwidth to each worker as a share of a memory copy's",
        baseline_is="numpy copy of the same bytes into memory that is mapped already",
        baseline=copy,
        ours=seconds,
        limit=least_seconds(copy, read, cpus, copies=1 if stored else workers, workers=workers),
        limit_is=f"one copy into {'shared memory' if stored else 'each worker'}, checksummed on its way, and one "
        f"checksum in each worker ({read:.3g} s on a core), all spread evenly over the cores",
        details={**stages, "gb_per_s_per_worker": size / seconds / 1e9, "copy_gb_per_s": size / copy / 1e9, **repack},
        notes=(
            f"{size / 1e9:g} GB in {TENSORS} tensors to {workers} workers on one machine; every byte is checked to be "
            "finite and checksummed on both sides" + (STORED if stored else PASSED),
            "vLLM's repacking of weights is not in it; vllm_repacking_s_per_gb is what it takes",
        ),
    )


def least_seconds(copy_s: float, read_s: float, cpus: int, *, copies: int, workers: int) -> float:
    """Of a publish that copies every byte and has it read by each worker, with work and bandwidth on all cores.

    Example:
        >>> least_seconds(copy_s=1.0, read_s=0.5, cpus=2, copies=1, workers=2)
        1.0
    """
    return (copies * copy_s + workers * read_s) / cpus


def sync_side(nbytes: int, device: str, transport: str = "object_store") -> Trial:
    """Ray with one learner and two workers; a turn copies the bytes once, then publishes them."""
    run = run_of(nbytes, transport)
    source = np.ones(nbytes, np.uint8)
    target = np.zeros_like(source)
    first: list[float] = []
    runner = asyncio.Runner()
    scratch = tempfile.TemporaryDirectory(prefix="stage-ray-bench-")
    atexit.register(scratch.cleanup)
    start_ray(run, Path(scratch.name))
    cluster = SyncCluster(run, None, nbytes, device)

    async def ready() -> None:
        await asyncio.gather(cluster.rollouts.ready(), cluster.learner.actor.ready(None))

    async def loaded() -> tuple[float, list[tuple[float, list[float]]]]:
        pack_s = await cluster.learner.call(lambda learner: learner.ask(SyncLearner.pack_s))
        actors = cluster.rollouts.actors
        return pack_s, [await actor.call(lambda worker: worker.ask(SyncRolloutWorker.loaded), None) for actor in actors]

    runner.run(ready())

    def turn() -> Facts:
        version = runner.run(cluster.learner.call(lambda learner: learner.ask(SyncLearner.advance)))
        time.sleep(FREE_S)
        copy_s, read_s = timed(lambda: np.copyto(target, source)), timed(lambda: xxhash.xxh3_64_intdigest(source.data))
        seconds = timed(lambda: runner.run(cluster.publish(version)))
        first.append(seconds)
        pack_s, loads = runner.run(loaded())
        values = [numbers for _, numbers in loads]
        if len(values[0]) != 1 or values != [values[0]] * len(loads):
            raise RuntimeError(f"the workers hold {values} instead of one published version")
        load_s = max(load_s for load_s, _ in loads)
        facts = {"copy_s": copy_s, "read_s": read_s, "seconds": seconds, "pack_s": pack_s, "load_s": load_s}
        return {
            **facts,
            "store_s": seconds - pack_s - load_s,
            "first_s": first[0],
            "workers": len(loads),
            "cpus": usable_cpus(),
        }

    return turn


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_of(nbytes: int, transport: str) -> RunConfig:
    """A synchronous run of two rollout workers, with room for three versions in the object store."""
    gpus, workers = 0, WORKERS
    if transport == "nccl":
        gpus, workers = 1, min(WORKERS, torch.cuda.device_count() - 1)
    data = {
        "steps": 1,
        "prompts": {"train": "none"},
        "policy": {"path": "none"},
        "rollout": {"workers": workers, "gpus": gpus},
        "learner": {"gpus": gpus},
        "rewards": [{"type": "geneval"}],
        "evaluation": {"enabled": False},
        "cluster": {
            "object_store_mb": 200 + 3 * nbytes // 2**20,
            "num_cpus": WORKERS + 2,
            "weight_transport": transport,
        },
    }
    return validate_config(data)


def repacking(device: str, quick: bool, progress: Progress) -> dict[str, float]:
    """Seconds a gigabyte that vLLM needs to take weights that lie ready."""
    with model_of(SMALL if quick else FIFTY_MILLION) as model:
        sides = [Variant("vllm", repack_side, {"model": model, "device": device})]
        facts = compare(sides, repeats=3, progress=progress, title="vLLM's repacking")["vllm"]
    return {"vllm_repacking_s_per_gb": median(facts, "seconds") / facts[0]["nbytes"] * 1e9}


def repack_side(model: str, device: str) -> Trial:
    """A vLLM engine that is given its own weights again and again."""
    from stage_ray.engines import build_engine

    settings = {"engine": "vllm", "images_per_batch": 2, "cpus": usable_cpus(), "gpus": float(device == "cuda")}
    rollout = RolloutConfig.model_validate(settings)
    engine = build_engine(PolicyConfig.model_validate({"path": model}), rollout, worker="bench")
    assert isinstance(engine, BatchEngine)
    tensors = {name: torch.zeros(shape) for name, shape in engine.weight_shapes().items()}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())

    def turn() -> Facts:
        start = time.perf_counter()
        engine.install(tensors)
        synchronize(torch.device(device))
        return {"seconds": time.perf_counter() - start, "nbytes": nbytes}

    return turn
