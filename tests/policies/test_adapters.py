"""Adapters on disk: peft and transformers load what is exported, ``policy.path`` takes what peft saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration

from stage_ray.cli import main
from stage_ray.config import PolicyConfig
from stage_ray.config.inputs import checkpoint_inputs
from stage_ray.engines.torch import TorchEngine
from stage_ray.errors import ConfigError
from stage_ray.inference.jobs import inputs_of
from stage_ray.learner.learner import Learner
from stage_ray.policies import check_adapters, load_policy
from stage_ray.pretrained import base_location, local_checkpoint
from stage_ray.train import train
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run
from tests.runs import lines
from tests.runs import tiny_run as tiny_ray_run

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

pytestmark = pytest.mark.usefixtures("one_thread")


def learner_at(path: Path, export: str, **policy: Any) -> Learner:
    given = {"path": str(path), "lora": LORA | {"export": export}, **policy}
    return Learner(tiny_run(path, policy=given, pipeline={"max_staleness": 9}), threads=1)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Where an update's adapters and the merged model are, ``apart`` and ``merged``; and the weights."""
    out = tmp_path_factory.mktemp("exported")
    learner = learner_at(model, "adapters", template="paper")
    groups = sample_groups(learner.policy, PROMPTS, 4)
    learner.update(groups, score(groups))
    learner.export(out / "apart")
    learner.save_state(out / "state")
    other = learner_at(model, "merged", export_dtype="bfloat16")
    other.load_state(out / "state")
    other.export(out / "merged")
    return out, {name: tensor.clone() for name, tensor in learner.weights()}


def config(path: Path, **changes: Any) -> PolicyConfig:
    return PolicyConfig.model_validate({"path": str(path), **changes})


def test_transformers_loads_what_is_merged_and_all_else_is_the_checkpoint(model: Path, exported) -> None:
    out, weights = exported
    loaded = JanusForConditionalGeneration.from_pretrained(out / "merged").state_dict()
    base = load_file(model / "model.safetensors")
    stored = load_file(out / "merged" / "model.safetensors")
    moved = {name for name in base if not torch.equal(stored[name].float(), base[name])}
    assert {name.rpartition("proj")[0].rpartition(".")[2] for name in moved} == {"q_", "down_"} and len(moved) == 4
    for name in moved:  # merged in float32, then rounded as policy.export_dtype says
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], weights[name].bfloat16()) and torch.equal(loaded[name], stored[name].float())


def test_peft_loads_what_is_exported_apart(model: Path, exported) -> None:
    out, weights = exported
    assert {file.name for file in (out / "apart").iterdir()} == {WEIGHTS, CONFIG, "chat_template.jinja"}
    base = JanusForConditionalGeneration.from_pretrained(model)
    merged = PeftModel.from_pretrained(base, str(out / "apart")).merge_and_unload().state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_a_directory_of_adapters_is_a_policy_and_an_engine_draws_from_what_it_makes(exported) -> None:
    out, weights = exported
    run = tiny_run(out / "apart")
    engine = TorchEngine(run.policy, run.rollout.model_copy(update={"dtype": "float32"}), worker="test")
    policy = load_policy(run.policy, device=CPU)
    for trained in (policy.trained_parameters(), engine._policy.trained_parameters()):
        assert trained.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(trained[name].detach(), tensor, rtol=0, atol=1e-6)
    told = inputs_of(run, [], {})
    assert (
        told["policy.path"]
        != told["policy.path: base"]
        == inputs_of(tiny_run(engine.codec.location), [], {})["policy.path"]
    )


def test_training_goes_on_in_saved_adapters_and_its_reference_is_their_base(model: Path, exported) -> None:
    out, weights = exported
    learner = learner_at(out / "apart", "adapters")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in learner.weights())
    groups = sample_groups(load_policy(config(out / "apart"), device=CPU), PROMPTS, 4)
    found = learner.update(groups, score(groups))
    assert found["kl"] > 0 and found["mismatch/abs_logprob"] < 2e-5  # the engine's groups are of merged weights
    base = dict(learner.policy.adapters.base_parameters())  # type: ignore[union-attr]
    plain = load_policy(config(model), device=CPU).trained_parameters()
    assert all(torch.equal(base[name], tensor) for name, tensor in plain.items())


def test_a_scorer_takes_no_adapter_in_place_of_a_model(exported) -> None:
    with pytest.raises(ConfigError, match="path: .* holds a LoRA adapter .* from a directory of policy.path alone"):
        local_checkpoint(str(exported[0] / "apart"), "clip", "path")


def test_adapters_that_peft_itself_saved_are_read(model: Path, tmp_path: Path) -> None:
    made = PeftConfig(r=2, lora_alpha=3, use_rslora=True, init_lora_weights=False, target_modules=r".*language.*v_proj")
    theirs = get_peft_model(JanusForConditionalGeneration.from_pretrained(model), made)
    theirs.save_pretrained(tmp_path / "saved")
    merged, policy = theirs.merge_and_unload().state_dict(), load_policy(config(tmp_path / "saved"), device=CPU)
    assert base_location(str(tmp_path / "saved")) == str(model)
    for name, parameter in policy.trained_parameters().items():
        torch.testing.assert_close(parameter.detach(), merged[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_a_run_through_vllm_begins_with_saved_adapters_and_ends_with_them_trained_further(
    exported, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    run = tiny_ray_run(
        tmp_path,
        exported[0] / "apart",
        steps=2,
        policy={"lora": LORA | {"export": "adapters"}, "template": "paper"},
        rollout={"engine": "vllm", "guidance_scale": 2.0, "images_per_batch": 8},
        evaluation={"enabled": False},
        learner={"lr": 1e-3, "autocast": "off", "micro_batch_images": 4, "threads": 1},
    )
    train(run)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and 0 < rows[0]["kl"] != rows[1]["kl"]
    # In the first step vLLM has the saved adapters merged, in the second the new ones.
    assert max(row["mismatch/abs_logprob"] for row in rows) < 1e-4
    final = tmp_path / "run" / "final"
    before, after = (load_file(path / WEIGHTS) for path in (exported[0] / "apart", final))
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in after)
    prompt = ["--prompt", PROMPTS[0], "--images", "2", "--engine", "torch", "--out", str(tmp_path / "pictures")]
    assert main(["generate", str(final), *prompt]) == 0
    assert (tmp_path / "pictures" / "0000-1.png").is_file()


def change(key: str, value: Any) -> Callable[[Path], None]:
    """Put another value into an adapter's config."""

    def changed(directory: Path) -> None:
        said = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(said | {key: value}))

    return changed


def test_a_base_in_a_hub_is_fetched_in_the_revision_that_the_adapter_names(exported, tmp_path: Path) -> None:
    shutil.copytree(exported[0] / "apart", tmp_path / "apart")
    change("base_model_name_or_path", "someone/base")(tmp_path / "apart")
    change("revision", "v2")(tmp_path / "apart")
    assert base_location(str(tmp_path / "apart")) == "someone/base@v2"
    (wanted,) = checkpoint_inputs(tiny_run(tmp_path / "apart")).items()
    assert (wanted[0], wanted[1].id, wanted[1].revision) == (
        "policy.path: base_model_name_or_path",
        "someone/base",
        "v2",
    )


def edit(tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Change an adapter's tensors."""
    return lambda directory: save_file(tensors(load_file(directory / WEIGHTS)), directory / WEIGHTS)


def first(tensors: dict[str, torch.Tensor], **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    name = min(tensors)
    return {**tensors, name: changes["value"]}


@pytest.mark.parametrize(
    ("damage", "lora", "said"),
    [
        (change("base_model_name_or_path", None), None, "base_model_name_or_path = None names no base"),
        (
            change("base_model_name_or_path", "./gone"),
            None,
            r"base_model_name_or_path = './gone': ./gone does not exist",
        ),
        (lambda d: change("base_model_name_or_path", str(d))(d), None, "it holds an adapter itself"),
        (change("r", 3), None, "has rank 4, but adapter_config.json says r = 3"),
        (change("r", None), None, r"gives no rank \(r\)"),
        (change("peft_type", "LOHA"), None, "peft_type = 'LOHA' is not read here"),
        (change("use_dora", True), None, "use_dora = True is not read here"),
        (change("init_lora_weights", "pissa_niter_4"), None, "init_lora_weights = 'pissa_niter_4' is not read here"),
        (lambda d: (d / WEIGHTS).unlink(), None, "has no adapter_model.safetensors; only safetensors are read"),
        (lambda d: (d / WEIGHTS).write_bytes(b"cut"), None, "is cut short or damaged"),
        (
            edit(lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}),
            None,
            "is no matrix of a pair A, B",
        ),
        (edit(lambda t: first(t, value=torch.full((4, 128), torch.nan))), None, "holds 512 values that are not finite"),
        (edit(lambda t: {k: v for k, v in t.items() if k != min(t)}), None, "has only one of A and B"),
        (
            edit(lambda t: {k.replace("q_proj", "wq"): v for k, v in t.items()}),
            None,
            "has no trained weight of that name",
        ),
        (
            edit(lambda t: first(t, value=torch.zeros(4, 5))),
            None,
            r"is for a matrix \[64, 5\], but its base has \[64, 128\]",
        ),
        (lambda d: None, LORA | {"rank": 8, "alpha": 16}, r"policy.lora.rank = 8, but .* was trained with 4"),
        (lambda d: None, LORA | {"alpha": 4}, r"policy.lora.alpha = 4, but .* was trained with 8"),
        (lambda d: None, LORA | {"target_modules": ["q_proj"]}, r"has an adapter of .*down_proj"),
        (lambda d: None, LORA | {"target_modules": ["wq"]}, r"no linear map 'wq'; there are down_proj, gate_proj"),
    ],
)
def test_what_cannot_be_read_or_trained_further_is_said_before_and_when_it_is_loaded(
    damage, lora, said, exported, tmp_path: Path
) -> None:
    shutil.copytree(exported[0] / "apart", tmp_path / "bad")
    damage(tmp_path / "bad")
    for tell in (check_adapters, lambda policy: load_policy(policy, device=CPU)):
        with pytest.raises(ConfigError, match=said):
            tell(config(tmp_path / "bad", lora=lora))
