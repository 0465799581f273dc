"""A Janus model small enough for tests: the classes, tokenizer, template and files of Janus-Pro, random weights.

32x32 pixels as 4x4 = 16 tokens of a 48-entry codebook; two Llama layers of width 64. The weights are spread so that
logits are far from flat: a wrong mask, position or branch changes them visibly.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

BOS, EOS, PAD, UNK = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>", "<unk>"
IMAGE, BOI, EOI = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
ROLES = ("<|User|>", "<|Assistant|>")
WORDS = """
    User Assistant : a an photo of and two three four red green blue yellow purple circle circles square squares
    triangle triangles ring rings left right above below the"""

IMAGE_SIZE, PATCH, CODES, HIDDEN = 32, 8, 48, 64
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2

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
    model = _model(tokenizer, seed)
    image_processor = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = JanusProcessor(
        image_processor,
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        use_default_system_prompt=False,
        num_image_tokens=IMAGE_TOKENS,
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    special = [PAD, BOS, EOS, UNK, IMAGE, BOI, EOI, *ROLES]
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS.split()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.add_special_tokens(special)
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
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


def _model(tokenizer: PreTrainedTokenizerFast, seed: int) -> JanusForConditionalGeneration:
    special = {"pad": PAD, "bos": BOS, "eos": EOS}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=128,
            **ids,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            mlp_ratio=1.0,
            projection_dim=HIDDEN,
            num_image_tokens=IMAGE_TOKENS,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODES,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 1],
            num_res_blocks=1,
            projection_dim=HIDDEN,
            image_token_embed_dim=HIDDEN,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    model = JanusForConditionalGeneration(config).eval()
    _spread(model, seed)
    boi = {"boi_token_id": tokenizer.convert_tokens_to_ids(BOI)}
    model.generation_config = GenerationConfig(
        guidance_scale=5.0, do_sample=True, max_length=128, generation_kwargs=boi, **ids
    )
    return model


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
