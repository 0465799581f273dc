"""How good the models came out: the numbers of the model cards. Only plain transformers draws here, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import JanusForConditionalGeneration, JanusProcessor

from stage_ray.shapeworld.grammar import Record, heldout_prompts
from stage_ray.shapeworld.pretrain.loop import device
from stage_ray.shapeworld.pretrain.policy_files import chat
from stage_ray.shapeworld.pretrain.tokenizer import decode_images, encode_images
from stage_ray.shapeworld.render import render_with_masks
from stage_ray.shapeworld.scene import random_scene

CONFIDENCE = COUNTING_CONFIDENCE = 0.5  # the thresholds of the ShapeWorld suite and configs


@torch.inference_mode()
def draw(path: Path, prompts: Sequence[str], guidance_scale: float, seed: int = 0, batch: int = 100) -> np.ndarray:
    """One picture a prompt, uint8 [B, 64, 64, 3], by transformers' own `generate` in float32."""
    processor = JanusProcessor.from_pretrained(path)
    model = JanusForConditionalGeneration.from_pretrained(path, dtype=torch.float32).to(device()).eval()
    torch.manual_seed(seed)
    pictures = []
    for start in range(0, len(prompts), batch):
        texts = [chat(processor, prompt) for prompt in prompts[start : start + batch]]
        inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt").to(device())
        tokens = model.generate(
            **inputs, generation_mode="image", do_sample=True, guidance_scale=guidance_scale, use_cache=True
        )
        pictures.append(decode_images(model.model.vqmodel, tokens))
    return np.concatenate(pictures)


def geneval(images: np.ndarray, records: Sequence[Record], detector_dir: Path) -> dict[str, float]:
    """Share of strictly correct pictures by task, and `overall`: the mean of the tasks, as GenEval counts."""
    from stage_ray.shapeworld.detector import ShapeDetector
    from stage_ray.shapeworld.detector_exam import is_correct

    verdicts: dict[str, list[bool]] = {}
    for record, found in zip(records, ShapeDetector(detector_dir).detect(images), strict=True):
        least = COUNTING_CONFIDENCE if record["tag"] == "counting" else CONFIDENCE
        objects: dict[str, list] = {}
        for one in found:
            if one.confidence > least:
                objects.setdefault(one.label, []).append(one)
        verdicts.setdefault(record["tag"], []).append(is_correct(record, objects))
    shares = {tag: float(np.mean(answers)) for tag, answers in verdicts.items()}
    return {**shares, "overall": float(np.mean(list(shares.values())))}


def base_geneval(
    path: Path, detector_dir: Path, guidance_scale: float = 3.0, repeats: int = 4, seed: int = 0
) -> dict[str, float]:
    """`geneval` of a policy on the held-out prompts, `repeats` pictures each."""
    records = heldout_prompts() * repeats
    images = draw(path, [record["prompt"] for record in records], guidance_scale, seed)
    return geneval(images, records, detector_dir)


def reconstruction(path: Path, count: int = 256, seed: int = 11) -> dict[str, float]:
    """Mean absolute error of the tokenizer's reconstructions on random scenes, in grey levels of 255, over all pixels
    and over objects alone, and how many codes `count` pictures use."""
    model = JanusForConditionalGeneration.from_pretrained(path, dtype=torch.float32).model.vqmodel.to(device()).eval()
    rng = np.random.default_rng(seed)
    drawn = [render_with_masks(random_scene(rng)) for _ in range(count)]
    images = np.stack([image for image, _ in drawn])
    objects = np.stack([masks.max(axis=0) for _, masks in drawn]) > 0.5
    ids = encode_images(model, images)
    error = np.abs(decode_images(model, ids).astype(np.float32) - images).mean(axis=-1)
    return {
        "error_all": float(error.mean()),
        "error_objects": float(error[objects].mean()),
        "codes_used": float(ids.unique().numel()),
    }
