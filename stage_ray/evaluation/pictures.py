"""Pictures of a directory with their prompts, and what scorers say of them: `stage-ray score`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.base import plain
from stage_ray.records import RECORDED, Prompt, RolloutGroup
from stage_ray.rewards import build_rewards, score_groups
from stage_ray.rewards.base import GroupReward
from stage_ray.rewards.routing import Routed

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
FILE_KEYS = ("file", "image", "path", "file_name", "filename")  # the first that a line of the prompts has
PROMPT_FILES = tuple(f"{name}.{suffix}" for name in ("prompts", "metadata") for suffix in ("jsonl", "csv"))
NOT_PICTURES = {"sheet.png"}  # the contact sheet of `generate`
IMAGES_PER_BATCH = 64


@dataclass(frozen=True, slots=True)
class Picture:
    """A file, and the prompt that it should show; ``prompt.index`` is the same for all pictures of one prompt."""

    path: Path
    prompt: Prompt

    @property
    def task(self) -> str:
        """The prompt's ``tag`` or ``task_type``; "" without one."""
        return str(self.prompt.record.get("tag") or self.prompt.record.get("task_type") or "")


@dataclass(frozen=True, slots=True)
class ScoredPictures:
    """What R scorers say of P pictures.

    Attributes:
        scores: float32 [P, R]; NaN where a scorer failed or was not asked, and where a picture cannot be read.
        asked: bool [P, R], the scorers whose ``when`` holds; False where a picture cannot be read.
        details: of each picture by scorer, JSON-able; ``error`` says why a score failed.
        unreadable: place of a picture -> why.
    """

    pictures: tuple[Picture, ...]
    names: tuple[str, ...]
    scores: np.ndarray
    asked: np.ndarray
    details: tuple[Mapping[str, Mapping[str, Any]], ...]
    unreadable: Mapping[int, str]

    def verdicts(self, name: str) -> np.ndarray:
        """A scorer's verdicts, float [P]: 1 right, 0 wrong, NaN without one."""
        said = [detail.get(name, {}).get("verdict") for detail in self.details]
        return np.array([np.nan if verdict is None else float(bool(verdict)) for verdict in said])


def find_pictures(
    directory: Path, read: Callable[[str], list[Prompt]], prompts: str | None = None, prompt: str | None = None
) -> list[Picture]:
    """The pictures of a directory with their prompts, those of one prompt together.

    One ``prompt`` of all; or those of a file ``prompts``, by default ``prompts.jsonl``, ``prompts.csv`` or
    ``metadata.*`` in the directory: it names the picture of each line, or the pictures are numbered as `generate` and
    `evaluate --pictures` write them; or GenEval's layout, ``00000/metadata.jsonl`` beside ``00000/samples/``. ``read``
    reads a file of prompts.

    Raises:
        ConfigError: there is no picture, or one has no prompt; says what was looked for.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory of pictures")
    files = sorted(
        path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.name not in NOT_PICTURES
    )
    if not files:
        raise ConfigError(f"{directory} holds no pictures: no file in it ends in {', '.join(sorted(SUFFIXES))}")
    if prompt is not None:
        return [Picture(file, Prompt(0, prompt, {"prompt": prompt}, "--prompt")) for file in files]
    beside = next((directory / name for name in PROMPT_FILES if (directory / name).is_file()), None)
    location = prompts or (None if beside is None else str(beside))
    if location is None:
        found = [
            replace(read(str(path))[0], index=_number(path.parent))
            for path in sorted(directory.glob("*/metadata.jsonl"))
        ]
        fix = "name them with --prompts FILE or --prompt TEXT, or put prompts.jsonl beside the pictures"
    else:
        found = [replace(one, record=_with_metadata(one.record)) for one in read(location)]
        fix = f"{location} has no column {', '.join(FILE_KEYS)} that would name its pictures"
        if named := next((key for key in FILE_KEYS if found and key in found[0].record), None):
            return _named(directory, found, named)
    by_number = {one.index: one for one in found}
    pictures = [Picture(file, by_number[n]) for file in files if (n := _number(file)) in by_number]
    if len(pictures) < len(files):
        lacking = next(file for file in files if _number(file) not in by_number)
        raise ConfigError(
            f"{len(files) - len(pictures)} of {len(files)} pictures of {directory} have no prompt, the first is "
            f"{lacking.relative_to(directory)}; {fix}"
        )
    return sorted(pictures, key=lambda picture: picture.prompt.index)


def _number(path: Path) -> int:
    """The number of a picture's prompt, of ``0001-0.png`` or ``00001/samples/0000.png``, or of such a directory."""
    name = path.parent.parent.name if path.parent.name == "samples" else path.name.partition("-")[0]
    return int(name) if name.isascii() and name.isdigit() else -1


def _with_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of GenEval's results has the prompt's own line as JSON in ``metadata``."""
    metadata = record.get("metadata")
    try:
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    except ValueError:
        metadata = None
    return {**(metadata if isinstance(metadata, Mapping) else {}), **record}


def _named(directory: Path, prompts: Sequence[Prompt], key: str) -> list[Picture]:
    """A picture a line, found below the directory by as much of its path as there is."""
    pictures, numbers = [], dict[str, int]()
    for one in prompts:
        parts = Path(str(one.record.get(key) or "")).parts
        places = [directory.joinpath(*parts[start:]) for start in range(len(parts))]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise ConfigError(f"{one.where}: {key} = {one.record.get(key)!r} is no file below {directory}")
        own = {name: value for name, value in one.record.items() if name in ("include", "exclude", "tag", "task_type")}
        index = numbers.setdefault(json.dumps([one.text, own], default=str), len(numbers))
        pictures.append(Picture(path, replace(one, index=index)))
    return sorted(pictures, key=lambda picture: picture.prompt.index)


def score_pictures(
    pictures: Sequence[Picture], rewards: Sequence[RewardConfig], advance: Callable[[int], object]
) -> ScoredPictures:
    """Score pictures in batches; ``advance`` counts them.

    A scorer that compares images is asked about groups, the pictures of one prompt and size. A scorer that fails, or a
    picture that cannot be read, is part of the answer and never a number.

    Raises:
        ConfigError: of `build_rewards`.
        RunError: no picture can be read.
    """
    scorers = build_rewards(rewards)
    compares = any(isinstance(s.scorer if isinstance(s, Routed) else s, GroupReward) for _, s in scorers)
    shape = (len(pictures), len(scorers))
    scores, asked = np.full(shape, np.nan, np.float32), np.zeros(shape, bool)
    details: list[Mapping[str, Mapping[str, Any]]] = [{} for _ in pictures]
    unreadable: dict[int, str] = {}
    for batch in _batches(pictures, whole_prompts=compares):
        groups: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}  # prompt and shape -> its pictures
        for place in batch:
            try:
                image = np.asarray(read_picture(pictures[place].path))
            except OSError as error:
                unreadable[place] = str(error)
                continue
            # Where no scorer compares pictures, each is a group, with all that its own line says.
            key = (pictures[place].prompt.index if compares else place, *image.shape)
            groups.setdefault(key, []).append((place, image))
        for size in dict.fromkeys(key[1:] for key in groups):  # one call scores images of one size
            members = [group for key, group in groups.items() if key[1:] == size]
            asking = [as_group(pictures[own[0][0]].prompt, np.stack([image for _, image in own])) for own in members]
            for own, group in zip(members, score_groups(scorers, asking), strict=True):
                for number, (place, _) in enumerate(own):
                    scores[place], asked[place] = group.scores[number], group.asked
                    said = json.dumps(group.details[number], default=plain)
                    details[place] = json.loads(said, parse_constant=lambda _: None)
        advance(len(batch))
    if len(unreadable) == len(pictures):
        raise RunError(f"none of {len(pictures)} pictures can be read; the first, {pictures[0].path}: {unreadable[0]}")
    names = tuple(name for name, _ in scorers)
    return ScoredPictures(tuple(pictures), names, scores, asked, tuple(details), unreadable)


def read_picture(path: Path) -> Image.Image:
    """A picture as RGB, the right way up; an OSError where it cannot be read."""
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's too, of damaged files
        raise OSError(error) from error


def _batches(pictures: Sequence[Picture], *, whole_prompts: bool) -> Iterator[range]:
    """Places of pictures, at least `IMAGES_PER_BATCH` where a prompt must not be cut, else at most."""
    first = 0
    for place in range(1, len(pictures)):
        cuts_prompt = pictures[place].prompt.index == pictures[place - 1].prompt.index
        if place - first >= IMAGES_PER_BATCH and not (whole_prompts and cuts_prompt):
            yield range(first, place)
            first = place
    yield range(first, len(pictures))


def as_group(prompt: Prompt, images: np.ndarray) -> RolloutGroup:
    """Pictures as scorers want them; nothing is known of their tokens."""
    count = len(images)
    empty: dict[str, Any] = {name: np.empty((count, 0), np.float32) for name in RECORDED}
    tokens = np.empty((count, 0), np.int32)
    return RolloutGroup(
        group_id=prompt.index,
        prompt=prompt,
        seeds=(0,) * count,
        tokens=tokens,
        **empty,
        images=images,
        policy_version=0,
        worker="local",
        generate_s=0.0,
    )
