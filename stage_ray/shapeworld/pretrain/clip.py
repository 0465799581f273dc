"""Trains a small `CLIPModel` on captioned training scenes: a learned, and therefore hackable, reward.

Plain symmetric contrastive training on fresh renders. Each batch holds distinct captions, and a caption that is also
true of another picture of the batch is rare enough to leave alone ("a photo of a ring" beside "a photo of a red ring").
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from stage_ray.shapeworld.grammar import Split, sample_record, sample_scene
from stage_ray.shapeworld.pretrain.language_model import TASK_WEIGHTS
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun, autocast, device, save_atomically
from stage_ray.shapeworld.pretrain.policy_files import BOS, EOS, PAD, VOCABULARY, text_tokenizer
from stage_ray.shapeworld.pretrain.tokenizer import to_pixels
from stage_ray.shapeworld.render import render
from stage_ray.shapeworld.scene import IMAGE_SIZE

BATCH = 128
PEAK_LR = 1.5e-3
CONTEXT = 24  # text tokens; the longest caption takes 13


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """The policy's word-level tokenizer, with an EOS at the end of each text."""
    return text_tokenizer(append_eos=True)


def clip_image_processor() -> CLIPImageProcessorPil:
    """64x64 pictures, pixels to -1..1."""
    return CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def new_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """An untrained CLIP of about 0.9 M parameters: vision 128 wide and 4 deep, text 96 wide and 3 deep."""
    ids = tokenizer.convert_tokens_to_ids
    text = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        projection_dim=128,
        bos_token_id=ids(BOS),
        eos_token_id=ids(EOS),
        pad_token_id=ids(PAD),
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=128,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def distinct_records(rng: np.random.Generator, count: int, split: Split) -> Iterator[dict]:
    """`count` records of a split, no two with the same prompt."""
    seen: set[str] = set()
    while len(seen) < count:
        record = sample_record(rng, TASK_WEIGHTS, split)
        if record["prompt"] not in seen:
            seen.add(record["prompt"])
            yield record


def _batch(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, count: int, split: Split = "train"
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` int64 [B, L], `pixel_values` float32 [B, 3, 64, 64]."""
    records = list(distinct_records(rng, count, split))
    images = np.stack([render(sample_scene(r, rng, avoid_held_out=split == "train")) for r in records])
    text = tokenizer([r["prompt"] for r in records], padding=True, return_tensors="pt").to(device())
    return {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"], "pixel_values": to_pixels(images)}


def _loss(model: CLIPModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with autocast():
        logits = model(**batch).logits_per_image.float()
    answers = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2


def train_clip(work: Path, budget: Budget, seed: int = 0) -> CLIPModel:
    """Trains (or resumes) the CLIP model; writes `work/clip.safetensors` (float32)."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    model = new_clip(tokenizer).to(device()).train()
    model.set_attn_implementation("eager")  # a CPU trains faster without fused bfloat16 attention
    run = TrainingRun(work / "clip-training.safetensors", model, PEAK_LR, budget, weight_decay=0.05)
    run.on_checkpoint = lambda: save_atomically(model.state_dict(), work / "clip.safetensors")
    for step, _ in run:
        loss = _loss(model, _batch(np.random.default_rng([seed, 3, step]), tokenizer, BATCH))
        run.descend(loss)
        run.report(loss=loss.item())
    return model.eval()


def load_clip(work: Path) -> CLIPModel:
    """The model that `train_clip` wrote, float32, in evaluation mode, on `device()`."""
    model = new_clip(clip_tokenizer())
    model.load_state_dict(load_file(work / "clip.safetensors"))
    return model.to(device()).eval()


@torch.no_grad()
def retrieval_accuracy(model: CLIPModel, split: Split = "heldout", ways: int = 64, batches: int = 16) -> float:
    """How often a picture's own caption is the nearest of `ways` distinct captions of the split."""
    tokenizer, hits = clip_tokenizer(), 0
    for index in range(batches):
        batch = _batch(np.random.default_rng([7, index]), tokenizer, ways, split)
        chosen = model(**batch).logits_per_image.argmax(dim=1)
        hits += int((chosen == torch.arange(ways, device=chosen.device)).sum())
    return hits / (ways * batches)
