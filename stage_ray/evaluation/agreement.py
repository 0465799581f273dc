"""How scorers agree: among each other, and with what a user knows of the pictures (`stage-ray score`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import stats

from stage_ray.errors import ConfigError, suggest
from stage_ray.evaluation.pictures import Picture, ScoredPictures
from stage_ray.rewards.geneval_rules import is_nothing

YES, NO = ("1", "1.0", "true", "yes", "right", "correct"), ("0", "0.0", "false", "no", "wrong", "incorrect")


@dataclass(frozen=True, slots=True)
class Correlation:
    """Of two scores over the ``count`` pictures that have both; None where one of them is constant there."""

    pearson: float | None
    spearman: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of yes and no with the labels of ``count`` pictures.

    Attributes:
        share: of the pictures on which both agree, 0..1; None without pictures.
        kappa: Cohen's kappa, 0 where both agree as often as by chance; None where both always say the same one thing.
        missed: labelled yes, and no was said; ``wrong``: labelled no, and yes was said.
        threshold: scores from here on are a yes; None where the scorer gives verdicts by itself. It is fitted: the
            greatest kappa on these same labels, so other pictures will agree less.
    """

    share: float | None
    kappa: float | None
    count: int
    missed: int
    wrong: int
    threshold: float | None = None


def correlation(first: np.ndarray, second: np.ndarray) -> Correlation:
    """Pearson's and Spearman's correlation of float [P] and [P]; NaN where there is no value.

    Example:
        >>> correlation(np.array([1.0, 2.0, 4.0, np.nan]), np.array([1.0, 2.0, 3.0, 4.0])).spearman
        1.0
    """
    both = np.isfinite(first) & np.isfinite(second)
    first, second, count = first[both], second[both], int(both.sum())
    if count < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Correlation(None, None, count)
    pearson, spearman = stats.pearsonr(first, second), stats.spearmanr(first, second)
    return Correlation(round(float(pearson.statistic), 6), round(float(spearman.statistic), 6), count)


def inside_prompts(first: np.ndarray, second: np.ndarray, prompts: np.ndarray) -> Correlation:
    """The same of what is left when the mean over the pictures of its prompt is taken off each score.

    GRPO compares the images of one prompt, so this is what its advantages see. Prompts with one picture are left out.

    Args:
        prompts: int [P], the prompt of each picture.
    """
    both = np.isfinite(first) & np.isfinite(second)
    first, second = (np.where(both, values, np.nan).astype(np.float64) for values in (first, second))
    for prompt in np.unique(prompts):
        mine = both & (prompts == prompt)
        for values in (first, second):
            values[mine] = values[mine] - values[mine].mean() if mine.sum() > 1 else np.nan
    rounded = [np.round(values, 12) for values in (first, second)]  # equal scores stay equal, whatever a mean rounds to
    return correlation(*rounded)


def cohens_kappa(said: np.ndarray, labels: np.ndarray) -> float | None:
    """Cohen's kappa of bool [P] and [P]: ``(p_o - p_e) / (1 - p_e)``, p_o the agreement and p_e that of chance.

    Example:
        >>> cohens_kappa(np.array([True, True, False, False]), np.array([True, False, False, False]))
        0.5
    """
    if not len(said):
        return None
    observed, yes, labelled = (said == labels).mean(), said.mean(), labels.mean()
    chance = yes * labelled + (1 - yes) * (1 - labelled)
    return None if chance == 1 else float((observed - chance) / (1 - chance))


def agreement(said: np.ndarray, labels: np.ndarray, threshold: float | None = None) -> Agreement:
    """How verdicts, bool [P], agree with labels, bool [P]."""
    share = float((said == labels).mean()) if len(said) else None
    missed, wrong = int((labels & ~said).sum()), int((~labels & said).sum())
    return Agreement(share, cohens_kappa(said, labels), len(said), missed, wrong, threshold)


def fitted_agreement(scores: np.ndarray, labels: np.ndarray) -> Agreement | None:
    """How graded scores, float [P], agree with labels, bool [P], at the threshold of the greatest kappa.

    None where no threshold parts the scores: they are all equal.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, count, yes = scores[order], len(scores), labels.sum()
    cuts = np.flatnonzero(ranked[:-1] > ranked[1:])  # the last place above each threshold
    if not len(cuts):
        return None
    called, hits = cuts + 1, np.cumsum(labels[order])[cuts]
    observed = (hits + (count - yes) - (called - hits)) / count
    chance = (called * yes + (count - called) * (count - yes)) / count**2
    best = cuts[np.argmax((observed - chance) / (1 - chance))]  # chance < 1: some scores are on either side
    threshold = float(ranked[best] + ranked[best + 1]) / 2
    return agreement(scores > threshold, labels, threshold)


@dataclass(frozen=True, slots=True)
class Labels:
    """A column of the user's: float [P], NaN where a picture has no label; ``binary``: 1 is yes and 0 is no."""

    name: str
    values: np.ndarray
    binary: bool


@dataclass(frozen=True, slots=True)
class ScorerSummary:
    """What one scorer said of all pictures that it was asked about.

    Attributes:
        asked, valid: pictures that it was asked about, and those that have a score.
        std: unbiased; None of fewer than two.
        right: share of its verdicts that are yes; None where it gives none.
        tasks: task -> mean.
        verdicts: how its verdicts agree with binary labels; ``fitted``: how its score does at the best threshold.
        labels: correlation with labels that are numbers.
    """

    name: str
    asked: int
    valid: int
    mean: float | None
    std: float | None
    minimum: float | None
    maximum: float | None
    right: float | None
    tasks: Mapping[str, float]
    verdicts: Agreement | None = None
    fitted: Agreement | None = None
    labels: Correlation | None = None


@dataclass(frozen=True, slots=True)
class PairSummary:
    """How two scorers go together: over all pictures, and inside prompts (`inside_prompts`)."""

    first: str
    second: str
    overall: Correlation
    inside: Correlation


def read_labels(pictures: Sequence[Picture], name: str) -> Labels:
    """The column ``name`` of the lines of pictures' prompts: yes and no in any of `YES` and `NO`, or numbers.

    Raises:
        ConfigError: no line has it, a value is neither.
    """
    found = [picture.prompt.record.get(name) for picture in pictures]
    texts = ["" if is_nothing(value) else str(value).strip().lower() for value in found]
    if not any(texts):
        known = dict.fromkeys(key for picture in pictures for key in picture.prompt.record)
        raise ConfigError(f"--column {name!r} has no value in any line; {suggest(name, list(known))}")
    if binary := all(text in ("", *YES, *NO) for text in texts):
        return Labels(name, np.array([np.nan if not text else float(text in YES) for text in texts]), binary)
    values = []
    for picture, text in zip(pictures, texts, strict=True):
        try:
            values.append(float(text) if text else np.nan)
        except ValueError:
            raise ConfigError(
                f"{picture.prompt.where}: {name} = {text!r} is neither a number nor one of {', '.join((*YES, *NO))}"
            ) from None
    return Labels(name, np.array(values), binary)


def summarise_scorers(scored: ScoredPictures, labels: Labels | None = None) -> list[ScorerSummary]:
    """What each scorer said, and how it agrees with ``labels``."""
    tasks = np.array([picture.task for picture in scored.pictures])
    summaries = []
    for column, name in enumerate(scored.names):
        scores = scored.scores[:, column].astype(np.float64)
        known, values = np.isfinite(scores), scores[np.isfinite(scores)]
        verdicts = scored.verdicts(name)
        judged = np.isfinite(verdicts)
        summary = ScorerSummary(
            name=name,
            asked=int(scored.asked[:, column].sum()),
            valid=len(values),
            mean=float(values.mean()) if len(values) else None,
            std=float(values.std(ddof=1)) if len(values) > 1 else None,
            minimum=float(values.min()) if len(values) else None,
            maximum=float(values.max()) if len(values) else None,
            right=float(verdicts[judged].mean()) if judged.any() else None,
            tasks={str(t): float(scores[known & (tasks == t)].mean()) for t in dict.fromkeys(tasks[known])},
        )
        if labels is not None and not labels.binary:
            summary = replace(summary, labels=correlation(scores, labels.values))
        elif labels is not None:
            judged, graded = (np.isfinite(labels.values) & np.isfinite(given) for given in (verdicts, scores))
            wanted = labels.values == 1
            summary = replace(
                summary,
                verdicts=agreement(verdicts[judged] == 1, wanted[judged]) if judged.any() else None,
                fitted=fitted_agreement(scores[graded], wanted[graded]),
            )
        summaries.append(summary)
    return summaries


def summarise_pairs(scored: ScoredPictures) -> list[PairSummary]:
    """Every two scorers, in the order of the columns."""
    prompts = np.array([picture.prompt.index for picture in scored.pictures])
    columns = dict(zip(scored.names, scored.scores.T.astype(np.float64), strict=True))
    return [
        PairSummary(a, b, correlation(columns[a], columns[b]), inside_prompts(columns[a], columns[b], prompts))
        for a, b in combinations(scored.names, 2)
    ]
