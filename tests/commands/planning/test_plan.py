"""A plan fits, is never slower with more GPUs, says why, and ends in a config that a run takes."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from stage_ray.cli import main
from stage_ray.commands.planning.gpus import GPUS
from stage_ray.commands.planning.links import links
from stage_ray.commands.planning.memory import group_bytes, learner_loading, room, weight_bytes
from stage_ray.commands.planning.models import KNOWN
from stage_ray.commands.planning.plan import make_plan, step_seconds
from stage_ray.commands.planning.show import print_plan
from stage_ray.commands.planning.simulate import JumpingClock, simulated_step_s
from stage_ray.commands.planning.split import Task, best_split
from stage_ray.config.load import load_config, validate_config
from stage_ray.errors import ConfigError

SEVEN, ONE, H100 = KNOWN["janus-pro-7b"], KNOWN["janus-pro-1b"], GPUS["h100"]
PLANS = Path(__file__).parents[3] / "deploy" / "PLANS.md"
CUT = "[...]"
COMMAND = re.compile(r"```console\n\$ stage-ray (plan [^\n]+)\n(.*?)```", flags=re.DOTALL)


@pytest.mark.parametrize("gpu", ["h100", "h200", "b200", "a100-80gb", "l40s"])
@pytest.mark.parametrize("model", KNOWN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_plan_never_fills_a_gpu_beyond_its_memory(model, gpu, dtype):
    task = Task(KNOWN[model], GPUS[gpu], gpus=32, dtype=dtype)
    try:
        plan = make_plan(task)
    except ConfigError as error:
        assert "does not fit" in str(error)
        return
    for role, lines in plan.memory.items():
        assert sum(lines.values()) <= room(task.gpu), role
    assert learner_loading(task.model) <= room(task.gpu)
    assert plan.split.images_per_batch <= plan.most_in_flight
    assert plan.split.gpus <= task.gpus
    assert plan.config.rollout.gpu_memory_utilization < 1


@pytest.mark.parametrize("groups", [8, 64, 480])
@pytest.mark.parametrize("staleness", [0, 1])
def test_more_gpus_never_give_a_slower_step(groups, staleness):
    steps = []
    for gpus in (4, 6, 8, 12, 16, 24, 31, 32, 64, 100, 256, 1024):
        task = Task(SEVEN, H100, gpus=gpus, groups_per_step=groups, max_staleness=staleness)
        try:
            steps.append(best_split(task).step_s(staleness))
        except ConfigError:
            assert not steps, "fewer GPUs did"
    assert len(steps) > 8 and steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(
    ("task", "staleness"),
    [
        (Task(SEVEN, H100, gpus=64), 0),
        (Task(SEVEN, H100, gpus=64), 1),
        (Task(SEVEN, H100, gpus=64, groups_per_step=480), 2),
        (Task(ONE, H100, gpus=8), 1),
        (Task(SEVEN, H100, gpus=1024, transport="nccl"), 1),
    ],
)
def test_the_simulated_step_is_near_the_least_it_could_be_and_never_below_the_slowest_stage(task, staleness):
    task = replace(task, max_staleness=staleness)
    split = best_split(task)
    seconds = step_seconds(task, split)
    busiest = max(split.waves_each * split.wave_s, split.stages["learner"])
    assert busiest * 0.999 <= seconds <= 1.15 * split.step_s(staleness)


def test_the_clock_jumps_and_a_wait_for_nothing_is_no_hang():
    loop = JumpingClock()
    loop.run_until_complete(asyncio.sleep(86_400))
    assert loop.time() == pytest.approx(86_400)
    with pytest.raises(RuntimeError, match="never comes"):
        loop.run_until_complete(asyncio.Event().wait())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_the_simulation_takes_as_long_as_a_pipeline_reckoned_by_hand():
    data = {
        "steps": 1,
        "prompts": {"train": "none"},
        "policy": {"path": "none"},
        "rewards": [{"type": "geneval"}],
        "rollout": {"workers": 2, "groups_per_step": 4, "group_size": 4, "images_per_batch": 8},
        "scoring": {"workers": 2, "groups_per_call": 2},
        "evaluation": {"enabled": False},
    }
    stages = {"wave": 5.0, "score": 1.0, "update": 2.0, "pack": 0.5, "transfer": 0.25, "load": 0.25}
    alone = validate_config(data)
    ahead = validate_config({**data, "pipeline": {"max_staleness": 3}})
    assert simulated_step_s(alone, stages) == pytest.approx(9.0)  # one after the other
    assert simulated_step_s(ahead, stages) == pytest.approx(5.25)  # a wave, and loading between waves


def test_the_links_carry_what_the_records_weigh():
    task = Task(SEVEN, H100, gpus=64)
    split = best_split(task)
    found = {(link.what, link.way.split(" (")[0].split(":")[0]): link for link in links(task, split)}
    images = split.groups * task.group_size
    groups = split.groups * group_bytes(SEVEN, task.group_size)
    assert found["groups, pictures", "rollout -> store"].bytes == groups + images * 384 * 384 * 3
    assert found["groups", "store -> learner nodes"].bytes == groups * (split.ranks // 8)
    assert found["weights", "store -> rollout nodes"].bytes == weight_bytes(SEVEN) * split.remote_nodes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "l40s", "--gpus", "64"], "learner does not fit: every rank loads policy and reference"),
        (
            ["--gpu", "l4", "--gpus", "64", "--dtype", "float32"],
            "rollout does not fit: janus-pro-7b with one image in flight needs",
        ),
        (["--gpus", "3"], "learner does not fit: at 1 rank(s)"),
        (["--gpus", "2"], "--gpus 2 is too few"),
        (["--gpus", "60"], "--gpus 60 is not a multiple of --gpus-per-node 8; give 56 or 64"),
        (["--model", "janus-pro-70b"], "--model janus-pro-70b is neither known"),
        (["--gpu", "h1000"], "--gpu h1000 is neither known"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_the_mend(capsys, arguments, said):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"stage-ray: {said}") and error.count("\n") == 1
    assert "Traceback" not in error and re.search(r"take a|give|known \(", error)


@pytest.mark.parametrize("options", [[], ["--group-size", "16", "--groups-per-step", "24", "--max-staleness", "0"]])
def test_the_config_of_a_plan_is_one_that_train_takes(capsys, tmp_path, options):
    assert main(["plan", "--gpus", "64", "--yaml", *options]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    run = load_config(file)
    assert main(["plan", "--gpus", "64", "--json", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert run == validate_config(plan["config"])
    assert run.rollout.group_size * run.rollout.groups_per_step == plan["images_per_step"]
    assert [run.rollout.workers, run.scoring.workers, run.learner.ranks] == list(plan["split"].values())
    assert plan["measured"] is False
    if options:
        assert (run.rollout.group_size, run.rollout.groups_per_step, run.pipeline.max_staleness) == (16, 24, 0)


def test_the_shipped_model_can_be_planned_on_a_gpu_of_ones_own(tmp_path, capsys):
    card = {"memory_gib": 10, "bfloat16_tflops": 50, "float32_tflops": 10, "memory_gbs": 400}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**card, "pcie_gbs": 16, "network_gbs": 1}))
    arguments = [
        "--model",
        "package:stage_ray/shapeworld/assets/janus",
        "--gpu",
        str(tmp_path / "mine.yaml"),
        "--gpus",
        "3",
    ]
    assert main(["plan", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus_used"] == 3


def test_planning_is_imported_without_torch_ray_or_vllm_and_the_config_needs_none_of_them():
    code = (
        "import sys\n"
        "from stage_ray.cli import main; import stage_ray.commands.planning.show; main(['plan', '--yaml']); "
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("# janus-pro-7b on 8 x h100") and done.stderr == "[]\n"


def printed(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints in a terminal of 100 columns."""
    assert main(arguments.split()) == 0
    return "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())


def test_a_plan_reads_well_in_a_terminal_of_100_columns():
    console = Console(width=100, file=StringIO())
    plan = make_plan(Task(SEVEN, H100, gpus=64))
    print_plan(console, plan)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "nothing in this plan was measured on a GPU" in text
    for part in ("GiB on one GPU", "Bytes of a step", "Why", "What would change it", "saturates first", "steps: 1600"):
        assert part in text
    assert re.search(rf"^learner +{plan.split.ranks} ", text, flags=re.MULTILINE) and f"{plan.step_s:.2f}" in text


@pytest.mark.parametrize("command", [match[0] for match in COMMAND.findall(PLANS.read_text(encoding="utf-8"))])
@pytest.mark.slow
def test_the_plans_in_deploy_are_what_the_command_prints(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    there = dict(COMMAND.findall(PLANS.read_text(encoding="utf-8")))[command].strip()
    now = printed(command, capsys).strip()
    if there.endswith(CUT):
        there, now = there.removesuffix(CUT).strip(), now[: now.index("\nTaken for granted")].strip()
    assert now == there, "write it anew: the end of deploy/PLANS.md says how"
