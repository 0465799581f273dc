"""Commands that hand over to a room of their own: ``bench``, ``pretrain``, ``report``, ``compare`` and ``metrics``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option, echo

from stage_ray.bench import bench_names
from stage_ray.config.paths import require_lasting
from stage_ray.errors import ConfigError


class PretrainStage(StrEnum):
    """The stages of ``pretrain``, named here because importing them takes seconds."""

    prompts = "prompts"
    tokenizer = "tokenizer"
    language_model = "language-model"
    detector = "detector"
    clip = "clip"
    features = "features"
    cards = "cards"


def bench(
    name: Annotated[str, Argument(metavar="NAME", help=f"{', '.join(bench_names())}, or all")],
    json_file: Annotated[Path | None, Option("--json", help="Also write the rows here, as a list")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], Option(help="Auto is a GPU where there is one")] = "auto",
    quick: Annotated[bool, Option("--quick", help="Small and few, to see that it works; ratios say nothing")] = False,
) -> None:
    """Measure how fast this is: ratios against plain code run in turn with ours, and the limit of each.

    rollout: images drawn, by each engine. learner: time and memory of an update. sync: weights to two workers.
    pipeline: what the driver hides and costs. roles: rollout and learner on the same cores.
    end-to-end: images trained a second, by a real short run.
    samplers: seconds, held-out score and diversity of ways to decode.

    A missed target is a fact, not a failure: the exit code is 0 all the same. Let nothing else run meanwhile.

    Example: stage-ray bench rollout --json rollout.json
    """
    require_lasting(json_file, "--json")
    from stage_ray.bench.command import run_benches

    run_benches(name, device=device, quick=quick, json_file=json_file)


def pretrain(
    out: Annotated[Path, Option(help="Directory of the results; a run that was cut off goes on in it")],
    stages: Annotated[list[PretrainStage] | None, Option("--stage", help="This stage alone; may be repeated")] = None,
    seed: Annotated[int, Option(help="Fixes the pictures and the weights at the start", min=0)] = 0,
    smoke: Annotated[bool, Option("--smoke", help="A few steps each, to see that it works")] = False,
) -> None:
    """Rebuild what ships with the package: prompts, tokenizer, policy, detector, CLIP, features. About 80 minutes.

    Example: stage-ray pretrain --out world --smoke
    """
    require_lasting(out, "--out")
    from stage_ray.shapeworld.pretrain import pretrain as pretrain_world

    pretrain_world(out, stages=stages, seed=seed, smoke=smoke)


def report(
    run_dir: Annotated[Path, Argument(metavar="RUN_DIR", help="The directory of a run, finished or not")],
) -> None:
    """Write report.html anew from whatever a run directory holds.

    Example: stage-ray report runs/stage_shapeworld
    """
    from stage_ray.report.report import write_report

    echo(write_report(run_dir))


def compare(
    run_dirs: Annotated[
        list[Path], Argument(metavar="RUN_DIR...", help="Directories of runs; differences are to the first")
    ],
    page: Annotated[Path, Option(help="Where to write the page")] = Path("compare.html"),
    json_file: Annotated[Path | None, Option("--json", help="Also write the numbers on it here")] = None,
    figure: Annotated[Path | None, Option(help="Also draw its curves as one picture: .svg, .pdf, .png")] = None,
    curve: Annotated[
        list[str] | None, Option(metavar="TITLE", help="What --figure draws of them, if not all; may be repeated")
    ] = None,
) -> None:
    """Compare runs on one page: intervals of what they reached, curves, pictures at equal steps, configs.

    Runs whose configs differ in nothing but the seed are one arm: its figures are means over them. An interval covers
    95 % of a bootstrap over runs and prompts; a difference to the first arm is taken prompt by prompt, between runs of
    one seed.

    Example: stage-ray compare runs/grpo_shapeworld runs/stage_shapeworld
    """
    require_lasting(page, "--page")
    require_lasting(json_file, "--json")
    require_lasting(figure, "--figure")
    if curve and figure is None:
        raise ConfigError("--curve says what --figure draws; give --figure FILE too")
    from stage_ray.report.compare import write_comparison

    echo(write_comparison(run_dirs, page, json_file, figure=figure, drawn=curve or ()))


def metrics(
    markdown: Annotated[bool, Option("--markdown", help="As Markdown: all of deploy/grafana/METRICS.md")] = False,
) -> None:
    """Explain every metric that a run records and its workers report: name, unit, meaning.

    Example: stage-ray metrics
    """
    from stage_ray.observability import registry

    echo(registry.markdown() if markdown else registry.TABLE, nl=False)
