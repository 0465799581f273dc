"""Builds everything ShapeWorld ships, from nothing but this package: about 80 minutes on two cores.

`stage-ray pretrain --out DIR`. Each stage can be run alone and goes on where it stopped: its checkpoint lies in
`DIR/work`, what ships in `DIR/{prompts,janus,detector,clip,features}`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open

from stage_ray.errors import ConfigError
from stage_ray.files import atomic_write
from stage_ray.policies.janus.builder import write_checkpoint
from stage_ray.shapeworld.grammar import Split, binding_prompts, prompts
from stage_ray.shapeworld.pretrain import tokenizer
from stage_ray.shapeworld.pretrain.clip import train_clip
from stage_ray.shapeworld.pretrain.detector import train_detector
from stage_ray.shapeworld.pretrain.features import train_features, write_features_card
from stage_ray.shapeworld.pretrain.language_model import janus_processor, load_policy, train_language_model
from stage_ray.shapeworld.pretrain.loop import Budget, console
from stage_ray.shapeworld.pretrain.measure import write_cards, write_detector_card

BUDGETS = {
    "tokenizer": Budget(steps=6000),
    "language-model": Budget(steps=6000),
    "detector": Budget(steps=1200),
    "clip": Budget(steps=1200),
    "features": Budget(steps=4000),
}
STAGES = ("prompts", "tokenizer", "language-model", "detector", "clip", "features", "cards")
RESULTS = ("work", "prompts", "janus", "detector", "clip", "features")  # the directories that it writes
# Stage -> a file that the tokenizer's stage leaves.
NEEDS = {
    "language-model": tokenizer.CHECKPOINT,
    "detector": "janus/model.safetensors",
    "features": "janus/model.safetensors",
}
PICTURES, DETECTOR_PICTURES = 64_000, 4096  # captioned scenes for the language model; pictures for the detector
FEATURE_PICTURES = 6144
SMOKE_STEPS, SMOKE_PICTURES = 2, 64


def pretrain(out: Path, *, stages: Sequence[str] | None = None, seed: int = 0, smoke: bool = False) -> None:
    """Run `stages` (all of `STAGES` by default, always in that order) and write their results under `out`.

    `smoke` runs a few steps of each, to show that the machinery works; the models are then useless.

    Raises:
        ValueError: a stage has another name.
        ConfigError: of `check`; nothing was begun.
    """
    stages = stages or STAGES
    if unknown := set(stages) - set(STAGES):
        raise ValueError(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    check(out, stages)
    budgets = dict.fromkeys(BUDGETS, Budget(SMOKE_STEPS)) if smoke else BUDGETS
    for stage in (stage for stage in STAGES if stage in stages):
        console.print(f"[bold]{stage}[/bold]")
        match stage:
            case "prompts":  # one record a line
                files = {split: prompts(split) for split in get_args(Split)} | {"binding": binding_prompts()}
                for name, records in files.items():
                    lines = [json.dumps(record) + "\n" for record in records]
                    atomic_write(out / "prompts" / f"{name}.jsonl", "".join(lines))
            case "tokenizer" | "language-model":  # the tokenizer ships inside the policy, untrained at first
                if stage == "tokenizer":
                    tokenizer.train_tokenizer(out, budgets[stage], seed)
                else:
                    train_language_model(out, budgets[stage], SMOKE_PICTURES if smoke else PICTURES, seed)
                write_checkpoint(out / "janus", load_policy(out).to(torch.bfloat16), janus_processor())
            case "detector":
                train_detector(out, budgets[stage], SMOKE_PICTURES if smoke else DETECTOR_PICTURES, seed)
                write_detector_card(out, seed, count=12 if smoke else 600)
            case "clip":
                train_clip(out, budgets[stage], seed)
            case "features":
                train_features(out, budgets[stage], SMOKE_PICTURES if smoke else FEATURE_PICTURES, seed)
                write_features_card(out, count=16 if smoke else 512)
            case "cards":
                write_cards(out, *(16, 1, 16) if smoke else (256, 16, 1))


def check(out: Path, stages: Sequence[str]) -> None:
    """Check that these stages can begin.

    Raises:
        ConfigError: `out` holds something else or cannot be written, a stage lacks what an earlier one makes, or a
            checkpoint is damaged.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a directory")
    if out.exists() and any(out.iterdir()) and not any((out / name).exists() for name in RESULTS):
        raise ConfigError(f"--out {out} is not empty and holds nothing of a pretraining; name another")
    for stage, file in NEEDS.items():
        if stage in stages and "tokenizer" not in stages and not (out / file).is_file():
            raise ConfigError(f"--stage {stage} needs {out / file}; add --stage tokenizer, which makes it")
    for checkpoint in sorted((out / "work/training").glob("*.safetensors")):
        try:
            with safe_open(checkpoint, "pt") as opened:
                whole = "progress" in (opened.metadata() or {})
        except (SafetensorError, OSError):
            whole = False
        if not whole:
            raise ConfigError(f"--out {out}: {checkpoint} is damaged; remove it, and its stage begins anew")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for directory in (out, *(out / name for name in RESULTS if (out / name).exists())):
            with tempfile.TemporaryFile(dir=directory):
                pass
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}; name another") from error
