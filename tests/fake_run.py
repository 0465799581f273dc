"""A run directory as a run leaves it, made of invented numbers: for tests of what reads one, and for nothing else."""

import math
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from stage_ray.evaluation.base import EvaluationResult, find_benchmark, summarise, write_result
from stage_ray.observability.metrics_logger import MetricsLogger
from stage_ray.records import Prompt, ScoredGroup
from stage_ray.report.samples import contact_sheet

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PROMPTS = [
    Prompt(i, f"a photo of a <{task.replace('_', ' ')}> & more, number {i}", {"tag": task})
    for i, task in enumerate(TASKS * 6)
]
KEPT = tempfile.TemporaryDirectory(prefix="stage-ray-fake-runs-")  # removed when this process ends


def write_fake_run(
    run_dir: Path, steps: int = 60, planned: int = 60, examined: tuple[str, ...] = ("before", "after"), **after: object
) -> None:
    """``steps`` of ``planned`` updates, and the evaluations named in ``examined``; ``after`` are fields of that one."""
    if after:
        write_files(run_dir, steps, examined, after)
    else:
        shutil.copytree(written(steps, examined), run_dir)
    config = {"steps": planned, "seed": 20, "run_dir": str(run_dir), "evaluation": {"enabled": True}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


@cache
def written(steps: int, examined: tuple[str, ...]) -> Path:
    """A run to copy from: its pictures take seconds."""
    directory = Path(KEPT.name) / f"{steps}-{'-'.join(examined)}"
    write_files(directory, steps, examined, {})
    return directory


def write_files(run_dir: Path, steps: int, examined: tuple[str, ...], after: dict[str, object]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    recorder = MetricsLogger(run_dir, port=None, host="127.0.0.1")
    for step in range(1, steps + 1):
        recorder.step(step, metrics_of(step, noise))
        if step in (7, 8, 30):
            recorder.alarm(
                step, "entropy_collapse", f"token entropy is 1.{step} nats, the reference's 3.1; <raise> beta"
            )
    recorder.close()
    (run_dir / "evaluation").mkdir()
    for name in examined:
        chance = 0.55 if name == "before" else 0.7
        groups = [scored(i, prompt, chance, noise) for i, prompt in enumerate(PROMPTS)]
        found = replace(result(groups), **after if name == "after" else {})
        write_result(run_dir / "evaluation" / f"{name}.json", found)
        draw(run_dir / "evaluation" / f"{name}.png", chance, noise)
    for step in range(10, steps + 1, 10):
        draw(run_dir / "samples" / f"step-{step:06d}.png", 0.5 + step / 200, noise)


def result(groups: list[ScoredGroup]) -> EvaluationResult:
    return replace(summarise(find_benchmark("geneval"), PROMPTS, groups), conditions={"evaluation.seed": 20})


def metrics_of(step: int, noise: np.random.Generator) -> dict[str, float | None]:
    wobble = noise.normal(0, 1, 12)
    reward = 0.55 + 0.25 * (1 - math.exp(-step / 30)) + 0.03 * wobble[0]
    times = {"rollout": 1.6, "score": 0.3, "update": 1.9, "publish": 0.1}
    seconds = {f"time/{name}_s": value * (1 + 0.05 * wobble[1]) for name, value in times.items()}
    return {
        "reward/mean": reward,
        "reward/std": 0.2,
        "reward/informative": 0.9,
        "reward/geneval": reward,
        "reward/clip": 0.3 + 0.01 * wobble[2],
        "kl": 0.0005 * step * (1 + 0.1 * wobble[3]),
        "loss": 0.01 * wobble[4],
        "grad_norm": math.nan if step == 20 else 0.8 + 0.1 * wobble[5],
        "entropy/policy": 3.1 - 0.005 * step + 0.03 * wobble[6],
        "entropy/reference": 3.1 + 0.03 * wobble[7],
        "similarity/mean": 0.2 + 0.02 * wobble[8],
        "mismatch/abs_logprob": 0.004 + 0.0005 * wobble[9],
        "mismatch/max_abs_logprob": 0.04 + 0.004 * wobble[10],
        "staleness/max": 0.0,
        **seconds,
        "time/step_s": sum(seconds.values()) + 0.1,
        "images_per_s": 64 / (sum(seconds.values()) + 0.1),
    }


def scored(number: int, prompt: Prompt, chance: float, noise: np.random.Generator) -> ScoredGroup:
    right = noise.random(4) < chance
    details = tuple({"geneval": {"verdict": bool(one), "soft": 0.5 + 0.5 * one, "reason": ""}} for one in right)
    return ScoredGroup(number, ("geneval",), right.astype(np.float32)[:, None], np.ones((4, 1), bool), details, 0.0)


def draw(path: Path, chance: float, noise: np.random.Generator) -> None:
    images = np.full((12, 64, 64, 3), 236, np.uint8)
    for image in images:
        top, left = noise.integers(6, 36, 2)
        image[top : top + 20, left : left + 20] = noise.integers(0, 220, 3)
    contact_sheet(images, [prompt.text for prompt in PROMPTS[:12]], list(noise.random(12) < chance), path)
