"""A plan fits its GPUs, says what it is and is not, and ends in a config that a run takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stage_ray.cli import main
from stage_ray.commands.plan import GPUS, make_plan, room
from stage_ray.config.load import load_config, validate_config
from stage_ray.config.model_sizes import KNOWN
from stage_ray.errors import ConfigError

PLANS = (Path(__file__).parents[2] / "deploy" / "PLANS.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"```console\n\$ stage-ray (plan [^\n]+)\n(.*?)```", flags=re.DOTALL)


@pytest.mark.parametrize("gpu", ["h100", "h200", "b200", "a100-80gb", "l40s"])
@pytest.mark.parametrize("model", KNOWN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpus", [4, 32])
def test_a_plan_never_fills_a_gpu_beyond_its_memory(model, gpu, dtype, gpus):
    try:
        plan = make_plan(KNOWN[model], gpu, gpus, dtype=dtype)
    except ConfigError as error:
        assert "does not fit" in str(error)
        return
    for role, lines in plan.memory.items():
        assert sum(lines.values()) <= room(GPUS[gpu]), role
        assert plan.least[role] <= plan.split[role]
    assert plan.images_per_batch <= plan.in_flight and plan.used <= gpus
    assert plan.groups % plan.split["learner"] == 0


@pytest.mark.parametrize("gpu", ["l40s", "a100-40gb"])
def test_the_7b_model_trains_on_gpus_that_hold_no_model_whole_in_float32(gpu):
    plan = make_plan(KNOWN["janus-pro-7b"], gpu, 64)
    assert plan.split["learner"] == 16 and not plan.checkpointing


def test_adapters_need_one_gpu_where_all_weights_need_two():
    full, lora = (make_plan(KNOWN["janus-pro-7b"], "h100", 8, lora_rank=rank) for rank in (0, 32))
    assert (full.least["learner"], lora.least["learner"]) == (2, 1)
    assert "reference" in full.memory["learner"] and "reference" not in lora.memory["learner"]
    numbers = (
        30 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11_008))
    )  # layers, rank, sides of attention's and MLP's matrices
    assert lora.memory["learner"]["optimizer"] == pytest.approx(2 * 4 * numbers / lora.split["learner"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--gpu", "l4", "--gpus", "64", "--dtype", "float32"],
            "rollout does not fit: janus-pro-7b with one image in flight needs",
        ),
        (["--gpus", "3"], "learner does not fit: at 1 rank(s)"),
        (["--gpus", "2"], "--gpus 2 is too few"),
        (["--model", "janus-pro-70b"], "--model janus-pro-70b is neither known"),
        (["--gpu", "h1000"], "--gpu h1000 is neither known"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_the_fix(capsys, arguments, said):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"stage-ray: {said}") and error.count("\n") == 1
    assert "Traceback" not in error and re.search(r"take a|give|known \(", error)


@pytest.mark.parametrize("options", [[], ["--group-size", "16", "--groups-per-step", "24"], ["--lora-rank", "8"]])
def test_the_config_of_a_plan_is_one_that_train_takes(capsys, tmp_path, options):
    assert main(["plan", "--gpus", "64", "--yaml", *options]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    run = load_config(file)
    assert main(["plan", "--gpus", "64", "--json", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert run == validate_config(plan["config"]) and run.rollout.gpu_memory_utilization < 1
    assert [run.rollout.workers, run.scoring.workers, run.learner.ranks] == list(plan["split"].values())
    assert plan["measured"] is False
    lora = "--lora-rank" in options
    assert (run.policy.lora and run.policy.lora.rank) == (8 if lora else None)
    if options and not lora:
        assert (run.rollout.group_size, run.rollout.groups_per_step) == (16, 24)


def test_the_shipped_model_can_be_planned_on_a_gpu_of_ones_own(capsys):
    arguments = ["--model", "package:stage_ray/shapeworld/assets/janus", "--gpu", "10", "--gpus", "3"]
    assert main(["plan", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["used"] == 3


def test_a_plan_is_made_without_torch_ray_or_vllm():
    code = (
        "import sys\n"
        "from stage_ray.cli import main; main(['plan', '--yaml']); "
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("# janus-pro-7b on 8 x h100") and done.stderr == "[]\n"


@pytest.mark.parametrize(("command", "there"), COMMAND.findall(PLANS))
def test_the_plans_in_deploy_are_what_the_command_prints(command, there, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(command.split()) == 0
    now = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert now.strip() == there.strip(), "paste the new output into deploy/PLANS.md and read its sentences again"
    assert max(map(len, now.splitlines())) <= 100 and "says nothing about speed" in now
