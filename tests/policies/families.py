"""Small models of every family, with random weights: a new family is one more row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stage_ray.cli import main
from stage_ray.config import PolicyConfig
from stage_ray.config.lora import LINEAR
from stage_ray.policies import load_policy
from stage_ray.policies.base import Policy
from tests import class_conditional, learner_case
from tests.policies import emu3, llamagen
from tests.tiny import tiny_janus


@dataclass(frozen=True, slots=True)
class Family:
    """What a test has to know of a family."""

    name: str  # policy.family
    texts: tuple[str, ...]  # prompts, of several lengths where the family has such
    write: Callable[[Path], Path]  # a checkpoint into a new directory; logits are far from flat
    is_trained: Callable[[str], bool]  # whether a tensor is, by its name in the checkpoint's file
    processes: int = 1  # of vLLM's engine in a run
    recomputes: bool = True  # activations, by learner.gradient_checkpointing
    linear: tuple[str, ...] = LINEAR  # linear maps of a layer, which get adapters

    def config(self, path: Path, **changes: Any) -> PolicyConfig:
        return PolicyConfig.model_validate({"path": str(path), "family": self.name, **changes})

    def policy(self, path: Path, **changes: Any) -> Policy:
        return load_policy(self.config(path, **changes), device=torch.device("cpu"))


def _converted(condition: str) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        source = directory.with_name(f"{directory.name}, published")
        llamagen.publish(source, condition)
        assert main(["convert", str(source), str(directory)]) == 0
        return directory

    return write


def _is_llamagens(name: str) -> bool:
    return not name.startswith("vq.") and name != "unconditional"


FAMILIES = {
    "janus": Family("janus", learner_case.PROMPTS, tiny_janus, lambda name: name.startswith("model.language_model.")),
    "dotted path": Family(
        class_conditional.FAMILY,
        ("ostrich", "2", "goldfish", "great white shark"),  # one by its number
        class_conditional.class_checkpoint,
        lambda name: not name.startswith("vq."),
        recomputes=False,
        linear=("qkv", "out", "down"),
    ),
    "llamagen, classes": Family("llamagen", llamagen.TEXTS["class"], _converted("class"), _is_llamagens),
    "llamagen, captions": Family("llamagen", llamagen.TEXTS["text"], _converted("text"), _is_llamagens, processes=2),
    "emu3": Family("emu3", emu3.TEXTS, emu3.tiny_emu3, lambda name: name.startswith("text_model.model."), processes=2),
}
BUT_JANUS = [name for name in FAMILIES if name != "janus"]  # tests/engines and tests/learner hold it to more


def moved(path: Path, to: Path, family: Family) -> Path:
    """The same model at other trained weights."""
    policy = family.policy(path)
    learner_case.move_weights(policy)
    policy.save(to)
    return to


def drawn(family: Family, path: Path) -> tuple[list[Any], list[Any]]:
    """Groups of four images that the checkpoint drew for two prompts, the same on every rank, and their scores."""
    groups = learner_case.sample_groups(family.policy(path), family.texts[:2], 4)
    return groups, learner_case.score(groups)
