"""Ways to decode beside each other: seconds, held-out score and diversity of the shipped model on ShapeWorld."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from stage_ray.bench.base import Bench, Measurement, Row, Trials, Variant, interleave, median
from stage_ray.bench.inputs import SHIPPED
from stage_ray.evaluation.shapeworld import JUDGE, ShapeWorldBenchmark
from stage_ray.inference.evaluate import evaluate
from stage_ray.inference.picture_index import index_pictures
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.shapeworld.scene import random_scene, render

CLIP = {"type": "clip", "options": {"path": "package:stage_ray/shapeworld/assets/clip"}}
CANDIDATES, WIDER = 4, 1.5  # of a search; what it may take beside as many images
PLAIN = "guided sampling of as many images, by the same engine, with loading, scoring and measuring"
CHOSEN = "chosen by CLIP, measured by the detector"

WAYS: dict[str, tuple[float, str, dict[str, Any]]] = {
    "entropy-informed": (1.1, "", {"sampler": "entropy_informed", "sampler_options": {"a": 0.4, "b": 1}}),
    "retrieval": (1.5, "", {"sampler": "retrieval"}),
    "template": (1.1, "", {"prompt_transform": "template"}),
    "best-of": (
        CANDIDATES * WIDER,
        CHOSEN,
        {"search": "best_of", "search_options": {"candidates": CANDIDATES, "scorer": "clip"}},
    ),
    "parm": (
        CANDIDATES * WIDER,
        f"{CHOSEN}, which judges potential too",
        {
            "search": "parm",
            "search_options": {"candidates": CANDIDATES, "scorer": "clip", "potential": JUDGE, "looks": [0.5, 0.75]},
        },
    ),
}
"""By name: times the seconds of guided sampling that it should take at most, a note, and keys of ``rollout``."""


class SamplersBench(Bench):
    """Every way to decode that needs no service; what it costs is the claim, what it brings stands beside it."""

    def rows(self) -> list[Row]:
        """A row a way, with GenEval, its standard error and diversity of both it and guided sampling."""
        pictures, prompts, images = (20, 4, 2) if self.quick else (1000, 100, 4)
        with tempfile.TemporaryDirectory(prefix="stage-ray-bench-index-") as directory:
            index = write_index(Path(directory), pictures)
            shared = {"prompts": prompts, "images": images, "gpus": float(self.device == "cuda")}
            variants = [Variant("guided", evaluations, {"rollout": {}, **shared})]
            for name, (_, _, rollout) in WAYS.items():
                where = {"sampler_options": {"index": str(index)}} if name == "retrieval" else {}
                variants.append(Variant(name, evaluations, {"rollout": {**rollout, **where}, **shared}))
            repeats = 1 if self.quick else 3
            trials = interleave(variants, repeats=repeats, warmups=0, progress=self.progress, title="samplers")
        plain, rows = trials["guided"], []
        for name, (target, note, _) in WAYS.items():
            details = {f"guided {key}": value for key, value in means(plain).items()} | means(trials[name])
            rows.append(
                Row(
                    f"samplers/{name}",
                    target,
                    median(plain, "seconds"),
                    median(trials[name], "seconds"),
                    "times as long",
                    PLAIN,
                    better="lower",
                    details=details,
                    notes=[f"{prompts} held-out prompts, {images} images each, guidance 3", *([note] if note else [])],
                )
            )
        return rows


def means(trials: Sequence[Measurement]) -> dict[str, float]:
    """What the trials of a variant measured beside seconds, which of one seed is the same but for rounding."""
    return {key: fmean(trial[key] for trial in trials) for key in trials[0] if key != "seconds"}


def write_index(directory: Path, pictures: int) -> Path:
    """An index of random scenes, as the shipped image tokenizer encodes them; its file."""
    rng, scenes = np.random.default_rng(0), directory / "scenes"
    scenes.mkdir()
    for number in range(pictures):
        Image.fromarray(render(random_scene(rng), plain=True)).save(scenes / f"{number:04d}.png")
    index_pictures(SHIPPED, scenes, directory / "patches.safetensors")
    return directory / "patches.safetensors"


def evaluations(rollout: dict[str, Any], prompts: int, images: int, gpus: float) -> Trials:
    """Held-out evaluations of the shipped model; each trial is all of one, the model's loading too."""
    found = load_prompts(ShapeWorldBenchmark.prompts)
    some = found[:: max(1, len(found) // prompts)][:prompts]  # spread evenly over the tasks
    overrides = [f"rewards={json.dumps([JUDGE, CLIP])}", f"rollout.gpus={gpus:g}"]
    overrides += [f"rollout.{key}={json.dumps(value)}" for key, value in rollout.items()]
    with tempfile.TemporaryDirectory(prefix="stage-ray-bench-") as directory:
        file = Path(directory) / "prompts.jsonl"
        file.write_text("\n".join(json.dumps(dict(prompt.record)) for prompt in some), encoding="utf-8")
        while True:
            began = time.perf_counter()
            result = evaluate(
                SHIPPED,
                prompts=file,
                images_per_prompt=images,
                engine="torch",
                measures=["shapeworld"],
                overrides=overrides,
            )
            measured = {name: metric.value for name, metric in result.metrics.items() if name == "diversity"}
            headline = result.metrics[result.headline]
            error = {} if headline.error is None else {"error": headline.error}
            yield {"seconds": time.perf_counter() - began, "GenEval": headline.value, **error, **measured}
