"""Two roles on the cores of one machine, at once and in turns.

At once rollout and learner have half of the cores each, as in a run; or all of them each, more threads than cores.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

from stage_ray.bench.base import Bench, Row, Trials, Variant, bench_run, interleave
from stage_ray.bench.inputs import SHIPPED, TRAIN
from stage_ray.bench.learner import random_groups
from stage_ray.bench.machine import timed
from stage_ray.config import RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.engines import build_engine
from stage_ray.learner.learner import Learner
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.records import RolloutRequest, image_seeds
from stage_ray.workers.threads import waiting

CPU = torch.device("cpu")
LOADS = ((8, 8), (8, 4), (8, 2), (2, 8))  # groups of 8 images: drawn, and trained meanwhile
STATIC = "the better of half of the cores each, at once, and of taking turns with all of them"


class RolesBench(Bench):
    """A step is over when both roles have done their share; the shares are more and less alike."""

    def rows(self) -> list[Row]:
        """What a run does by default, and what more threads than cores cost, for each pair of loads."""
        cores, loads = usable_cpus(), ((1, 1),) if self.quick else LOADS
        half = max(1, cores // 2)
        variants = [
            Variant(name, step, {"threads": threads, "turns": turns, "loads": loads})
            for name, threads, turns in (("half", half, False), ("turns", cores, True), ("all", cores, False))
        ]
        repeats = 1 if self.quick else 3
        trials = interleave(variants, repeats=repeats, progress=self.progress, title="two roles")
        rows = []
        for load in loads:
            half_s, turns_s, all_s = (median(trial[str(load)] for trial in trials[v.name]) for v in variants)
            case, best = "roles/{}-to-{}".format(*load), min(half_s, turns_s)
            shared: Any = {"baseline_is": STATIC, "details": {"half_s": half_s, "turns_s": turns_s, "all_s": all_s}}
            shared["notes"] = ("{} groups of 8 images drawn while {} are trained, torch engine".format(*load),)
            rows.append(Row(f"{case}/default", 0.95, best, half_s, "times as fast, half of the cores each", **shared))
            words = f"times as long, {cores} threads each"
            rows.append(Row(f"{case}/oversubscribed", 1.2, best, all_s, words, better="lower", **shared))
        return rows


def step(threads: int, turns: bool, loads: tuple[tuple[int, int], ...]) -> Trials:
    """Seconds of a step by loads, in two processes that have a run's environment."""
    os.environ.update({"OMP_NUM_THREADS": str(threads), **waiting(threads if turns else 2 * threads)})
    roles = [_start(make) for make in (_rollout, _learner)]

    def work(load: tuple[int, int]) -> None:
        for role, groups in zip(roles, load, strict=True):
            role.send(groups)
            if turns:
                role.recv()
        for role in () if turns else roles:
            role.recv()

    while True:
        yield {str(load): timed(CPU, work, load)[0] for load in loads}


def _start(make: Callable[[RunConfig], Callable[[int], object]]) -> Connection:
    """A role in a process of its own, loaded: works on as many groups as it is sent, then answers."""
    spawn = multiprocessing.get_context("spawn")
    pipe, other_end = spawn.Pipe()
    spawn.Process(target=_serve, args=(other_end, make), daemon=True).start()
    other_end.close()
    pipe.recv()
    return pipe


def _serve(pipe: Connection, make: Callable[[RunConfig], Callable[[int], object]]) -> None:
    rollout = {"engine": "torch", "dtype": "float32", "group_size": 8, "guidance_scale": 3.0}
    work = make(bench_run(SHIPPED, rollout=rollout, learner={"autocast": "off"}, pipeline={"max_staleness": 1}))
    pipe.send(None)
    while True:
        work(pipe.recv())
        pipe.send(None)


def _rollout(run: RunConfig) -> Callable[[int], object]:
    engine, prompts = build_engine(run.policy, run.rollout, worker="bench"), load_prompts(TRAIN)
    requests = [RolloutRequest(i, prompt, image_seeds(0, i, 8)) for i, prompt in enumerate(islice(prompts, 8))]
    return lambda groups: engine.generate(requests[:groups])


def _learner(run: RunConfig) -> Callable[[int], object]:
    learner = Learner(run)
    return lambda groups: learner.update(*random_groups(learner.policy, learner.version, groups))
