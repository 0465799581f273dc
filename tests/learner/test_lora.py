"""Adapters are trained beside frozen weights: their gradients, reference, merged weights, state and memory.

Two ranks do it in `tests.learner.test_ranks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stage_ray.commands.plan import model_sizes
from stage_ray.config import PolicyConfig
from stage_ray.config.lora import LINEAR, LoraConfig
from stage_ray.errors import ConfigError
from stage_ray.learner import memory
from stage_ray.learner.learner import Learner
from stage_ray.policies import load_policy
from stage_ray.policies.base import Policy
from stage_ray.policies.lora import low_rank
from stage_ray.pretrained import export_checkpoint
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run
from tests.policies.families import FAMILIES, Family

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8}
MERGING = 2e-5  # nats a token between adapters beside the weights and in them, float32; those of tiny models are large
ROUNDED = 0.1  # the same where what is merged is rounded to bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    directory = tmp_path_factory.mktemp("families")
    return {name: family.write(directory / name) for name, family in FAMILIES.items()}


def adapted_at(path: Path, family: Family) -> Policy:
    """The policy with adapters that do something."""
    adapted = family.policy(path, lora=LORA | {"target_modules": family.linear})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.trained_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


def loss(policy: Policy, family: Family = FAMILIES["janus"]) -> torch.Tensor:
    """Some number that depends on every log-probability of three images, two of them of one prompt."""
    first, _, last = family.texts[:3]
    prompts = [policy.codec.encode_prompt(text).conditional for text in (first, first, last)]
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(policy.codebook_size, (3, policy.image_tokens), generator=generator)
    found = policy.token_logprobs(prompts, tokens)
    return (found.logprobs * torch.linspace(0.5, 1.5, policy.image_tokens)).sum()


@pytest.mark.parametrize("row", FAMILIES)
def test_gradients_are_those_of_the_dense_matrix_that_an_adapter_makes(models, row: str) -> None:
    family = FAMILIES[row]
    plain, adapted = family.policy(models[row]), adapted_at(models[row], family)
    assert adapted.adapters is not None
    layers = {name: low_rank(layer) for name, layer in adapted.model.named_modules() if hasattr(layer, "lora_A")}
    pairs = {}
    for name, layer in layers.items():
        assert layer is not None
        a, b = (weight.detach().clone().requires_grad_() for weight in (layer.down.weight, layer.up.weight))
        pairs[name] = a, b, layer.scale * b @ a  # scale: alpha / rank
        assert layer.scale == 2.0
        with torch.no_grad():
            plain.model.get_parameter(f"{name}.weight").add_(pairs[name][2])
    dense, low = loss(plain, family), loss(adapted, family)
    torch.testing.assert_close(low, dense, rtol=1e-5, atol=1e-4)
    dense.backward()
    low.backward()
    for name, (a, b, delta) in pairs.items():
        delta.backward(plain.model.get_parameter(f"{name}.weight").grad)
        layer = layers[name]
        assert layer is not None and a.grad is not None and float(a.grad.abs().max()) > 1e-4
        torch.testing.assert_close(layer.down.weight.grad, a.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.up.weight.grad, b.grad, rtol=1e-3, atol=1e-4)
    trained = {name for name, parameter in adapted.model.named_parameters() if parameter.grad is not None}
    assert trained == adapted.trained_parameters().keys()


@torch.no_grad()
@pytest.mark.parametrize("row", FAMILIES)
def test_a_merged_export_loads_as_what_was_trained(models, row: str, tmp_path: Path) -> None:
    family = FAMILIES[row]
    plain, adapted = family.policy(models[row]), adapted_at(models[row], family)
    assert adapted.adapters is not None
    deltas, texts = dict(adapted.adapters.deltas(lambda tensor: tensor)), adapted.codec.texts()
    export_checkpoint(adapted.codec.location, tmp_path / "merged", deltas, added=True, texts=texts)
    merged = family.policy(tmp_path / "merged")
    torch.testing.assert_close(loss(merged, family), loss(adapted, family), rtol=1e-5, atol=1e-3)
    assert (loss(plain, family) - loss(adapted, family)).abs() > 0.1


@torch.no_grad()
def test_a_decoder_draws_with_the_adapters_that_a_forward_has(models) -> None:
    adapted = adapted_at(models["janus"], FAMILIES["janus"])
    prompts = [adapted.codec.encode_prompt(text).conditional for text in PROMPTS]
    states = adapted.hidden_states(prompts, torch.zeros(len(prompts), adapted.image_tokens, dtype=torch.int64))
    first = adapted.decoder(len(prompts), 100).prefill(prompts)
    torch.testing.assert_close(first, states[:, 0], rtol=1e-4, atol=1e-5)


def lora_run(model: Path, lora: dict[str, Any] | None = None, **sections: Any):
    policy = {"path": str(model), "lora": LORA | (lora or {})}
    return tiny_run(model, **{"policy": policy, "pipeline": {"max_staleness": 9}, **sections})


@pytest.fixture(scope="module")
def plain(model: Path) -> Policy:
    return load_policy(PolicyConfig(path=str(model)), device=CPU)


@pytest.fixture(scope="module")
def groups(plain: Policy):
    return sample_groups(plain, [*PROMPTS, PROMPTS[0]], 4)


def updates(learner: Learner, groups, count: int) -> list[dict[str, float]]:
    return [learner.update(groups, score(groups)) for _ in range(count)]


@pytest.fixture(scope="module")
def trained(model: Path, groups) -> Iterator[Learner]:
    """After two updates."""
    learner = Learner(lora_run(model), threads=1)
    learner.first = updates(learner, groups, 2)  # type: ignore[attr-defined]
    yield learner


def test_the_policy_begins_as_its_base_and_the_reference_stays_it(model, plain, groups, trained) -> None:
    fresh = Learner(lora_run(model), threads=1)
    assert torch.equal(loss(fresh.policy), loss(plain))
    assert not torch.equal(loss(trained.policy), loss(plain))
    assert torch.equal(loss(trained._reference), loss(plain))
    with torch.no_grad():  # off while the reference runs, not afterwards
        assert not torch.equal(loss(trained.policy), loss(trained._reference))
    base = dict(trained.policy.adapters.base_parameters())
    assert base.keys() == plain.trained_parameters().keys()
    assert all(torch.equal(base[name], tensor) for name, tensor in plain.trained_parameters().items())
    first, second = trained.first
    assert first["kl"] == 0 < second["kl"] and first["mismatch/abs_logprob"] < 1e-5


def merged_policy(learner: Learner, model: Path, dtype: torch.dtype = torch.float32) -> Policy:
    policy = load_policy(PolicyConfig(path=str(model)), device=CPU)
    with torch.no_grad():
        for name, tensor in learner.weights(dtype):
            policy.model.get_parameter(name).copy_(tensor)
    return policy


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, MERGING), (torch.bfloat16, ROUNDED)])
def test_merging_changes_log_probabilities_by_no_more_than_rounding(model, groups, trained, dtype, most) -> None:
    merged = merged_policy(trained, model, dtype)
    prompts = [merged.codec.encode_prompt(PROMPTS[0]).conditional] * 4
    tokens = torch.as_tensor(groups[0].tokens, dtype=torch.int64)
    with torch.no_grad():
        one, two = (policy.token_logprobs(prompts, tokens).logprobs for policy in (trained.policy, merged))
    change = (one - two).abs()
    print(f"{dtype}: mean {change.mean():.2g}, largest {change.max():.2g} nats")
    assert 0 < change.mean() <= change.max() < most


def test_a_state_is_the_adapters_alone_and_training_goes_on_from_it(model, groups, trained, tmp_path) -> None:
    again, interrupted = Learner(lora_run(model), threads=1), Learner(lora_run(model), threads=1)
    updates(interrupted, groups, 1)
    interrupted.save_state(tmp_path)
    (shard,) = (tmp_path / "shards").iterdir()
    names = {name.rpartition("/")[2] for name in load_file(shard)}
    assert names == trained.policy.trained_parameters().keys() and all(".lora_" in name for name in names)
    again.load_state(tmp_path)
    assert again.version == 1
    updates(again, groups, 1)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again.weights(), trained.weights(), strict=True))


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"micro_batch_images": 3}])
def test_recomputed_or_cut_otherwise_the_update_is_the_same(model, groups, trained, options) -> None:
    learner = Learner(lora_run(model, learner={"lr": 1e-3, "autocast": "off", **options}), threads=1)
    found, wanted = updates(learner, groups, 1)[0], trained.first[0]
    for name in ("loss", "grad_norm", "kl"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6), name


def test_under_autocast_the_base_is_kept_in_bfloat16_and_merged_from_what_it_was(model, groups, tmp_path) -> None:
    learner = Learner(lora_run(model, learner={"lr": 1e-3, "autocast": "bfloat16"}), threads=1)
    kept = {parameter.dtype for name, parameter in learner.policy.model.named_parameters() if "base_layer" in name}
    assert kept == {torch.bfloat16}
    assert {parameter.dtype for parameter in learner.policy.trained_parameters().values()} == {torch.float32}
    first, second = updates(learner, groups, 2)
    assert first["kl"] == 0 < second["kl"] and first["mismatch/abs_logprob"] < 0.05
    learner.export(tmp_path / "export")
    exported, base = (load_file(path / "model.safetensors") for path in (tmp_path / "export", model))
    deltas = dict(learner.policy.adapters.deltas(lambda tensor: tensor))
    for name, tensor in base.items():
        assert torch.equal(exported[name], tensor + deltas[name] if name in deltas else tensor), name


def test_memory_is_that_of_the_adapters_and_of_one_model(model, trained) -> None:
    sizes, lora = model_sizes(str(model)), LoraConfig.model_validate(LORA)
    form = {"ranks": 1, "images": 2, "prompt": 256, "dtype": "float32", "checkpointing": False}
    lines, full = memory.learner_memory(sizes, **form, lora=lora), memory.learner_memory(sizes, **form)
    held = [
        sum(t.nbytes for t in tensors)
        for tensors in (
            trained.policy.trained_parameters().values(),
            [t for state in trained._optimizer.state.values() for t in state.values() if t.dim() > 0],
            trained.policy.model.parameters(),
        )
    ]
    assert [lines["adapters"], lines["gradients"], lines["optimizer"]] == [held[0], held[0], held[1]]
    assert lines["weights"] + lines["frozen parts"] + lines["adapters"] == held[2]
    assert "reference" not in lines and sum(lines.values()) < sum(full.values())
    narrow = memory.learner_memory(sizes, **form | {"dtype": "bfloat16"}, lora=lora)
    assert lines["weights"] - narrow["weights"] == 2 * sizes.layers * sizes.matrices


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"policy": {"reference": "other"}}, "policy.reference does not go with policy.lora"),
        ({"learner": {"reference_offload": True}}, "learner.reference_offload does not go with policy.lora"),
        ({"learner": {"reference_dtype": "bfloat16"}}, "reference_dtype = bfloat16 does not go with policy.lora"),
        ({"policy": {"lora": {"rank": 0}}}, "policy.lora.rank"),
        ({"policy": {"lora": {"target_modules": ["q_proj", "q_proj"]}}}, "'q_proj' stands there twice"),
    ],
)
def test_what_does_not_go_with_adapters_is_refused_by_its_key(model, sections, said) -> None:
    base = {"policy": {"path": str(model), "lora": {}}, "learner": {"autocast": "off"}}
    merged = {name: {**base.get(name, {}), **section} for name, section in sections.items()}
    with pytest.raises(ConfigError, match=said):
        tiny_run(model, **base | merged)


def test_the_names_of_all_linear_maps_of_a_llama_are_the_default(plain) -> None:
    names = {
        name.rpartition(".")[2]
        for name, module in plain.backbone.layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert names == set(LINEAR)
