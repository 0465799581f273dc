"""The command line: arguments in, one call, an exit code out. No logic lives here, and imports wait for their command.

Exit codes: 0 done, 1 the run failed, 2 wrong usage or config, 128 + n stopped by signal n. Expected errors are one
sentence on stderr; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.exceptions import TyperException

from stage_ray.bench import bench_names
from stage_ray.commands.options import (
    EngineOption,
    GuidanceOption,
    ModelArgument,
    OverridesOption,
    PretrainStage,
    SeedOption,
)
from stage_ray.errors import ConfigError, Interrupted, RunError

app = typer.Typer(
    name="stage-ray",
    help="STAGE post-training of autoregressive image models, on Ray, with rollouts served by vLLM.\n\n"
    "Begin with: stage-ray doctor, then stage-ray train configs/stage_shapeworld.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(no_args_is_help=True)
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/stage_shapeworld.yaml")
    ],
    overrides: OverridesOption = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run writes; run_dir of the config by default")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run directory")
    ] = False,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume", help="Go on if the run directory holds a run, else begin; for jobs that are retried"
        ),
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR", help="Train the learner alone on the groups that RUN_DIR recorded (pipeline.record=true)"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the resolved config, start nothing")
    ] = False,
) -> None:
    """Train a model and write a run directory that ends with report.html.

    Example: stage-ray train configs/stage_shapeworld.yaml --set learner.lr=1e-5 --run-dir runs/slow
    """
    from stage_ray.config.load import load_config

    run = load_config(config, overrides, run_dir)
    if dry_run:
        from stage_ray.run.preflight import describe

        typer.echo(describe(run))
        return
    from stage_ray.observability.progress import progress_for

    if replay is not None:
        from stage_ray.commands.replay import replay as replay_run

        with progress_for(run) as progress:
            progress.note(f"replayed into {replay_run(run, replay, progress)}")
        return
    from stage_ray.evaluation.base import find_benchmark
    from stage_ray.train import train as train_run

    with progress_for(run) as progress:
        summary = train_run(run, resume="auto" if auto_resume else resume, progress=progress)
        if summary.before is not None and summary.after is not None:
            headline = find_benchmark(run.evaluation.benchmark).headline
            progress.note(
                f"held-out {headline} {summary.before:.3f} before, {summary.after:.3f} after {summary.steps} steps"
            )
        progress.note(f"report: {summary.report}")


@app.command(no_args_is_help=True)
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; checked here before anything is sent")],
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The dashboard of the Ray cluster")
    ] = "http://127.0.0.1:8265",
    overrides: OverridesOption = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run writes: absolute, on storage that the cluster shares")
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="A relative run directory is wanted: it is lost with the job")
    ] = False,
    auto_resume: Annotated[
        bool, typer.Option(help="Go on if the run directory holds a run, else begin; without, begin or fail")
    ] = True,
    job_id: Annotated[
        str | None, typer.Option("--id", help="Name of the job; by default made of run directory and config")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the log until the job ends; its exit code is ours")] = True,
    working_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Send this directory, minus .gitignore, .rayignore; not our code")
    ] = None,
    image_has_code: Annotated[
        bool, typer.Option("--image-has-code", help="Send only the config: the cluster has stage_ray installed")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Pass this variable of yours on; may be repeated. Whoever has the cluster's token can read it there",
        ),
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML of Ray's runtime_env: pip, uv, py_modules, env_vars")
    ] = None,
    entrypoint_cpus: Annotated[
        float, typer.Option(help="CPUs reserved for the driver; more than 0 lets it leave the head node", min=0)
    ] = 0.0,
    entrypoint_resources: Annotated[
        str | None, typer.Option(metavar="MAPPING", help="Custom resources reserved for the driver, as {driver: 1}")
    ] = None,
) -> None:
    """Train as a job of a Ray cluster: start it, or follow it if it runs, or go on with it if it failed.

    The exit code is that of the run. Ctrl-C stops following, not the job. A cluster that demands a token gets it from
    RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    Example: stage-ray submit configs/stage_shapeworld.yaml --run-dir /shared/runs/first
    """
    from stage_ray.commands.job import plan_job
    from stage_ray.commands.submit import submit_job

    job = plan_job(
        config,
        overrides or [],
        run_dir,
        auto_resume=auto_resume,
        name=job_id,
        working_dir=working_dir,
        image_has_code=image_has_code,
        scratch=scratch,
        env=env or [],
        cpus=entrypoint_cpus,
        resources=entrypoint_resources,
        runtime_env=runtime_env,
    )
    raise typer.Exit(submit_job(job, address, wait=wait))


@app.command(no_args_is_help=True)
def evaluate(
    model: ModelArgument,
    suite: Annotated[str, typer.Option(help="Which benchmark")] = "geneval",
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A prompt file in the suite's format; the suite's own by default")
    ] = None,
    images_per_prompt: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Images of each prompt; the suite's number by default", min=1)
    ] = None,
    engine: EngineOption = None,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the whole result here")] = None,
) -> None:
    """Draw held-out prompts with a model and score the pictures.

    Example: stage-ray evaluate runs/stage_shapeworld/final --suite geneval --json after.json
    """
    from stage_ray.commands.inference import evaluate_model, result_table, write_result
    from stage_ray.observability.progress import Progress

    with Progress() as progress:
        result = evaluate_model(
            model,
            suite=suite,
            prompts=prompts,
            engine=engine,
            images_per_prompt=images_per_prompt,
            guidance=guidance,
            seed=seed,
            progress=progress,
        )
    if json_file is not None:
        write_result(result, json_file)
    typer.echo(result_table(result))


@app.command(no_args_is_help=True)
def generate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory for the PNGs and the contact sheet; must be new or empty")],
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be repeated")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file of prompts, one a line, or JSON Lines")
    ] = None,
    images: Annotated[int, typer.Option(help="Images of each prompt", min=1)] = 4,
    engine: EngineOption = None,
    guidance: GuidanceOption = 3.0,
    seed: SeedOption = 20,
) -> None:
    """Draw prompts: one PNG per image, and a contact sheet of all.

    Example: stage-ray generate runs/stage_shapeworld/final --prompt "a photo of a red ring" --out pictures
    """
    from stage_ray.commands.inference import generate_images
    from stage_ray.observability.progress import Progress

    with Progress() as progress:
        sheet = generate_images(
            model,
            texts=prompt or [],
            prompts=prompts,
            out=out,
            engine=engine,
            images_per_prompt=images,
            guidance=guidance,
            seed=seed,
            progress=progress,
        )
        progress.note(f"contact sheet: {sheet}")


@app.command(no_args_is_help=True)
def pretrain(
    out: Annotated[Path, typer.Option(help="Directory of the results; a run that was cut off goes on in it")],
    stages: Annotated[
        list[PretrainStage] | None, typer.Option("--stage", help="Run only this stage; may be repeated")
    ] = None,
    seed: Annotated[int, typer.Option(help="Fixes the pictures and the weights at the start", min=0)] = 0,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few steps of each stage, to see that it works; the models are useless")
    ] = False,
) -> None:
    """Rebuild what ships with the package: prompts, tokenizer, policy, detector, CLIP. About 75 minutes on two cores.

    Example: stage-ray pretrain --out world --smoke
    """
    from stage_ray.shapeworld.pretrain import pretrain as pretrain_world

    pretrain_world(out, stages=stages, seed=seed, smoke=smoke)


@app.command(no_args_is_help=True)
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"{', '.join(bench_names())}, or all")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows here, as a list")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="What computes; auto is a GPU where there is one")
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes and few repeats, to see that it works; the ratios say nothing")
    ] = False,
) -> None:
    """Measure how fast this is: ratios against plain code run in turn with ours, and the limit of each.

    rollout: images drawn, by each engine. learner: time and memory of an update. sync: weights to two workers.
    pipeline: what the driver hides and costs. end-to-end: images trained a second, by a real short run.

    A missed target is a fact, not a failure: the exit code is 0 all the same. Let nothing else run meanwhile.

    Example: stage-ray bench rollout --json rollout.json
    """
    from stage_ray.bench.command import run_benches

    run_benches(name, device=device, quick=quick, json_file=json_file)


@app.command(no_args_is_help=True)
def plan(
    model: Annotated[
        str, typer.Option(help="janus-pro-1b, janus-pro-7b, or a local directory with a config.json")
    ] = "janus-pro-7b",
    gpu: Annotated[
        str, typer.Option(help="h100, h200, b200, a100-80gb, a100-40gb, l40s, l4, or a YAML file that describes one")
    ] = "h100",
    gpus: Annotated[int, typer.Option(help="GPUs of the whole cluster", min=1)] = 8,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of one machine", min=1)] = 8,
    group_size: Annotated[int, typer.Option(help="Images of one prompt", min=2)] = 8,
    groups_per_step: Annotated[
        int | None, typer.Option(help="Prompts of one update; the plan's choice by default", min=1)
    ] = None,
    max_staleness: Annotated[int, typer.Option(help="Updates a group may lag behind the learner", min=0)] = 1,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="What rollout and learner compute in")
    ] = "bfloat16",
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the config alone, for stage-ray train")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number, for a program")] = False,
) -> None:
    """Reckon on paper what fits on which GPU, how to split them, how long a step takes and what travels.

    Nothing is measured or started, and no GPU is needed: sizes are published, speeds are the vendors'.

    Example: stage-ray plan --model janus-pro-7b --gpu h100 --gpus 64
    """
    from stage_ray.commands.planning.show import run_plan

    run_plan(
        model=model,
        gpu=gpu,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        group_size=group_size,
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        dtype=dtype,
        form="json" if as_json else "yaml" if as_yaml else "text",
    )


@app.command(no_args_is_help=True)
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run, finished or not")],
) -> None:
    """Write report.html anew from whatever a run directory holds.

    Example: stage-ray report runs/stage_shapeworld
    """
    from stage_ray.report.report import write_report

    typer.echo(write_report(run_dir))


@app.command()
def metrics(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As Markdown, the whole of deploy/grafana/METRICS.md")
    ] = False,
) -> None:
    """Explain every metric that a run records and its workers report: name, unit, meaning.

    Example: stage-ray metrics
    """
    from stage_ray.observability.registry import markdown as as_markdown
    from stage_ray.observability.registry import print_table

    if markdown:
        typer.echo(as_markdown(), nl=False)
    else:
        print_table()


@app.command()
def doctor() -> None:
    """Say what this machine has, what the default job lacks, and how to get it. Exit code 1 if something is lacking.

    Example: stage-ray doctor
    """
    from stage_ray.commands.doctor import examine

    raise typer.Exit(0 if examine() else 1)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. See the top of the file."""
    try:
        return app(arguments, prog_name="stage-ray", standalone_mode=False) or 0
    except (ConfigError, TyperException) as error:
        code = 2
        sentence = error.format_message() if isinstance(error, TyperException) else str(error)
    except Interrupted as stopped:
        code, sentence = stopped.exit_code, str(stopped)
    except RunError as error:
        code, sentence = 1, str(error)
    if sentence.strip():  # a bare command has shown its help instead
        from stage_ray.observability.logs import log_error

        log_error(f"stage-ray: {' '.join(sentence.split())}".replace("Value error, ", ""))
    return code
