"""A plan as a config that `stage-ray train` takes."""

from __future__ import annotations

from typing import Any

import yaml

from stage_ray.commands.planning.memory import rollout_lines, vllm_share
from stage_ray.commands.planning.split import Split, Task
from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config

STEPS = 1600  # of the published runs
PATIENCE = 4  # times the planned seconds before a wait counts as a failure
HEAD = """\
# {name} on {used} x {gpu}: where to begin, as `stage-ray plan` reckons on paper.
# Needs those GPUs, and what is yours: prompts.train, rewards (any scorer of your own), and
# run_dir, on storage that driver and learner share.
"""


def config_of(task: Task, split: Split) -> RunConfig:
    """The plan as a validated config."""
    return validate_config(_data(task, split), source="the plan's own config")


def as_yaml(task: Task, split: Split) -> str:
    """The same as YAML, with what is left for a person to fill in said on top.

    Example:
        Path("run.yaml").write_text(as_yaml(task, split))
    """
    text = HEAD.format(name=task.model.name, used=split.gpus, gpu=task.gpu.name)
    return text + yaml.safe_dump(_data(task, split), sort_keys=False)


def _data(task: Task, split: Split) -> dict[str, Any]:
    lines = rollout_lines(task.model, images=split.images_per_batch, dtype=task.dtype)
    sync = split.transfer_s + split.load_s + split.waves_each * split.wave_s
    return {
        "steps": STEPS,
        "run_dir": f"/shared/runs/{task.model.name}",
        "prompts": {"train": "prompts.jsonl"},
        "policy": {"path": task.model.path},
        "rollout": {
            "engine": "vllm",
            "workers": split.rollouts,
            "gpus": 1,
            "dtype": task.dtype,
            "group_size": task.group_size,
            "groups_per_step": split.groups,
            "images_per_batch": split.images_per_batch,
            "gpu_memory_utilization": vllm_share(lines, task.gpu),
        },
        "rewards": [{"type": "geneval", "options": {"detector": "your_package.YourDetector"}}],
        "scoring": {
            "workers": split.rewards,
            "gpus": 1,
            "groups_per_call": split.call_groups,
        },
        "learner": {
            "ranks": split.ranks,
            "gpus": 1,
            "micro_batch_images": split.cut.rows,
            "gradient_checkpointing": split.cut.checkpointing,
            "autocast": "off" if task.dtype == "float32" else "bfloat16",
        },
        "pipeline": {"max_staleness": task.max_staleness},
        "evaluation": {"enabled": False},
        "cluster": {
            "sync_timeout_s": float(max(120, 60 * round(PATIENCE * sync / 60))),
            "start_timeout_s": 1800.0,
        },
    }
