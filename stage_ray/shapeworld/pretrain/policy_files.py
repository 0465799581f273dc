"""What a ShapeWorld Janus directory holds beside its weights: configs, a word-level tokenizer, the processor.

The same files as an official Janus-Pro directory, only smaller, so that plain transformers loads and samples it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    JanusProcessor,
    JanusVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from stage_ray.shapeworld.grammar import NUMBERS, RELATIONS
from stage_ray.shapeworld.pretrain.tokenizer import vq_config
from stage_ray.shapeworld.scene import COLORS, IMAGE_SIZE, SHAPES

WIDTH, LAYERS, HEADS, INTERMEDIATE = 192, 6, 6, 512
VOCABULARY = 64  # rows of the text embedding; the words and special tokens fill most of them
IMAGE_TOKENS = 64

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
USER, ASSISTANT, UNKNOWN = "<|User|>", "<|Assistant|>", "<unk>"
# EOS must not get id 2: transformers' CLIP takes an `eos_token_id` of 2 for a sign of a broken old config.
SPECIAL = (PAD, BOS, BOI, EOI, IMAGE, EOS, USER, ASSISTANT, UNKNOWN)

# Janus-Pro's own template.
CHAT_TEMPLATE = (
    "{%set seps=['\\n\\n','" + EOS + "']%}{%for message in messages%}"
    "{%if message['role']|lower=='user'%}<|User|>: "
    "{%elif message['role']|lower=='assistant'%}<|Assistant|>:"
    "{%if not (loop.last and not add_generation_prompt and message['content'][0]['type']=='text' "
    "and message['content'][0]['text']=='')%} {%endif%}"
    "{%else%}{{message['role'].capitalize()}}: {%endif%}"
    "{%for content in message['content']%}{%if content['type']=='image'%}<image_placeholder>"
    "{%elif content['type']=='text'%}{%set text=content['text']%}"
    "{%if loop.first%}{%set text=text.lstrip()%}{%endif%}{%if loop.last%}{%set text=text.rstrip()%}{%endif%}"
    "{%if not loop.first and message['content'][loop.index0-1]['type']=='text'%}{{' '+text}}{%else%}{{text}}{%endif%}"
    "{%endif%}{%endfor%}"
    "{%if not loop.last or add_generation_prompt%}"
    "{%if message['role']|lower=='user'%}{{seps[0]}}{%else%}{{seps[1]}}{%endif%}{%endif%}{%endfor%}"
    "{%if add_generation_prompt%}<|Assistant|>:{%endif%}"
)


def words() -> list[str]:
    """Every word of the prompt grammar, in a fixed order."""
    kinds = [*SHAPES, *(kind + ("es" if kind.endswith("s") else "s") for kind in SHAPES)]
    relations = [word for relation in RELATIONS for word in relation.split()]
    return list(dict.fromkeys([":", "a", "an", "photo", "of", "and", *NUMBERS.values(), *kinds, *COLORS, *relations]))


def text_tokenizer(append_eos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the grammar: lower-cased, split at white space and punctuation, unknown words `<unk>`.

    `append_eos` ends every text in EOS, whose state CLIP reads. `special` names further special tokens (Janus wants
    `image_token`, `boi_token`, `eoi_token`)."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words()))}
    if len(vocabulary) > VOCABULARY:
        raise ValueError(f"{len(vocabulary)} words do not fit {VOCABULARY} embedding rows")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w]"), behavior="isolated")]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}" if append_eos else f"{BOS} $A",
        special_tokens=[(BOS, vocabulary[BOS]), (EOS, vocabulary[EOS])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="right" if append_eos else "left",
        model_max_length=128,
        **({"extra_special_tokens": special} if special else {}),
    )


def janus_processor() -> JanusProcessor:
    """Tokenizer, chat template and image processor (64x64, pixels to -1..1) as one JanusProcessor."""
    tokenizer = text_tokenizer(image_token=IMAGE, boi_token=BOI, eoi_token=EOI)
    tokenizer.chat_template = CHAT_TEMPLATE
    images = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        min_size=IMAGE_SIZE,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return JanusProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=IMAGE_TOKENS)


def janus_config(tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    """2.9 M-parameter Llama, the 1.15 M tokenizer, and the smallest vision tower that transformers accepts."""
    ids = tokenizer.convert_tokens_to_ids
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        bos_token_id=ids(BOS),
        eos_token_id=ids(EOS),
        pad_token_id=ids(PAD),
        tie_word_embeddings=True,
    )
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        mlp_ratio=1.0,
        projection_dim=WIDTH,
        depth=1,
        num_image_tokens=IMAGE_TOKENS,
    )
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq_config(WIDTH), image_token_id=ids(IMAGE))


def new_policy(tokenizer: PreTrainedTokenizerFast) -> JanusForConditionalGeneration:
    """An untrained policy (float32) with the generation settings that transformers' image sampling reads."""
    model = JanusForConditionalGeneration(janus_config(tokenizer))
    ids = tokenizer.convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        bos_token_id=ids(BOS),
        eos_token_id=ids(EOS),
        pad_token_id=ids(PAD),
        do_sample=True,
        temperature=1.0,
        guidance_scale=3.0,
        generation_kwargs={"boi_token_id": ids(BOI)},
    )
    return model


def save_janus(model: JanusForConditionalGeneration, processor: JanusProcessor, path: Path) -> None:
    """Writes a directory that plain transformers loads; weights in bfloat16, file names as in official checkpoints."""
    path.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(path)
    half = new_policy(processor.tokenizer)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).save_pretrained(path)


def chat(processor: JanusProcessor, prompt: str) -> str:
    """The prompt in Janus' chat template: what `processor(text=[...], generation_mode="image")` wants to see."""
    message = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    return str(processor.apply_chat_template(message, add_generation_prompt=True))


def prompt_ids(processor: JanusProcessor, prompt: str) -> list[int]:
    """The conditional token ids of one prompt, exactly as `processor(text=[chat], generation_mode="image")` gives them:
    `BOS <|User|> : a photo of ... <|Assistant|> : BOI`. No padding; training and sampling both start from these."""
    return list(processor(text=[chat(processor, prompt)], generation_mode="image")["input_ids"][0].tolist())


def unconditional_ids(processor: JanusProcessor, ids: list[int]) -> list[int]:
    """The unconditional branch of the same prompt as transformers' `generate` builds it: everything but BOS and BOI
    becomes the pad token, which is attended to like any other."""
    token = processor.tokenizer.convert_tokens_to_ids
    return [i if i in (token(BOS), token(BOI)) else token(PAD) for i in ids]
