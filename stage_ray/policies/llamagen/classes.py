"""Classes by number or name: a prompt of a class-conditional model is either, also in a sentence around a name."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

IMAGENET = Path(__file__).with_name("imagenet.txt")
SENTENCE = re.compile(r"(?:an? (?:photo|picture|image) of )?(?:an?|the) (.+)", re.IGNORECASE)


class ClassNames:
    """Numbers of classes by their names, upper and lower case alike.

    All names of a class together are its surest name, then its first one, then the others. A name that two classes
    share (ImageNet has two kinds of crane) is none of them.
    """

    def __init__(self, classes: Sequence[str], count: int) -> None:
        """``classes``: in order, each with its names separated by ", "; those without names are known by number."""
        self.count, self.classes = count, tuple(classes)
        whole, first, other = (defaultdict[str, set[int]](set) for _ in range(3))
        for number, line in enumerate(self.classes):
            whole[line.lower()].add(number)
            for place, name in enumerate(line.lower().split(", ")):
                (other if place else first)[name].add(number)
        self._numbers = {name: min(found) for name, found in (other | first | whole).items() if len(found) == 1}

    def number(self, text: str) -> int:
        """The class that a prompt asks for: its number, its name, or "a photo of a NAME".

        Raises:
            ValueError: there is none of that number or name.
        """
        asked = text.strip()
        if asked.isdecimal():
            if int(asked) < self.count:
                return int(asked)
            raise ValueError(f"{asked} is no class; they are numbered 0 to {self.count - 1}")
        for name in (asked, match[1] if (match := SENTENCE.fullmatch(asked.rstrip("."))) else asked):
            if (found := self._numbers.get(name.lower())) is not None:
                return found
        near = difflib.get_close_matches(asked.lower(), self._numbers, n=1)
        hint = f"did you mean {near[0]!r}, or " if near else ""
        raise ValueError(f"{asked[:80]!r} is no class of one meaning; {hint}give its number, 0 to {self.count - 1}")


@cache
def imagenet() -> tuple[str, ...]:
    """ImageNet's 1,000 classes (ILSVRC 2012), by number: WordNet's names of each, separated by ", "."""
    return tuple(IMAGENET.read_text(encoding="utf-8").splitlines())
