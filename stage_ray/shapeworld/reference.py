"""A picture of what a prompt asks for: the real pictures that generated ones are compared with."""

from __future__ import annotations

import numpy as np

from stage_ray.records import Prompt
from stage_ray.shapeworld.grammar import sample_scene
from stage_ray.shapeworld.scene import render


def draw_prompt(prompt: Prompt, seed: int) -> np.ndarray:
    """A random scene of the prompt's record, uint8 [64, 64, 3]; equal seeds draw equal pictures.

    Raises:
        KeyError: its line is no record of ShapeWorld's grammar.
    """
    return render(sample_scene(dict(prompt.record), np.random.default_rng(seed)))
