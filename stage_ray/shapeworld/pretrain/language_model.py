"""Trains the policy: a small Llama that writes the image tokens of a caption, with plain next-token cross-entropy.

Captions and scenes come from the training split of the grammar alone, and pictures show no held-out (shape, colour)
either. A third of the captions go beyond the six tasks (`sample_mixture`): from the tasks alone a model learns eight
pairs of shapes by heart; from every mixture of objects, colours, numbers and relations it learns to combine any two.
One caption in ten is replaced by its unconditional form, in exactly the shape guidance uses when sampling.

Captions say nothing of grain, of a tint, or of half a pixel to the left, so the pictures to learn from have plain
paper, places on a lattice, two sizes, and thrifty codes: what is left to learn is shapes, colours, numbers and places.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from transformers import JanusForConditionalGeneration, JanusProcessor

from stage_ray.config import PolicyConfig
from stage_ray.policies.janus.builder import build_model
from stage_ray.policies.janus.policy import JanusPolicy
from stage_ray.shapeworld.grammar import sample_mixture, sample_record, sample_scene
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun, autocast, console, device, load_weights
from stage_ray.shapeworld.pretrain.text import SIZES, janus_processor
from stage_ray.shapeworld.pretrain.tokenizer import ThriftyCodes, load_tokenizer
from stage_ray.shapeworld.render import render

CHECKPOINT = "training/language-model.safetensors"
BATCH = 32
PEAK_LR = 3e-3
PROMPT_DROPOUT = 0.1
MIXTURE = 0.35  # share of captions beyond the six tasks
SHARE_PICTURES = 2048  # pictures that give the shares of codes
TASK_WEIGHTS = {
    "single_object": 0.08,
    "two_object": 0.12,
    "counting": 0.25,
    "colors": 0.12,
    "position": 0.2,
    "color_attr": 0.23,
}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Captions and their pictures' tokens.

    `prompts`: every distinct caption; `captions` int32 [K]: index into `prompts`; `tokens` int16 [K, 64]: 0..511.
    """

    prompts: list[str]
    captions: torch.Tensor
    tokens: torch.Tensor


def build_corpus(work: Path, pictures: int, seed: int = 0) -> Corpus:
    """Draws `pictures` training scenes and tokenizes them."""
    tokenizer = load_tokenizer(work)
    rng = np.random.default_rng([seed, 1])
    index: dict[str, int] = {}

    def draw() -> tuple[int, np.ndarray]:
        record = sample_mixture(rng) if rng.random() < MIXTURE else sample_record(rng, TASK_WEIGHTS)
        picture = render(sample_scene(record, rng, lattice=True), plain=True)
        return index.setdefault(record["prompt"], len(index)), picture

    codes = ThriftyCodes(tokenizer, np.stack([draw()[1] for _ in range(min(pictures, SHARE_PICTURES))]))
    captions, tokens, images = [], [], []
    for number in track(range(pictures), "tokenizing pictures", console=console, transient=True):
        caption, picture = draw()
        captions.append(caption)
        images.append(picture)
        if len(images) == 64 or number == pictures - 1:
            tokens.append(codes.encode(np.stack(images)))
            images.clear()
    return Corpus(list(index), torch.tensor(captions, dtype=torch.int32), torch.cat(tokens))


def initial_policy(work: Path, processor: JanusProcessor, seed: int = 0) -> JanusForConditionalGeneration:
    """An untrained policy around the trained tokenizer, its generation embedding started at the codebook."""
    torch.manual_seed(seed)
    policy = build_model(SIZES, processor.tokenizer)
    policy.model.vqmodel.load_state_dict(load_tokenizer(work).state_dict())
    with torch.no_grad():
        policy.model.generation_embeddings.weight.copy_(policy.model.vqmodel.quantize.embedding.weight)
    return policy


def train_language_model(janus: Path, work: Path, budget: Budget, pictures: int, seed: int = 0) -> None:
    """Trains (or resumes) the policy on `pictures` captioned scenes; writes `work/training/language-model.safetensors`.

    `janus` is the model's directory, which the tokenizer's stage has written.
    """
    corpus = build_corpus(work, pictures, seed)
    console.print(
        f"corpus: {pictures} pictures, {len(corpus.prompts)} captions, {corpus.tokens.unique().numel()} codes"
    )
    policy = JanusPolicy.load(PolicyConfig(path=str(janus)), device=device())
    model = policy.model
    model.load_state_dict(initial_policy(work, janus_processor(), seed).state_dict())
    model.set_attn_implementation("eager")  # a CPU's fused bfloat16 attention is half again as slow when training
    for part in (model.model.generation_embeddings, model.model.generation_aligner, model.model.generation_head):
        part.requires_grad_(True)
    prompts = [policy.codec.encode_prompt(prompt) for prompt in corpus.prompts]
    layers = model.model.language_model.layers
    run = TrainingRun(work / CHECKPOINT, model, PEAK_LR, budget, weight_decay=0.05, hidden=layers)
    for step, _ in run:
        rng = np.random.default_rng([seed, 2, step])
        chosen = rng.integers(pictures, size=BATCH)
        captions = zip(corpus.captions[chosen].tolist(), (rng.random(BATCH) < PROMPT_DROPOUT).tolist(), strict=True)
        ids = [prompts[i].unconditional if dropped else prompts[i].conditional for i, dropped in captions]
        tokens = corpus.tokens[chosen].long().to(device())
        with autocast():
            logits = policy.image_logits(ids, tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        run.descend(loss)
        run.report(loss=loss.item())


def load_policy(work: Path, processor: JanusProcessor) -> JanusForConditionalGeneration:
    """What the working files hold: the trained policy, or an untrained one around the trained tokenizer."""
    policy = initial_policy(work, processor)
    if (work / CHECKPOINT).exists():
        load_weights(work / CHECKPOINT, policy)
    return policy.eval()
