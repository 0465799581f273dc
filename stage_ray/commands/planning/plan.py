"""A whole plan: the split, what fits, what travels, how long a step takes, and what would change that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from stage_ray.commands.planning.links import Link, fullest, links
from stage_ray.commands.planning.memory import (
    BFLOAT16,
    FLOAT32,
    Lines,
    images_in_flight,
    learner_lines,
    learner_loading,
    reward_lines,
    rollout_lines,
    room,
    weight_bytes,
)
from stage_ray.commands.planning.snippet import config_of
from stage_ray.commands.planning.split import Split, Task, best_split
from stage_ray.commands.planning.timing import score_s
from stage_ray.config import RunConfig
from stage_ray.errors import ConfigError

RUNS = (2, 4, 16)
PUBLISHED_GROUPS = 8  # STAGE (arXiv 2509.25027): 8 GPUs with a group of 8 each


@dataclass(frozen=True, slots=True)
class Other:
    """The best plan where one thing is different; of several runs side by side, all together.

    Example:
        >>> Other("bf16 GPU to GPU", gpus=64, images=1024, step_s=16.0).images_per_s
        64.0
    """

    change: str
    gpus: int
    images: int
    step_s: float

    @property
    def images_per_s(self) -> float:
        """Images trained a second."""
        return self.images / self.step_s


@dataclass(frozen=True, slots=True)
class Plan:
    """What `stage-ray plan` says.

    Attributes:
        memory: by role, bytes on one GPU, line by line.
        step_s: of the simulated pipeline; ``estimate_s`` by the formula that the search for a split goes by.
    """

    task: Task
    split: Split
    memory: dict[str, Lines]
    most_in_flight: int
    links: list[Link]
    step_s: float
    estimate_s: float
    config: RunConfig
    others: list[Other]

    @property
    def images(self) -> int:
        """Images of a step."""
        return self.split.groups * self.task.group_size

    @property
    def fullest(self) -> Link:
        """The link that saturates first."""
        return fullest(self.links)

    def host_bytes(self) -> dict[str, int]:
        """Memory of a node's host, by role: what is easily forgotten.

        A node with rollout workers keeps two versions (the old one until every worker has the new). Each rank reads
        both models through the host, one at a time; the first one holds a whole version and the store its copies.
        """
        versions = 2 * weight_bytes(self.task.model)
        per_node = self.task.gpus_per_node
        learner = min(self.split.ranks, per_node) * self.task.model.total * FLOAT32
        rollout = min(self.split.rollouts, per_node) * self.task.model.total * BFLOAT16
        return {"rollout": rollout + versions, "learner": learner + weight_bytes(self.task.model) + versions}


def make_plan(task: Task) -> Plan:
    """Plan one run.

    Raises:
        ConfigError: something does not fit; names it and the mend.

    Example:
        make_plan(Task(model_sizes("janus-pro-7b"), gpu_named("h100"), gpus=64)).step_s
    """
    split = best_split(task)
    found = links(task, split)
    return Plan(
        task=task,
        split=split,
        memory={
            "rollout": rollout_lines(task.model, images=split.images_per_batch, dtype=task.dtype),
            "reward": reward_lines(),
            "learner": learner_lines(
                task.model,
                ranks=split.ranks,
                rows=split.cut.rows,
                dtype=task.dtype,
                checkpointing=split.cut.checkpointing,
            ),
        },
        most_in_flight=images_in_flight(task.model, task.gpu, dtype=task.dtype),
        links=found,
        step_s=step_seconds(task, split),
        estimate_s=split.step_s(task.max_staleness),
        config=config_of(task, split),
        others=_others(task),
    )


def step_seconds(task: Task, split: Split) -> float:
    """Expected seconds of a step: the driver's real stream over the planned stages."""
    from stage_ray.commands.planning.simulate import simulated_step_s  # the driver's stream, and with it Ray and torch

    scoring = score_s(task.gpu, split.call_groups * task.group_size)
    stages = {
        "wave": split.wave_s,
        "score": scoring,
        "update": split.cut.time.seconds + split.driver_s,
        "pack": split.pack_s,
        "transfer": split.transfer_s,
        "load": split.load_s,
    }
    return simulated_step_s(config_of(task, split), stages)


def _others(task: Task) -> list[Other]:
    changes = [(f"max_staleness {task.max_staleness + 1}", 1, replace(task, max_staleness=task.max_staleness + 1))]
    changes.append(("bf16 GPU to GPU (not built yet)", 1, replace(task, transport="nccl")))
    if task.groups_per_step is None:
        text = f"{PUBLISHED_GROUPS} groups a step, as published"
        changes.append((text, 1, replace(task, groups_per_step=PUBLISHED_GROUPS)))
    if task.gpus // RUNS[0] >= task.gpus_per_node:
        runs = [count for count in RUNS if task.gpus // count >= task.gpus_per_node]
        changes += [(f"{n} runs of {task.gpus // n} GPUs", n, replace(task, gpus=task.gpus // n)) for n in runs]
    found = []
    for change, runs_n, other in changes:
        try:
            split = best_split(other)
        except ConfigError:  # half the GPUs may not hold the model
            continue
        images = runs_n * split.groups * other.group_size
        found.append(Other(change, runs_n * split.gpus, images, step_seconds(other, split)))
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; sizes in bytes, times in seconds."""
    task, split = plan.task, plan.split
    return {
        "model": task.model.name,
        "gpu": task.gpu.name,
        "gpus": task.gpus,
        "gpus_per_node": task.gpus_per_node,
        "gpus_used": split.gpus,
        "split": {"rollout": split.rollouts, "reward": split.rewards, "learner": split.ranks},
        "groups_per_step": split.groups,
        "group_size": task.group_size,
        "images_per_step": plan.images,
        "images_per_batch": split.images_per_batch,
        "images_in_flight_at_most": plan.most_in_flight,
        "tensor_parallel": 1,
        "micro_batch_images": split.cut.rows,
        "gradient_checkpointing": split.cut.checkpointing,
        "max_staleness": task.max_staleness,
        "step_s": plan.step_s,
        "step_estimate_s": plan.estimate_s,
        "images_per_s": plan.images / plan.step_s,
        "stages_s": split.stages,
        "memory_bytes": plan.memory,
        "memory_room_bytes": room(task.gpu),
        "learner_loading_bytes": learner_loading(task.model),
        "host_bytes": plan.host_bytes(),
        "links": [
            {"what": link.what, "way": link.way, "bytes": link.bytes, "gb_per_s": link.gbs, "seconds": link.seconds}
            for link in plan.links
        ],
        "saturates_first": f"{plan.fullest.what}: {plan.fullest.way}",
        "others": [
            {"change": o.change, "gpus": o.gpus, "images": o.images, "step_s": o.step_s, "images_per_s": o.images_per_s}
            for o in plan.others
        ],
        "config": plan.config.model_dump(mode="json"),
        "measured": False,
    }
