"""The packed forward of a Llama against transformers' own, with gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from stage_ray.policies.backbone import Backbone
from stage_ray.policies.llama import LlamaBackbone

HIDDEN, IMAGE = 32, 5
A, B = (3, 1, 4, 1), (5, 9)


@pytest.fixture
def llama() -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaModel(config).eval()
    for parameter in model.parameters():  # norms of 1 and biases of 0 would hide where they belong
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def outputs(backbone: Backbone, prompts, embeds, slopes):
    """States, and gradients in the embeddings and in every parameter."""
    backbone.zero_grad()
    leaf = embeds.clone().requires_grad_()
    states = backbone.predict(prompts, leaf)
    states.backward(slopes)
    return [states.detach(), leaf.grad, *(parameter.grad.clone() for parameter in backbone.parameters())]


@pytest.mark.parametrize("prompts", [[A, A, A], [A, B, B, A], [B], [A, B]], ids=["one", "mixed", "single", "unshared"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_transformers(llama, prompts, checkpointing):
    embeds, slopes = torch.randn(len(prompts), IMAGE, HIDDEN), torch.randn(len(prompts), IMAGE + 1, HIDDEN)
    expected = outputs(Backbone(llama), prompts, embeds, slopes)
    packed = LlamaBackbone(llama)
    if checkpointing:
        llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        llama.train()
    found = outputs(packed, prompts, embeds, slopes)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_shared_prompt_passes_the_layers_once(llama):
    packed, seen = LlamaBackbone(llama), []
    llama.layers[0].mlp.gate_proj.weight.requires_grad_(False)  # a frozen matrix gets no gradient
    llama.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    packed.predict([A, B, A], torch.randn(3, IMAGE, HIDDEN)).sum().backward()
    assert seen == [len(A) + len(B) + 3 * IMAGE]
    assert llama.layers[0].mlp.gate_proj.weight.grad is None


def test_transformers_forward_is_as_before(llama):
    ids = torch.tensor([A])
    before = llama(ids, use_cache=False).last_hidden_state
    LlamaBackbone(llama)
    assert torch.equal(llama(ids, use_cache=False).last_hidden_state, before)
