"""The command line: every command is a function of ``commands/``; an exit code and at most one sentence come out.

Exit codes: 0 done, 1 the run failed, 2 wrong usage or config, 128 + n stopped by signal n. Expected errors are one
sentence on stderr; anything else is a bug and shows its traceback. Commands import what is heavy when they run.
"""

from __future__ import annotations

import typer
from typer.exceptions import TyperException

from stage_ray.commands.configs import configs, fetch, init
from stage_ray.commands.convert import convert
from stage_ray.commands.doctor import doctor
from stage_ray.commands.gpu_check import gpu_check
from stage_ray.commands.index import index
from stage_ray.commands.inference import evaluate, generate
from stage_ray.commands.plan import plan
from stage_ray.commands.prompts import prompts
from stage_ray.commands.score import score
from stage_ray.commands.study import study
from stage_ray.commands.submit import submit
from stage_ray.commands.tools import bench, compare, metrics, pretrain, report
from stage_ray.commands.train import train
from stage_ray.config.home import ensure_home
from stage_ray.errors import ConfigError, Interrupted, RunError

app = typer.Typer(
    name="stage-ray",
    help="STAGE post-training of autoregressive image models, on Ray, with rollouts served by vLLM.\n\n"
    "Begin with: stage-ray doctor, then stage-ray train stage_shapeworld",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
WORK = (init, train, study, evaluate, generate, score, submit, pretrain, bench)
AROUND = (fetch, convert, index, prompts, plan, report, compare)
for command in WORK + AROUND:
    app.command(no_args_is_help=True)(command)
app.command()(configs)  # a bare command does its work
app.command()(metrics)
app.command()(doctor)
app.command()(gpu_check)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. See the top of the file."""
    try:
        ensure_home()
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
