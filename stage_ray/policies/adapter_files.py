"""Adapters on disk, in peft's layout: ``adapter_config.json`` and ``adapter_model.safetensors``, no pickle.

Only what can be merged is read: a pair A, B for each of some linear maps. Anything else that peft can put there would
be lost without a word, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stage_ray.config import LoraConfig
from stage_ray.errors import ConfigError
from stage_ray.pretrained import ADAPTER, KEY, adapter_directory, check_finite, read_object, whole_directory

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of tensor names: peft's wrapper around the model
PARTS = (".lora_A.weight", ".lora_B.weight")
# What an adapter may set: the rest of peft's options changes the base, or adds more than two matrices.
READ = {"r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
READ |= {"lora_dropout", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"}
READ |= {"peft_version", "peft_type", "init_lora_weights"}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin, by which the base is another


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter as it was saved.

    Attributes:
        scale: what B A is multiplied with, alpha / rank.
        pairs: by module, A [rank, in] and B [out, rank].
    """

    directory: Path
    rank: int
    scale: float
    pairs: dict[str, tuple[Tensor, Tensor]]

    def delta(self, module: str) -> Tensor:
        """What merging adds to the module's weight, float32 [out, in]."""
        down, up = self.pairs[module]
        return self.scale * (up.float() @ down.float())

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the base by name, with the adapter merged in float32 where it has a pair."""
        found = dict(tensors)
        for name in self.pairs:
            found[f"{name}.weight"] = found[f"{name}.weight"].float() + self.delta(name)
        return found

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that each pair belongs to a matrix of the base, whose trained tensors have these shapes by name.

        Raises:
            ConfigError: names the first that does not.
        """
        for name, (down, up) in self.pairs.items():
            shape, own = shapes.get(f"{name}.weight"), (up.shape[0], down.shape[1])
            if shape != own:
                has = "has no trained weight of that name" if shape is None else f"has {list(shape)} there"
                raise ConfigError(
                    f"{KEY}: {self.directory}: the adapter of {name} is for a matrix {list(own)}, but its base {has}; "
                    f"correct base_model_name_or_path in {ADAPTER}"
                )

    def check_same(self, config: LoraConfig, modules: Collection[str]) -> None:
        """Check that it can be trained further under ``policy.lora``, which puts adapters on ``modules``.

        Raises:
            ConfigError: names what differs.
        """
        differing = {
            "rank": (self.rank, config.rank),
            "alpha": (self.scale * self.rank, config.alpha),
        }
        for key, (own, wanted) in differing.items():
            if not math.isclose(own, wanted, rel_tol=1e-6):
                raise ConfigError(
                    f"policy.lora.{key} = {wanted:g}, but {self.directory} was trained with {own:g}; set it to that, "
                    "or policy.lora to null to train all weights of the merged model"
                )
        if other := sorted(self.pairs.keys() ^ set(modules)):
            has = "an adapter" if other[0] in self.pairs else "no adapter"
            raise ConfigError(
                f"policy.lora.target_modules = {list(config.target_modules)}, but {self.directory} has {has} of "
                f"{other[0]}; give the modules that it was trained with"
            )


def read_adapter(path: str) -> SavedAdapter | None:
    """The adapter that ``policy.path`` names; None where it names a whole checkpoint.

    Raises:
        ConfigError: a file is missing or damaged, or it holds what cannot be merged; names the key or the tensor.
    """
    directory = adapter_directory(path)
    if directory is None:
        return None
    config = read_object(directory / ADAPTER)
    _check_options(directory, config)
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1 or not isinstance(config.get("lora_alpha"), int | float):
        raise ConfigError(f"{KEY}: {directory / ADAPTER} gives no rank (r) of 1 or more, or no lora_alpha")
    file = directory / WEIGHTS
    if not file.is_file():
        raise ConfigError(f"{KEY}: {directory} has no {WEIGHTS}; only safetensors are read, a pickle may run code")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{KEY}: {file} is cut short or damaged ({error}); copy or download it again") from error
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return SavedAdapter(directory, rank, scale, _pairs(file, tensors, rank))


def write_adapter(
    directory: Path, config: PeftConfig, pairs: Mapping[str, tuple[Tensor, Tensor]], texts: Mapping[str, str]
) -> None:
    """Write adapters by module, whole or not at all, with what peft needs to load them, and further files ``texts``."""
    tensors = {f"{PREFIX}{name}{part}": t for name, pair in pairs.items() for part, t in zip(PARTS, pair, strict=True)}
    with whole_directory(directory) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(partial))
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")


def _check_options(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than pairs A, B beside the base's own weights."""
    from peft import LoraConfig as PeftConfig  # late: it takes seconds

    plain = PeftConfig().to_dict()
    wrong = [key for key, value in config.items() if key not in READ and value and value != plain.get(key)]
    if config.get("peft_type") != "LORA":
        wrong.insert(0, "peft_type")
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        wrong.append("init_lora_weights")
    if wrong:
        raise ConfigError(
            f"{KEY}: {directory / ADAPTER}: {wrong[0]} = {config.get(wrong[0])!r} is not read here, LoRA's plain pairs "
            "of matrices are; merge it with peft's merge_and_unload, save that, and name its directory"
        )


def _pairs(file: Path, tensors: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Both matrices of each module, in the rank that the config gives."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = next((part for part in PARTS if name.endswith(part)), None)
        if part is None or not name.startswith(PREFIX) or tensor.dim() != 2:
            raise ConfigError(f"{KEY}: {file}: tensor {name} is no matrix of a pair A, B, and is not read here")
        check_finite(name, tensor, file)
        given = tensor.shape[PARTS.index(part)]
        if given != rank:
            raise ConfigError(f"{KEY}: {file}: tensor {name} has rank {given}, but {ADAPTER} says r = {rank}")
        found.setdefault(name.removeprefix(PREFIX).removesuffix(part), {})[part] = tensor.to(torch.float32)
    if lacking := next((name for name, parts in found.items() if len(parts) < len(PARTS)), None):
        raise ConfigError(f"{KEY}: {file}: {lacking} has only one of A and B; copy or download it again")
    if not found:
        raise ConfigError(f"{KEY}: {file} holds no adapter")
    return {name: (parts[PARTS[0]], parts[PARTS[1]]) for name, parts in found.items()}
