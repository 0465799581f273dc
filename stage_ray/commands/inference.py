"""One model in this process, no Ray: what ``stage-ray evaluate`` and ``stage-ray generate`` do."""

from __future__ import annotations

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
from stage_ray.evaluation import EvaluationResult, evaluate, find_suite, requests_for
from stage_ray.files import atomic_write
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.prompts import load_prompts
from stage_ray.records import Prompt
from stage_ray.report.samples import contact_sheet
from stage_ray.rewards import build_rewards

IMAGES_AT_ONCE = 64
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
        ConfigError: unknown suite or engine, missing or damaged model, unreadable prompts.
    """
    chosen = find_suite(suite)
    asked = load_prompts(prompts or chosen.prompts)
    images = images_per_prompt or chosen.images_per_prompt
    scorers = build_rewards(chosen.rewards)
    with _engine(model, engine, guidance, progress) as drawing, progress.bar(suite, total=len(asked)) as advance:
        return evaluate(drawing, scorers, asked, images_per_prompt=images, seed=seed, progress=advance, suite=chosen)


def result_table(result: EvaluationResult) -> str:
    """A result as lines of plain text."""
    rows = [(name, task.score, task.standard_error, task.images) for name, task in result.tasks.items()]
    if result.overall is not None:
        rows.append(("mean of tasks", result.overall, result.standard_error, result.images))
    width = max((len(row[0]) for row in rows), default=0)
    lines = [
        f"{name:<{width}}  {score:.3f}" + (f" ± {error:.3f}" if error is not None else "") + f"  ({images} images)"
        for name, score, error, images in rows
    ]
    if result.soft is not None:
        lines.append(f"{'soft score':<{width}}  {result.soft:.3f}")
    if result.invalid:
        lines.append(f"{result.invalid} images could not be judged and count in no score")
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
    requests = requests_for(asked, images_per_prompt, seed)
    piece = max(1, IMAGES_AT_ONCE // images_per_prompt)
    sheet: list[tuple[np.ndarray, str]] = []
    with _engine(model, engine, guidance, progress) as drawing, progress.bar("drawing", total=len(asked)) as advance:
        out.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(requests), piece):
            groups = drawing.generate(requests[start : start + piece])
            for group in groups:
                for number, image in enumerate(group.images):
                    Image.fromarray(image).save(out / f"{group.prompt.index:04d}-{number}.png")
                    sheet.append((image, group.prompt.text))
            advance(len(groups))
    del sheet[SHEET_IMAGES:]
    path = out / "sheet.png"
    contact_sheet(np.stack([image for image, _ in sheet]), [text for _, text in sheet], [None] * len(sheet), path)
    return path


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
