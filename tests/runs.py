"""Runs on a tiny model that take seconds, and what their files say. Shared by all that start runs."""

from __future__ import annotations

import json
from pathlib import Path

from stage_ray.config import RunConfig
from stage_ray.config.load import validate_config
from stage_ray.observability.progress import Progress
from tests.plain import FAMILY

PROMPTS = ["a photo of a red circle", "a photo of two rings", "a photo of a blue square", "a photo of a triangle"]
CLOCKS = ("time/", "images_per_s", "busy/", "queue/")


def tiny_run(directory: Path, model: Path, scorer: str = "Brightness", **changes) -> RunConfig:
    """A run of four steps on the torch engine; ``changes`` are merged into the config, a section at a time."""
    prompts = directory / "prompts.txt"
    directory.mkdir(parents=True, exist_ok=True)
    prompts.write_text("\n".join(PROMPTS))
    options = changes.pop("options", {})
    data = {
        "steps": 4,
        "run_dir": str(directory / "run"),
        "prompts": {"train": str(prompts), "heldout": str(prompts)},
        "policy": {"path": str(model), "family": FAMILY if model.name == "plain" else "janus"},
        "rollout": {
            "engine": "torch",
            "group_size": 4,
            "groups_per_step": 2,
            "images_per_batch": 4,
            "dtype": "float32",
            "cpus": 0.5,
            "threads": 1,
        },
        "rewards": [{"type": f"tests.scorers.{scorer}", "options": options}],
        "scoring": {"groups_per_call": 1},
        "learner": {"lr": 1e-4, "autocast": "off", "micro_batch_images": 4, "threads": 1, "cpus": 0.5},
        "checkpoint": {"every": 2},
        "evaluation": {"images_per_prompt": 2, "sample_every": 2, "sample_prompts": 2},
        "cluster": {"object_store_mb": 128, "metrics_port": None},
    }
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_config(data)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clocks(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


class StopsAfter(Progress):
    """A driver that dies after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._last = step

    def step(self, step: int, total: int, metrics) -> None:
        super().step(step, total, metrics)
        if step == self._last:
            raise KeyboardInterrupt
