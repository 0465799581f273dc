"""A plan as a person reads it: tables for numbers, sentences for reasons."""

from __future__ import annotations

import json
import textwrap

from rich.console import Console
from rich.table import Table

from stage_ray.commands.planning.gpus import GIB, gpu_named
from stage_ray.commands.planning.memory import learner_loading, room
from stage_ray.commands.planning.models import model_sizes
from stage_ray.commands.planning.plan import Plan, as_json, make_plan
from stage_ray.commands.planning.snippet import as_yaml
from stage_ray.commands.planning.split import CRITICAL_IMAGES, GPU_PRICE, Task, best_split
from stage_ray.commands.planning.timing import ASSUMED
from stage_ray.errors import ConfigError

PAPER = "On paper only: nothing in this plan was measured on a GPU."


def run_plan(
    *,
    model: str,
    gpu: str,
    gpus: int,
    gpus_per_node: int,
    group_size: int,
    groups_per_step: int | None,
    max_staleness: int,
    dtype: str,
    form: str,
) -> None:
    """What the command does: plan, then print it as ``form``: text, yaml or json.

    Raises:
        ConfigError: an unknown model or GPU, or something that does not fit.
    """
    if gpus > gpus_per_node and gpus % gpus_per_node:
        whole = gpus // gpus_per_node * gpus_per_node
        raise ConfigError(
            f"--gpus {gpus} is not a multiple of --gpus-per-node {gpus_per_node}; "
            f"give {whole} or {whole + gpus_per_node}, or the GPUs that your machines have"
        )
    task = Task(
        model=model_sizes(model),
        gpu=gpu_named(gpu),
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        group_size=group_size,
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        dtype=dtype,
    )
    if form == "yaml":  # needs no simulation
        print(as_yaml(task, best_split(task)), end="")
    elif form == "json":
        print(json.dumps(as_json(make_plan(task)), indent=1))
    else:
        print_plan(Console(), make_plan(task))


def print_plan(console: Console, plan: Plan) -> None:
    """Everything, top down: who does what, what fits, what travels, why, and what would change it."""
    task = plan.task
    console.print(
        f"[bold]{task.model.name} on {task.gpus} x {task.gpu.name}[/]: "
        f"{plan.images} images a step in {plan.step_s:.1f} s, {plan.images / plan.step_s:.1f} images/s",
        highlight=False,
    )
    console.print(f"{PAPER}\n", style="yellow")
    _print_split(console, plan)
    _print_memory(console, plan)
    _print_links(console, plan)
    _heading(console, "Why")
    for line in reasons(plan):
        _item(console, line)
    if plan.others:
        _print_others(console, plan)
    _heading(console, "Taken for granted")
    for what, value in ASSUMED.items():
        _item(console, f"{what}: {value}", style="dim")
    _heading(console, "Config (--yaml prints it alone)")
    console.print(as_yaml(task, plan.split), markup=False, highlight=False, soft_wrap=True, end="")


def reasons(plan: Plan) -> list[str]:
    """Why the plan is as it is, a sentence or two each."""
    return [_rollout(plan), _learner(plan), _batch(plan), _step(plan), _link(plan), *_idle(plan), _host(plan)]


def _rollout(plan: Plan) -> str:
    weights = plan.memory["rollout"]["weights"] / GIB
    return (
        f"rollout: one engine a GPU (tensor parallel 1): its {weights:.1f} GiB of weights fit, and cutting them would "
        f"add traffic at every token. Up to {plan.most_in_flight} images fit in flight, "
        f"{plan.split.images_per_batch} are planned; each is two sequences."
    )


def _learner(plan: Plan) -> str:
    split, cut = plan.split, plan.split.cut
    group = "whole groups" if cut.rows >= plan.task.group_size else "parts of a group: no whole one fits"
    store = "with checkpointed layers" if cut.checkpointing else "without checkpointing, which fits"
    return (
        f"learner: {_many(split.ranks, 'rank')} of {_many(split.groups // split.ranks, 'group')} each, micro-batches "
        f"of {_many(cut.rows, 'image')} ({group}), {store}: the fastest way. Arithmetic takes "
        f"{cut.time.compute:.1f} s, collectives {cut.time.collectives:.1f} s beside it, packing a version "
        f"{split.pack_s:.1f} s after it."
    )


def _batch(plan: Plan) -> str:
    groups, size = plan.split.groups, plan.task.group_size
    if plan.task.groups_per_step:
        return f"batch: {_many(groups, 'group')} of {size}, as asked for."
    return (
        f"batch: {groups} groups of {size}, for the shortest step x (1 + {CRITICAL_IMAGES} / images): larger batches "
        f"fill GPUs better but need more images for the same result. The {CRITICAL_IMAGES} is a guess; "
        f"--groups-per-step decides otherwise, and the published runs use 8 or 16."
    )


def _step(plan: Plan) -> str:
    stages, ahead = plan.split.stages, plan.task.max_staleness
    slowest, whole = max(stages, key=lambda name: stages[name]), sum(stages.values())
    if ahead == 0:
        return f"step: nothing overlaps with max_staleness 0, so the stages add up to {whole:.1f} s."
    if whole / (ahead + 1) <= stages[slowest]:
        return f"step: {slowest} takes {stages[slowest]:.1f} s and hides the rest."
    return (
        f"step: a batch takes {whole:.1f} s from admission to new weights and {ahead + 1} are under way, so a step "
        f"takes about {whole / (ahead + 1):.1f} s; the slowest stage, {slowest}, takes {stages[slowest]:.1f} s."
    )


def _link(plan: Plan) -> str:
    link = plan.fullest
    return f"links: {link.what}, {link.way}, saturates first: busy {link.seconds / plan.step_s:.0%} of a step."


def _idle(plan: Plan) -> list[str]:
    idle = plan.task.gpus - plan.split.gpus
    if not idle:
        return []
    return [
        f"idle: {idle} of {plan.task.gpus} GPUs, as each would shorten the step by less than {GPU_PRICE:.1%}; use them "
        f"for another run, or give a larger --groups-per-step."
    ]


def _host(plan: Plan) -> str:
    rollout, learner = (plan.host_bytes()[role] / 1e9 for role in ("rollout", "learner"))
    return (
        f"host memory: about {rollout:.0f} GB on a node with rollout workers, {learner:.0f} GB on the first learner "
        f"node while it starts, object store included."
    )


def _many(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}{plural}"


def _print_split(console: Console, plan: Plan) -> None:
    split, size = plan.split, plan.task.group_size
    table = _table("role", ">GPUs", "in a step", ">busy s", ">of a step")
    each = f"{_many(split.waves_each, 'wave')} of {split.wave_groups * size} images each"
    cuts = -(-split.groups // split.ranks * size // split.cut.rows)
    work = {
        "rollout": (split.rollouts, f"{each}, then new weights"),
        "reward": (split.rewards, f"{plan.images} pictures"),
        "learner": (
            split.ranks,
            f"{split.groups // split.ranks * size} images a rank, {_many(cuts, 'micro-batch', 'es')}; packing",
        ),
        "weights": (0, f"to {_many(split.remote_nodes, 'other node')} with rollout workers"),
        "driver": (0, f"{split.groups} groups"),
    }
    for role, (count, what) in work.items():
        seconds = split.stages[role]
        table.add_row(role, str(count or ""), what, f"{seconds:.2f}", f"{seconds / plan.step_s:.0%}")
    table.add_row("[bold]step[/]", f"[bold]{split.gpus}[/]", "simulated", f"[bold]{plan.step_s:.2f}[/]", "")
    console.print(table)


def _print_memory(console: Console, plan: Plan) -> None:
    _heading(console, "GiB on one GPU")
    roles = list(plan.memory)
    table = _table("", *(f">{role}" for role in roles))
    names = list(dict.fromkeys(name for lines in plan.memory.values() for name in lines))
    for name in names:
        cells = [f"{plan.memory[role][name] / GIB:.1f}" if name in plan.memory[role] else "" for role in roles]
        table.add_row(name, *cells)
    totals = [f"[bold]{sum(plan.memory[role].values()) / GIB:.1f}[/]" for role in roles]
    table.add_row("[bold]in all[/]", *totals)
    space, loading = room(plan.task.gpu) / GIB, learner_loading(plan.task.model) / GIB
    table.add_row("while it loads", "", "", f"{loading:.1f}", style="dim")
    table.add_row(f"of {plan.task.gpu.memory_gib:g}, to fill", *[f"{space:.1f}"] * len(roles), style="dim")
    console.print(table)


def _print_links(console: Console, plan: Plan) -> None:
    _heading(console, "Bytes of a step")
    table = _table("what", "way", ">GB", ">GB/s", ">s", ">of a step")
    for link in plan.links:
        style = "bold yellow" if link is plan.fullest else ""
        share = f"{link.seconds / plan.step_s:.0%}"
        table.add_row(
            link.what, link.way, _gb(link.bytes), f"{link.gbs:.1f}", f"{link.seconds:.2f}", share, style=style
        )
    console.print(table)


def _print_others(console: Console, plan: Plan) -> None:
    _heading(console, "What would change it")
    table = _table("", ">GPUs", ">images a step", ">step s", ">images/s")
    now = f"{plan.images / plan.step_s:.1f}"
    table.add_row("this plan", str(plan.split.gpus), str(plan.images), f"{plan.step_s:.1f}", now, style="bold")
    for other in plan.others:
        row = (other.change, str(other.gpus), str(other.images), f"{other.step_s:.1f}", f"{other.images_per_s:.1f}")
        table.add_row(*row)
    console.print(table)


def _table(*columns: str) -> Table:
    """Columns by name; ``>`` in front sets numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", markup=False, highlight=False)


def _item(console: Console, text: str, style: str = "") -> None:
    """A line that wraps under itself."""
    lines = textwrap.fill(text, console.width - 1, initial_indent="- ", subsequent_indent="  ")
    console.print(lines, style=style, markup=False, highlight=False)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e7 else f"{size / 1e9:.4f}"
