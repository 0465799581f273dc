"""One model in this process, no Ray: what ``stage-ray evaluate`` and ``stage-ray generate`` do."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import transformers
from PIL import Image

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.engines import build_engine
from stage_ray.engines.base import ImageEngine
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import EvaluationResult, find_benchmark
from stage_ray.evaluation.loop import EngineBackend, JudgedGroup, evaluate, judge_in_batches, requests_for
from stage_ray.files import atomic_write
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.prompts import load_prompts
from stage_ray.records import Prompt
from stage_ray.report.samples import contact_sheet
from stage_ray.rewards import build_rewards

SHEET_IMAGES = 120  # more make a picture that no viewer likes


def evaluate_model(
    model: str,
    *,
    suite: str,
    prompts: str | None,
    engine: str | None,
    images_per_prompt: int | None,
    guidance: float,
    seed: int,
    progress: Progress,
) -> EvaluationResult:
    """Run a benchmark over a model; ``None`` takes the benchmark's own prompts and images a prompt.

    Raises:
        ConfigError: unknown benchmark or engine, missing or damaged model, unreadable prompts.
    """
    benchmark = find_benchmark(suite, "--suite")
    asked = load_prompts(prompts or benchmark.prompts)
    images = images_per_prompt or benchmark.images_per_prompt
    scorers = build_rewards(benchmark.rewards)
    with _engine(model, engine, guidance, progress) as loaded, progress.bar(suite, total=len(asked)) as advance:
        backend = EngineBackend(loaded, scorers)
        return asyncio.run(evaluate(backend, benchmark, requests_for(asked, images, seed), advance))


def result_table(result: EvaluationResult) -> str:
    """A result as lines of plain text."""
    width = max(map(len, result.metrics), default=0)
    lines = [f"{name:<{width}}  {metric}  ({metric.images} images)" for name, metric in result.metrics.items()]
    headline = result.metrics.get(result.headline)
    left_out = len(result.images) - (headline.images if headline else 0)
    if left_out:
        lines.append(f"{left_out} images could not be judged and count in no score")
    return "\n".join(lines)


def write_result(result: EvaluationResult, path: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    atomic_write(path, json.dumps(result.to_json(), indent=1))


def generate_images(
    model: str,
    *,
    texts: Sequence[str],
    prompts: str | None,
    out: Path,
    engine: str | None,
    images_per_prompt: int,
    guidance: float,
    seed: int,
    progress: Progress,
) -> Path:
    """Draw prompts to ``out/0000-0.png`` (prompt, image) and a contact sheet, whose path is returned.

    Raises:
        ConfigError: no prompts, a directory that holds something, or a model that does not load.
    """
    asked = [Prompt(i, text, {"prompt": text}) for i, text in enumerate(texts)]
    if prompts is not None:
        asked += [Prompt(len(asked) + i, one.text, one.record) for i, one in enumerate(load_prompts(prompts))]
    if not asked or any(not prompt.text.strip() for prompt in asked):
        raise ConfigError('there is nothing to draw; give --prompt "a photo of ..." or --prompts FILE')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty directory; name another")
    sheet: list[tuple[np.ndarray, str]] = []

    def save(group: JudgedGroup) -> None:
        prompt = group.request.prompt
        for number, image in enumerate(group.images if group.images is not None else ()):
            Image.fromarray(image).save(out / f"{prompt.index:04d}-{number}.png")
            if len(sheet) < SHEET_IMAGES:
                sheet.append((image, prompt.text))

    with _engine(model, engine, guidance, progress) as loaded, progress.bar("drawing", total=len(asked)) as advance:
        out.mkdir(parents=True, exist_ok=True)
        requests = requests_for(asked, images_per_prompt, seed)
        asyncio.run(judge_in_batches(EngineBackend(loaded), requests, save, images=True, advance=advance))
    images, captions = zip(*sheet, strict=True)
    contact_sheet(np.stack(images), captions, [None] * len(sheet), out / "sheet.png")
    return out / "sheet.png"


@contextmanager
def _engine(model: str, name: str | None, guidance: float, progress: Progress) -> Iterator[ImageEngine]:
    """The engine of a model in this process, vLLM where it is installed unless another is named; closed at the end."""
    transformers.utils.logging.disable_progress_bar()
    name = name or ("vllm" if importlib.util.find_spec("vllm") else "torch")
    rollout = RolloutConfig.model_validate({"engine": name, "guidance_scale": guidance, "cpus": usable_cpus()})
    policy = PolicyConfig.model_validate({"path": model})
    progress.stage(f"loading {model} into the {name} engine")
    engine = build_engine(policy, rollout, worker="local")
    try:
        yield engine
    finally:
        engine.close()
