"""From working files to what ships: directories that plain transformers loads, with measured model cards.

Only plain transformers draws the pictures that are measured here, no engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import JanusForConditionalGeneration, JanusProcessor

from stage_ray.policies.janus.builder import write_checkpoint
from stage_ray.shapeworld.detector import CLASSES, ShapeClassifier, ShapeDetector
from stage_ray.shapeworld.grammar import heldout_prompts, training_prompts
from stage_ray.shapeworld.pretrain import clip, detector, language_model, tokenizer
from stage_ray.shapeworld.pretrain.detector_evaluation import evaluate_detector, is_correct
from stage_ray.shapeworld.pretrain.loop import console, device, load_weights, read_progress
from stage_ray.shapeworld.pretrain.text import chat, janus_processor, text_tokenizer
from stage_ray.shapeworld.pretrain.tokenizer_view import TokenizerView
from stage_ray.shapeworld.render import render_with_masks
from stage_ray.shapeworld.scene import random_scene

TEMPLATES = Path(__file__).parent / "cards"
CONFIDENCE = 0.5  # threshold of the ShapeWorld suite and configs, for counting too


def write_prompts(out: Path) -> None:
    """Writes `prompts/train.jsonl` and `prompts/heldout.jsonl`, one GenEval record a line."""
    folder = out / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", training_prompts()), ("heldout", heldout_prompts())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def export_janus(out: Path, work: Path) -> None:
    """Writes `janus/` in bfloat16; its policy is untrained while only the tokenizer is trained."""
    processor = janus_processor()
    write_checkpoint(out / "janus", language_model.load_policy(work, processor).to(torch.bfloat16), processor)


def export_clip(out: Path, work: Path) -> None:
    """Writes `clip/`: bfloat16 weights, tokenizer, image processor."""
    for part in (clip.load_clip(work).to("cpu", torch.bfloat16), text_tokenizer(append_eos=True)):
        part.save_pretrained(out / "clip")
    clip.clip_image_processor().save_pretrained(out / "clip")


def export_detector(out: Path, work: Path, seed: int, cases: int = 600) -> None:
    """Writes `detector/`, and its card with verdicts on that many cases."""
    model = ShapeClassifier()
    load_weights(work / detector.CHECKPOINT, model)
    model.save(out / "detector")
    _write_card(
        out / "detector",
        classes=", ".join(CLASSES),
        seed=seed,
        steps=read_progress(work / detector.CHECKPOINT)["step"],
        batch=detector.BATCH,
        threshold=CONFIDENCE,
        **evaluate_detector(
            ShapeDetector(out / "detector"), TokenizerView.load(out / "janus"), count=cases, threshold=CONFIDENCE
        ),
    )


def write_cards(out: Path, work: Path, *, repeats: int = 4) -> None:
    """Measures the models in `out` and writes their README.md; GenEval with `repeats` pictures a prompt."""
    if (out / "janus" / "config.json").exists():
        geneval = ""
        if (out / "detector").exists() and (work / language_model.CHECKPOINT).exists():
            shares = measure_geneval(out / "janus", out / "detector", repeats=repeats)
            listed = ", ".join(f"{tag} {share:.2f}" for tag, share in shares.items())
            geneval = f"\nStrict GenEval on the held-out prompts, guidance 3, {repeats} pictures a prompt: {listed}.\n"
            console.print(geneval.strip())
        _write_card(
            out / "janus",
            size=(out / "janus" / "model.safetensors").stat().st_size / 1e6,
            tokenizer=_history(work / tokenizer.CHECKPOINT),
            language_model=_history(work / language_model.CHECKPOINT),
            geneval=geneval,
            **measure_reconstruction(out / "janus"),
        )
    if (work / clip.CHECKPOINT).exists():
        model = clip.load_clip(work)
        _write_card(
            out / "clip",
            parameters=sum(p.numel() for p in model.parameters()) / 1e6,
            clip=_history(work / clip.CHECKPOINT),
            heldout=clip.retrieval_accuracy(model, "heldout"),
            train=clip.retrieval_accuracy(model, "train"),
        )


def _write_card(model: Path, **figures: object) -> None:
    template = (TEMPLATES / f"{model.name}.md").read_text(encoding="utf-8")
    (model / "README.md").write_text(template.format(**figures), encoding="utf-8")


def _history(checkpoint: Path) -> str:
    """`4800 steps in 24 minutes, loss 1.35 at first, 0.10 at the end` (mean of the last ten reports)."""
    if not checkpoint.exists():
        return "not trained"
    progress = read_progress(checkpoint)
    losses = [row["loss"] for row in progress["history"]]
    last, minutes = float(np.mean(losses[-10:])), progress["elapsed_s"] / 60
    return f"{progress['step']} steps in {minutes:.0f} minutes, loss {losses[0]:.2f} at first, {last:.2f} at the end"


@torch.inference_mode()
def draw(path: Path, prompts: Sequence[str], guidance_scale: float, seed: int = 0, batch: int = 100) -> np.ndarray:
    """One picture a prompt, uint8 [B, 64, 64, 3], by transformers' own `generate` in float32."""
    processor = JanusProcessor.from_pretrained(path)
    model = JanusForConditionalGeneration.from_pretrained(path, dtype=torch.float32).to(device()).eval()
    torch.manual_seed(seed)
    tokens = []
    for start in range(0, len(prompts), batch):
        texts = [chat(processor, prompt) for prompt in prompts[start : start + batch]]
        inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt").to(device())
        options = {"generation_mode": "image", "do_sample": True, "guidance_scale": guidance_scale, "use_cache": True}
        tokens.append(model.generate(**inputs, **options).cpu())
    return TokenizerView(model.cpu().model.vqmodel).decode(torch.cat(tokens))


def measure_geneval(path: Path, detector_dir: Path, repeats: int = 4) -> dict[str, float]:
    """Share of strictly correct pictures by held-out task, and `overall`: the tasks' mean, as GenEval counts."""
    records = heldout_prompts() * repeats
    found = ShapeDetector(detector_dir).detect(draw(path, [record["prompt"] for record in records], 3.0))
    verdicts: dict[str, list[bool]] = {}
    for record, detections in zip(records, found, strict=True):
        verdicts.setdefault(record["tag"], []).append(is_correct(record, detections, CONFIDENCE))
    shares = {tag: float(np.mean(answers)) for tag, answers in verdicts.items()}
    return {**shares, "overall": float(np.mean(list(shares.values())))}


def measure_reconstruction(path: Path, count: int = 256, seed: int = 11) -> dict[str, float]:
    """Mean absolute error of the tokenizer's reconstructions on random scenes, in grey levels of 255, over all pixels
    and over objects alone, and how many codes `count` pictures use."""
    view, rng = TokenizerView.load(path), np.random.default_rng(seed)
    images, masks = zip(*(render_with_masks(random_scene(rng)) for _ in range(count)), strict=True)
    objects = np.stack([mask.max(axis=0) for mask in masks]) > 0.5
    tokens = view.encode(np.stack(images))
    error = np.abs(view.decode(tokens).astype(np.float32) - np.stack(images)).mean(axis=-1)
    return {
        "error_all": float(error.mean()),
        "error_objects": float(error[objects].mean()),
        "codes_used": float(tokens.unique().numel()),
    }
