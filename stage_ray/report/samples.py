"""Contact sheets: a grid of images, each with its prompt and a verdict that can be read at a glance."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from stage_ray.report.lettering import SIZE, draw_line, line_width, spelled

TILE = 144  # smallest edge of a shown image, pixels: ShapeWorld's 64 would be stamps
BORDER = 4
MARGIN = 10
CAPTION_LINES = 3
BACKGROUND, INK = (250, 250, 248), (40, 40, 46)
VERDICTS = {True: ((34, 139, 74), "right"), False: ((196, 52, 44), "wrong"), None: ((150, 150, 158), "")}


def contact_sheet(images: np.ndarray, captions: Sequence[str], good: Sequence[bool | None], path: Path) -> None:
    """Write a PNG grid, whole or not at all.

    Args:
        images: uint8 [B, H, W, 3]; small ones are enlarged by whole pixels, so nothing is smoothed.
        captions: B prompts, wrapped under their image and cut after three lines.
        good: B verdicts: True draws a green frame, False a red one, None a grey one.
        path: the PNG; its directory is made.

    Raises:
        ValueError: the three have different lengths, or there is no image.
    """
    if not len(images) == len(captions) == len(good) or len(images) == 0:
        counts = f"{len(images)} images, {len(captions)} captions, {len(good)} verdicts"
        raise ValueError(f"a contact sheet needs at least one image, and as many captions and verdicts: {counts}")
    scale = max(1, math.ceil(TILE / max(images.shape[1:3])))
    width, height = images.shape[2] * scale, images.shape[1] * scale
    line = SIZE + 4
    wrapped = [_wrap(spelled(caption), width + 2 * BORDER) for caption in captions]
    lines = max(map(len, wrapped)) + any(verdict is not None for verdict in good)
    cell = (width + 2 * BORDER + MARGIN, height + 2 * BORDER + MARGIN + lines * line + 6)
    # A sheet of about 4:3, at most six columns; a number that leaves no gap in the last row where one is near.
    wanted, count = math.sqrt(len(images) * 4 / 3 * cell[1] / cell[0]), len(images)
    columns = min(range(1, min(count, 6) + 1), key=lambda number: abs(number - wanted) + 1.5 * (count % number > 0))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption, verdict) in enumerate(zip(images, wrapped, good, strict=True)):
        x, y = MARGIN + index % columns * cell[0], MARGIN + index // columns * cell[1]
        color, word = VERDICTS[None if verdict is None else bool(verdict)]
        draw.rectangle((x, y, x + width + 2 * BORDER - 1, y + height + 2 * BORDER - 1), fill=color)
        tile = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x + BORDER, y + BORDER))
        y += height + 2 * BORDER + 3
        if word:
            draw_line(draw, (x, y), word, color)
            y += line
        for text in caption:
            draw_line(draw, (x, y), text, INK)
            y += line
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    sheet.save(scratch, format="PNG", optimize=True)
    scratch.replace(path)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of a caption that fit a width in pixels, the last one ending in an ellipsis if there is more."""
    letters = max(8, int(width / line_width("i")))
    while True:
        lines = textwrap.wrap(text, letters, max_lines=CAPTION_LINES, placeholder=" …") or [""]
        if letters <= 8 or all(line_width(line) <= width for line in lines):
            return lines
        letters -= 1
