"""The order in which prompts are drawn: fixed by the run's seed and the weights of the files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

from stage_ray.records import Prompt


@dataclass(slots=True)
class PromptCursor:
    """Draws prompts for ever, a new order each epoch. ``position`` alone is its state, so resuming is exact.

    Each file has epochs of its own. The next prompt is of the file that is furthest behind its share, the first of
    equals: so n draws hold as many of each as its weight says, to within a few prompts, and every update sees the mix.
    """

    prompts: InitVar[Sequence[Prompt]]
    seed: int
    shuffle: bool = True
    position: int = 0
    weights: Sequence[float] = (1.0,)  # of the files, by `Prompt.source`
    _files: list[_File] = field(init=False, repr=False)

    def __post_init__(self, prompts: Sequence[Prompt]) -> None:
        files = [[prompt for prompt in prompts if prompt.source == source] for source in range(len(self.weights))]
        self._files = [_File(own, f":{source}" if source else "") for source, own in enumerate(files)]
        for done in range(self.position):
            self._next(done).drawn += 1

    def draw(self) -> Prompt:
        """The next prompt."""
        file = self._next(self.position)
        self.position += 1
        return file.draw(self.seed, self.shuffle)

    def _next(self, done: int) -> _File:
        """The file of the next prompt, after ``done``."""
        total = sum(self.weights)
        behind = [
            weight / total * (done + 1) - file.drawn for weight, file in zip(self.weights, self._files, strict=True)
        ]
        return self._files[behind.index(max(behind))]


@dataclass(slots=True)
class _File:
    """The prompts of a file, and how many were drawn of it."""

    prompts: list[Prompt]
    name: str  # so that two files are not shuffled alike
    drawn: int = 0
    order: tuple[int, list[int]] = (-1, [])

    def draw(self, seed: int, shuffle: bool) -> Prompt:
        epoch, offset = divmod(self.drawn, len(self.prompts))
        if self.order[0] != epoch:
            order = list(range(len(self.prompts)))
            if shuffle:
                random.Random(f"{seed}:{epoch}{self.name}").shuffle(order)
            self.order = (epoch, order)
        self.drawn += 1
        return self.prompts[self.order[1][offset]]
