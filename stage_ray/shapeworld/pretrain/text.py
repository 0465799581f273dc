"""The text side of the shipped models: a word-level tokenizer of the grammar and Janus' processor around it."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import JanusProcessor, PreTrainedTokenizerFast

from stage_ray.config.paths import resolve_path
from stage_ray.policies.janus.builder import JanusSizes, build_processor
from stage_ray.shapeworld.grammar import NUMBERS, RELATIONS, plural
from stage_ray.shapeworld.scene import COLORS, SHAPES

SIZES = JanusSizes(hidden=192, layers=6, heads=6, intermediate=512, codes=512, side=8, vocabulary=64)
# Janus-Pro's own template: it ships as it is and is not rebuilt.
CHAT_TEMPLATE = "package:stage_ray/shapeworld/assets/janus/chat_template.jinja"

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
USER, ASSISTANT, UNKNOWN = "<|User|>", "<|Assistant|>", "<unk>"
# EOS must not get id 2: transformers' CLIP takes an `eos_token_id` of 2 for a sign of a broken old config.
SPECIAL = (PAD, BOS, BOI, EOI, IMAGE, EOS, USER, ASSISTANT, UNKNOWN)


def text_tokenizer(append_eos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the grammar: lower-cased, split at white space and punctuation, unknown words `<unk>`.

    `append_eos` ends every text in EOS, whose state CLIP reads. `special` names further special tokens (Janus wants
    `image_token`, `boi_token`, `eoi_token`)."""
    names = (*SHAPES, *map(plural, SHAPES), *COLORS)
    words = (":", "a", "an", "photo", "of", "and", *NUMBERS.values(), *names, *" ".join(RELATIONS).split())
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*SPECIAL, *words)))}  # each word once
    if len(vocabulary) > SIZES.vocabulary:
        raise ValueError(f"{len(vocabulary)} words do not fit {SIZES.vocabulary} embedding rows")
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
    tokenizer.chat_template = resolve_path(CHAT_TEMPLATE).read_text(encoding="utf-8")
    return build_processor(SIZES, tokenizer, tokenizer.chat_template)
