"""How good the detector is: GenEval verdicts on pictures whose truth is known, and objects seen in non-objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from stage_ray.rewards.detection import Detection, Detector
from stage_ray.rewards.geneval_rules import requirements, strict_verdict
from stage_ray.shapeworld.grammar import TASKS, Record, sample_record, sample_scene
from stage_ray.shapeworld.pretrain.tokenizer_view import TokenizerView
from stage_ray.shapeworld.render import render
from stage_ray.shapeworld.scene import COLORS, SHAPES, Scene, random_scene

View = Callable[[np.ndarray], np.ndarray]

NON_OBJECTS = {  # kind: its name in the model card
    "noise": "smooth coloured noise",
    "blend": "two scenes at half strength each",
    "tokens": "decoded from random tokens",
    "shuffled": "a scene with half of its tokens in each other's places (an object may well survive that)",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A picture, a prompt's record, and whether the one satisfies the other."""

    scene: Scene
    record: Record
    correct: bool


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Shares of right verdicts, 0..1.

    Attributes:
        right: true and wrong prompts together.
        right_true: of the true prompts, those found correct.
        right_wrong: of the wrong prompts, those found incorrect.
        missed: indices of the cases that were judged wrongly.
    """

    right: float
    right_true: float
    right_wrong: float
    missed: tuple[int, ...]


def is_correct(record: Record, detections: Sequence[Detection], threshold: float) -> bool:
    """GenEval's strict verdict of a record over the detections of one picture that are surer than the threshold."""
    objects: dict[str, list[Detection]] = {}
    for one in detections:
        if one.confidence > threshold:
            objects.setdefault(one.label, []).append(one)
    return strict_verdict(requirements(record), requirements(record, "exclude"), objects)[0]


def draw_cases(count: int, seed: int) -> list[Case]:
    """Half true prompts, half wrong ones (a shape, colour, number or place is off), all six tasks equally often."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    while len(cases) < count:
        tag = TASKS[len(cases) // 2 % len(TASKS)]
        record = sample_record(rng, {tag: 1.0}, "heldout" if rng.random() < 0.3 else "train")
        scene = sample_scene(record, rng, avoid_held_out=False)
        if len(cases) % 2:
            scene = _spoiled(scene, rng)
        exact = [Detection(shape.kind, 1.0, shape.box, shape.color, 1.0) for shape in scene.shapes]
        if is_correct(record, exact, 0.5) == (len(cases) % 2 == 0):
            cases.append(Case(scene, record, len(cases) % 2 == 0))
    return cases


def _spoiled(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one thing changed: a shape, a colour, an object gone, or two objects in each other's place."""
    shapes = list(scene.shapes)
    index, change = int(rng.integers(len(shapes))), int(rng.integers(4))
    if change == 0:
        shapes[index] = replace(shapes[index], kind=str(rng.choice([k for k in SHAPES if k != shapes[index].kind])))
    elif change == 1:
        shapes[index] = replace(shapes[index], color=str(rng.choice([c for c in COLORS if c != shapes[index].color])))
    elif change == 2:
        del shapes[index]
    elif len(shapes) == 2:
        first, second = shapes
        shapes = [
            replace(first, cx=second.cx, cy=second.cy, size=second.size),
            replace(second, cx=first.cx, cy=first.cy, size=first.size),
        ]
    return replace(scene, shapes=tuple(shapes))


def judge_cases(detector: Detector, cases: Sequence[Case], *, threshold: float, view: View | None = None) -> Verdicts:
    """Judge cases by what the detector finds, as rendered or through `view` (a tokenizer's reconstruction)."""
    images = np.stack([render(case.scene) for case in cases])
    found = detector.detect(images if view is None else view(images))
    true = np.asarray([case.correct for case in cases])
    right = true == [is_correct(case.record, seen, threshold) for case, seen in zip(cases, found, strict=True)]
    missed = tuple(np.flatnonzero(~right).tolist())
    return Verdicts(float(right.mean()), float(right[true].mean()), float(right[~true].mean()), missed)


def draw_non_objects(count: int, seed: int, tokenizer: TokenizerView) -> dict[str, np.ndarray]:
    """Pictures without a clear object, by kind: uint8 [count, 64, 64, 3] each.

    ``noise``: smooth coloured noise. ``blend``: two scenes at half strength each. ``tokens``: decoded from random
    tokens. ``shuffled``: a scene's tokens with half of their places exchanged.
    """
    rng = np.random.default_rng(seed)
    scenes = [np.stack([render(random_scene(rng)) for _ in range(count)]).astype(np.float32) for _ in range(2)]
    noise = ndimage.gaussian_filter(rng.normal(size=scenes[0].shape), sigma=(0, 4, 4, 0))
    return {
        "noise": np.clip(160 + 70 * noise / noise.std(), 0, 255).astype(np.uint8),
        "blend": ((scenes[0] + scenes[1]) / 2).astype(np.uint8),
        "tokens": tokenizer.random_images(count, rng),
        "shuffled": tokenizer.shuffled_images(scenes[0].astype(np.uint8), 0.5, rng),
    }


def share_with_objects(detector: Detector, images: np.ndarray, *, threshold: float) -> float:
    """Share of pictures with at least one detection above the threshold."""
    return float(np.mean([any(one.confidence > threshold for one in found) for found in detector.detect(images)]))


def evaluate_detector(
    detector: Detector, tokenizer: TokenizerView, *, count: int = 600, seed: int = 7, threshold: float = 0.5
) -> dict[str, str]:
    """The tables of the model card, in Markdown: ``verdicts`` on `count` cases and ``non_objects`` by kind."""
    cases = draw_cases(count, seed)
    verdicts = {
        "rendered": judge_cases(detector, cases, threshold=threshold),
        "reconstructed": judge_cases(detector, cases, threshold=threshold, view=tokenizer.reconstruct),
    }
    shares = {
        NON_OBJECTS[kind]: share_with_objects(detector, images, threshold=threshold)
        for kind, images in draw_non_objects(count // 3, seed, tokenizer).items()
    }
    return {
        "verdicts": "\n".join(
            f"| {name} | {found.right:.3f} | {found.right_true:.3f} | {found.right_wrong:.3f} |"
            for name, found in verdicts.items()
        ),
        "non_objects": "\n".join(f"| {kind} | {share:.3f} |" for kind, share in shares.items()),
    }
