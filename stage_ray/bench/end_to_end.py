"""End to end: images trained a second by a real run of the default job, against one process doing the same update."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from stage_ray.bench.base import Bench, Row, Trials, Variant, interleave
from stage_ray.bench.baselines import SingleProcessTrainer
from stage_ray.bench.machine import best, dtype_name, machine, sampling_limit, throughput, timed, update_limit
from stage_ray.config.flops import forward_flops, sampling_flops, training_flops
from stage_ray.config.load import load_config
from stage_ray.errors import RunError
from stage_ray.observability.metrics_logger import METRICS_FILE, read_steps
from stage_ray.policies.devices import device_for
from stage_ray.policies.janus.builder import checkpoint_sizes

CONFIG = "stage_shapeworld"
PLAIN = "a single-process trainer: plain key-value-cache loop, decode, score, update with all logits at once"


class EndToEndBench(Bench):
    """Short runs of both in turn; the first steps of each are warm-up."""

    def rows(self) -> list[Row]:
        """The config as it is and with the fastest engine, from the seconds of all steps that count."""
        steps, skipped, repeats = (4, 2, 1) if self.quick else (12, 3, 3)
        gpus = 0.5 if self.device == "cuda" else 0.0  # rollouts and learner share a GPU
        changes = [f"steps={steps}", "evaluation.enabled=false", "cluster.metrics_port=null"]
        changes += [f"rollout.gpus={gpus}", f"learner.gpus={gpus}"]
        run, options = load_config(CONFIG, changes), {"overrides": changes, "skipped": skipped}
        dtypes = [dtype_name(setting, self.device) for setting in (run.rollout.dtype, run.learner.autocast)]
        ours = {run.rollout.engine: options, "torch": {**options, "overrides": [*changes, "rollout.engine=torch"]}}
        variants = [Variant("plain", single_process, options), machine(self.device, *dtypes)]
        variants += [Variant(engine, train_command, its_options) for engine, its_options in ours.items()]
        trials = interleave(variants, repeats=repeats, warmups=0, progress=self.progress, title="end-to-end")
        step_s = {name: median(s for trial in trials[name] for s in trial["step_s"]) for name in ("plain", *ours)}
        plain_s, default, fastest = step_s["plain"], run.rollout.engine, min(ours, key=step_s.__getitem__)
        images, model = run.rollout.group_size * run.rollout.groups_per_step, checkpoint_sizes(run.policy.path)
        # Sampling and the update one after the other at the machine's best; scoring and decoding not counted.
        prompt, speed = trials["plain"][0]["prompt"], best(trials["machine"])
        sampling, _ = sampling_limit(model, sequences=2 * images, prompt=prompt, speed=speed, dtype=dtypes[0])
        positions = images * (model.image_tokens + prompt - 1)
        update, _ = update_limit(model, positions=positions, speed=speed, dtype=dtypes[1])
        shared: Any = {
            "ratio_is": "times as many images trained a second",
            "baseline_is": PLAIN,
            "limit": sampling + update,
            "limit_is": f"sampling {sampling:.3g} s, then the update {update:.3g} s, at the machine's best",
        }
        flops = images * (
            2 * sampling_flops(model, prompt) + forward_flops(model, prompt) + training_flops(model, prompt)
        )
        same: Any = {"device": self.device, "dtype": dtypes[1], "speed": speed}
        rows = []
        for claim, target, engine in (("default", 1.5, default), ("best", 1.8, fastest)):
            ours_s, setting = step_s[engine], f"max_staleness = {run.pipeline.max_staleness}, rollout.engine = {engine}"
            told = throughput(model, images=images, seconds=ours_s, flops=flops, **same)
            details = {"baseline_images_per_s": images / plain_s} | told
            notes = (f"seconds a step of {images} images; pipeline.{setting}",)
            rows.append(Row(f"end-to-end/{claim}", target, plain_s, ours_s, details=details, notes=notes, **shared))
        return rows


def single_process(overrides: list[str], skipped: int) -> Trials:
    """The baseline: as many steps as a run has, in this process."""
    run = load_config(CONFIG, overrides)
    trainer, device = SingleProcessTrainer(run), device_for(run.learner.gpus)
    prompt = len(trainer.prompts[0][1].conditional)
    while True:
        step_s = [timed(device, trainer.step)[0] for _ in range(run.steps)]
        yield {"prompt": prompt, "step_s": step_s[skipped:]}


def train_command(overrides: list[str], skipped: int) -> Trials:
    """Ours: each trial is ``stage-ray train`` as a person starts it."""
    settings = [argument for override in overrides for argument in ("--set", override)]
    while True:
        with tempfile.TemporaryDirectory(prefix="stage-ray-bench-") as scratch:
            command = [sys.executable, "-m", "stage_ray", "train", CONFIG, "--run-dir", scratch, *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [""])[-1]
                raise RunError(f"stage-ray train ended with exit code {done.returncode}: {last}")
            yield {"step_s": step_times(Path(scratch))[skipped:]}


def step_times(run_dir: Path) -> list[float]:
    """Seconds of each of a run's steps, by its metrics."""
    return [row["images"] / row["images_per_s"] for row in read_steps(run_dir / METRICS_FILE)]
