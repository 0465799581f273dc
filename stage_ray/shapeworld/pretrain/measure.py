"""Measures what was trained: the detector's verdicts, the tokenizer's error, CLIP's retrieval; writes model cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from transformers import CLIPModel, JanusVQVAE

from stage_ray.rewards.detection import Detection, Detector
from stage_ray.rewards.geneval_rules import requirements, strict_verdict
from stage_ray.shapeworld.detector import CLASSES, WEIGHTS_FILE, ShapeDetector
from stage_ray.shapeworld.grammar import TASKS, Record, sample_record, sample_scene
from stage_ray.shapeworld.pretrain import clip, detector, heldout, language_model, tokenizer
from stage_ray.shapeworld.pretrain.loop import device, read_checkpoint
from stage_ray.shapeworld.scene import COLORS, SHAPES, Scene, coverage, random_scene, render
from stage_ray.shapeworld.segmentation import backgrounds

CONFIDENCE = 0.5  # above which a detection counts: of the ShapeWorld suite and configs, for counting too
Case = tuple[Scene, Record]  # a picture and a prompt's record


def write_detector_card(out: Path, seed: int, count: int) -> None:
    """Write the detector's card, with verdicts on `count` cases and objects seen in non-objects."""
    found, codes = ShapeDetector(out / "detector"), tokenizer.load_exported(out / "janus")
    cases = draw_cases(count, seed=7)
    images = np.stack([render(scene) for scene, _ in cases])
    verdicts = []
    for name, shown in (("rendered", images), ("reconstructed", tokenizer.reconstruct(codes, images))):
        right = judge_cases(found, cases, shown)
        verdicts.append(f"| {name} | {right.mean():.3f} | {right[::2].mean():.3f} | {right[1::2].mean():.3f} |")
    shares = {kind: share_with_objects(found, shown) for kind, shown in draw_non_objects(count // 3, 7, codes).items()}
    _write_card(
        out / "detector",
        classes=", ".join(CLASSES),
        seed=seed,
        steps=read_checkpoint(out / detector.CHECKPOINT)["step"],
        batch=detector.BATCH,
        threshold=CONFIDENCE,
        verdicts="\n".join(verdicts),
        non_objects="\n".join(f"| {kind} | {share:.3f} |" for kind, share in shares.items()),
    )


def write_cards(out: Path, count: int, images: int, every: int) -> None:
    """Measure the image model and CLIP on `count` pictures, where `out` holds them, and write their README.md.

    The image model is evaluated on every `every`-th prompt, with `images` each, if there is a detector to judge it.
    """
    janus = out / "janus"
    if (janus / "config.json").exists():
        codes, rng = tokenizer.load_exported(janus), np.random.default_rng(11)
        scenes = [random_scene(rng) for _ in range(count)]
        pictures = np.stack([render(scene) for scene in scenes])
        again = tokenizer.reconstruct(codes, pictures)
        named = zip(backgrounds(again), scenes, strict=True)
        judged = (out / "detector" / WEIGHTS_FILE).exists() and (out / "prompts").exists()
        _write_card(
            janus,
            count=count,
            paper=np.mean([name == scene.background for name, scene in named]),
            size=(janus / "model.safetensors").stat().st_size / 1e6,
            tokenizer=_history(out / tokenizer.CHECKPOINT),
            language_model=_history(out / language_model.CHECKPOINT),
            error=np.abs(again.astype(np.float32) - pictures).mean(),
            images=images,
            heldout=heldout.evaluate_base(out, images, every) if judged else "| not evaluated | | |",
        )
    if (out / "clip" / "config.json").exists():
        model = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32).to(device()).eval()
        _write_card(
            out / "clip",
            parameters=model.num_parameters() / 1e6,
            clip=_history(out / clip.CHECKPOINT),
            heldout=clip.retrieval_accuracy(model, "heldout", batches=count // 16),
            train=clip.retrieval_accuracy(model, "train", batches=count // 16),
        )


def draw_cases(count: int, seed: int) -> list[Case]:
    """Pictures and prompts, of all six tasks equally often: the 1st, 3rd, 5th... prompt is true of its picture, the
    others are wrong by a shape, a colour, a number or a place."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    while len(cases) < count:
        tag, true = TASKS[len(cases) // 2 % len(TASKS)], len(cases) % 2 == 0
        record = sample_record(rng, {tag: 1.0}, "heldout" if rng.random() < 0.3 else "train")
        scene = sample_scene(record, rng)
        if not true:
            scene = _spoiled(scene, rng)
        exact = [Detection(shape.kind, 1.0, shape.box, shape.color, 1.0) for shape in scene.shapes]
        if _is_correct(record, exact) == true:
            cases.append((scene, record))
    return cases


def _spoiled(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing changed: a shape, a colour, an object gone, or two objects in each other's place."""
    shapes = list(scene.shapes)
    index, change = int(rng.integers(len(shapes))), int(rng.integers(4))
    one = shapes[index]
    if change == 0:
        shapes[index] = replace(one, kind=str(rng.choice([kind for kind in SHAPES if kind != one.kind])))
    elif change == 1:
        shapes[index] = replace(one, color=str(rng.choice([color for color in COLORS if color != one.color])))
    elif change == 2:
        del shapes[index]
    elif len(shapes) == 2:
        a, b = shapes
        shapes = [replace(b, kind=a.kind, color=a.color), replace(a, kind=b.kind, color=b.color)]
    return replace(scene, shapes=tuple(shapes))


def judge_cases(detector: Detector, cases: Sequence[Case], images: np.ndarray) -> np.ndarray:
    """Which of `draw_cases`'s cases get the right verdict by what the detector finds in their pictures, bool [n]."""
    found = zip(cases, detector.detect(images), strict=True)
    true = np.arange(len(cases)) % 2 == 0
    return np.asarray([_is_correct(record, seen) for (_, record), seen in found]) == true


def _is_correct(record: Record, detections: Sequence[Detection]) -> bool:
    """GenEval's strict verdict over the detections of one picture that are surer than CONFIDENCE."""
    sure = [one for one in detections if one.confidence > CONFIDENCE]
    objects = {kind: [one for one in sure if one.label == kind] for kind in SHAPES}
    return strict_verdict(requirements(record), requirements(record, "exclude"), objects)[0]


def draw_non_objects(count: int, seed: int, model: JanusVQVAE) -> dict[str, np.ndarray]:
    """Pictures without a clear object, by kind, as the card names it: uint8 [count, 64, 64, 3] each."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(2 * count)]
    first, second = np.split(np.stack([render(scene) for scene in scenes]), 2)
    noise = ndimage.gaussian_filter(rng.normal(size=first.shape), sigma=(0, 4, 4, 0))
    random = tokenizer.random_images(model, count, rng)
    shuffled = tokenizer.encode(model, first).cpu().clone()
    side, patch = tokenizer.SIZES.side, tokenizer.PATCH
    for tokens, scene in zip(shuffled.numpy(), scenes, strict=False):  # in place
        painted = np.max([coverage(shape) for shape in scene.shapes], axis=0) > 0
        painted = painted.reshape(side, patch, side, patch).any((1, 3))
        places = rng.permutation(np.flatnonzero(painted))
        tokens[places] = tokens[np.roll(places, 1)]  # none stays where it was
    return {
        "smooth coloured noise": np.clip(160 + 70 * noise / noise.std(), 0, 255).astype(np.uint8),
        "two scenes at half strength each": ((first.astype(np.float32) + second) / 2).astype(np.uint8),
        "decoded from random tokens": random,
        "a scene with its objects' tokens in each other's places": tokenizer.decode(model, shuffled),
    }


def share_with_objects(detector: Detector, images: np.ndarray) -> float:
    """Share of pictures with at least one detection above CONFIDENCE."""
    return float(np.mean([any(one.confidence > CONFIDENCE for one in found) for found in detector.detect(images)]))


def _write_card(model: Path, **figures: object) -> None:
    template = (Path(__file__).parent / "cards" / f"{model.name}.md").read_text(encoding="utf-8")
    (model / "README.md").write_text(template.format(**figures), encoding="utf-8")


def _history(checkpoint: Path) -> str:
    """`4800 steps in 24 minutes, loss 1.35 at first, 0.10 at the end` (mean of the last ten reports)."""
    if not checkpoint.exists():
        return "not trained"
    saved = read_checkpoint(checkpoint)
    losses = [row["loss"] for row in saved["history"]]
    last, minutes = float(np.mean(losses[-10:])), saved["elapsed_s"] / 60
    return f"{saved['step']} steps in {minutes:.0f} minutes, loss {losses[0]:.2f} at first, {last:.2f} at the end"
