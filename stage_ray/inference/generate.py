"""Prompts drawn by one model without a run: ``stage-ray generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from stage_ray.config.paths import require_lasting
from stage_ray.errors import ConfigError
from stage_ray.evaluation.base import write_png
from stage_ray.evaluation.loop import requests_for
from stage_ray.evaluation.partial import PartialResult
from stage_ray.files import name_disk_errors, require_writable
from stage_ray.inference.config import inference_config, require_judgeable
from stage_ray.inference.jobs import GO_ON, Job, inputs_of, judge
from stage_ray.observability.progress import Progress
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.policies import policy_class
from stage_ray.records import JudgedGroup, Prompt, RolloutRequest
from stage_ray.report.samples import contact_sheet
from stage_ray.run.preflight import drawable_prompts

SHEET_IMAGES = 120  # more make a picture that no viewer likes


def generate(
    model: str | Path,
    prompt: str | Sequence[str],
    out: str | Path,
    *,
    prompts: str | Path | None = None,
    images: int = 4,
    engine: str | None = None,
    guidance: float = 3.0,
    seed: int = 20,
    overrides: Sequence[str] | None = None,
    address: str | None = None,
    workers: int | None = None,
) -> list[Path]:
    """Draw texts, and those of a file ``prompts``, into ``out``; each argument is an option of `stage-ray generate`.

    Returns:
        The PNGs, ``images`` of each prompt in order; beside them lies ``sheet.png`` with all of them.

    Raises:
        ConfigError: a wrong argument, by the name of the command's option; nothing was drawn.
        RunError: the engine or the cluster failed; the same call goes on after the PNGs that are there.

    Example:
        generate("runs/stage_shapeworld/final", "a photo of a red ring", "pictures", images=1)
    """
    out = Path(out)
    require_lasting(out, "--out")
    found = [Prompt(0, text, {"prompt": text}) for text in ([prompt] if isinstance(prompt, str) else prompt)]
    found += load_prompts(str(prompts)) if prompts is not None else []
    asked = [replace(one, index=index) for index, one in enumerate(found)]  # a file's own numbers begin at 0 too
    if not asked or any(not one.text.strip() for one in asked):
        raise ConfigError('there is nothing to draw; give --prompt "a photo of ..." or --prompts FILE')
    kept = out / "partial.jsonl"  # while it is there, the directory is drawn in part
    if out.exists() and not (out.is_dir() and (kept.is_file() or not any(out.iterdir()))):
        raise ConfigError(f"--out {out} exists and is not an empty directory; name another")
    require_writable(out, "--out")
    run = inference_config(model, engine, guidance, address, workers, overrides, images=images * len(asked))
    scoring = run.rollout.search is not None  # which then chooses by scores
    if scoring:
        require_judgeable(run, asked)
    asked = drawable_prompts(run, policy_class(run.policy).check(run.policy), asked)
    partial = PartialResult(kept, inputs_of(run, asked, {"--images": images, "--seed": seed}, scoring=scoring))
    requests = requests_for(asked, images, seed)
    for request in requests:
        if not all(file.is_file() for file in _pictures(out, request)):
            partial.groups.pop(request.group_id, None)

    def save(group: JudgedGroup) -> None:
        assert group.images is not None, "they are asked for"
        for image, file in zip(group.images, _pictures(out, group.request), strict=True):
            write_png(file, image)

    with name_disk_errors(out, GO_ON), Progress() as progress:
        judge(run, [Job(run, requests, partial, "drawing", use=save)], progress, go_on=GO_ON, scoring=scoring)
        _write_sheet(out, requests)
        partial.remove()
        progress.note(f"contact sheet: {out / 'sheet.png'}")
    return [file for request in requests for file in _pictures(out, request)]


def _pictures(out: Path, request: RolloutRequest) -> list[Path]:
    """The files of a group's images."""
    return [out / f"{request.prompt.index:04d}-{number}.png" for number in range(len(request.seeds))]


def _write_sheet(out: Path, requests: Sequence[RolloutRequest]) -> None:
    """The first images on one page, read back from their files: those of an earlier call are among them."""
    files = [(file, request.prompt.text) for request in requests for file in _pictures(out, request)][:SHEET_IMAGES]
    images = np.stack([np.asarray(Image.open(file)) for file, _ in files])
    contact_sheet(images, [text for _, text in files], [None] * len(files), out / "sheet.png")
