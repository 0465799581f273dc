"""End to end: images trained a second by a real run of the default job, against one process doing the same update."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stage_ray.bench.base import Bench, Row, median
from stage_ray.bench.baselines import SingleProcessTrainer
from stage_ray.bench.limits import Speed, Work, learner_dtype, machine, rollout_dtype, timed
from stage_ray.bench.timing import Measurement, Trial, Variant
from stage_ray.config.load import load_config
from stage_ray.errors import ConfigError, RunError
from stage_ray.policies.devices import device_for

CONFIG = Path(__file__).parents[2] / "configs" / "stage_shapeworld.yaml"
TARGET = 2.5
PLAIN = (
    "a single-process trainer in the style of the published one: plain key-value-cache loop, decode, score, "
    "teacher-forced policy and reference with all logits, backward, AdamW"
)


class EndToEndBench(Bench):
    """Short runs of both in turn; the first steps of each are warm-up."""

    def rows(self) -> list[Row]:
        """The claim, from the seconds of all steps that count.

        Raises:
            ConfigError: the default job's config, which lies beside the package in a checkout, is not there.
        """
        if not CONFIG.is_file():
            raise ConfigError(f"bench end-to-end needs {CONFIG}; run it from a checkout with `make install`")
        steps, skipped = (4, 2) if self.quick else (12, 3)
        changes = overrides(self.device, steps)
        run, options = load_config(CONFIG, changes), {"overrides": changes, "skipped": skipped}
        dtypes = rollout_dtype(run.rollout.dtype, self.device), learner_dtype(run)
        variants = [
            Variant("single-process", single_process, options),
            Variant("stage-ray", train_command, options),
            machine(self.device, *dtypes),
        ]
        trials = self.interleave("end-to-end", variants, repeats=1 if self.quick else 3, warmups=0)
        plain_s, seconds = (
            statistics.median(s for trial in trials[variant.name] for s in trial["step_s"]) for variant in variants[:2]
        )
        wall, images = (
            median(trials["stage-ray"], "ledger_step_s"),
            run.rollout.group_size * run.rollout.groups_per_step,
        )
        # Sampling and the update one after the other at the machine's best; scoring and decoding not counted.
        work, speed = Work.of_checkpoint(run.policy.path), Speed.of(trials["machine"])
        prompt, tokens = (trials["single-process"][0][name] for name in ("prompt", "tokens"))
        sampling, _ = work.sampling_limit(rows=2 * images, prompt=prompt, tokens=tokens, speed=speed, dtype=dtypes[0])
        update, _ = work.update_limit(tokens=images * (tokens + prompt - 1), speed=speed, dtype=dtypes[1])
        row = Row(
            name="end-to-end/shapeworld",
            target=TARGET,
            baseline=plain_s,
            ours=seconds,
            ratio_is="times as many images trained a second",
            baseline_is=PLAIN,
            limit=sampling + update,
            limit_is=f"sampling {sampling:.3g} s, then the update {update:.3g} s, at the machine's best",
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
        return [row]


def overrides(device: str, steps: int) -> list[str]:
    """The default job, cut short and without what is not training; on a GPU, rollouts and learner share it."""
    gpus = 0.5 if device == "cuda" else 0.0
    more = ("evaluation.enabled=false", "cluster.metrics_port=null")
    return [f"steps={steps}", *more, f"rollout.gpus={gpus}", f"learner.gpus={gpus}"]


def single_process(overrides: list[str], skipped: int) -> Trial:
    """The baseline: as many steps as a run has, in this process."""
    run = load_config(CONFIG, overrides)
    trainer, device = SingleProcessTrainer(run), device_for(run.learner.gpus)
    lengths = {"prompt": len(trainer.prompts[0][1].conditional), "tokens": trainer.learner.policy.image_tokens}

    def trial() -> Measurement:
        return {**lengths, "step_s": [timed(device, trainer.step)[0] for _ in range(run.steps)][skipped:]}

    return trial


def train_command(overrides: list[str], skipped: int) -> Trial:
    """Ours: each trial is ``stage-ray train`` as a person starts it."""
    settings = [argument for override in overrides for argument in ("--set", override)]

    def trial() -> Measurement:
        with tempfile.TemporaryDirectory(prefix="stage-ray-bench-run-") as scratch:
            run_dir = Path(scratch) / "run"
            command = [sys.executable, "-m", "stage_ray", "train", str(CONFIG), "--run-dir", str(run_dir), *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [""])[-1]
                raise RunError(f"stage-ray train ended with exit code {done.returncode}: {last}")
            return {"step_s": step_seconds(run_dir)[skipped:], "ledger_step_s": ledger_step(run_dir, skipped)}

    return trial


def step_seconds(run_dir: Path) -> list[float]:
    """Seconds of every step as ``metrics.jsonl`` tells them: its images by its ``images_per_s``."""
    lines = _json_lines(run_dir / "metrics.jsonl")
    return [line["images"] / line["images_per_s"] for line in lines if "images_per_s" in line]


def ledger_step(run_dir: Path, skipped: int) -> float:
    """Mean seconds from one trained step to the next by the ledger's clock, after the first ``skipped`` steps."""
    events = _json_lines(run_dir / "ledger.jsonl")
    times = {event["step"]: event["time"] for event in events if event["event"] == "trained"}
    counted = [times[step] for step in sorted(times)][max(0, skipped - 1) :]
    return (counted[-1] - counted[0]) / (len(counted) - 1)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
