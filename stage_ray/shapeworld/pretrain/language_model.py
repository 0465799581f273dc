"""Trains the policy: a small Llama that writes the image tokens of a caption, with plain next-token cross-entropy.

Captions and scenes come from the training split of the grammar alone, and pictures show no held-out (shape, colour)
either. A third of the captions go beyond the six tasks (`sample_mixture`): who has only ever read "a ring and a square"
learns eight pairs by heart; who reads every mixture of objects, colours, numbers and relations learns to put any two
together. One caption in ten is replaced by its unconditional form, in exactly the shape guidance uses when sampling.

Captions say nothing of grain, of a tint, or of half a pixel to the left, so the pictures to learn from have plain
paper, places on a lattice, two sizes, and thrifty codes: what is left to learn is shapes, colours, numbers and places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file
from torch import nn
from transformers import JanusForConditionalGeneration, JanusProcessor

from stage_ray.shapeworld.grammar import sample_mixture, sample_record, sample_scene
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun, autocast, console, device, save_atomically
from stage_ray.shapeworld.pretrain.policy_files import new_policy, prompt_ids, unconditional_ids
from stage_ray.shapeworld.pretrain.tokenizer import ThriftyCodes, load_tokenizer
from stage_ray.shapeworld.render import render

BATCH = 32
PEAK_LR = 3e-3
PROMPT_DROPOUT = 0.1
MIXTURE = 0.35  # share of captions beyond the six tasks
SHARE_PICTURES = 2048  # pictures that settle the shares of codes
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


class NextImageToken(nn.Module):
    """The part of a Janus model that draws: language model, generation embedding, aligner and head."""

    def __init__(self, policy: JanusForConditionalGeneration) -> None:
        super().__init__()
        core = policy.model
        self.language_model = core.language_model
        self.generation_embeddings = core.generation_embeddings
        self.generation_aligner = core.generation_aligner
        self.generation_head = core.generation_head

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy (nats per image token).

        `ids` int64 [B, L]: prompts, padded on the right to L = longest + 63; `lengths` int64 [B]: prompt lengths;
        `tokens` int64 [B, 64]. Image token t sits at position length + t; causal attention never sees the padding after
        the last one, so no mask is needed.
        """
        text = self.language_model.embed_tokens(ids)
        image = self.generation_aligner(self.generation_embeddings(tokens[:, :-1]))
        steps = torch.arange(tokens.shape[1], device=ids.device)
        places = lengths[:, None] + steps[:-1]  # [B, 63]
        embeds = text.to(image.dtype).scatter(1, places[..., None].expand_as(image), image)
        states = self.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        predicting = (lengths[:, None] - 1 + steps)[..., None].expand(-1, -1, states.shape[-1])
        logits = self.generation_head(states.gather(1, predicting))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


class PromptTable:
    """Token ids of every caption, conditional and unconditional, ready to be stacked into batches."""

    def __init__(self, processor: JanusProcessor, prompts: Sequence[str]) -> None:
        self.conditional = [prompt_ids(processor, prompt) for prompt in prompts]
        self.unconditional = [unconditional_ids(processor, ids) for ids in self.conditional]
        self.pad = int(processor.tokenizer.pad_token_id)

    def batch(self, captions: Sequence[int], dropped: Sequence[bool], tail: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 [B, longest + tail] and lengths int64 [B]; `dropped` captions take their unconditional form."""
        rows = [
            (self.unconditional if drop else self.conditional)[i] for i, drop in zip(captions, dropped, strict=True)
        ]
        width = max(map(len, rows)) + tail
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])
        return ids, torch.tensor([len(row) for row in rows])


def initial_policy(work: Path, processor: JanusProcessor, seed: int = 0) -> JanusForConditionalGeneration:
    """An untrained policy around the trained tokenizer, its generation embedding started at the codebook."""
    torch.manual_seed(seed)
    policy = new_policy(processor.tokenizer)
    policy.model.vqmodel.load_state_dict(load_file(work / "tokenizer.safetensors"))
    with torch.no_grad():
        policy.model.generation_embeddings.weight.copy_(policy.model.vqmodel.quantize.embedding.weight)
    return policy


def train_language_model(
    work: Path, processor: JanusProcessor, budget: Budget, pictures: int, seed: int = 0
) -> JanusForConditionalGeneration:
    """Trains (or resumes) the policy on `pictures` captioned scenes; writes `work/policy.safetensors` (float32)."""
    corpus = build_corpus(work, pictures, seed)
    console.print(
        f"corpus: {pictures} pictures, {len(corpus.prompts)} captions, {corpus.tokens.unique().numel()} codes"
    )
    table = PromptTable(processor, corpus.prompts)
    policy = initial_policy(work, processor, seed).to(device())
    policy.set_attn_implementation("eager")  # a CPU's fused bfloat16 attention is half again as slow when training
    model = NextImageToken(policy).train()
    path, layers = work / "language-model-training.safetensors", model.language_model.layers
    run = TrainingRun(path, model, PEAK_LR, budget, weight_decay=0.05, hidden=layers)
    run.on_checkpoint = lambda: save_policy(policy, work / "policy.safetensors")
    for step, _ in run:
        rng = np.random.default_rng([seed, 2, step])
        chosen = rng.integers(pictures, size=BATCH)
        ids, lengths = table.batch(
            corpus.captions[chosen].tolist(),
            (rng.random(BATCH) < PROMPT_DROPOUT).tolist(),
            tail=corpus.tokens.shape[1] - 1,
        )
        tokens = corpus.tokens[chosen].long().to(device())
        with autocast():
            loss = model(ids.to(device()), lengths.to(device()), tokens)
        run.descend(loss)
        run.report(loss=loss.item())
    return policy.eval()


def save_policy(policy: JanusForConditionalGeneration, path: Path) -> None:
    """All weights, float32; the tied text head is left out (loading ties it again)."""
    save_atomically({k: v for k, v in policy.state_dict().items() if k != "lm_head.weight"}, path)


def load_policy(work: Path, processor: JanusProcessor) -> JanusForConditionalGeneration:
    """The policy that `train_language_model` wrote, float32, in evaluation mode, on the CPU."""
    policy = new_policy(processor.tokenizer)
    policy.load_state_dict(load_file(work / "policy.safetensors"), strict=False)
    return policy.eval()
