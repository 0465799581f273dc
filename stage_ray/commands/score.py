"""``stage-ray score``: any scorers over any pictures, and how far they agree with each other and with a person."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from stage_ray.commands.train import SetOption
from stage_ray.config.paths import require_lasting
from stage_ray.errors import ConfigError, RunError
from stage_ray.files import atomic_write, name_disk_errors, require_writable

if TYPE_CHECKING:
    from stage_ray.config import RewardConfig
    from stage_ray.evaluation.agreement import Labels, PairSummary, ScorerSummary
    from stage_ray.evaluation.pictures import ScoredPictures

AGAIN = "nothing is kept; give the same command again"
SHOWN = 3  # pictures and prompts that a message names
PROMPTS = "Lines with a prompt and its picture (file, image, path, file_name), or numbered as the pictures are"
COLUMN = "Compare with this key of the lines: official verdicts, human labels; yes and no, or numbers"


def score(
    directory: Annotated[Path, Argument(metavar="DIR", help="Pictures: png, jpg, webp")],
    scorer: Annotated[list[str] | None, Option(metavar="NAME", help="As rewards[].type; may be repeated")] = None,
    config: Annotated[Path | None, Option(metavar="CONFIG", help="Take the rewards of this config instead")] = None,
    overrides: SetOption = None,
    prompts: Annotated[str | None, Option(metavar="FILE", help=PROMPTS)] = None,
    prompt: Annotated[str | None, Option(metavar="TEXT", help="One prompt for all pictures")] = None,
    column: Annotated[str | None, Option(metavar="NAME", help=COLUMN)] = None,
    page: Annotated[Path, Option(metavar="FILE", help="Where the page goes")] = Path("scores.html"),
    shown: Annotated[int, Option(metavar="COUNT", help="Best and worst pictures on the page", min=1)] = 8,
    json_file: Annotated[Path | None, Option("--json", help="Also write everything here")] = None,
    csv_file: Annotated[Path | None, Option("--csv", help="Also write a line a picture here")] = None,
) -> None:
    """Score pictures: a table, correlations of the scorers, agreement with labels, best and worst pictures on a page.

    Prompts come from --prompts, from prompts.jsonl, prompts.csv or metadata.jsonl in DIR, or from GenEval's layout
    (00000/metadata.jsonl, 00000/samples/). Pictures of generate and of evaluate --pictures are found by their numbers.
    GenEval's own results.jsonl is a FILE, and its column "correct" holds the official verdicts.

    Exit code 1 if a scorer gives no picture a score. Examples:

    stage-ray score pictures --prompt "a red ring" --scorer clip --set rewards.0.options.path=OWNER/NAME

    stage-ray score outputs --config stage_shapeworld --prompts results.jsonl --column correct --csv scores.csv
    """
    import transformers

    from stage_ray.evaluation.agreement import read_labels, summarise_pairs, summarise_scorers
    from stage_ray.evaluation.pictures import find_pictures, score_pictures
    from stage_ray.observability.progress import Progress
    from stage_ray.pipeline.prompt_files import load_prompts
    from stage_ray.report.scores import write_scores_page
    from stage_ray.run.stop import stops_at_once

    rewards = scorers_of(scorer or [], config, overrides or [])
    for option, file in (("--page", page), ("--json", json_file), ("--csv", csv_file)):
        if file is not None:
            require_lasting(file, option)
            require_writable(file.parent, option)
            if file.is_dir():
                raise ConfigError(f"{option} {file} is a directory; name a file in it")
    if prompts is not None and prompt is not None:
        raise ConfigError("--prompts and --prompt are two sources of prompts; give one of them")
    pictures = find_pictures(directory, load_prompts, prompts, prompt)
    labels = None if column is None else read_labels(pictures, column)
    transformers.utils.logging.disable_progress_bar()
    with stops_at_once(AGAIN), name_disk_errors(page, AGAIN), Progress() as progress:
        _name_unjudgeable(rewards, list({picture.prompt.index: picture.prompt for picture in pictures}.values()))
        progress.stage("loading the scorers")
        with progress.bar("scoring", total=len(pictures)) as advance:
            scored = score_pictures(pictures, rewards, advance)
        summaries, pairs = summarise_scorers(scored, labels), summarise_pairs(scored)
        write_scores_page(page, directory, scored, summaries, pairs, labels, shown)
        if json_file is not None:
            atomic_write(json_file, json.dumps(_everything(scored, summaries, pairs, labels), indent=1))
        if csv_file is not None:
            atomic_write(csv_file, _lines(scored, labels))
    _name_failures(scored)
    _print_tables(summaries, pairs, labels)
    echo(f"page: {page}")
    if silent := [one.name for one in summaries if not one.valid]:
        raise RunError(f"no picture has a score of {', '.join(silent)}")


def scorers_of(names: Sequence[str], config: Path | None, overrides: Sequence[str]) -> list[RewardConfig]:
    """The scorers that a command names: by type, or those of a config; options by ``rewards.0.options.KEY=VALUE``.

    Raises:
        ConfigError: none or both are named, or an override is wrong.
    """
    from stage_ray.config.load import load_config, validate_config

    if config is not None:
        if names:
            raise ConfigError(f"--config {config} and --scorer {names[0]} both name scorers; give one of them")
        return load_config(config, overrides).rewards
    if not names and not any(override.startswith("rewards=") for override in overrides):
        raise ConfigError("no scorer is named; give --scorer NAME, --config CONFIG, or --set 'rewards=[{type: NAME}]'")
    data: dict[str, Any] = {"steps": 1, "policy": {"path": "-"}, "prompts": {"train": "-"}}
    data |= {"rewards": [{"type": name} for name in names], "evaluation": {"enabled": False}}
    return validate_config(data, overrides, source="--scorer").rewards


def _name_unjudgeable(rewards: Sequence[RewardConfig], prompts: Sequence[Any]) -> None:
    """Say which prompts a scorer cannot judge; a `ConfigError` for wrong options comes before models are loaded."""
    from stage_ray.rewards import check_rewards

    problems = dict.fromkeys(f"{prompt.where}: {why}" for prompt, why in check_rewards(rewards, prompts))
    for problem in list(problems)[:SHOWN]:
        echo(problem, err=True)
    if len(problems) > SHOWN:
        echo(f"and {len(problems) - SHOWN} more", err=True)


def _name_failures(scored: ScoredPictures) -> None:
    """Say which pictures cannot be read, and of each scorer how many scores failed and why the first did."""
    for place, why in list(scored.unreadable.items())[:SHOWN]:
        echo(f"{scored.pictures[place].path}: cannot be read: {why}", err=True)
    if scored.unreadable:
        echo(f"{len(scored.unreadable)} of {len(scored.pictures)} pictures cannot be read", err=True)
    for number, name in enumerate(scored.names):
        errors = [(p, d[name]["error"]) for p, d in enumerate(scored.details) if "error" in d.get(name, {})]
        if errors:
            place, why = errors[0]
            asked = int(scored.asked[:, number].sum())
            echo(f"{name}: {len(errors)} of {asked} scores failed: {scored.pictures[place].path}: {why}", err=True)


def _print_tables(summaries: Sequence[ScorerSummary], pairs: Sequence[PairSummary], labels: Labels | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def show(*columns: str, rows: Sequence[Sequence[Any]]) -> None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for number, name in enumerate(columns):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(f"{it:.3f}" if isinstance(it, float) else "" if it is None else str(it) for it in row))
        console.print(table, markup=False)
        console.print()

    show(
        *("scorer", "pictures", "scored", "mean", "std", "min", "max", "right"),
        rows=[
            (s.name, s.asked, s.valid / max(1, s.asked), s.mean, s.std, s.minimum, s.maximum, s.right)
            for s in summaries
        ],
    )
    tasks = dict.fromkeys(task for one in summaries for task in one.tasks if task)
    if tasks:
        names = [one.name for one in summaries]
        show("mean by task", *names, rows=[(task, *(one.tasks.get(task) for one in summaries)) for task in tasks])
    if pairs:
        show(
            *("correlation", "pictures", "Spearman", "Pearson", "Spearman inside prompts", "Pearson inside prompts"),
            rows=[
                (
                    f"{p.first}, {p.second}",
                    p.overall.count,
                    *(it for c in (p.overall, p.inside) for it in (c.spearman, c.pearson)),
                )
                for p in pairs
            ],
        )
    if labels is not None and labels.binary:
        found = [(one.name, it) for one in summaries for it in (one.verdicts, one.fitted) if it is not None]
        said = ["verdict" if it.threshold is None else f"≥ {it.threshold:.4g} (fitted)" for _, it in found]
        show(
            *(f"against {labels.name}", "pictures", "agreement", "kappa", "missed", "wrongly right"),
            rows=[
                (f"{name} {how}", it.count, it.share, it.kappa, it.missed, it.wrong)
                for (name, it), how in zip(found, said, strict=True)
            ],
        )
    elif labels is not None:
        both = [(one.name, one.labels) for one in summaries if one.labels is not None]
        numbers = [(name, it.count, it.spearman, it.pearson) for name, it in both]
        show(f"with {labels.name}", "pictures", "Spearman", "Pearson", rows=numbers)


def _rows(scored: ScoredPictures, labels: Labels | None) -> list[dict[str, Any]]:
    """A picture each: where, what it should show, and its scores; None for what there is not."""
    rows = []
    for place, picture in enumerate(scored.pictures):
        row: dict[str, Any] = {"file": str(picture.path), "prompt": picture.prompt.text, "task": picture.task}
        scores = scored.scores[place].tolist()
        row["scores"] = {name: it if it == it else None for name, it in zip(scored.names, scores, strict=True)}
        if labels is not None:
            value = float(labels.values[place])
            row["label"] = value if value == value else None
        rows.append(row | {"error": scored.unreadable.get(place, "")})
    return rows


def _everything(
    scored: ScoredPictures, summaries: Sequence[ScorerSummary], pairs: Sequence[PairSummary], labels: Labels | None
) -> dict[str, Any]:
    images = [row | {"details": said} for row, said in zip(_rows(scored, labels), scored.details, strict=True)]
    return {
        "scorers": [asdict(one) for one in summaries],
        "correlations": [asdict(pair) for pair in pairs],
        "column": None if labels is None else labels.name,
        "images": images,
    }


def _lines(scored: ScoredPictures, labels: Labels | None) -> str:
    """CSV: a line a picture, a column a scorer; empty where there is no score."""
    rows = [{**row, **row.pop("scores")} for row in _rows(scored, labels)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
