"""``stage-ray plan``: what fits on which GPU, and a split and a config to begin with. Memory alone, never speed."""

from __future__ import annotations

import itertools
import json
import textwrap
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from stage_ray.config.lora import LoraConfig
from stage_ray.config.model_sizes import FLOAT32, KNOWN, WIDTH, ModelSizes
from stage_ray.config.paths import PACKAGE, resolve_path
from stage_ray.engines.memory import images_in_flight, longest_prompt, rollout_memory
from stage_ray.errors import ConfigError
from stage_ray.learner import memory

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30
GPUS = {"h100": 79.2, "h200": 139.8, "b200": 178.4, "a100-80gb": 79.1, "a100-40gb": 39.4, "l40s": 44.4, "l4": 22.0}
"""GiB that torch reports on a card, a little less than its name says."""
# Mask2Former Swin-S (69 M, arXiv 2112.01527), CLIP ViT-L/14 (428 M, arXiv 2103.00020) in float32, a batch of pictures.
REWARD = {"scorers": int(0.5e9) * FLOAT32, "activations": 3 * GIB}
HEAD = """\
# {name} on {used} x {gpu}: where to begin, as `stage-ray plan` computes from memory alone.
# Needs those GPUs, and what is yours: prompts.train, rewards (any scorer of your own), and
# run_dir, on storage that driver and learner share.
"""


def plan(
    model: Annotated[str, Option(help=f"{', '.join(KNOWN)}, or a directory with a config.json")] = "janus-pro-7b",
    gpu: Annotated[str, Option(help=f"{', '.join(GPUS)}, or the GiB of another one, such as 47")] = "h100",
    gpus: Annotated[int, Option(help="GPUs of the whole cluster", min=1)] = 8,
    group_size: Annotated[int, Option(help="Images of one prompt", min=2)] = 8,
    groups_per_step: Annotated[int, Option(help="Prompts of one update", min=1)] = 16,
    dtype: Annotated[Literal["bfloat16", "float32"], Option(help="What rollout and learner compute in")] = "bfloat16",
    lora_rank: Annotated[int, Option(help="Train adapters of this rank (policy.lora); 0: all weights", min=0)] = 0,
    as_yaml: Annotated[bool, Option("--yaml", help="Print the config alone, for stage-ray train")] = False,
    as_json: Annotated[bool, Option("--json", help="Print every number, for a program; memory in bytes")] = False,
) -> None:
    """Compute on paper what fits on which GPU, how many each role needs, and how to split them by memory alone.

    It says nothing about speed. Nothing is measured or started, and no GPU is needed: sizes are published.

    Example: stage-ray plan --model janus-pro-7b --gpu h100 --gpus 64
    """
    batch = {"group_size": group_size, "groups": groups_per_step}
    made = make_plan(model_sizes(model), gpu, gpus, **batch, dtype=dtype, lora_rank=lora_rank)
    if as_json:
        derived = {"used": made.used, "memory_room": room(made.gpu_gib), "config": config_of(made), "measured": False}
        loading = {"learner_loading": memory.loading_bytes(made.model)}
        print(
            json.dumps(
                asdict(made) | {"lora": made.lora and made.lora.model_dump(mode="json")} | derived | loading, indent=1
            )
        )
    elif as_yaml:
        import yaml

        print(HEAD.format(name=made.model.name, used=made.used, gpu=made.gpu), end="")
        print(yaml.safe_dump(config_of(made), sort_keys=False), end="")
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
        lora: the adapters that are trained, None where all weights are.
        memory: by role and what holds it, bytes on one GPU.
    """

    model: ModelSizes
    gpu: str
    gpu_gib: float
    gpus: int
    group_size: int
    groups: int
    dtype: str
    lora: LoraConfig | None
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


def model_sizes(model: str) -> ModelSizes:
    """Sizes of a known name, or of a directory with a family's ``config.json``; a ConfigError if it is neither."""
    if known := KNOWN.get(model.lower()):
        return known
    from stage_ray.policies import POLICIES, family_of  # late: it imports torch

    directory = resolve_path(model) if model.startswith(PACKAGE) else Path(model).expanduser()
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"--model {model} is neither known ({', '.join(KNOWN)}) nor a local directory: no config.json is in it"
        )
    family = family_of(directory, "--model")
    sizes = POLICIES.find(family, "--model").sizes(directory, model) if family else None
    if sizes is None:
        raise ConfigError(f"--model {model} is of no family that can be planned: {', '.join(POLICIES.names())}")
    return sizes


def room(gpu_gib: float) -> int:
    """Bytes of a GPU that a plan may fill."""
    return memory.fillable(int(gpu_gib * GIB))


def make_plan(
    model: ModelSizes,
    gpu: str,
    gpus: int,
    *,
    group_size: int = 8,
    groups: int = 16,
    dtype: str = "bfloat16",
    lora_rank: int = 0,
) -> Plan:
    """Split GPUs by memory alone: about half to the learner, the others to rollout, while there is a group for each.

    Raises:
        ConfigError: an unknown GPU, too few of them, or a role that does not fit; names it and the fix.
    """
    gib = GPUS.get(gpu.lower()) or (float(gpu) if gpu.replace(".", "", 1).isdigit() else 0.0)
    if not gib:
        raise ConfigError(f"--gpu {gpu} is neither known ({', '.join(GPUS)}) nor a number of GiB, such as 47")
    if gpus < 3:
        fix = "give --gpus 3 or more, or let roles share a GPU by hand (rollout.gpus and learner.gpus of 0.5)"
        raise ConfigError(f"--gpus {gpus} is too few: rollout, reward and learner take one each; {fix}")
    space = room(gib)
    _check_one_gpu(model, gpu, space, dtype)
    lora = LoraConfig(rank=lora_rank) if lora_rank else None
    learner = partial(memory.learner_memory, model, prompt=longest_prompt(model), dtype=dtype, lora=lora)
    possible = [ranks for ranks in range(1, gpus - 1) if groups % ranks == 0]

    def cut_for(ranks: int) -> memory.Cut | None:
        return memory.first_fit(memory.possible_cuts(group_size), space, partial(learner, ranks=ranks))

    fitting = {ranks: cut for ranks in possible if (cut := cut_for(ranks))}
    if not fitting:
        lines = learner(ranks=possible[-1], images=1, checkpointing=True)
        raise ConfigError(
            f"learner does not fit: at {possible[-1]} rank(s), one image a micro-batch and checkpointing each still "
            f"needs {sum(lines.values()) / GIB:.1f} GiB (most of it {max(lines, key=lambda name: lines[name])}) and "
            f"{gpu} has {space / GIB:.1f} GiB to fill; give more --gpus, a GPU with more memory, or a "
            "--groups-per-step that more ranks divide" + ("" if lora else ", or train adapters with --lora-rank 32")
        )
    ranks = max((count for count in fitting if count <= gpus // 2), default=min(fitting))
    images, checkpointing = fitting[ranks]
    rollouts = min(groups, gpus - 1 - ranks)
    in_flight = images_in_flight(model, space, dtype=dtype)
    batch = min(in_flight, -(-groups // rollouts) * group_size)  # the groups of one worker, rounded up
    least = next(count for count in itertools.count(1) if cut_for(count))  # more need less each
    return Plan(
        model=model,
        gpu=gpu.lower(),
        gpu_gib=gib,
        gpus=gpus,
        group_size=group_size,
        groups=groups,
        dtype=dtype,
        lora=lora,
        least={"rollout": 1, "reward": 1, "learner": least},
        split={"rollout": rollouts, "reward": 1, "learner": ranks},
        in_flight=in_flight,
        images_per_batch=batch,
        micro_batch=images,
        checkpointing=checkpointing,
        memory={
            "rollout": rollout_memory(model, images=batch, dtype=dtype),
            "reward": REWARD,
            "learner": learner(ranks=ranks, images=images, checkpointing=checkpointing),
        },
    )


def _check_one_gpu(model: ModelSizes, gpu: str, space: int, dtype: str) -> None:
    """Raise a `ConfigError` where a role fits on no number of these GPUs."""
    larger = "take a GPU with more memory or a smaller model"
    narrower = "" if dtype == "bfloat16" else ", or take --dtype bfloat16"
    rollout = sum(rollout_memory(model, images=1, dtype=dtype).values())
    needs = [
        (rollout, f"rollout does not fit: {model.name} with one image in flight needs", larger + narrower),
        (sum(REWARD.values()), "reward does not fit: the scorers need", "take a larger GPU"),
    ]
    for size, what, fix in needs:
        if size > space:
            raise ConfigError(f"{what} {size / GIB:.1f} GiB and {gpu} has {space / GIB:.1f} GiB to fill; {fix}")


def config_of(made: Plan) -> dict[str, Any]:
    """The plan as a config that `stage-ray train` takes; prompts and rewards are to be filled in."""
    rollout = made.memory["rollout"]
    beside = rollout["image decoder"] + rollout.get("text encoder", 0)  # which are not vLLM's own
    inside_vllm = sum(rollout.values()) - beside + memory.CONTEXT
    return {
        "steps": 1600,  # of the published runs
        "run_dir": f"/shared/runs/{made.model.name}",
        "prompts": {"train": "prompts.jsonl"},
        "policy": ({"family": made.model.family} if made.model.family != "janus" else {})
        | {"path": made.model.path}
        | ({"lora": {"rank": made.lora.rank, "alpha": made.lora.alpha}} if made.lora else {}),
        "rollout": {
            "engine": "vllm",
            "workers": made.split["rollout"],
            "gpus": 1,
            "dtype": made.dtype,
            "group_size": made.group_size,
            "groups_per_step": made.groups,
            "images_per_batch": made.images_per_batch,
            "gpu_memory_utilization": -(-100 * inside_vllm // int(made.gpu_gib * GIB)) / 100,  # in percent, rounded up
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


def print_plan(made: Plan) -> None:
    """To the terminal: the GPUs of each role and what fills one of them, as tables, then what goes with them."""
    from rich.console import Console

    def gib(size: int) -> str:
        return f"{size / GIB:.1f}"

    console = Console(highlight=False, markup=False)
    console.print(
        f"{made.model.name} on {made.gpus} x {made.gpu}: {made.groups} groups of {made.group_size} images a step"
    )
    paper = (
        "Memory alone, on paper. This plan says nothing about speed, and nothing in it was measured on a GPU: "
        "begin with it, then measure."
    )
    console.print(textwrap.fill(paper, console.width - 1) + "\n", style="yellow")
    split = [[role, str(made.least[role]), str(count)] for role, count in made.split.items()]
    split.append(["in all", str(sum(made.least.values())), f"{made.used} of {made.gpus}"])
    console.print(_table(["GPUs", "at least", "proposed"], split))
    roles = made.memory.values()
    names = dict.fromkeys(name for lines in roles for name in lines)  # in order, each once
    rows = [[name, *(gib(lines[name]) if name in lines else "" for lines in roles)] for name in names]
    rows.append(["in all", *(gib(sum(lines.values())) for lines in roles)])
    rows.append([f"of {made.gpu_gib:g}, to fill", *[gib(room(made.gpu_gib))] * len(roles)])
    console.print(" ", _table(["GiB on one GPU", *made.memory], rows), " ", sep="\n")
    adapters = made.model.layers * memory.adapter_parameters(made.model, made.lora)
    trained, whole = (adapters or made.model.trained) * FLOAT32 / 1e9, made.model.total * FLOAT32 / 1e9
    stored = made.model.trained * WIDTH[made.dtype] / 1e9
    images = "a whole group" if made.micro_batch == made.group_size else "part of a group"
    sentences = [
        f"rollout: each image in flight is two sequences, with and without the prompt. {made.in_flight} fit on a GPU, "
        f"{made.images_per_batch} are planned.",
        f"learner: micro-batches of {made.micro_batch} images, {images}, with {'' if made.checkpointing else 'no '}"
        f"checkpointing; the ranks divide the {made.groups} groups of a step.",
        f"on disk: {3 * trained:.{1 if made.lora else 0}f} GB a checkpoint ({'adapters' if made.lora else 'weights'} "
        f"and two moments), {whole:.0f} GB the final model.",
        f"in a node's own memory: {2 * stored:.0f} GB of Ray's object store for two versions of the weights; "
        f"{memory.loading_bytes(made.model) / 1e9:.0f} GB for each rank while it loads.",
        f"kept free, both guesses: {memory.FRAGMENTS:.0%} of a GPU for fragments, {memory.CONTEXT / GIB:g} GiB for "
        "the CUDA context.",
        "--yaml prints the config of this split, --json the numbers.",
    ]
    if idle := made.gpus - made.used:
        sentences.append(
            f"idle: {idle} of {made.gpus} GPUs, for want of groups: give a larger --groups-per-step, more reward "
            "workers (scoring.workers), or another run."
        )
    for line in sentences:
        console.print(textwrap.fill(line, console.width - 1, initial_indent="- ", subsequent_indent="  "))


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    from rich.table import Column, Table

    numbers = [Column(name, justify="right") for name in columns[1:]]
    table = Table(columns[0], *numbers, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    return table
