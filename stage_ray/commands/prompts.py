"""``stage-ray prompts``: what a prompt file holds, or a set that is made here, as JSON Lines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def prompts(
    location: Annotated[str, Argument(help="As prompts.train: a file, hf://..., geneval:test, geneval:train[:COUNT]")],
    out: Annotated[
        Path | None, Option(help="Write them here, JSON Lines, a prompt a line with all that it has")
    ] = None,
) -> None:
    """Read prompts as a run would, say what they are, and write them as JSON Lines.

    Example: stage-ray prompts geneval:test --out geneval.jsonl
    """
    from stage_ray.files import atomic_write
    from stage_ray.pipeline.prompt_files import load_prompts

    found = load_prompts(location)
    print(f"{len(found)} prompts, {len({prompt.text for prompt in found})} different; the first: {found[0].text}")
    tasks = Counter(str(prompt.record.get("tag") or prompt.record.get("task_type") or "") for prompt in found)
    if set(tasks) != {""}:
        print(", ".join(f"{name or 'without a tag'} {count}" for name, count in tasks.most_common()))
    if out is not None:
        atomic_write(out, "".join(json.dumps(prompt.record, default=str) + "\n" for prompt in found))
        print(f"written to {out}")
