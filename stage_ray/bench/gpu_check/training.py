"""Checks of the learner: its update against the CPU's, its state on disk, weights on their way, and a short run."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from stage_ray.actors.client import free_address
from stage_ray.bench.base import bench_run
from stage_ray.bench.gpu_check.base import Figures, Setting, SkippedError, require
from stage_ray.bench.gpu_check.models import model_path
from stage_ray.bench.gpu_check.sampling import draw, start_engine
from stage_ray.bench.learner import GROUP_SIZE, GROUPS, random_groups
from stage_ray.config import RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.learner.learner import Learner
from stage_ray.learner.ranks import Ranks
from stage_ray.observability.metrics_logger import METRICS_FILE, read_steps
from stage_ray.records import Prompt, RolloutGroup, ScoredGroup, WeightManifest
from stage_ray.rewards.base import RewardOutput
from stage_ray.weights.manifest import describe
from stage_ray.weights.process_groups import BroadcastGroup, GroupMember

HOST = "127.0.0.1"
MEETING_S = 60.0  # to connect two processes, and again for what they exchange
STATES = ("state-first", "state-second")
STEPS = 10
SAME = {"rel_tol": 1e-2, "abs_tol": 1e-4}  # float32 on two kinds of hardware, sums in another order


class Brightness:
    """A scorer for models of noise: the mean of an image's pixels, 0..1."""

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Scores of uint8 [B, H, W, 3]."""
        scores = (images.mean(axis=(1, 2, 3)) / 255).astype(np.float32)
        return RewardOutput(scores, np.ones(len(scores), bool), tuple({} for _ in scores))


def learner_run(setting: Setting, *, gpus: float, lr: float = 1e-4, micro_batch: int = 4, size: int = 8) -> RunConfig:
    """A run on the exact model, in float32; groups may be one update old."""
    return bench_run(
        model_path(setting, "exact"),
        rollout={"group_size": size, "groups_per_step": GROUPS, "guidance_scale": 3.0},
        learner={"gpus": gpus, "lr": lr, "micro_batch_images": micro_batch, "autocast": "off"},
        pipeline={"max_staleness": 1},
    )


def update(setting: Setting, figures: Figures) -> None:
    """Two updates from an engine's groups with next to no learning rate, in pieces, and on the CPU in one piece.

    In the second one the groups are old, so that the ratio is taken against what the engine recorded; the weights have
    hardly moved, so it is 1.
    """
    engine = start_engine(setting, "torch", "float32")
    with closing(engine):
        groups = draw(engine)
    size = len(groups[0].seeds)
    options: Any = {"lr": 1e-9, "size": size}
    ours = Learner(learner_run(setting, gpus=float(setting.device == "cuda"), micro_batch=4, **options))
    cpu = Learner(learner_run(setting, gpus=0.0, micro_batch=GROUPS * size, **options))
    scored = scores_of(groups)
    for when in ("fresh", "old"):
        found, expected = ours.update(groups, scored), cpu.update(groups, scored)
        ratios = {name: found[f"ratio/{name}"] for name in ("mean", "max")}
        figures |= {f"{when}_loss": found["loss"], f"{when}_grad_norm": found["grad_norm"]}
        figures |= {f"{when}_ratio_{name}": value for name, value in ratios.items()}
        require(math.isfinite(found["loss"]), f"the loss is {found['loss']}")
        require(math.isfinite(found["grad_norm"]) and found["grad_norm"] > 0, "there is no gradient")
        require(all(abs(value - 1) < 0.02 for value in ratios.values()), f"ratios are {ratios}, not 1")
        for name, value in expected.items():
            good = name.startswith(("time/", "mfu/")) or math.isclose(found[name], value, **SAME)
            require(good, f"{name} is {found[name]:.6g}, on the CPU it is {value:.6g}")
    figures["mismatch_nats"] = found["mismatch/with_drift_abs_logprob"]


def scores_of(groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
    """Different scores for every image."""
    noise = np.random.default_rng(0)
    scored = []
    for group in groups:
        scores = noise.random((len(group.seeds), 1)).astype(np.float32)
        details = tuple(dict[str, Any]() for _ in scores)
        scored.append(ScoredGroup(group.group_id, ("geneval",), scores, np.ones(scores.shape, bool), details, 0.0))
    return scored


def checkpoint(setting: Setting, figures: Figures) -> None:
    """Save after an update, load into a learner that knows nothing of it, save again: the same bits in every shard.

    Two ranks with a shard each where there are two GPUs, and on a CPU; else one.
    """
    ranks = 2 if setting.device == "cpu" or torch.cuda.device_count() > 1 else 1
    address = free_address(HOST)
    with _processes(ranks) as pool:
        calls = [pool.submit(save_and_load, setting, rank, ranks, address) for rank in range(ranks)]
        found = [call.result() for call in calls]
    figures |= {"ranks": ranks, **found[0]}
    first, second = (saved(setting.scratch / name) for name in STATES)
    require(first.keys() == second.keys(), f"the second state has other tensors: {first.keys() ^ second.keys()}")
    changed = [name for name, value in first.items() if not torch.equal(value, second[name])]
    require(not changed, f"{len(changed)} tensors changed on disk, the first is {changed[:1]}")


def saved(directory: Path) -> dict[str, torch.Tensor]:
    """Every shard's tensors as bytes, by file and name."""
    files = sorted((directory / "shards").iterdir())
    return {
        f"{file.name}/{name}": value.view(-1).view(torch.uint8)
        for file in files
        for name, value in load_file(file).items()
    }


def save_and_load(setting: Setting, rank: int, ranks: int, address: str) -> Figures:
    """What each rank does; the figures of its own."""
    device = _see_gpu(setting, rank)
    team = Ranks.init_process_group(rank, ranks, address, device, MEETING_S)
    run = learner_run(setting, gpus=float(device.type == "cuda"), size=GROUP_SIZE)
    first, second = (setting.scratch / name for name in STATES)
    threads = max(1, usable_cpus() // ranks)
    learner = Learner(run, threads, team)
    learner.update(*random_groups(learner.policy, 0))
    start = time.perf_counter()
    written = learner.save_state(first)
    save_s = time.perf_counter() - start
    other = Learner(run, threads, team)
    start = time.perf_counter()
    other.load_state(first)
    load_s = time.perf_counter() - start
    other.save_state(second)
    require(other.version == 1, f"the loaded state is of version {other.version}, not 1")
    require(len(written) == ranks, f"{ranks} ranks wrote {len(written)} shards")
    size = sum(file.bytes for file in written.values()) / 2**20
    return {"mib": size, "save_s": save_s, "load_s": load_s}


def broadcast(setting: Setting, figures: Figures) -> None:
    """A version from one process to another by NCCL, verified where it arrives (on a CPU: by gloo)."""
    cuda = setting.device == "cuda"
    if cuda and torch.cuda.device_count() < 2:
        raise SkippedError("NCCL takes one process a GPU, and this machine has one GPU")
    nbytes = 2**22 if setting.small else 2**30
    device = _see_gpu(setting, 0)
    tensors = [(f"layer.{n}", torch.randn(nbytes // 4 // 8, device=device)) for n in range(8)]
    manifest, group = describe(1, tensors, device), BroadcastGroup()
    member = GroupMember(0, group.open(HOST, MEETING_S), 0, 2, "nccl" if cuda else "gloo", MEETING_S)
    with _processes(1) as pool:
        call = pool.submit(receive, setting, member, manifest)
        seconds = []
        for _ in range(2):  # the first one connects
            start = time.perf_counter()
            group.send(member, tensors)
            seconds.append(time.perf_counter() - start)
        totals = call.result()
    require(totals == [float(t.double().sum()) for _, t in tensors], "what arrived is not what was sent")
    figures |= {"mib": nbytes / 2**20, "first_s": seconds[0], "second_s": seconds[1]}
    figures["gb_per_s"] = nbytes / 1e9 / seconds[1]


def receive(setting: Setting, sender: GroupMember, manifest: WeightManifest) -> list[float]:
    """In the other process: take the version twice; sums of the second one's tensors."""
    _see_gpu(setting, 1)
    group = BroadcastGroup()
    member = GroupMember(sender.number, sender.address, 1, sender.count, sender.backend, sender.timeout_s)
    for _ in range(2):
        tensors = group.receive(member, manifest)
    return [float(tensor.double().sum()) for _, tensor in tensors]


def short_run(setting: Setting, figures: Figures, limit_s: float) -> None:
    """Ten steps of ``stage-ray train`` at Janus-Pro-1B's shapes, engine and learner taking turns on one GPU."""
    share = 0.5 if setting.device == "cuda" else 0.0
    engine = "vllm" if importlib.util.find_spec("vllm") else "torch"
    changes = [f"steps={STEPS}", f"policy.path={model_path(setting, 'large')}", f"rollout.engine={engine}"]
    changes += ["evaluation.enabled=false", "cluster.metrics_port=null", "pipeline.max_staleness=0"]
    changes += ["rollout.colocated=true", f"rollout.gpus={share}", f"learner.gpus={share}", "rollout.dtype=auto"]
    changes += ["rollout.groups_per_step=2", "rollout.images_per_batch=16", "rollout.max_prompt_tokens=64"]
    changes += ["learner.autocast=auto", "learner.micro_batch_images=null", "learner.lr=1e-6"]
    changes += [f"rewards=[{{type: {__name__}.Brightness}}]"]
    run_dir = setting.scratch / "run"
    command = [sys.executable, "-m", "stage_ray", "train", "stage_shapeworld", "--run-dir", str(run_dir)]
    command += [word for change in changes for word in ("--set", change)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    figures["whole_run_s"] = time.perf_counter() - start
    rows = read_steps(run_dir / METRICS_FILE)
    figures["steps"] = len(rows)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    require(done.returncode == 0, f"stage-ray train ended with exit code {done.returncode}: {last}")
    require(len(rows) == STEPS, f"the run has {len(rows)} steps, not {STEPS}")
    later = rows[2:]  # the first two warm up
    figures["images_per_s"] = median(row["images_per_s"] for row in later)
    figures["tokens_per_s"] = median(row["images_per_s"] * row["tokens"] / row["images"] for row in later)
    for name in ("loss", "grad_norm", "mismatch/abs_logprob", "mfu/rollout", "mfu/learner"):
        if values := [row[name] for row in later if name in row]:
            figures[name.replace("/", "_")] = median(values)
    require(all(math.isfinite(row["loss"]) for row in rows), "a loss is not finite")
    require(all(row["grad_norm"] > 0 for row in rows), "a step has no gradient")


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def _see_gpu(setting: Setting, number: int) -> torch.device:
    """Let this process see one GPU alone, as Ray does; before it uses any."""
    if setting.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number]
    return torch.device(setting.device)
