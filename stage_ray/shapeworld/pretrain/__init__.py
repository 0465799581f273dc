"""Builds everything ShapeWorld ships, from nothing but this package: about 80 minutes on two cores.

`stage-ray pretrain --out DIR`. Each stage can be run alone and goes on where it stopped; its working files lie in
`DIR/work`, what ships in `DIR/{prompts,janus,detector,clip}`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stage_ray.shapeworld.pretrain.clip import train_clip
from stage_ray.shapeworld.pretrain.detector import train_detector
from stage_ray.shapeworld.pretrain.export import export_clip, export_detector, export_janus, write_cards, write_prompts
from stage_ray.shapeworld.pretrain.language_model import train_language_model
from stage_ray.shapeworld.pretrain.loop import Budget, console
from stage_ray.shapeworld.pretrain.tokenizer import train_tokenizer
from stage_ray.shapeworld.pretrain.tokenizer_view import TokenizerView

# Steps, or minutes of wall clock if those pass first.
BUDGETS = {
    "tokenizer": Budget(steps=3600, seconds=24 * 60),
    "language-model": Budget(steps=4400, seconds=40 * 60),
    "detector": Budget(steps=1200),
    "clip": Budget(steps=1200, seconds=10 * 60),
}
STAGES = ("prompts", "tokenizer", "language-model", "detector", "clip", "cards")
PICTURES = 56_000  # captioned scenes that the language model sees
DETECTOR_PICTURES = 4096
SMOKE_STEPS, SMOKE_PICTURES, SMOKE_CASES = 2, 64, 12


def pretrain(out: Path, *, stages: Sequence[str] | None = None, seed: int = 0, smoke: bool = False) -> None:
    """Runs `stages` (all of `STAGES` by default, always in that order) and writes their results under `out`.

    `smoke` runs a few steps of each, to show that the machinery works; the models are then useless.

    Raises:
        ValueError: a stage has another name.
    """
    if unknown := set(stages or ()) - set(STAGES):
        raise ValueError(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    budgets = dict.fromkeys(BUDGETS, Budget(SMOKE_STEPS)) if smoke else BUDGETS

    def tokenizer() -> None:
        train_tokenizer(work, budgets["tokenizer"], seed)
        export_janus(out, work)

    def language_model() -> None:
        pictures = SMOKE_PICTURES if smoke else PICTURES
        train_language_model(out / "janus", work, budgets["language-model"], pictures, seed)
        export_janus(out, work)

    def detector() -> None:
        pictures = SMOKE_PICTURES if smoke else DETECTOR_PICTURES
        train_detector(work, TokenizerView.load(out / "janus"), budgets["detector"], pictures, seed)
        export_detector(out, work, seed, **({"cases": SMOKE_CASES} if smoke else {}))

    def clip() -> None:
        train_clip(work, budgets["clip"], seed)
        export_clip(out, work)

    actions: dict[str, Callable[[], None]] = {
        "prompts": lambda: write_prompts(out),
        "tokenizer": tokenizer,
        "language-model": language_model,
        "detector": detector,
        "clip": clip,
        "cards": lambda: write_cards(out, work, repeats=1 if smoke else 4),
    }
    for stage in STAGES:
        if stages is None or stage in stages:
            console.print(f"[bold]{stage}[/bold]")
            actions[stage]()
