"""Builds everything ShapeWorld ships, from nothing but this package: about 80 minutes on two cores.

`stage-ray pretrain --out DIR` or `python -m stage_ray.shapeworld.pretrain --out DIR`. Each stage can be run alone and
goes on where it stopped; what it works on lies in `DIR/work`, what ships in `DIR/{prompts,janus,detector,clip}`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stage_ray.shapeworld import detector_training
from stage_ray.shapeworld.pretrain.clip import train_clip
from stage_ray.shapeworld.pretrain.export import export_clip, export_janus, write_cards, write_prompts
from stage_ray.shapeworld.pretrain.language_model import train_language_model
from stage_ray.shapeworld.pretrain.loop import Budget, console
from stage_ray.shapeworld.pretrain.policy_files import janus_processor
from stage_ray.shapeworld.pretrain.tokenizer import train_tokenizer

STAGES = ("prompts", "tokenizer", "language-model", "detector", "clip", "cards")

# Steps, or minutes of wall clock if those pass first.
BUDGETS = {
    "tokenizer": Budget(steps=3600, seconds=24 * 60),
    "language-model": Budget(steps=4400, seconds=40 * 60),
    "clip": Budget(steps=1200, seconds=10 * 60),
}
PICTURES = 56_000  # captioned scenes that the language model sees
SMOKE_STEPS, SMOKE_PICTURES = 3, 64


def pretrain(out: Path, *, stages: Sequence[str] | None = None, seed: int = 0, smoke: bool = False) -> None:
    """Runs `stages` (all of `STAGES` by default, always in that order) and writes their results under `out`.

    `smoke` runs a few steps of each, to show that the machinery works; the models are then useless and the detector
    stage, which has no short form, is left out.

    Raises:
        ValueError: a stage has another name.
    """
    if unknown := set(stages or ()) - set(STAGES):
        raise ValueError(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)

    def budget(stage: str) -> Budget:
        return Budget(SMOKE_STEPS) if smoke else BUDGETS[stage]

    def tokenizer() -> None:
        train_tokenizer(work, budget("tokenizer"), seed)
        export_janus(out, work)

    def language_model() -> None:
        pictures = SMOKE_PICTURES if smoke else PICTURES
        train_language_model(work, janus_processor(), budget("language-model"), pictures, seed)
        export_janus(out, work)

    def clip() -> None:
        train_clip(work, budget("clip"), seed)
        export_clip(out, work)

    def detector() -> None:
        if not smoke:
            detector_training.train(out / "detector", out / "janus", seed=seed)

    actions: dict[str, Callable[[], None]] = {
        "prompts": lambda: write_prompts(out),
        "tokenizer": tokenizer,
        "language-model": language_model,
        "detector": detector,
        "clip": clip,
        "cards": lambda: write_cards(out, work),
    }
    for stage in STAGES:
        if stages is None or stage in stages:
            console.print(f"[bold]{stage}[/bold]")
            actions[stage]()
