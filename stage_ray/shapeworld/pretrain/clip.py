"""Trains a small `CLIPModel` on captioned training scenes: a learned, and therefore hackable, reward.

Symmetric contrastive training on fresh renders, with distinct captions in a batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from stage_ray.shapeworld.grammar import Record, Split, sample_mixture, sample_record, sample_scene
from stage_ray.shapeworld.pretrain.language_model import MIXTURE, TASK_WEIGHTS, text_tokenizer
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun, autocast, device
from stage_ray.shapeworld.pretrain.tokenizer import SIZES, to_pixels
from stage_ray.shapeworld.scene import IMAGE_SIZE, render

CHECKPOINT = "work/training/clip.safetensors"
BATCH = 128
CONTEXT = 32  # text tokens; the longest caption takes 26


def _batch(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, count: int, split: Split, mixture: float = 0.0
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` int64 [B, L], `pixel_values` float32 [B, 3, 64, 64].

    A share `mixture` of the captions goes beyond the six tasks.
    """
    records: dict[str, Record] = {}  # by prompt: no two captions of a batch are the same
    while len(records) < count:
        record = sample_mixture(rng) if rng.random() < mixture else sample_record(rng, TASK_WEIGHTS, split)
        records.setdefault(record["prompt"], record)
    images = [render(sample_scene(record, rng)) for record in records.values()]
    text = tokenizer(list(records), padding=True, return_tensors="pt", return_token_type_ids=False).to(device())
    return {**text, "pixel_values": to_pixels(np.stack(images))}


def train_clip(out: Path, budget: Budget, seed: int) -> None:
    """Train (or resume) the CLIP model; writes `out/clip`: bfloat16 weights, tokenizer, image processor."""
    torch.manual_seed(seed)
    tokenizer = text_tokenizer(append_eos=True)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    both = {"num_attention_heads": 4, "projection_dim": 128}
    text = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": SIZES.vocabulary}
    text |= {"max_position_embeddings": CONTEXT, **special, **both}
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, **both}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))  # 0.9 M parameters
    model.to(device()).train()
    model.set_attn_implementation("eager")  # a CPU trains faster without fused bfloat16 attention
    run = TrainingRun(out / CHECKPOINT, model, 1.5e-3, budget, weight_decay=0.05)
    for step, _ in run:
        batch = _batch(np.random.default_rng([seed, 3, step]), tokenizer, BATCH, "train", MIXTURE)
        with autocast():
            logits = model(**batch).logits_per_image.float()
        answers = torch.arange(BATCH, device=logits.device)
        run.descend((F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2)
    size, middle = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=middle, image_std=middle)
    # A fresh tokenizer: the used one would keep the padding of its last batch.
    for part in (model.to("cpu", torch.bfloat16), text_tokenizer(append_eos=True), images):
        part.save_pretrained(out / "clip")


@torch.no_grad()
def retrieval_accuracy(model: CLIPModel, split: Split, ways: int = 64, batches: int = 16) -> float:
    """How often a picture's own caption is the nearest of `ways` distinct captions of the split."""
    tokenizer, hits = text_tokenizer(append_eos=True), 0
    for index in range(batches):
        batch = _batch(np.random.default_rng([7, index]), tokenizer, ways, split)
        chosen = model(**batch).logits_per_image.argmax(dim=1)
        hits += int((chosen == torch.arange(ways, device=chosen.device)).sum())
    return hits / (ways * batches)
