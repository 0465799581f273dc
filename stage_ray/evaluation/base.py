"""What a benchmark is, and the result of one evaluation: named metrics with standard errors, and every image."""

from __future__ import annotations

import json
import math
from abc import ABC
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from stage_ray.config import RewardConfig
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.metrics import MetricValue, drawn_value, mean_of_metrics, mean_over_images
from stage_ray.files import atomic_write, read_json
from stage_ray.records import MEASURES, Prompt, ScoredGroup
from stage_ray.registry import Registry
from stage_ray.rewards.geneval_rules import is_nothing

BENCHMARKS = Registry("stage_ray.evaluation", "Benchmark", "benchmark")


class Benchmark(ABC):
    """Which prompts are drawn, what scores the images, and what the scores add up to. Built without arguments.

    A subclass names its attributes; most need to say nothing else than `values` (``README.md`` beside this file).

    Attributes:
        name: as ``evaluation.benchmark`` and ``evaluate --suite`` know it.
        headline: the metric that stands for all of them in a run's summary; more of it is better.
        prompts: location of its prompts, as in a config; "" where the user names a copy, got from ``source``.
        files: category -> file below that location, for prompts in several files; without any it is one file. A
            record of such a prompt has its ``number`` in its file, from 0.
        counts: category -> number of its prompts; a copy with others is refused. Empty: any prompts will do.
        category_key: key of a prompt's record that holds its category.
        images_per_prompt: as the benchmark defines it.
        rewards: its scorers, as in a config; none: those of the run. A run's own evaluation takes the run's prompts
            and scorers instead.
        aside: metrics of `values` that the headline leaves out.
        note: how its figures relate to the official ones; stands in a result by its scorers, and below the table.
    """

    name: str
    headline: str
    prompts: str = ""
    source: str = ""
    files: Mapping[str, str] = MappingProxyType({})
    counts: Mapping[str, int] = MappingProxyType({})
    category_key: str = "tag"
    images_per_prompt: int = 1
    rewards: Sequence[RewardConfig] = ()
    aside: tuple[str, ...] = ()
    note: str = ""

    def load(self, location: str, read: Callable[[str], list[Prompt]]) -> list[Prompt]:
        """The prompts of a copy at a location, all of them; ``read`` reads one file.

        Raises:
            ConfigError: of ``read``; no location; or another number of prompts than the benchmark has.
        """
        whole = f"get the whole from {self.source}" if self.source else "name the whole"
        if not location:
            raise ConfigError(
                f"benchmark {self.name} ships no prompts; {whole}, and give its place: evaluate --prompts, or prompts "
                "of the suite in evaluation.suites"
            )
        found: list[Prompt] = []
        for category, file in (self.files or {"": ""}).items():
            for number, prompt in enumerate(read(f"{location.rstrip('/')}/{file}" if file else location)):
                own = {self.category_key: category, "number": number} if category else {}
                found.append(replace(prompt, record={**prompt.record, **own}))
        prompts = [replace(prompt, index=index) for index, prompt in enumerate(self.prepare(found))]
        counts = Counter(map(self.category, prompts))
        for category in self.counts and [*self.counts, *counts]:
            if (count := counts[category]) != (wanted := self.counts.get(category, 0)):
                raise ConfigError(
                    f"prompts of benchmark {self.name}: {location} has {count} of category {category!r} and not "
                    f"{wanted}, so its score would be no score of {self.name}; {whole}"
                )
        return prompts

    def prepare(self, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts to draw, from those of the files: where several lines are one prompt, or text stands elsewhere.

        They are numbered afterwards, and the number of a prompt gives its images' seeds.
        """
        return prompts

    def category(self, prompt: Prompt) -> str:
        """The row of the benchmark's table that a prompt belongs to; "all" without one."""
        found = prompt.record.get(self.category_key)
        return found.strip() if isinstance(found, str) and not is_nothing(found) else "all"

    def values(
        self, prompt: Prompt, scores: Mapping[str, float | None], details: Mapping[str, Mapping[str, Any]]
    ) -> Mapping[str, float | Sequence[float]]:
        """What one image counts in each metric; it counts in none that is absent. Here: the first score, by category.

        Several values of a metric, such as one for each question about the image, count one by one.

        Args:
            scores: by scorer that was asked, in the order of the config; None where it failed.
            details: what each scorer said of the image.
        """
        score = next(iter(scores.values()), None)
        return {} if score is None else {self.category(prompt): score}

    def aggregate(self, prompts: Sequence[Prompt], scored: Sequence[ScoredGroup]) -> dict[str, MetricValue]:
        """Metrics in the order in which people read them, from one scored group for each prompt, in their order.

        Means over the images of `values`: categories in the order of the prompts, the headline, what stands
        ``aside``. The headline is the mean of the categories unless `values` has one of its own. A metric without a
        usable image is absent, never 0; the headline too.
        """
        found: dict[str, dict[int, list[float]]] = {self.category(prompt): {} for prompt in prompts}
        images = Counter[str]()  # that count in a metric; those that count in any under the headline's name
        for prompt, group in zip(prompts, scored, strict=True):
            for scores, details in zip(valid_scores(group), group.details, strict=True):
                counted = self.values(prompt, scores, details)
                images.update({*counted, self.headline} if counted else ())
                for metric, value in counted.items():
                    values = value if isinstance(value, Sequence) else [value]
                    found.setdefault(metric, {}).setdefault(prompt.index, []).extend(values)
        means = {metric: mean for metric, by_prompt in found.items() if (mean := mean_over_images(by_prompt))}
        aside = {metric: mean for metric, mean in means.items() if self.is_aside(metric)}
        table = {metric: mean for metric, mean in means.items() if metric not in (self.headline, *aside)}
        headline = means.get(self.headline) or mean_of_metrics(table)
        metrics = table | ({self.headline: headline} if headline else {}) | aside
        return {metric: replace(mean, images=images[metric]) for metric, mean in metrics.items()}

    def is_aside(self, metric: str) -> bool:
        """Whether the headline leaves a metric out."""
        return metric in self.aside

    def picture(self, prompt: Prompt, image: int) -> str:
        """Where the benchmark's official code looks for an image, below the directory of all.

        The file is a PNG, whatever its name ends in.
        Images of a prompt that share a place are laid out there as one square grid, row by row.
        """
        return f"{prompt.index:05d}-{image}.png"

    def save_pictures(self, directory: Path, prompt: Prompt, images: np.ndarray) -> None:
        """Write the images of a prompt, uint8 [G, H, W, 3], to their places; each file whole or not at all."""
        places: dict[str, list[np.ndarray]] = {}
        for number, image in enumerate(images):
            places.setdefault(self.picture(prompt, number), []).append(image)
        for place, tiles in places.items():
            columns = math.ceil(math.sqrt(len(tiles)))
            tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)  # black where the last row has no more
            rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
            write_png(directory / place, np.concatenate(rows))

    def has_pictures(self, directory: Path, prompt: Prompt, images: int) -> bool:
        """Whether the pictures of a prompt are there."""
        return all((directory / self.picture(prompt, number)).is_file() for number in range(images))


def find_benchmark(name: str, key: str = "evaluation.benchmark") -> Benchmark:
    """The benchmark of a name or dotted path; ``key`` is the config's, for messages.

    Raises:
        ConfigError: there is none (with the nearest name), or it is no `Benchmark` with a name and a headline.
    """
    kind = BENCHMARKS.find(name, key)
    if not (isinstance(kind, type) and issubclass(kind, Benchmark)):
        raise ConfigError(f"{key} = {name!r} is no class that derives from stage_ray.evaluation.Benchmark")
    if lacking := [attribute for attribute in ("name", "headline") if not hasattr(kind, attribute)]:
        raise ConfigError(f"{key} = {name!r} has no {' and no '.join(lacking)}; give the class that attribute, a text")
    return kind()


def valid_scores(group: ScoredGroup) -> list[dict[str, float | None]]:
    """Of each image its score by scorer, None where that failed; without the scorers that were not asked."""
    return [
        {
            name: float(score) if valid else None
            for name, score, valid in zip(group.names, *image, strict=True)
            if name not in group.unasked
        }
        for image in zip(group.scores, group.valid, strict=True)
    ]


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3], whole or not at all; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    Image.fromarray(image).save(scratch, format="PNG")
    scratch.replace(path)


def answers_by_kind(kinds: Sequence[str], answers: Sequence[float]) -> dict[str, list[float]]:
    """Answers to questions about one image by their kind, in the order of names.

    Example:
        >>> answers_by_kind(["entity - part", "global", "entity - whole"], [1.0, 0.0, 0.5])
        {'entity': [1.0, 0.5], 'entity - part': [1.0], 'entity - whole': [0.5], 'global': [0.0]}
    """
    found: dict[str, list[float]] = {}
    for kind, answer in zip(kinds, answers, strict=True):
        for name in {kind.partition(" - ")[0], kind}:  # a finer kind counts in the one before its dash too
            found.setdefault(name, []).append(answer)
    return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The result of one evaluation; JSON-able, see `write_result`.

    Attributes:
        benchmark: its name.
        headline: name of its headline metric.
        metrics: as `Benchmark.aggregate` gives them.
        scores: mean of every scorer, by its column; None where it scored nothing.
        images: for each image ``prompt_index``, ``prompt``, ``image``, ``scores`` (of scorers that were asked; None
            where invalid) and ``details``.
        conditions: what it depends on beside the weights, by key of a config: see `conditions` in ``loop.py``.
            Empty in a file of an earlier version.
        note: the benchmark's; "" where other scorers than its own judged.
    """

    benchmark: str
    headline: str
    metrics: Mapping[str, MetricValue]
    scores: Mapping[str, float | None] = field(default_factory=dict)
    images: tuple[Mapping[str, Any], ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def unjudged(self) -> int:
        """Images that count in no score."""
        headline = self.metrics.get(self.headline)
        return len(self.images) - (headline.images if headline else 0)

    def with_metrics(self, further: Mapping[str, MetricValue]) -> EvaluationResult:
        """The result with further metrics, after its own, whose names they may not take."""
        return replace(self, metrics=dict(self.metrics) | {k: v for k, v in further.items() if k not in self.metrics})

    def direction(self, metric: str) -> int:
        """1 where more of a metric is better, -1 where less is; 0 where neither is, or nothing is known."""
        headline, found = self.metrics.get(self.headline), self.metrics.get(metric)
        judged = (self.headline, *(headline.parts if headline else ()))
        better = found.better if found and found.better else "larger" * (metric in judged)
        return {"larger": 1, "smaller": -1}.get(better, 0)

    @property
    def headline_value(self) -> float | None:
        """Value of the headline metric; None where no image could be judged."""
        return self.metrics[self.headline].value if self.headline in self.metrics else None


def unlike(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Why two evaluations cannot be compared prompt by prompt, from their ``conditions``; "" where they can.

    Example:
        >>> unlike({"evaluation.seed": 20}, {"evaluation.seed": 21})
        'before and after cannot be compared: evaluation.seed was 20 and is 21'
    """
    said = []
    for key in sorted(before.keys() | after.keys()):
        if key == MEASURES and not (key in before and key in after):
            continue  # that one of them measured more changes nothing in the rest
        if (was := before.get(key)) != (now := after.get(key)):
            values = f"was {was} and is {now}"
            said.append(f"{key} {values if len(values) < 100 else 'was another'}")
    if not before or not after:
        said = ["an earlier version wrote one of them, and not what it was made with"]
    return f"before and after cannot be compared: {'; '.join(said)}" if said else ""


def changes(before: EvaluationResult, after: EvaluationResult) -> dict[str, MetricValue]:
    """Change of each metric that two evaluations of one benchmark have, with its standard error.

    Both draw the same prompts with the same seeds, so the change is estimated prompt by prompt: its standard error is
    that of the prompts' differences, which is smaller than what the two values' errors suggest. The change of a mean
    of metrics is the mean of their changes; that of a metric with ``draws`` spreads as those of the same prompts do.
    """
    found: dict[str, MetricValue] = {}
    for name, was in before.metrics.items():
        now = after.metrics.get(name)
        if now is None or any(part not in found for part in was.parts):
            continue
        if was.draws and len(was.draws) == len(now.draws):
            found[name] = drawn_value(now.value - was.value, np.subtract(now.draws, was.draws), now.images)
            continue
        both = was.by_prompt.keys() & now.by_prompt.keys()  # prompts with a judged image in both
        differences = {prompt: [now.by_prompt[prompt] - was.by_prompt[prompt]] for prompt in sorted(both)}
        parts = {part: found[part] for part in was.parts}  # empty where the metric is measured itself
        if (change := mean_of_metrics(parts) or mean_over_images(differences)) is not None:
            found[name] = change
    return found


def write_result(path: Path, result: EvaluationResult, **more: Any) -> None:
    """Write a result as JSON, whole or not at all; ``more`` are keys beside its own."""
    atomic_write(path, json.dumps(asdict(result) | more, indent=1))


def read_result(path: Path) -> EvaluationResult | None:
    """Read a file of `write_result`, without its further keys; None if there is no file.

    Raises:
        RunError: the file is damaged, or another version wrote it.
    """
    data = read_json(path)
    try:
        return None if data is None else TypeAdapter(EvaluationResult).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]  # one is enough to see what the file is
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise RunError(f"{path} is not an evaluation ({why}); remove it to go on without it") from error


def plain(value: Any) -> Any:
    """What a scorer says, where JSON does not know its type: NumPy's numbers and arrays as Python's, else a text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def summarise(benchmark: Benchmark, prompts: Sequence[Prompt], scored: Sequence[ScoredGroup]) -> EvaluationResult:
    """Sum up the scored groups of `requests_for`'s requests, in any order.

    Raises:
        ValueError: `scored` is not exactly one group for each prompt.
    """
    ordered = sorted(scored, key=lambda group: group.group_id)
    if [group.group_id for group in ordered] != list(range(len(prompts))):  # one is missing, twice or a stranger
        raise ValueError(f"{len(scored)} scored groups do not match {len(prompts)} prompts; each needs exactly one")
    images: list[dict[str, Any]] = []
    columns: dict[str, list[float]] = {name: [] for group in ordered for name in group.names}  # valid scores only
    for prompt, group in zip(prompts, ordered, strict=True):
        # Details are a user's: a trip through JSON makes NaN null, and whatever JSON does not know what `plain` says.
        details = json.loads(json.dumps(group.details, default=plain), parse_constant=lambda _: None)
        for image, (scores, said) in enumerate(zip(valid_scores(group), details, strict=True)):
            for name, score in scores.items():
                columns[name] += [] if score is None else [score]
            where = {"prompt_index": prompt.index, "prompt": prompt.text, "image": image}
            images.append({**where, "scores": scores, "details": said})
    means = {name: sum(scores) / len(scores) if scores else None for name, scores in columns.items()}
    metrics = benchmark.aggregate(prompts, ordered)
    own = all(reward.column in columns for reward in benchmark.rewards)  # else a note on its scorers is none on these
    note = benchmark.note if own else ""
    return EvaluationResult(benchmark.name, benchmark.headline, metrics, means, tuple(images), note=note)
