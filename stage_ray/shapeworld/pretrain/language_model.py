"""Trains the policy: a small Llama that writes the image tokens of a caption, with plain next-token cross-entropy.

Captions come from the training split alone; pictures may show what is held out, below a caption that leaves it open.
Two captions in five go beyond the six tasks: from these alone a model learns eight pairs of shapes by heart. One
caption in ten is replaced by its unconditional form, in exactly the shape guidance uses. Captions say nothing of grain,
or of half a pixel to the left, so the pictures have plain paper, places on a lattice, two sizes, and thrifty codes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import JanusForConditionalGeneration, JanusProcessor, PreTrainedTokenizerFast

from stage_ray.config import PolicyConfig
from stage_ray.config.paths import resolve_path
from stage_ray.policies.janus.builder import build_model, build_processor
from stage_ray.policies.janus.policy import JanusPolicy
from stage_ray.shapeworld.grammar import (
    ANY,
    COMPARISONS,
    NUMBERS,
    OPENERS,
    RELATIONS,
    REWORDED,
    SIZE_WORDS,
    TASKS,
    plural,
    sample_mixture,
    sample_record,
    sample_scene,
)
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun, autocast, console, device, read_checkpoint
from stage_ray.shapeworld.pretrain.tokenizer import BATCH_IMAGES, SIZES, cosines, load_tokenizer, thrifty_bonus
from stage_ray.shapeworld.scene import BACKGROUNDS, COLORS, SHAPES, render

CHECKPOINT = "work/training/language-model.safetensors"
BATCH = 32
PROMPT_DROPOUT = 0.1
MIXTURE = 0.4  # share of captions beyond the six tasks
SHARE_PICTURES = 2048  # pictures that give the shares of codes
TASK_WEIGHTS = dict(zip(TASKS, (0.08, 0.12, 0.25, 0.12, 0.2, 0.23), strict=True))

# Janus-Pro's own template: it ships as it is and is not rebuilt.
CHAT_TEMPLATE = "package:stage_ray/shapeworld/assets/janus/chat_template.jinja"
BOS, EOS, PAD, UNKNOWN = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<unk>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
# EOS must not get id 2: transformers' CLIP takes an `eos_token_id` of 2 for a sign of a broken old config.
SPECIAL = (PAD, BOS, BOI, EOI, IMAGE, EOS, "<|User|>", "<|Assistant|>", UNKNOWN)


def text_tokenizer(append_eos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the grammar, lower-cased; `append_eos`: texts end in EOS, whose state CLIP reads."""
    names = (*SHAPES, ANY, *map(plural, (*SHAPES, ANY)), *COLORS, *BACKGROUNDS, *SIZE_WORDS, *NUMBERS.values())
    phrases = (*OPENERS, *RELATIONS, *COMPARISONS, *REWORDED.values(), "and in on paper")
    words = (":", *names, *" ".join(phrases).split())
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*SPECIAL, *words)))}  # each word once
    assert len(vocabulary) <= SIZES.vocabulary, f"{len(vocabulary)} words, {SIZES.vocabulary} embedding rows"
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


def build_corpus(out: Path, pictures: int, seed: int) -> tuple[list[str], np.ndarray, Tensor]:
    """Every distinct caption of K training pictures; the index of each one's own, int64 [K]; tokens int16 [K, 64]."""
    tokenizer = load_tokenizer(out)
    rng = np.random.default_rng([seed, 1])
    index: dict[str, int] = {}

    def draw(count: int) -> tuple[list[int], np.ndarray]:
        captions, images = [], []
        for _ in range(count):
            record = sample_mixture(rng) if rng.random() < MIXTURE else sample_record(rng, TASK_WEIGHTS)
            images.append(render(sample_scene(record, rng, lattice=True), plain=True))
            captions.append(index.setdefault(record["prompt"], len(index)))
        return captions, np.stack(images)

    bonus = thrifty_bonus(cosines(tokenizer, draw(min(pictures, SHARE_PICTURES))[1]))
    captions, tokens = [], []
    for start in track(range(0, pictures, BATCH_IMAGES), "tokenizing pictures", console=console, transient=True):
        chosen, images = draw(min(BATCH_IMAGES, pictures - start))
        captions += chosen
        tokens.append((cosines(tokenizer, images) + bonus).argmax(-1).to("cpu", torch.int16))
    return list(index), np.asarray(captions), torch.cat(tokens)


def load_policy(out: Path, seed: int = 0) -> JanusForConditionalGeneration:
    """The policy as trained so far, around the trained tokenizer; its generation embedding starts at the codebook."""
    torch.manual_seed(seed)
    policy = build_model(SIZES, janus_processor().tokenizer)
    policy.model.vqmodel.load_state_dict(load_tokenizer(out).state_dict())
    policy.model.generation_embeddings.weight.data.copy_(policy.model.vqmodel.quantize.embedding.weight)
    if (out / CHECKPOINT).exists():
        policy.load_state_dict(read_checkpoint(out / CHECKPOINT)["module"], strict=False)  # of what makes images
    return policy


def train_language_model(out: Path, budget: Budget, pictures: int, seed: int) -> None:
    """Train (or resume) the policy of `out/janus` on `pictures` captioned scenes; writes the checkpoint alone."""
    texts, captions, codes = build_corpus(out, pictures, seed)
    console.print(f"corpus: {pictures} pictures, {len(texts)} captions, {codes.unique().numel()} codes")
    policy = JanusPolicy.load(PolicyConfig(path=str(out / "janus")), device=device())
    model = policy.model
    model.load_state_dict(load_policy(out, seed).state_dict(), strict=False)  # in float32, unlike the directory's
    model.set_attn_implementation("eager")  # a CPU's fused bfloat16 attention is half again as slow when training
    for part in (model.model.generation_embeddings, model.model.generation_aligner, model.model.generation_head):
        part.requires_grad_(True)
    prompts = [policy.codec.encode_prompt(text) for text in texts]
    layers = model.model.language_model.layers
    run = TrainingRun(out / CHECKPOINT, model, 3e-3, budget, weight_decay=0.05, hidden=layers)
    for step, _ in run:
        rng = np.random.default_rng([seed, 2, step])
        chosen = rng.integers(pictures, size=BATCH)
        drawn = zip(captions[chosen], rng.random(BATCH) < PROMPT_DROPOUT, strict=True)
        ids = [prompts[caption].unconditional if drop else prompts[caption].conditional for caption, drop in drawn]
        tokens = codes[chosen].long().to(device())
        with autocast():
            logits = policy.image_logits(ids, tokens)
        run.descend(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
