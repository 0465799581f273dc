"""How large a picture an Emu3 draws, and of how many rows and columns of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Emu3Config, Emu3Processor

IMAGE_AREA, RATIO = 518_400, "1:1"  # pixels, and width to height, of the published model: 90 x 90 tokens


def picture_size(config: Emu3Config) -> tuple[Any, Any]:
    """Pixels, and width to height, that ``config.json`` names as ``image_area`` and ``ratio``; not checked."""
    return getattr(config, "image_area", IMAGE_AREA), getattr(config, "ratio", RATIO)


def grid_of(processor: Emu3Processor, config: Emu3Config, location: Path) -> tuple[int, int]:
    """Rows and columns of a picture's tokens, as the processor writes them into a prompt.

    Raises:
        ConfigError: the config of the checkpoint at ``location`` names no picture.
    """
    area, ratio = picture_size(config)
    try:
        rows, columns = processor.calculate_generate_size(ratio, area, processor.downsample_ratio)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise ConfigError(
            f"policy.path: {location / 'config.json'}: image_area = {area!r} and ratio = {ratio!r} are no picture; "
            f"give pixels and width:height, such as {IMAGE_AREA} and {RATIO!r}, or leave them out"
        )
    return rows, columns
