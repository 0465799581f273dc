"""How good the detector is: GenEval verdicts on pictures whose truth is known, and what it sees in mush."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import ndimage

from stage_ray.rewards.detection import Detection, Detector
from stage_ray.rewards.geneval_rules import Objects, requirements, strict_verdict
from stage_ray.shapeworld.detector_tokenizer import TokenizerView
from stage_ray.shapeworld.grammar import TASKS, Record, sample_record, sample_scene
from stage_ray.shapeworld.render import render
from stage_ray.shapeworld.scene import COLORS, SHAPES, Scene, Shape, random_scene

View = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Case:
    """A picture, a prompt's record, and whether the one satisfies the other."""

    scene: Scene
    record: Record
    correct: bool


@dataclass(frozen=True, slots=True)
class Grades:
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


def exact_objects(scene: Scene) -> Objects:
    """What a perfect detector sees in a scene."""
    objects: dict[str, list[Detection]] = {}
    for shape in scene.shapes:
        objects.setdefault(shape.kind, []).append(Detection(shape.kind, 1.0, shape.box, shape.color, 1.0))
    return objects


def is_correct(record: Record, objects: Objects) -> bool:
    """GenEval's strict verdict of a record over objects."""
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
        if is_correct(record, exact_objects(scene)) == (len(cases) % 2 == 0):
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
        shapes = [_at(shapes[0], shapes[1]), _at(shapes[1], shapes[0])]
    return replace(scene, shapes=tuple(shapes))


def _at(shape: Shape, other: Shape) -> Shape:
    return replace(shape, cx=other.cx, cy=other.cy, size=other.size)


def grade(detector: Detector, cases: Sequence[Case], *, threshold: float, view: View | None = None) -> Grades:
    """Judge cases by the detector's eyes, as rendered or through `view` (a tokenizer's reconstruction)."""
    images = np.stack([render(case.scene) for case in cases])
    right = np.zeros(len(cases), bool)
    for index, found in enumerate(detector.detect(images if view is None else view(images))):
        objects: dict[str, list[Detection]] = {}
        for one in found:
            if one.confidence > threshold:
                objects.setdefault(one.label, []).append(one)
        right[index] = is_correct(cases[index].record, objects) == cases[index].correct
    true = np.asarray([case.correct for case in cases])
    missed = tuple(int(index) for index in np.flatnonzero(~right))
    return Grades(float(right.mean()), float(right[true].mean()), float(right[~true].mean()), missed)


def draw_mush(count: int, seed: int, tokenizer: TokenizerView | None) -> dict[str, np.ndarray]:
    """Pictures without a clear object, by kind: uint8 [count, 64, 64, 3] each.

    ``noise``: smooth coloured noise. ``blend``: two scenes at half strength each. With a tokenizer also ``tokens``:
    decoded from random tokens, and ``shuffled``: a scene's tokens with half of their places exchanged.
    """
    rng = np.random.default_rng(seed)
    scenes = [np.stack([render(random_scene(rng)) for _ in range(count)]).astype(np.float32) for _ in range(2)]
    noise = ndimage.gaussian_filter(rng.normal(size=scenes[0].shape), sigma=(0, 4, 4, 0))
    non_objects = {
        "noise": np.clip(160 + 70 * noise / noise.std(), 0, 255).astype(np.uint8),
        "blend": ((scenes[0] + scenes[1]) / 2).astype(np.uint8),
    }
    if tokenizer is not None:
        non_objects["tokens"] = tokenizer.random_images(count, rng)
        non_objects["shuffled"] = tokenizer.shuffled_images(scenes[0].astype(np.uint8), 0.5, rng)
    return non_objects


def share_with_objects(detector: Detector, images: np.ndarray, *, threshold: float) -> float:
    """Share of pictures with at least one detection above the threshold."""
    return float(np.mean([any(one.confidence > threshold for one in found) for found in detector.detect(images)]))


def examine(
    detector: Detector, tokenizer: TokenizerView | None, *, count: int = 600, seed: int = 7, threshold: float = 0.5
) -> dict[str, dict[str, float]]:
    """Everything the model card states: verdicts on renders and reconstructions, and mush seen as objects, by kind."""
    cases = draw_cases(count, seed)
    views: dict[str, View | None] = {"rendered": None}
    if tokenizer is not None:
        views["reconstructed"] = tokenizer.reconstruct
    report: dict[str, dict[str, float]] = {}
    for name, view in views.items():
        facts = asdict(grade(detector, cases, threshold=threshold, view=view))
        report[name] = {key: value for key, value in facts.items() if key != "missed"}
    non_objects = draw_mush(count // 3, seed, tokenizer)
    report["mush"] = {
        kind: share_with_objects(detector, images, threshold=threshold) for kind, images in non_objects.items()
    }
    return report
