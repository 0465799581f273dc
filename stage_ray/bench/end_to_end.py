"""End to end: images trained a second by a real run of the default job, against one process doing the same update."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_ray.bench.limits import Speed, Work, probe_side
from stage_ray.bench.rows import Row
from stage_ray.bench.single_process import SingleProcessTrainer
from stage_ray.bench.timing import Facts, Trial, Variant, compare
from stage_ray.config import RunConfig
from stage_ray.config.load import load_config
from stage_ray.errors import ConfigError, RunError
from stage_ray.learner.precision import uses_bfloat16
from stage_ray.observability.progress import Progress
from stage_ray.policies.base import compute_dtype, device_for

CONFIG = Path(__file__).parents[2] / "configs" / "stage_shapeworld.yaml"
STEPS, SKIPPED, REPEATS = 12, 3, 3
QUICK_STEPS, QUICK_SKIPPED = 4, 2
TARGET = 2.5
PLAIN = (
    "a single-process trainer in the style of the published one: plain key-value-cache loop, decode, score, "
    "teacher-forced policy and reference with all logits, backward, AdamW"
)


def bench(*, device: str, quick: bool, progress: Progress) -> list[Row]:
    """Short runs of both, in turn; the first steps of each are warm-up."""
    steps, skipped = (QUICK_STEPS, QUICK_SKIPPED) if quick else (STEPS, SKIPPED)
    options = {"overrides": overrides(device, steps), "skipped": skipped}
    run = load_config(config_file(), overrides(device, steps))
    sides = [
        Variant("single-process", single_side, options),
        Variant("stage-ray", train_side, options),
        probe_side(device, ["float32", rollout_dtype_of(run), learner_dtype_of(run)]),
    ]
    repeats = 1 if quick else REPEATS
    facts = compare(sides, repeats=repeats, progress=progress, title="end-to-end", warmups=0)
    return [row_of(run, facts["single-process"], facts["stage-ray"], Speed.of(facts["machine"]))]


def row_of(run: RunConfig, single: Sequence[Facts], ours: Sequence[Facts], speed: Speed) -> Row:
    """The claim, from the seconds of all steps that count."""
    images = run.rollout.group_size * run.rollout.groups_per_step
    plain_s, seconds = (statistics.median(s for turn in side for s in turn["step_s"]) for side in (single, ours))
    wall = statistics.median(turn["ledger_step_s"] for turn in ours)
    limit, limit_is = limit_of(run, single[0], speed)
    return Row(
        name="end-to-end/shapeworld",
        ratio=plain_s / seconds,
        target=TARGET,
        ratio_is="times as many images trained a second",
        baseline_is=PLAIN,
        baseline=plain_s,
        ours=seconds,
        limit=limit,
        limit_is=limit_is,
        details={
            "baseline_images_per_s": images / plain_s,
            "images_per_s": images / seconds,
            "images_per_s_by_the_clock": images / wall,
            "ratio_by_the_clock": plain_s / wall,
        },
        notes=(
            f"seconds a step of {images} images; pipeline.max_staleness = {run.pipeline.max_staleness}, "
            f"rollout.engine = {run.rollout.engine}",
            "images_per_s is that of metrics.jsonl, which leaves out what a run writes between steps; "
            "by_the_clock is from one trained step to the next in ledger.jsonl",
        ),
    )


def limit_of(run: RunConfig, facts: Facts, speed: Speed) -> tuple[float, str]:
    """Sampling and the update one after the other at the machine's best; scoring and decoding not counted."""
    images = run.rollout.group_size * run.rollout.groups_per_step
    work: Work = facts["work"]
    tokens, prompt, dtype = facts["tokens"], facts["prompt"], rollout_dtype_of(run)
    sampling, _ = work.sampling_limit(rows=2 * images, prompt=prompt, tokens=tokens, speed=speed, dtype=dtype)
    positions = images * (tokens + prompt - 1)
    update, _ = work.update_limit(tokens=positions, speed=speed, dtype=learner_dtype_of(run))
    return sampling + update, f"sampling {sampling:.3g} s, then the update {update:.3g} s, at the machine's best"


def rollout_dtype_of(run: RunConfig) -> str:
    """What the engine multiplies in."""
    return str(compute_dtype(run.rollout.dtype, device_for(run.rollout.gpus))).removeprefix("torch.")


def learner_dtype_of(run: RunConfig) -> str:
    """What the learner multiplies in."""
    return "bfloat16" if uses_bfloat16(run.learner.autocast, device_for(run.learner.gpus)) else "float32"


def overrides(device: str, steps: int) -> list[str]:
    """The default job, cut short and without what is not training; on a GPU, rollouts and learner share it."""
    gpus = 0.5 if device == "cuda" else 0.0
    return [
        f"steps={steps}",
        "evaluation.enabled=false",
        "cluster.metrics_port=null",
        f"rollout.gpus={gpus}",
        f"learner.gpus={gpus}",
    ]


def config_file() -> Path:
    """The default job's config, which lies beside the package in a checkout.

    Raises:
        ConfigError: this is not a checkout.
    """
    if not CONFIG.is_file():
        raise ConfigError(f"bench end-to-end needs {CONFIG}; run it from a checkout with `make install`")
    return CONFIG


def single_side(overrides: list[str], skipped: int) -> Trial:
    """The baseline: as many steps as a run has, in this process."""
    run = load_config(config_file(), overrides)
    trainer = SingleProcessTrainer(run)

    def turn() -> Facts:
        seconds = [trainer.step() for _ in range(run.steps)][skipped:]
        return {"step_s": seconds, "work": trainer.work, "tokens": trainer.tokens, "prompt": trainer.prompt}

    return turn


def train_side(overrides: list[str], skipped: int) -> Trial:
    """Ours: each turn is ``stage-ray train`` as a person starts it."""
    arguments = [argument for override in overrides for argument in ("--set", override)]

    def turn() -> Facts:
        with tempfile.TemporaryDirectory(prefix="stage-ray-bench-run-") as scratch:
            run_dir = Path(scratch) / "run"
            command = [sys.executable, "-m", "stage_ray", "train", str(config_file()), "--run-dir", str(run_dir)]
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                last = next(iter(reversed(done.stderr.strip().splitlines())), "")
                raise RunError(f"stage-ray train ended with exit code {done.returncode}: {last}")
            return {"step_s": step_seconds(run_dir)[skipped:], "ledger_step_s": ledger_step(run_dir, skipped)}

    return turn


def step_seconds(run_dir: Path) -> list[float]:
    """Seconds of every step as ``metrics.jsonl`` tells them: its images by its ``images_per_s``."""
    rows = _json_lines(run_dir / "metrics.jsonl")
    return [row["images"] / row["images_per_s"] for row in rows if "images_per_s" in row]


def ledger_step(run_dir: Path, skipped: int) -> float:
    """Mean seconds from one trained step to the next by the ledger's clock, after the first ``skipped`` steps."""
    times: dict[int, float] = {}
    for event in _json_lines(run_dir / "ledger.jsonl"):
        if event["event"] == "trained":
            times[event["step"]] = event["time"]
    counted = [times[step] for step in sorted(times)][max(0, skipped - 1) :]
    return (counted[-1] - counted[0]) / (len(counted) - 1)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
