"""The memory of an update: the formulas against what real tensors take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

from stage_ray.bench.base import Measurement, Variant, interleave
from stage_ray.bench.inputs import FIFTY_MILLION, write_model
from stage_ray.commands.plan import model_sizes
from stage_ray.config.lora import LoraConfig
from stage_ray.config.model_sizes import FLOAT32, KNOWN, ModelSizes
from stage_ray.learner import memory
from stage_ray.learner.learner import Learner
from stage_ray.observability.progress import Progress
from stage_ray.policies import base
from stage_ray.policies.devices import hardware_has_bfloat16
from stage_ray.policies.llama import LlamaBackbone
from stage_ray.weights.manifest import pack
from tests.learner.measured import peak_of_each_form, peak_of_loading
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run
from tests.tiny import tiny_janus

NATIVE_BFLOAT16 = pytest.mark.skipif(
    not hardware_has_bfloat16(torch.device("cpu")), reason="this CPU has no bfloat16 products: minutes without them"
)
IMAGES = 6
PEAK = {(False, False): (0.97, 1.15), (False, True): (0.97, 1.4), (True, False): (0.97, 1.15)}
"""(bfloat16, checkpointing) -> least and most that the foreseen peak may be of the measured one: a shared prompt is
foreseen once an image."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_janus(tmp_path_factory.mktemp("models") / "janus")


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("reference_dtype", ["float32", "bfloat16"])
def test_weights_optimizer_and_published_bytes_are_those_of_a_learner_after_a_step(tiny, reference_dtype):
    learner = Learner(tiny_run(tiny, learner={"reference_dtype": reference_dtype}))
    groups = sample_groups(learner.policy, PROMPTS[:1], group_size=2)
    learner.update(groups, score(groups))
    lines = memory.learner_memory(
        model_sizes(str(tiny)),
        ranks=1,
        images=2,
        prompt=256,
        dtype="float32",
        checkpointing=False,
        reference_dtype=reference_dtype,
    )
    policy, parameters = learner.policy.model, learner.policy.trained_parameters()
    moments = [t for state in learner._optimizer.state.values() for t in state.values() if t.dim() > 0]
    assert lines["weights"] == lines["gradients"] == bytes_of(parameters.values())
    assert lines["reference"] == bytes_of(learner._reference.trained_parameters().values())
    assert lines["optimizer"] == bytes_of(moments)
    assert lines["frozen parts"] == 2 * (bytes_of(policy.parameters()) - bytes_of(parameters.values()))
    manifest, _ = pack(1, learner.weights())
    assert FLOAT32 * model_sizes(str(tiny)).trained == sum(spec.nbytes for spec in manifest.tensors)


def test_ranks_share_what_is_trained_and_nothing_else():
    model = KNOWN["janus-pro-7b"]
    one, eight = (
        memory.learner_memory(model, ranks=ranks, images=8, prompt=256, dtype="bfloat16", checkpointing=True)
        for ranks in (1, 8)
    )
    for name in ("weights", "reference", "gradients", "optimizer"):
        assert eight[name] == pytest.approx(one[name] / 8, rel=1e-6)
    assert eight["frozen parts"] == one["frozen parts"]


@pytest.mark.parametrize(
    ("form", "dtype", "sharded", "lora"),
    [
        ("float32", "float32", False, None),
        ("autocast", "bfloat16", False, None),
        ("bfloat16 parameters", "bfloat16", True, None),
        ("float32", "float32", False, LoraConfig(rank=24)),
        ("autocast", "bfloat16", False, LoraConfig(rank=24)),
    ],
)
def test_a_layer_keeps_what_the_formula_says_for_its_backward_pass(form, dtype, sharded, lora):
    sizes = replace(KNOWN["janus-pro-1b"], hidden=64, intermediate=160, layers=1, heads=4, kv_heads=2, head_dim=16)
    rows, length = 2, 48
    one, two = (_kept(sizes, layers, form, rows, length, lora) for layers in (1, 2))
    layer = memory.layer_activations(sizes, dtype=dtype, sharded=sharded, lora=lora)
    assert (two - one) / (rows * length) == pytest.approx(layer, rel=0.02)


def _kept(sizes, layers: int, form: str, rows: int, length: int, lora: LoraConfig | None) -> int:
    """Bytes that autograd keeps of a Llama model's forward pass, each storage once, parameters left out."""
    model = LlamaModel(
        LlamaConfig(
            vocab_size=8,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
        )
    )
    if form == "bfloat16 parameters":
        model = model.bfloat16()
    if lora is not None:
        inject_adapter_in_model(PeftConfig(r=lora.rank, target_modules=list(lora.target_modules)), model)
    dtype = next(model.parameters()).dtype
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.T.shape) for p in model.parameters() if p.dim() == 2
    }
    kept = {}

    def keep(tensor):
        if tuple(tensor.shape) not in shapes:  # nor their bfloat16 copies, which a plan has on another line
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    states = torch.randn(rows, length - 1, sizes.hidden, dtype=dtype, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"),
    ):
        prompts = [[row] for row in range(rows)]  # none shared
        LlamaBackbone(model).predict(prompts, states)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSizes, Measurement]:
    """Sizes of a model of 27 million parameters, and the peak of its update in every form that this machine can do."""
    path = write_model(tmp_path_factory.mktemp("models") / "27m", replace(FIFTY_MILLION, layers=6))
    native = hardware_has_bfloat16(torch.device("cpu"))
    options = {"model": str(path), "images": IMAGES, "forms": [form for form in PEAK if native or not form[0]]}
    variant = Variant("peak", peak_of_each_form, options)
    with Progress() as progress:
        (measured,) = interleave([variant], repeats=1, warmups=0, progress=progress, title="peak")["peak"]
    return model_sizes(str(path)), measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bfloat16", "checkpointing"),
    [
        pytest.param(False, False, id="float32"),
        pytest.param(False, True, id="kept"),
        pytest.param(True, False, id="autocast", marks=NATIVE_BFLOAT16),
    ],
)
def test_the_peak_of_a_real_update_of_27_million_parameters_is_foreseen(peaks, bfloat16, checkpointing):
    sizes, measured = peaks
    rise = measured["rises"][bfloat16, checkpointing]
    dtype = "bfloat16" if bfloat16 else "float32"
    batch = {"prompt": measured["prompt"], "dtype": dtype, "sharded": False, "checkpointing": checkpointing}
    expected = sum(memory.batch_bytes(sizes, images=IMAGES, **batch))
    print(f"peak {rise / 2**20:.0f} MiB, foreseen {expected / 2**20:.0f} MiB")
    least, most = PEAK[bfloat16, checkpointing]
    assert least <= expected / rise <= most


@pytest.mark.slow
def test_the_peak_of_loading_is_one_model_beside_a_share_of_the_other(tmp_path):
    """On a CPU, where both are in the machine's memory."""
    path = write_model(tmp_path / "27m", replace(FIFTY_MILLION, layers=6))
    file = path / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})  # as published
    sizes = model_sizes(str(path))
    with Progress() as progress:
        variant = Variant("loading", peak_of_loading, {"model": str(path), "ranks": [1, 4]})
        (measured,) = interleave([variant], repeats=1, warmups=0, progress=progress, title="loading")["loading"]
    for ranks, rise in measured["rises"].items():
        form = {"ranks": ranks, "images": 1, "prompt": 1, "dtype": "float32", "checkpointing": False}
        lines = memory.learner_memory(sizes, **form, offload=True)  # the frozen parts of the policy alone
        expected = memory.loading_bytes(sizes) + lines["weights"] + lines["frozen parts"]
        print(f"{ranks} rank(s): peak {rise / 2**20:.0f} MiB, foreseen {expected / 2**20:.0f} MiB")
        assert 0.93 <= expected / rise <= 1.07


def test_logits_are_made_in_chunks_of_the_policys_size():
    assert memory.LOGITS_AT_ONCE == base.LOGITS_AT_ONCE
