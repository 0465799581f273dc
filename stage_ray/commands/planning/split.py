"""How GPUs and the batch are split: every choice tried on paper, the best one kept.

What is best: with a batch given, the shortest step. Else the shortest way to a result, step time x (1 + C / images):
the number of steps that a batch of B images needs goes as 1 + C / B (McCandlish et al., arXiv 1812.06162). C is not
known for this algorithm; the published runs use 64 and 128 images a step.

A GPU that shortens the step by less than `GPU_PRICE` is left idle. The choices for n GPUs are among those for n + 1,
and what uses more of them is only chosen where it is faster: more GPUs are never slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from stage_ray.commands.planning import timing
from stage_ray.commands.planning.gpus import GIB, Gpu
from stage_ray.commands.planning.memory import (
    images_in_flight,
    learner_lines,
    learner_loading,
    reward_lines,
    rollout_lines,
    room,
)
from stage_ray.commands.planning.models import ModelSizes
from stage_ray.errors import ConfigError

CRITICAL_IMAGES = 512
GPU_PRICE = 0.001
ROLES = 3  # rollout, reward and learner have a GPU each at least
EVENLY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
GROUPS_CALL = 8  # groups that a reward worker scores at once, at most


@dataclass(frozen=True, slots=True)
class Task:
    """What to plan for.

    Example:
        Task(KNOWN["janus-pro-7b"], GPUS["h100"], gpus=64)
    """

    model: ModelSizes
    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8
    group_size: int = 8
    groups_per_step: int | None = None
    max_staleness: int = 1
    dtype: str = "bfloat16"
    transport: Literal["store", "nccl"] = "store"


@dataclass(frozen=True, slots=True)
class LearnerCut:
    """How one rank's update is cut to fit: the fastest way that does."""

    rows: int
    checkpointing: bool
    time: timing.UpdateTime


@dataclass(frozen=True, slots=True)
class Split:
    """One choice, and the seconds of its stages. GPUs are filled in order: learner, rollout, reward."""

    rollouts: int
    rewards: int
    ranks: int
    groups: int
    wave_groups: int
    call_groups: int
    images_per_batch: int
    cut: LearnerCut
    wave_s: float
    load_s: float
    transfer_s: float
    pack_s: float
    score_s: float
    driver_s: float
    remote_nodes: int
    waves_each: int

    @property
    def gpus(self) -> int:
        """GPUs in use."""
        return self.rollouts + self.rewards + self.ranks

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of a step that each part is busy; they overlap with ``max_staleness`` above 0."""
        return {
            "rollout": self.waves_each * self.wave_s + self.load_s,
            "reward": self.score_s,
            "learner": self.cut.time.seconds + self.pack_s,
            "weights": self.transfer_s,
            "driver": self.driver_s,
        }

    def step_s(self, max_staleness: int) -> float:
        """An estimate: the slowest stage, or a batch's whole way over the batches under way, as in `bench pipeline`."""
        stages = self.stages
        return max(*stages.values(), sum(stages.values()) / (max_staleness + 1))


def best_split(task: Task) -> Split:
    """The best of all choices.

    Raises:
        ConfigError: something does not fit, whatever the split; names it and the mend.
    """
    most = _check(task)
    best: tuple[float, Split] | None = None
    # Those first that may be best, so that most are passed over: no step is shorter than the learner's part of it.
    learners = [
        (_cost(task, cut.time.seconds, groups, ranks + 2), ranks, groups, cut) for ranks, groups, cut in _learners(task)
    ]
    for least, ranks, groups, cut in sorted(learners, key=lambda learner: learner[0]):
        if best is not None and least >= best[0]:
            break
        for split in _splits(task, most, ranks, groups, cut):
            cost = _cost(task, split.step_s(task.max_staleness), split.groups, split.gpus)
            if best is None or cost < best[0]:
                best = (cost, split)
    if best is None:
        raise ConfigError(_no_learner(task))
    return best[1]


def _cost(task: Task, step_s: float, groups: int, gpus: int) -> float:
    """What is to be least."""
    steps = 1.0 if task.groups_per_step else 1 + CRITICAL_IMAGES / (groups * task.group_size)
    return step_s * steps * (1 + GPU_PRICE * gpus)


def _check(task: Task) -> int:
    """Images in flight that fit; raises where a role fits nowhere."""
    model, gpu, space = task.model, task.gpu, room(task.gpu)
    if task.gpus < ROLES:
        raise ConfigError(
            f"--gpus {task.gpus} is too few: rollout, reward and learner take one each; give --gpus 3 or more, "
            f"or let roles share a GPU by hand (rollout.gpus and learner.gpus of 0.5)"
        )
    most = images_in_flight(model, gpu, dtype=task.dtype)
    if most == 0:
        needed = sum(rollout_lines(model, images=1, dtype=task.dtype).values())
        other = "" if task.dtype == "bfloat16" else ", or take --dtype bfloat16"
        raise ConfigError(
            f"rollout does not fit: {model.name} with one image in flight needs {needed / GIB:.1f} GiB and {gpu.name} "
            f"has {space / GIB:.1f} GiB to fill; take a GPU with more memory or a smaller model{other}"
        )
    if learner_loading(model) > space:
        raise ConfigError(
            f"learner does not fit: every rank loads policy and reference of {model.name} whole in float32 before it "
            f"cuts them, {learner_loading(model) / GIB:.1f} GiB, and {gpu.name} has {space / GIB:.1f} GiB to fill; "
            f"take a GPU with more memory or a smaller model"
        )
    if sum(reward_lines().values()) > space:
        raise ConfigError(f"reward does not fit: {gpu.name} has {space / GIB:.1f} GiB to fill; take a larger GPU")
    return most


def _no_learner(task: Task) -> str:
    ranks = _ranks(task)
    lines = learner_lines(task.model, ranks=ranks[-1], rows=1, dtype=task.dtype, checkpointing=True)
    biggest = max(lines, key=lambda name: lines[name])
    return (
        f"learner does not fit: at {ranks[-1]} rank(s), one image a micro-batch and checkpointing each still needs "
        f"{sum(lines.values()) / GIB:.1f} GiB (most of it {biggest}) and {task.gpu.name} has "
        f"{room(task.gpu) / GIB:.1f} GiB to fill; give more --gpus, a GPU with more memory, or a "
        f"--groups-per-step that more ranks divide"
    )


def _ranks(task: Task) -> list[int]:
    """Ranks that may be, in order: those that divide the batch where it is given."""
    given = task.groups_per_step
    counts = [count for count in range(1, given + 1) if given % count == 0] if given else EVENLY
    return [count for count in counts if count <= task.gpus - 2]


def _learners(task: Task) -> Iterator[tuple[int, int, LearnerCut]]:
    """Ranks, groups a step and the cut that fits, where one does."""
    batches = [task.groups_per_step] if task.groups_per_step else [*EVENLY, 1536, 2048]
    for ranks in _ranks(task):
        for groups in (count for count in batches if count % ranks == 0):
            cut = best_cut(task, ranks, groups * task.group_size)
            if cut is not None:
                yield ranks, groups, cut


def _splits(task: Task, most: int, ranks: int, groups: int, cut: LearnerCut) -> Iterator[Split]:
    """What the other GPUs may do beside a learner."""
    left = task.gpus - ranks
    rollouts = [count for count in _counts(min(groups, left - 1)) if _take_turns(task, most, count, groups)]
    for rewards in (count for count in EVENLY if count <= min(groups, left - 1)):
        for count in rollouts:
            if count <= left - rewards:
                yield _split(task, most, count, rewards, ranks, groups, cut)


def _take_turns(task: Task, most: int, rollouts: int, groups: int) -> bool:
    """Whether each worker draws as many waves as the others: they take turns, and with one more some would lag."""
    wave_groups, waves_each = _waves(task, most, rollouts, groups)
    return waves_each * rollouts == math.ceil(groups / wave_groups)


def _waves(task: Task, most: int, rollouts: int, groups: int) -> tuple[int, int]:
    """Groups of a wave and waves of a worker, cut as `GroupStream` cuts them."""
    wave_groups = min(max(1, most // task.group_size), math.ceil(groups / rollouts))
    return wave_groups, math.ceil(math.ceil(groups / wave_groups) / rollouts)


def _counts(most: int) -> Iterator[int]:
    """Every number up to 64, then multiples of 8."""
    yield from range(1, min(most, 64) + 1)
    yield from range(72, most + 1, 8)


@lru_cache(maxsize=4096)
def best_cut(task: Task, ranks: int, images: int) -> LearnerCut | None:
    """The fastest micro-batch that fits: whole groups where one does, with or without checkpointing."""
    share, space = images // ranks, room(task.gpu)
    group = task.group_size
    sizes = [group * count for count in EVENLY if group * count <= share]
    parts = [count for count in range(1, group) if group % count == 0]
    cuts: list[LearnerCut] = []
    for rows in (*sizes, *parts):
        if rows < group and any(cut.rows >= group for cut in cuts):
            break
        for checkpointing in (False, True):
            lines = learner_lines(task.model, ranks=ranks, rows=rows, dtype=task.dtype, checkpointing=checkpointing)
            if sum(lines.values()) <= space:
                time = timing.update_time(
                    task.model,
                    task.gpu,
                    images=images,
                    ranks=ranks,
                    rows=rows,
                    dtype=task.dtype,
                    checkpointing=checkpointing,
                    gpus_per_node=task.gpus_per_node,
                )
                cuts.append(LearnerCut(rows, checkpointing, time))
    return min(cuts, key=lambda cut: cut.time.seconds, default=None)


def _split(task: Task, most: int, rollouts: int, rewards: int, ranks: int, groups: int, cut: LearnerCut) -> Split:
    """Fill in the seconds."""
    size, per_node = task.group_size, task.gpus_per_node
    wave_groups, waves_each = _waves(task, most, rollouts, groups)
    images = min(most, wave_groups * size)  # a group larger than a wave is drawn in several
    parts = math.ceil(wave_groups * size / images)
    first, last = ranks // per_node, (ranks + rollouts - 1) // per_node
    remote = last - first + 1 - (first == 0)
    call_groups = max(1, min(GROUPS_CALL, wave_groups, groups // rewards))  # a call never spans two waves
    calls = math.ceil(groups / wave_groups) * math.ceil(wave_groups / call_groups)
    if task.transport == "nccl":
        pack = load = timing.nccl_transfer_s(task.model, task.gpu)
        transfer = 0.0
    else:
        pack = timing.pack_s(task.model, task.gpu, ranks=ranks, gpus_per_node=per_node)
        load = timing.load_s(task.model, task.gpu, min(rollouts, per_node))
        transfer = timing.transfer_s(task.model, task.gpu, remote)
    return Split(
        rollouts=rollouts,
        rewards=rewards,
        ranks=ranks,
        groups=groups,
        wave_groups=wave_groups,
        call_groups=call_groups,
        images_per_batch=images,
        cut=cut,
        wave_s=parts * _wave_s(task.model, task.gpu, images, task.dtype),
        load_s=load,
        transfer_s=transfer,
        pack_s=pack,
        score_s=math.ceil(calls / rewards) * timing.score_s(task.gpu, call_groups * size),
        driver_s=groups * timing.DRIVER_S,
        remote_nodes=remote,
        waves_each=waves_each,
    )


@lru_cache(maxsize=4096)
def _wave_s(model: ModelSizes, gpu: Gpu, images: int, dtype: str) -> float:
    return timing.wave_s(model, gpu, images=images, dtype=dtype)
