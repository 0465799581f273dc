"""From working files to what ships: directories that plain transformers loads, with a model card that says how each
was made and how good it is."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from stage_ray.shapeworld.grammar import heldout_prompts, training_prompts
from stage_ray.shapeworld.pretrain.clip import clip_image_processor, clip_tokenizer, load_clip, retrieval_accuracy
from stage_ray.shapeworld.pretrain.language_model import initial_policy, load_policy
from stage_ray.shapeworld.pretrain.loop import console
from stage_ray.shapeworld.pretrain.measure import base_geneval, reconstruction
from stage_ray.shapeworld.pretrain.policy_files import janus_processor, save_janus

JANUS_CARD = """# ShapeWorld Janus

A {size:.1f} MB image model with the architecture and file layout of Janus-Pro: a language model of 2.7 M parameters
writes 64 tokens, a `JanusVQVAE` of 1.15 M decodes them to a 64x64 picture. `JanusForConditionalGeneration` loads it,
`JanusProcessor` prepares its prompts ("a photo of a red ring and a blue square"), guidance about 3 suits it.

Made by `stage-ray pretrain` from rendered scenes alone; no outside data. The vision tower exists so that transformers
loads the model; it is untrained, and so is everything that reads pictures into text.

| stage | training |
|---|---|
| tokenizer | {tokenizer} |
| language model | {language_model} |

Tokenizer: mean absolute error {error_all:.1f} of 255 over all pixels, {error_objects:.1f} on objects; {codes_used:.0f}
of 512 codes in use over 256 pictures.
{geneval}
Known weaknesses: small objects lose their corners, paper tints drift, outlines of sampled shapes wobble; words outside
the grammar of `stage_ray.shapeworld.grammar` are unknown to it.
"""

CLIP_CARD = """# ShapeWorld CLIP

A `CLIPModel` of {parameters:.2f} M parameters for 64x64 ShapeWorld pictures and captions: a *learned* reward, and so
one that a policy can learn to please without drawing what was asked.

Made by `stage-ray pretrain` on training-split captions and fresh renders: {clip}.

Finds a picture's caption among 64: {heldout:.1%} on held-out compositions, {train:.1%} on training compositions
(chance 1.6%; captions that are true of several pictures keep both below 100%). It has seen clean renders only.
"""


def write_prompts(out: Path) -> None:
    """Writes `prompts/train.jsonl` and `prompts/heldout.jsonl`, one GenEval record a line."""
    folder = out / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", training_prompts()), ("heldout", heldout_prompts())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def export_janus(out: Path, work: Path) -> None:
    """Writes `janus/` from the working files; the policy in it is untrained while only the tokenizer is trained."""
    processor = janus_processor()
    trained = (work / "policy.safetensors").exists()
    policy = load_policy(work, processor) if trained else initial_policy(work, processor)
    save_janus(policy, processor, out / "janus")


def export_clip(out: Path, work: Path) -> None:
    """Writes `clip/`: bfloat16 weights, tokenizer, image processor."""
    load_clip(work).to("cpu", torch.bfloat16).save_pretrained(out / "clip")
    clip_tokenizer().save_pretrained(out / "clip")
    clip_image_processor().save_pretrained(out / "clip")


def _history(work: Path, stage: str) -> str:
    """`4800 steps in 24 minutes, loss 1.35 at first, 0.10 at the end (mean of the last ten reports)`."""
    path = work / f"{stage}-training.safetensors"
    if not path.exists():
        return "not trained"
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    losses = [row["loss"] for row in progress["history"]]
    last = sum(losses[-10:]) / len(losses[-10:])
    minutes = progress["elapsed_s"] / 60
    return f"{progress['step']} steps in {minutes:.0f} minutes, loss {losses[0]:.2f} at first, {last:.2f} at the end"


def write_cards(out: Path, work: Path) -> None:
    """Measures what `out` holds and writes the README.md of each model."""
    if (out / "janus" / "config.json").exists():
        facts = reconstruction(out / "janus")
        geneval = ""
        if (out / "detector").exists() and (work / "policy.safetensors").exists():
            shares = base_geneval(out / "janus", out / "detector")
            listed = ", ".join(f"{tag} {share:.2f}" for tag, share in shares.items())
            geneval = f"\nStrict GenEval on the held-out prompts, guidance 3, four pictures a prompt: {listed}.\n"
            console.print(geneval.strip())
        size = (out / "janus" / "model.safetensors").stat().st_size / 1e6
        text = JANUS_CARD.format(
            size=size,
            tokenizer=_history(work, "tokenizer"),
            language_model=_history(work, "language-model"),
            geneval=geneval,
            **facts,
        )
        (out / "janus" / "README.md").write_text(text)
    if (work / "clip.safetensors").exists():
        model = load_clip(work)
        text = CLIP_CARD.format(
            parameters=sum(p.numel() for p in model.parameters()) / 1e6,
            clip=_history(work, "clip"),
            heldout=retrieval_accuracy(model, "heldout"),
            train=retrieval_accuracy(model, "train"),
        )
        (out / "clip" / "README.md").write_text(text)
