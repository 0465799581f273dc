"""The page of `stage-ray score`: how scorers agree, and the pictures that each calls best and worst."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stage_ray.evaluation.agreement import Labels, PairSummary, ScorerSummary
from stage_ray.evaluation.pictures import ScoredPictures, read_picture
from stage_ray.report.page import write_page

THUMBNAIL = 320  # longest side, pixels
SMALL = 128  # up to here a picture is kept as it is, and enlarged without smoothing


@dataclass(frozen=True, slots=True)
class _Tile:
    """One picture of the page."""

    source: str  # data URI
    small: bool
    file: str
    prompt: str
    scores: dict[str, float]
    label: str  # the user's
    details: dict[str, dict[str, Any]]


def write_scores_page(
    path: Path,
    directory: Path,
    scored: ScoredPictures,
    summaries: Sequence[ScorerSummary],
    pairs: Sequence[PairSummary],
    labels: Labels | None,
    shown: int,
) -> None:
    """Write the page, whole or not at all: ``shown`` best and worst pictures of each scorer, and of disagreements."""

    def tiles(places: np.ndarray) -> list[_Tile]:
        return [_tile(directory, scored, int(place), labels) for place in places[:shown]]

    sections: dict[str, dict[str, list[_Tile]]] = {}
    for column, name in enumerate(scored.names):
        scores = scored.scores[:, column]
        ranked = np.argsort(scores, kind="stable")[: int(np.isfinite(scores).sum())]  # NaN is sorted last
        best, worst = ranked[::-1][:shown], ranked[: max(0, len(ranked) - shown)]  # no picture is both
        sections[name] = {f"Best by {name}": tiles(best), f"Worst by {name}": tiles(worst)}
        if labels is not None and labels.binary:
            verdicts = scored.verdicts(name)
            wrong = np.flatnonzero(np.isfinite(verdicts) & np.isfinite(labels.values) & (verdicts != labels.values))
            sections[name][f"{name} against {labels.name}"] = tiles(wrong)
    write_page(
        path,
        "scores.html.j2",
        name=directory.resolve().name,
        pictures=len(scored.pictures),
        prompts=len({picture.prompt.index for picture in scored.pictures}),
        unreadable={_name(directory, scored, place): why for place, why in scored.unreadable.items()},
        summaries=summaries,
        tasks=[task for task in dict.fromkeys(picture.task for picture in scored.pictures) if task],
        pairs=pairs,
        labels=labels,
        sections=sections,
    )


def _name(directory: Path, scored: ScoredPictures, place: int) -> str:
    path = scored.pictures[place].path
    return str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)


def _tile(directory: Path, scored: ScoredPictures, place: int, labels: Labels | None) -> _Tile:
    picture, data = scored.pictures[place], io.BytesIO()
    image = read_picture(picture.path)
    small = max(image.size) <= SMALL
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(data, "PNG" if small else "JPEG", quality=85)
    row = zip(scored.names, scored.scores[place].tolist(), strict=True)
    label, value = "", np.nan if labels is None else float(labels.values[place])
    if labels is not None and np.isfinite(value):
        label = ("no", "yes")[int(value)] if labels.binary else f"{value:g}"
    return _Tile(
        source=f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}",
        small=small,
        file=_name(directory, scored, place),
        prompt=picture.prompt.text,
        scores={name: score for name, score in row if np.isfinite(score)},
        label=label,
        details={name: dict(said) for name, said in scored.details[place].items() if said},
    )
