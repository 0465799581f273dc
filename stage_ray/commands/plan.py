"""``stage-ray plan``: what fits on which GPU, and a split and a config to begin with. Memory alone, never speed."""

from __future__ import annotations

import itertools
import json
import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stage_ray.commands.memory import (
    CONTEXT,
    FLOAT32,
    FRAGMENTS,
    GIB,
    REWARD,
    ModelSizes,
    images_in_flight,
    learner_lines,
    learner_loading,
    model_sizes,
    rollout_lines,
    room,
)
from stage_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

GPUS = {"h100": 79.2, "h200": 139.8, "b200": 178.4, "a100-80gb": 79.1, "a100-40gb": 39.4, "l40s": 44.4, "l4": 22.0}
"""GiB that torch reports on a card, a little less than its name says."""
ROLES = 3  # rollout, reward and learner have a GPU each at least
PAPER = (
    "Memory alone, on paper. This plan says nothing about speed, and nothing in it was measured on a GPU: "
    "begin with it, then measure."
)
HEAD = """\
# {name} on {used} x {gpu}: where to begin, as `stage-ray plan` computes from memory alone.
# Needs those GPUs, and what is yours: prompts.train, rewards (any scorer of your own), and
# run_dir, on storage that driver and learner share.
"""


def plan(
    model: Annotated[
        str, typer.Option(help="janus-pro-1b, janus-pro-7b, or a local directory with a config.json")
    ] = "janus-pro-7b",
    gpu: Annotated[
        str,
        typer.Option(help="h100, h200, b200, a100-80gb, a100-40gb, l40s, l4, or the GiB of another one, such as 47"),
    ] = "h100",
    gpus: Annotated[int, typer.Option(help="GPUs of the whole cluster", min=1)] = 8,
    group_size: Annotated[int, typer.Option(help="Images of one prompt", min=2)] = 8,
    groups_per_step: Annotated[int, typer.Option(help="Prompts of one update", min=1)] = 16,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="What rollout and learner compute in")
    ] = "bfloat16",
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the config alone, for stage-ray train")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number, for a program; memory in bytes")] = False,
) -> None:
    """Compute on paper what fits on which GPU, how many each role needs, and how to split them by memory alone.

    It says nothing about speed. Nothing is measured or started, and no GPU is needed: sizes are published.

    Example: stage-ray plan --model janus-pro-7b --gpu h100 --gpus 64
    """
    made = make_plan(model_sizes(model), gpu, gpus, group_size=group_size, groups=groups_per_step, dtype=dtype)
    if as_json:
        sizes = {"memory_room": room(made.gpu_gib), "learner_loading": learner_loading(made.model)}
        print(
            json.dumps(
                asdict(made) | {"used": made.used, **sizes, "config": config_of(made), "measured": False}, indent=1
            )
        )
    elif as_yaml:
        print(to_yaml(made), end="")
    else:
        print_plan(made)


@dataclass(frozen=True, slots=True)
class Plan:
    """A split of GPUs, and what it puts on each.

    Attributes:
        gpu_gib: memory of one GPU as torch reports it.
        least: GPUs that each role needs at least, whatever the batch.
        split: GPUs of each role, one process each.
        in_flight: images that fit on one rollout GPU at once, at most; ``images_per_batch`` are planned.
        micro_batch: images of one micro-batch of the learner.
        memory: by role, bytes on one GPU.
    """

    model: ModelSizes
    gpu: str
    gpu_gib: float
    gpus: int
    group_size: int
    groups: int
    dtype: str
    least: dict[str, int]
    split: dict[str, int]
    in_flight: int
    images_per_batch: int
    micro_batch: int
    checkpointing: bool
    memory: dict[str, dict[str, int]]

    @property
    def used(self) -> int:
        """GPUs of the split."""
        return sum(self.split.values())


def make_plan(
    model: ModelSizes, gpu: str, gpus: int, *, group_size: int = 8, groups: int = 16, dtype: str = "bfloat16"
) -> Plan:
    """Split GPUs by memory alone: about half to the learner, the others to rollout, while there is a group for each.

    Raises:
        ConfigError: an unknown GPU, too few of them, or a role that does not fit; names it and the fix.

    Example:
        make_plan(KNOWN["janus-pro-7b"], "h100", 64).split  # {'rollout': 16, 'reward': 1, 'learner': 16}
    """
    gib = _gpu_gib(gpu)
    in_flight = _check_roles(model, gpu, gib, gpus, dtype)

    def rank(ranks: int, images: int, checkpointing: bool) -> dict[str, int]:
        return learner_lines(model, ranks=ranks, rows=images, dtype=dtype, checkpointing=checkpointing)

    # A group in a micro-batch, with its layers checkpointed where they do not fit otherwise, else a part of a group.
    ways = [(group_size, False), *((part, True) for part in reversed(_divisors(group_size)))]
    possible = [ranks for ranks in _divisors(groups) if ranks <= gpus - 2]
    fitting = {
        ranks: (rank(ranks, *way), way)
        for ranks in possible
        for way in reversed(ways)  # the last one that fits stays
        if sum(rank(ranks, *way).values()) <= room(gib)
    }
    if not fitting:
        raise ConfigError(_no_learner(rank(possible[-1], 1, True), possible[-1], gpu, gib))
    ranks = max((count for count in fitting if count <= gpus // 2), default=min(fitting))
    lines, (images, checkpointing) = fitting[ranks]
    rollouts = min(groups, gpus - 1 - ranks)
    batch = min(in_flight, -(-groups // rollouts) * group_size)
    least = next(n for n in itertools.count(1) if sum(rank(n, 1, True).values()) <= room(gib))  # more need less each
    return Plan(
        model=model,
        gpu=gpu.lower(),
        gpu_gib=gib,
        gpus=gpus,
        group_size=group_size,
        groups=groups,
        dtype=dtype,
        least={"rollout": 1, "reward": 1, "learner": least},
        split={"rollout": rollouts, "reward": 1, "learner": ranks},
        in_flight=in_flight,
        images_per_batch=batch,
        micro_batch=images,
        checkpointing=checkpointing,
        memory={"rollout": rollout_lines(model, images=batch, dtype=dtype), "reward": REWARD, "learner": lines},
    )


def _gpu_gib(gpu: str) -> float:
    if gpu.lower() in GPUS:
        return GPUS[gpu.lower()]
    if not gpu.replace(".", "", 1).isdigit() or not float(gpu):
        raise ConfigError(f"--gpu {gpu} is neither known ({', '.join(GPUS)}) nor a number of GiB, such as 47")
    return float(gpu)


def _check_roles(model: ModelSizes, gpu: str, gib: float, gpus: int, dtype: str) -> int:
    """Images in flight that fit one GPU; raises where a role fits on no number of GPUs."""
    if gpus < ROLES:
        raise ConfigError(
            f"--gpus {gpus} is too few: rollout, reward and learner take one each; give --gpus 3 or more, "
            f"or let roles share a GPU by hand (rollout.gpus and learner.gpus of 0.5)"
        )
    space = room(gib)
    fill = f"{gpu} has {space / GIB:.1f} GiB to fill"
    in_flight = images_in_flight(model, gib, dtype=dtype)
    if in_flight == 0:
        needed = sum(rollout_lines(model, images=1, dtype=dtype).values()) / GIB
        other = "" if dtype == "bfloat16" else ", or take --dtype bfloat16"
        raise ConfigError(
            f"rollout does not fit: {model.name} with one image in flight needs {needed:.1f} GiB and {fill}; "
            f"take a GPU with more memory or a smaller model{other}"
        )
    if learner_loading(model) > space:
        raise ConfigError(
            f"learner does not fit: every rank loads policy and reference of {model.name} whole in float32 before it "
            f"cuts them, {learner_loading(model) / GIB:.1f} GiB, and {fill}; take a GPU with more memory or a smaller "
            "model"
        )
    if sum(REWARD.values()) > space:
        raise ConfigError(f"reward does not fit: {fill}; take a larger GPU")
    return in_flight


def _divisors(count: int) -> list[int]:
    return [part for part in range(1, count + 1) if count % part == 0]


def _no_learner(lines: dict[str, int], ranks: int, gpu: str, gib: float) -> str:
    return (
        f"learner does not fit: at {ranks} rank(s), one image a micro-batch and checkpointing each still needs "
        f"{sum(lines.values()) / GIB:.1f} GiB (most of it {max(lines, key=lambda name: lines[name])}) and {gpu} has "
        f"{room(gib) / GIB:.1f} GiB to fill; give more --gpus, a GPU with more memory, or a --groups-per-step that "
        "more ranks divide"
    )


def config_of(made: Plan) -> dict[str, Any]:
    """The plan as a config that `stage-ray train` takes; prompts and rewards are to be filled in."""
    rollout = made.memory["rollout"]
    inside_vllm = sum(rollout.values()) - rollout["image decoder"] + CONTEXT  # the decoder lives beside vLLM
    return {
        "steps": 1600,  # of the published runs
        "run_dir": f"/shared/runs/{made.model.name}",
        "prompts": {"train": "prompts.jsonl"},
        "policy": {"path": made.model.path},
        "rollout": {
            "engine": "vllm",
            "workers": made.split["rollout"],
            "gpus": 1,
            "dtype": made.dtype,
            "group_size": made.group_size,
            "groups_per_step": made.groups,
            "images_per_batch": made.images_per_batch,
            "gpu_memory_utilization": -(-100 * inside_vllm // int(made.gpu_gib * GIB)) / 100,
        },
        "rewards": [{"type": "geneval", "options": {"detector": "your_package.YourDetector"}}],
        "scoring": {"workers": made.split["reward"], "gpus": 1},
        "learner": {
            "ranks": made.split["learner"],
            "gpus": 1,
            "micro_batch_images": made.micro_batch,
            "gradient_checkpointing": made.checkpointing,
            "autocast": "off" if made.dtype == "float32" else "bfloat16",
        },
        "pipeline": {"max_staleness": 1},
        "evaluation": {"enabled": False},
        "cluster": {"sync_timeout_s": 600.0, "start_timeout_s": 1800.0},
    }


def to_yaml(made: Plan) -> str:
    """`config_of` as YAML under three lines that say what it needs."""
    import yaml

    head = HEAD.format(name=made.model.name, used=made.used, gpu=made.gpu)
    return head + yaml.safe_dump(config_of(made), sort_keys=False)


def sentences(made: Plan) -> list[str]:
    """What the tables do not say, a sentence or two each."""
    trained, whole = made.model.trained * FLOAT32 / 1e9, made.model.total * FLOAT32 / 1e9
    images = "a whole group" if made.micro_batch == made.group_size else "part of a group"
    found = [
        f"rollout: each image in flight is two sequences, with and without the prompt. {made.in_flight} fit on a GPU, "
        f"{made.images_per_batch} are planned.",
        f"learner: micro-batches of {made.micro_batch} images, {images}, with {'' if made.checkpointing else 'no '}"
        f"checkpointing; the ranks divide the {made.groups} groups of a step.",
        f"on disk: {3 * trained:.0f} GB a checkpoint (weights and two moments), {whole:.0f} GB the final model.",
        f"in a node's own memory: {2 * trained:.0f} GB for two versions of the weights; {whole:.0f} GB for each rank "
        "while it loads.",
        f"kept free, both guesses: {FRAGMENTS:.0%} of a GPU for fragments, {CONTEXT / GIB:g} GiB for the CUDA context.",
        "--yaml prints the config of this split, --json the numbers.",
    ]
    if idle := made.gpus - made.used:
        found.append(
            f"idle: {idle} of {made.gpus} GPUs, for want of groups: give a larger --groups-per-step, more reward "
            "workers (scoring.workers), or another run."
        )
    return found


def print_plan(made: Plan) -> None:
    """Everything, top down: who gets what, what fits, the rest in sentences."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(
        f"{made.model.name} on {made.gpus} x {made.gpu}: {made.groups} groups of {made.group_size} images a step"
    )
    console.print(textwrap.fill(PAPER, console.width - 1) + "\n", style="yellow")
    total = ["in all", str(sum(made.least.values())), f"{made.used} of {made.gpus}"]
    console.print(
        _table(
            ["GPUs", "at least", "proposed"], [*([r, str(made.least[r]), str(n)] for r, n in made.split.items()), total]
        )
    )
    roles = made.memory.values()
    names = dict.fromkeys(name for lines in roles for name in lines)  # in order, each once
    rows = [[name, *(_gib(lines[name]) if name in lines else "" for lines in roles)] for name in names]
    rows.append(["in all", *(_gib(sum(lines.values())) for lines in roles)])
    rows.append(["while it loads", "", "", _gib(learner_loading(made.model))])
    rows.append([f"of {made.gpu_gib:g}, to fill", *[_gib(room(made.gpu_gib))] * len(roles)])
    console.print(" ", _table(["GiB on one GPU", *made.memory], rows), " ", sep="\n")
    for line in sentences(made):
        console.print(textwrap.fill(line, console.width - 1, initial_indent="- ", subsequent_indent="  "))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
