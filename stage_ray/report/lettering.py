"""Letters of any alphabet on pictures: each is drawn in the first font that has it."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import unicodedata
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError
from PIL import ImageDraw, ImageFont

SIZE = 16  # of letters, pixels
SHIPPED = (  # package, and where its font lies: most alphabets; Chinese and Japanese; Korean
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    ("justmytype_intl_cjk", "fonts/ofl/notosanssc/NotoSansSC[wght].ttf"),
    ("justmytype_intl_cjk", "fonts/ofl/notosanskr/NotoSansKR[wght].ttf"),
)
REGULAR = 400  # weight of a font that has all weights, and begins with the thinnest


def spelled(text: str) -> str:
    """A text with the names of letters that no font has, as of most emoji, in their places: ``[rocket]``."""
    kept = (letter if _font_of(letter) or letter.isspace() else _name(letter) for letter in text)
    return "".join(kept)


def _name(letter: str) -> str:
    return f"[{unicodedata.name(letter, f'U+{ord(letter):04X}').lower()}]" if letter.isprintable() else ""


def line_width(line: str) -> float:
    """Pixels that a line of text takes."""
    return sum(font.getlength(part) for font, part in _parts(line))


def draw_line(canvas: ImageDraw.ImageDraw, place: tuple[int, int], line: str, fill: tuple[int, int, int]) -> None:
    """Draw a line of text from its upper left corner, all of its fonts on one baseline."""
    x, y = float(place[0]), place[1] + _shipped()[0].getmetrics()[0]
    for font, part in _parts(line):
        canvas.text((x, y), part, fill=fill, font=font, anchor="ls")
        x += font.getlength(part)


def _parts(line: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """A line cut where the font changes. Inside a part, letters are shaped together, as Arabic needs it."""
    return [(font or _shipped()[0], "".join(letters)) for font, letters in itertools.groupby(line, _font_of)]


@functools.cache
def _font_of(letter: str) -> ImageFont.FreeTypeFont | None:
    """The first font that has a letter, of those that ship and then of the system."""
    found = next((font for font in _shipped() if ord(letter) in _letters(str(font.path))), None)
    if found is None and letter.isprintable():
        from matplotlib.font_manager import findSystemFonts  # takes a second, and is seldom needed

        paths = (path for path in sorted(findSystemFonts()) if ord(letter) in _letters(path))
        found = next((font for path in paths if (font := _opened(path))), None)
    return found


@functools.cache
def _shipped() -> list[ImageFont.FreeTypeFont]:
    fonts = []
    for package, file in SHIPPED:
        spec = importlib.util.find_spec(package)  # not imported: that takes long, and may change matplotlib's settings
        assert spec is not None and spec.origin is not None
        font = ImageFont.truetype(Path(spec.origin).parent / file, SIZE)
        if "[wght]" in file:
            font.set_variation_by_axes([REGULAR])
        fonts.append(font)
    return fonts


@functools.cache
def _opened(path: str) -> ImageFont.FreeTypeFont | None:
    """A font of the system at our size; None for one that has pictures of another size, as fonts of emoji do."""
    try:
        return ImageFont.truetype(path, SIZE)
    except OSError:
        return None


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """Code points that a font has a glyph for; none where it cannot be read."""
    try:
        with TTFont(path, lazy=True, fontNumber=0) as font:
            return frozenset(font.getBestCmap() or ())
    except (OSError, TTLibError):
        return frozenset()
