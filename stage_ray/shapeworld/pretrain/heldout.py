"""Evaluates the policy that was trained on both benchmarks, with head room: what the best of several images reaches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from stage_ray.config import PolicyConfig, RewardConfig, RolloutConfig
from stage_ray.engines import build_engine
from stage_ray.evaluation.base import EvaluationResult, find_benchmark, summarise
from stage_ray.evaluation.loop import EngineBackend, judge_in_batches, requests_for
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.records import Prompt
from stage_ray.rewards import build_rewards
from stage_ray.rewards.routing import Scorer
from stage_ray.shapeworld.pretrain.loop import console

SUITES = {"shapeworld": "heldout", "binding": "binding"}  # benchmark -> its prompts
GUIDANCE, SEED = 3.0, 20


def evaluate_base(out: Path, images: int, every: int = 1) -> str:
    """The rows of a Markdown table of `out/janus`, judged by `out/detector`: a task, the mean over its images, and the
    share of prompts of which at least one of `images` is correct. Every `every`-th prompt is drawn.
    """
    rollout = RolloutConfig(engine="torch", guidance_scale=GUIDANCE)
    engine = build_engine(PolicyConfig(path=str(out / "janus")), rollout, worker="pretrain")
    rows: list[str] = []
    try:
        for suite, file in SUITES.items():
            prompts = load_prompts(str(out / "prompts" / f"{file}.jsonl"))[::every]
            result = _evaluate(EngineBackend(engine, _scorers(out, suite)), suite, prompts, images)
            headline, best = result.metrics[result.headline], _best(result, prompts)
            rows += [f"| {suite}: {task} | {result.metrics[task]} | {best[task]:.3f} |" for task in headline.parts]
            rows.append(f"| {suite}: mean | {headline} | {fmean(best.values()):.3f} |")
    finally:
        engine.close()
    return "\n".join(rows)


def _scorers(out: Path, suite: str) -> Sequence[tuple[str, Scorer]]:
    """The suite's own scorers with the detector of `out`."""
    own = {"detector_options": {"assets": str(out / "detector")}}
    kinds = find_benchmark(suite).rewards
    return build_rewards([RewardConfig(type=one.type, options={**one.options, **own}) for one in kinds])


def _evaluate(backend: EngineBackend, suite: str, prompts: Sequence[Prompt], images: int) -> EvaluationResult:
    requests = requests_for(prompts, images, SEED)
    with Progress(console) as progress, progress.bar(f"{suite}, {images} images a prompt", len(prompts)) as advance:
        scored = asyncio.run(judge_in_batches(backend, requests, lambda group: group.scored, advance=advance))
    return summarise(find_benchmark(suite), prompts, scored)


def _best(result: EvaluationResult, prompts: Sequence[Prompt]) -> dict[str, float]:
    """By task, the share of prompts of which an image is correct."""
    correct: dict[int, bool] = {}
    for image in result.images:
        verdict = any(said.get("verdict") for said in image["details"].values())
        correct[image["prompt_index"]] = verdict or correct.get(image["prompt_index"], False)
    tasks: dict[str, list[bool]] = {}
    for prompt in prompts:
        tasks.setdefault(str(prompt.record["tag"]), []).append(correct[prompt.index])
    return {task: fmean(found) for task, found in tasks.items()}
