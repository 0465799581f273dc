"""The order in which prompts are drawn: fixed by the run's seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from stage_ray.records import Prompt


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
