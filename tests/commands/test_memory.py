"""The formulas of memory against what real tensors take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from stage_ray.bench.base import Variant, interleave
from stage_ray.bench.inputs import FIFTY_MILLION, write_model
from stage_ray.commands import memory
from stage_ray.commands.memory import KNOWN, model_sizes
from stage_ray.commands.plan import GPUS
from stage_ray.engines.vllm import engine
from stage_ray.learner import Learner
from stage_ray.observability.progress import Progress
from stage_ray.policies import base
from stage_ray.policies.base import hardware_has_bfloat16
from stage_ray.policies.janus import codec as janus_parts
from stage_ray.policies.static_decoder import StaticDecoder
from stage_ray.weights.manifest import pack
from tests.commands.measured import peak_side
from tests.learner_case import PROMPTS, sample_groups, score, tiny_run
from tests.tiny import tiny_janus

NATIVE_BFLOAT16 = pytest.mark.skipif(
    not hardware_has_bfloat16(torch.device("cpu")), reason="this CPU has no bfloat16 products: minutes without them"
)
PEAK = {False: (0.97, 1.1), True: (0.97, 1.4)}  # foreseen by measured, without and with checkpointing


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_janus(tmp_path_factory.mktemp("models") / "janus")


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_optimizer_and_published_bytes_are_those_of_a_learner_after_a_step(tiny):
    learner = Learner(tiny_run(tiny))
    groups = sample_groups(learner.policy, PROMPTS[:1], group_size=2)
    learner.update(groups, score(groups))
    lines = memory.learner_lines(model_sizes(str(tiny)), ranks=1, rows=2, dtype="float32", checkpointing=False)
    policy, parameters = learner.policy.model, learner.policy.trained_parameters()
    moments = [t for state in learner._optimizer.state.values() for t in state.values() if t.dim() > 0]
    assert lines["weights"] == lines["reference"] == lines["gradients"] == bytes_of(parameters.values())
    assert lines["optimizer"] == bytes_of(moments)
    assert lines["frozen parts"] == 2 * (bytes_of(policy.parameters()) - bytes_of(parameters.values()))
    manifest, _ = pack(1, learner.weights())
    assert memory.weight_bytes(model_sizes(str(tiny))) == sum(spec.nbytes for spec in manifest.tensors)


def test_ranks_share_what_is_trained_and_nothing_else():
    model = KNOWN["janus-pro-7b"]
    one, eight = (
        memory.learner_lines(model, ranks=ranks, rows=8, dtype="bfloat16", checkpointing=True) for ranks in (1, 8)
    )
    for name in ("weights", "reference", "gradients", "optimizer"):
        assert eight[name] == pytest.approx(one[name] / 8, rel=1e-6)
    assert eight["frozen parts"] == one["frozen parts"]


@pytest.mark.parametrize("heads", [(2, 1), (4, 4)])
def test_the_cache_is_as_large_as_the_torch_engine_makes_it(heads):
    sizes = KNOWN["janus-pro-1b"]
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=8,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
        )
    )
    small = replace(sizes, layers=3, hidden=64, heads=heads[0], kv_heads=heads[1], head_dim=64 // heads[0])
    length = 2 * memory.CACHE_BLOCK
    cache = StaticDecoder(llama, 2, length)._new_cache(2, length)
    assert bytes_of([cache]) == 2 * memory.cache_bytes(small, tokens=length, dtype="float32")


def test_the_cache_is_vllms_blocks_times_its_page():
    interface = pytest.importorskip("vllm.v1.kv_cache_interface")
    model = KNOWN["janus-pro-7b"]
    page = interface.FullAttentionSpec(
        block_size=memory.CACHE_BLOCK, num_kv_heads=model.kv_heads, head_size=model.head_dim, dtype=torch.bfloat16
    ).page_size_bytes
    blocks = -(-(memory.LONGEST_PROMPT + model.image_tokens) // memory.CACHE_BLOCK)
    tokens = memory.LONGEST_PROMPT + model.image_tokens
    assert memory.cache_bytes(model, tokens=tokens, dtype="bfloat16") == blocks * page * model.layers


@pytest.mark.parametrize(
    ("form", "dtype", "sharded"),
    [("float32", "float32", False), ("autocast", "bfloat16", False), ("bfloat16 parameters", "bfloat16", True)],
)
def test_a_layer_keeps_what_the_formula_says_for_its_backward_pass(form, dtype, sharded):
    sizes = replace(KNOWN["janus-pro-1b"], hidden=64, intermediate=160, layers=1, heads=4, kv_heads=2, head_dim=16)
    rows, length = 2, 48
    one, two = (_kept(sizes, layers, form, rows, length) for layers in (1, 2))
    layer = memory.layer_activations(sizes, dtype=dtype, sharded=sharded)
    assert (two - one) / (rows * length) == pytest.approx(layer, rel=0.02)


def _kept(sizes, layers: int, form: str, rows: int, length: int) -> int:
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
    dtype = next(model.parameters()).dtype
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.T.shape) for p in model.parameters() if p.dim() == 2
    }
    kept = {}

    def keep(tensor):
        if tuple(tensor.shape) not in shapes:  # nor their bfloat16 copies, which a plan has on another line
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    states = torch.randn(rows, length, sizes.hidden, dtype=dtype, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"),
    ):
        model(inputs_embeds=states, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bfloat16", "checkpointing"),
    [
        pytest.param(False, False, id="float32"),
        pytest.param(False, True, id="kept"),
        pytest.param(True, False, id="autocast", marks=NATIVE_BFLOAT16),
    ],
)
def test_the_peak_of_a_real_update_of_50_million_parameters_is_foreseen(tmp_path, bfloat16, checkpointing):
    path, rows = write_model(tmp_path / "50m", FIFTY_MILLION), 6
    options = {"model": str(path), "rows": rows, "bfloat16": bfloat16, "checkpointing": checkpointing}
    with Progress() as progress:
        (facts,) = interleave(
            [Variant("peak", peak_side, options)], repeats=1, warmups=0, progress=progress, title="peak"
        )["peak"]
    sizes, dtype = model_sizes(str(path)), "bfloat16" if bfloat16 else "float32"
    batch = {"prompt": facts["prompt"], "dtype": dtype, "sharded": False, "checkpointing": checkpointing}
    expected = memory.kept_bytes(sizes, rows=rows, **batch) + memory.working_bytes(sizes, rows=rows, **batch)
    if bfloat16:
        expected += memory.BFLOAT16 * sizes.layers * sizes.layer  # what autocast keeps of the weights
    print(f"peak {facts['rise'] / 2**20:.0f} MiB, foreseen {expected / 2**20:.0f} MiB")
    least, most = PEAK[checkpointing]
    assert least <= expected / facts["rise"] <= most


def test_the_constants_are_those_of_the_program():
    assert memory.LONGEST_PROMPT == engine.LONGEST_PROMPT
    assert memory.LOGITS_AT_ONCE == base.LOGITS_AT_ONCE
    assert memory.DECODE_CHUNK == janus_parts.DECODE_CHUNK


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", KNOWN)
def test_the_images_in_flight_fit_and_one_more_would_not(model, gpu):
    sizes, card = KNOWN[model], GPUS[gpu]
    images = memory.images_in_flight(sizes, card, dtype="bfloat16")
    used = [sum(memory.rollout_lines(sizes, images=n, dtype="bfloat16").values()) for n in (images, images + 1)]
    assert images == 0 or used[0] <= memory.room(card)
    assert used[1] > memory.room(card)
