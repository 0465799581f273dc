"""A Janus model small enough for tests: the classes, tokenizer, template and files of Janus-Pro, random weights.

32x32 pixels as 4x4 = 16 tokens of a 48-entry codebook; two Llama layers of width 64. The weights are spread so that
logits are far from flat: a wrong mask, position or branch changes them visibly.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from stage_ray.policies.janus.builder import JanusSizes, build_model, build_processor, write_checkpoint

BOS, EOS, PAD, UNK = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>", "<unk>"
IMAGE, BOI, EOI = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
ROLES = ("<|User|>", "<|Assistant|>")
WORDS = """
    User Assistant : a an photo of and two three four red green blue yellow purple circle circles square squares
    triangle triangles ring rings left right above below the"""

SPECIAL = [PAD, BOS, EOS, UNK, IMAGE, BOI, EOI, *ROLES]
VOCABULARY = {token: index for index, token in enumerate([*SPECIAL, *WORDS.split()])}

CODES, HIDDEN = 48, 64
SIZES = JanusSizes(
    hidden=HIDDEN,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=32,
    intermediate=128,
    codes=CODES,
    side=4,
    vocabulary=len(VOCABULARY),
    prompt_tokens=112,
    tied=False,
    channel_multiplier=(1, 1, 1, 1),
    latent_channels=32,
    aligner_layers=2,
)
IMAGE_SIZE, IMAGE_TOKENS = SIZES.image_pixels, SIZES.side**2

# Janus-Pro's own template, for conversations of text.
CHAT_TEMPLATE = (
    "{%for message in messages%}"
    "{%if message['role']|lower=='user'%}<|User|>: {%elif message['role']|lower=='assistant'%}<|Assistant|>: {%endif%}"
    "{%for content in message['content']%}{%if content['type']=='text'%}{{content['text']|trim}}{%endif%}{%endfor%}"
    "{%if not loop.last or add_generation_prompt%}{{'\n\n'}}{%endif%}"
    "{%endfor%}"
    "{%if add_generation_prompt%}<|Assistant|>:{%endif%}"
)


def tiny_janus(directory: Path, seed: int = 0) -> Path:
    """Write a tiny random Janus checkpoint, processor included, and return its directory.

    Example:
        path = tiny_janus(tmp_path / "janus")
        JanusForConditionalGeneration.from_pretrained(path)
    """
    tokenizer = _tokenizer()
    model = build_model(SIZES, tokenizer, guidance_scale=5.0, seed=seed)
    _spread(model, seed)
    return write_checkpoint(directory, model, build_processor(SIZES, tokenizer, CHAT_TEMPLATE))


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    core.add_special_tokens(SPECIAL)
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, VOCABULARY[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI},
    )


@torch.no_grad()
def _spread(model: JanusForConditionalGeneration, seed: int) -> None:
    """Fill every matrix with values of unit gain, and the last one with more, so that no distribution is flat."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        fan_in = 1 if "embed" in name and "patch" not in name else parameter[0].numel()
        gain = 3.0 if name.endswith("vision_head.weight") else 1.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
