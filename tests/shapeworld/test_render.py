"""The renderer: exact, repeatable, and clear enough to tell shapes and colours apart."""

from __future__ import annotations

import numpy as np
import pytest

from stage_ray.shapeworld.scene import BACKGROUNDS, COLORS, SHAPES, Scene, Shape, coverage, random_scene, render


def test_the_same_scene_gives_the_same_pixels_and_another_seed_does_not():
    scene = random_scene(np.random.default_rng(0))
    assert (render(scene) == render(scene)).all()
    assert (render(scene) != render(Scene(scene.shapes, scene.background, scene.seed + 1))).any()


def test_pictures_and_masks_have_the_promised_form():
    scene = random_scene(np.random.default_rng(1))
    image, masks = render(scene), np.stack([coverage(shape) for shape in scene.shapes])
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert masks.shape == (len(scene.shapes), 64, 64) and masks.dtype == np.float32
    assert masks.min() >= 0 and masks.max() <= 1


@pytest.mark.parametrize("kind", SHAPES)
def test_a_mask_fills_its_bounding_box(kind: str):
    shape = Shape(kind, "red", cx=30.0, cy=34.0, size=20.0)
    rows, columns = np.nonzero(coverage(shape) > 0.4)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.subtract(box, shape.box)).max() <= 1


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_color_is_painted_as_named_and_stands_out_from_every_background(color: str, background: str):
    square = Shape("square", color, 32.0, 32.0, 24.0)
    image, mask = render(Scene((square,), background)).astype(float), coverage(square)
    inside = image[mask == 1].mean(axis=0)
    assert np.abs(inside - COLORS[color]).max() < 3
    assert np.linalg.norm(inside - image[mask == 0].mean(axis=0)) > 90


def test_no_two_shapes_of_a_size_cover_the_same_pixels():
    masks = [coverage(Shape(kind, "red", 32.0, 32.0, 16.0)) for kind in SHAPES]
    for index, one in enumerate(masks):
        for other in masks[index + 1 :]:
            assert np.minimum(one, other).sum() / np.maximum(one, other).sum() < 0.88


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="circle, square"):
        Shape("star", "red", 32, 32, 20)
    with pytest.raises(ValueError, match="red, orange"):
        Shape("circle", "mauve", 32, 32, 20)
