"""Prompt files, and the order in which prompts are drawn: fixed by the run's seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from stage_ray.records import Prompt


def load_prompts(location: str) -> list[Prompt]:
    """Read a prompt file: JSON Lines with at least ``prompt`` (``.jsonl``), or plain text, one prompt a line.

    Raises:
        ConfigError: missing, empty or malformed file; names the line.
    """
    path = resolve_path(location)
    if not path.is_file():
        raise ConfigError(f"prompt file {location} is not a file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt file {location} is not UTF-8 text: {error.reason}") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = {"prompt": line.strip()}
        if path.suffix in {".jsonl", ".json"}:
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not a JSON object ({error.msg})") from error
            text = record.get("prompt") if isinstance(record, dict) else None
            if not isinstance(text, str) or not text.strip():
                example = '{"prompt": "a photo of a circle"}'
                raise ConfigError(f'{path}, line {number}: needs a non-empty "prompt", for example {example}')
        prompts.append(Prompt(len(prompts), record["prompt"], record))
    if not prompts:
        raise ConfigError(f"prompt file {location} holds no prompts; give it at least one line")
    return prompts


@dataclass(slots=True)
class PromptCursor:
    """Draws prompts for ever, a new order each epoch. ``position`` alone is its state, so resuming is exact."""

    prompts: list[Prompt]
    seed: int
    shuffle: bool = True
    position: int = 0
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)

    def draw(self) -> Prompt:
        """The next prompt."""
        epoch, offset = divmod(self.position, len(self.prompts))
        if self._order[0] != epoch:
            order = list(range(len(self.prompts)))
            if self.shuffle:
                random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        self.position += 1
        return self.prompts[self._order[1][offset]]
