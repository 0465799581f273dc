"""A contact sheet shows every image unsmoothed, framed by its verdict, with a caption that fits."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage_ray.report.lettering import spelled
from stage_ray.report.samples import BORDER, MARGIN, VERDICTS, contact_sheet


def test_frames_tell_the_verdict_and_pixels_are_those_of_the_image(tmp_path: Path) -> None:
    images = np.stack([np.full((64, 64, 3), shade, np.uint8) for shade in (10, 20, 30)])
    contact_sheet(images, ["a", "b", "c"], [True, False, None], tmp_path / "deep" / "sheet.png")
    with Image.open(tmp_path / "deep" / "sheet.png") as opened:
        sheet = np.asarray(opened)
    row = sheet[MARGIN + BORDER + 5]
    shown = [tuple(int(v) for v in pixel) for pixel in row]
    assert [shown.count((shade, shade, shade)) for shade in (10, 20, 30)] == [192, 192, 192]
    for verdict in (True, False, None):
        assert shown.count(VERDICTS[verdict][0]) == 2 * BORDER


def test_a_long_caption_is_cut_after_three_lines(tmp_path: Path) -> None:
    images = np.zeros((4, 16, 16, 3), np.uint8)
    contact_sheet(images, ["three short lines " * 3] * 4, [None] * 4, tmp_path / "short.png")
    contact_sheet(images, ["word " * 100, "x" * 300, "", "…"], [None] * 4, tmp_path / "long.png")
    with Image.open(tmp_path / "short.png") as short, Image.open(tmp_path / "long.png") as long:
        assert short.size == long.size


@pytest.mark.parametrize("count", [1, 5, 12, 48])
def test_any_number_of_images_fits(count: int, tmp_path: Path) -> None:
    contact_sheet(np.zeros((count, 32, 32, 3), np.uint8), ["a"] * count, [True] * count, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 144


def test_a_missing_caption_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 images, 1 captions"):
        contact_sheet(np.zeros((2, 8, 8, 3), np.uint8), ["a"], [True, True], tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


def test_captions_have_letters_of_other_alphabets_and_not_boxes(tmp_path: Path) -> None:
    def caption(text: str) -> np.ndarray:
        path = tmp_path / "sheet.png"
        contact_sheet(np.zeros((1, 8, 8, 3), np.uint8), [text], [None], path)
        with Image.open(path) as opened:
            return np.asarray(opened.convert("L"))[150:]

    drawn = [caption(letter) for letter in "\u00e9\ufb01\u044f\u03b1\u0645\u732b\u7ea2\u3042\ud55c"]
    assert all((a != b).any() for a, b in itertools.combinations(drawn, 2)), "two letters are the same box"


def test_a_letter_that_no_font_has_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [])
    assert spelled("a \U0001f680 lands\n\u732b") == "a [rocket] lands\n\u732b"


def test_a_font_of_the_system_that_cannot_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [str(tmp_path / "broken.ttf")])
    assert spelled("\U0001f681") == "[helicopter]"
