"""LoRA (Hu et al. 2021, arXiv 2106.09685): W + s B A in the place of frozen matrices W, of which A and B are trained.

peft puts its layers into a policy, and its layout is what is saved (`stage_ray.policies.adapter_files`). With them off
the policy is its base: the reference of a run, which so needs no second model. Engines get merged weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from stage_ray.config import LoraConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.adapter_files import SavedAdapter, write_adapter

if TYPE_CHECKING:
    from stage_ray.policies.backbone import Backbone
    from stage_ray.policies.base import Policy

KEY = "policy.lora.target_modules"
NAME = "default"  # of the one adapter that each of peft's layers has, and in names of its parameters

Gather = Callable[[Tensor], Tensor]
"""From a parameter, which may be this rank's shard, to the whole tensor."""


class LowRank(NamedTuple):
    """The adapter of one linear map: ``down`` is A [r, in], ``up`` is B [out, r]; ``up(down(x))`` times ``scale``."""

    down: nn.Linear
    up: nn.Linear
    scale: float


def base_linear(linear: Any) -> nn.Linear:
    """The frozen map under an adapter, or the map itself."""
    base: Any = getattr(linear, "base_layer", None)
    return linear if base is None else base


def low_rank(linear: nn.Module) -> LowRank | None:
    """The adapter of a linear map; None where it has none, or where that is off."""
    layer: Any = linear
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return None
    return LowRank(layer.lora_A[NAME], layer.lora_B[NAME], layer.scaling[NAME])


def merged_weight(linear: nn.Module) -> Tensor:
    """The matrix of a linear map with its adapter, if there is one, merged in float32: [out, in] in its own dtype."""
    weight, adapter = base_linear(linear).weight, low_rank(linear)
    return weight if adapter is None else (weight.float() + _product(adapter)).to(weight.dtype)


def _product(adapter: LowRank, gather: Gather = lambda tensor: tensor) -> Tensor:
    """What merging adds to a matrix, s B A, float32 [out, in]."""
    return adapter.scale * (gather(adapter.up.weight).float() @ gather(adapter.down.weight).float())


class Adapters:
    """The adapters of a policy, in its modules already; its other parameters are frozen.

    Invariant: nothing here changes the base. A is random and B is 0 at first, so that the policy is its base exactly.
    """

    def __init__(self, policy: Policy, config: LoraConfig) -> None:
        """Put them in; A is drawn from torch's generator.

        Raises:
            ConfigError: no layer has a linear map of a name in ``target_modules``.
        """
        from peft import LoraConfig as PeftConfig  # late: it takes seconds
        from peft import inject_adapter_in_model

        self.config, self._policy = config, policy
        layers = _layer_names(policy)
        check_targets(config, (name for layer, prefix in layers for name in _linear_names(layer, prefix)))
        # By whole names: a list of last parts, as users give it, would also match modules that `policy` has dropped.
        parents = "|".join(sorted({re.escape(prefix.rpartition(".")[0]) for _, prefix in layers}))
        names = "|".join(map(re.escape, config.target_modules))
        alpha: Any = int(config.alpha) if config.alpha.is_integer() else config.alpha  # peft's type is int
        self._peft = PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=rf"({parents})\.\d+\.(.+\.)?({names})")
        inject_adapter_in_model(self._peft, policy.model)
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        self._layers = {name: module for name, module in policy.model.named_modules() if hasattr(module, "lora_A")}

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every adapter by name, all that is trained."""
        named = self._policy.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under the trained prefix as they are without adapters, by the checkpoint's names."""
        for name, parameter in self._policy.model.named_parameters():
            if name.startswith(self._policy.trained_prefix) and ".lora_" not in name:
                yield name.replace(".base_layer.", "."), parameter

    @torch.no_grad()
    def load(self, saved: SavedAdapter) -> None:
        """Go on from saved adapters.

        Raises:
            ConfigError: they are of another rank or scale, or of other modules; names both.
        """
        saved.check_same(self.config, self._layers)
        for name, layer in self._layers.items():
            adapter = _adapter(layer)
            for parameter, tensor in zip((adapter.down.weight, adapter.up.weight), saved.pairs[name], strict=True):
                parameter.copy_(tensor)

    @torch.no_grad()
    def deltas(self, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        """What merging adds to each matrix, s B A, float32 [out, in], one at a time, by the checkpoint's names.

        Every rank must take all.
        """
        for name, layer in self._layers.items():
            yield f"{name}.weight", _product(_adapter(layer), gather)

    @torch.no_grad()
    def merged(self, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        """All that a policy without adapters would train, merged in float32, one at a time, by the checkpoint's names.

        Every rank must take all.
        """
        for name, parameter in self.base_parameters():
            value = gather(parameter.detach()).float()
            layer = self._layers.get(name.removesuffix(".weight"))
            yield name, value if layer is None else value + _product(_adapter(layer), gather)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the policy be its base meanwhile."""
        self._switch(off=True)
        try:
            yield
        finally:
            self._switch(off=False)

    def without(self) -> Policy:
        """The same policy with its adapters off; no parameter is copied."""
        base = copy.copy(self._policy)
        base.backbone = _WithoutAdapters(self._policy.backbone, self)  # type: ignore[assignment]
        return base

    def save(self, directory: Path, base: str, revision: str | None, gather: Gather, *, keep: bool) -> None:
        """Write them in peft's layout; every rank must call it, one is to ``keep``.

        ``base`` is the directory of their model, or its id in a hub, where it has a ``revision``.
        """
        pairs = {}
        for name, layer in self._layers.items():
            adapter = _adapter(layer)
            found = gather(adapter.down.weight.detach()).cpu(), gather(adapter.up.weight.detach()).cpu()
            if keep:
                pairs[name] = found
        if keep:
            self._peft.base_model_name_or_path, self._peft.revision = base, revision
            write_adapter(directory, self._peft, pairs, self._policy.codec.texts())

    def _switch(self, *, off: bool) -> None:
        # peft's `enable_adapters` would also set `requires_grad`, of which copies that FSDP gathered know nothing.
        for layer in self._layers.values():
            layer._disable_adapters = off


def _adapter(layer: nn.Module) -> LowRank:
    """What is on a layer of peft."""
    adapter = low_rank(layer)
    assert adapter is not None, "adapters are off only while the reference runs"
    return adapter


class _WithoutAdapters:
    """A backbone whose adapters are off while it predicts."""

    def __init__(self, backbone: Backbone, adapters: Adapters) -> None:
        self._backbone, self._adapters = backbone, adapters

    def predict(self, *arguments: Any) -> Tensor:
        """See `Backbone.predict`."""
        with self._adapters.off():
            return self._backbone.predict(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)


def check_targets(config: LoraConfig, linear_maps: Iterable[str]) -> None:
    """Check names of ``target_modules`` against the linear maps of the decoder's layers.

    Raises:
        ConfigError: there is no such map; says which there are.
    """
    there = sorted({name.rpartition(".")[2] for name in linear_maps})
    for target in config.target_modules:
        if target not in there:
            raise ConfigError(
                f"{KEY}: the decoder's layers have no linear map {target!r}; there are {', '.join(there)}"
            )


@torch.no_grad()
def merge(policy: Policy, saved: SavedAdapter) -> None:
    """Merge saved adapters into a policy's weights, in float32, rounded to its dtype at last.

    Raises:
        ConfigError: they are of another model.
    """
    weights = policy.trained_parameters()
    saved.check_fits({name: tuple(parameter.shape) for name, parameter in weights.items()})
    for name in saved.pairs:
        weight = weights[f"{name}.weight"]
        weight.copy_(weight.float() + saved.delta(name).to(weight.device))


def _layer_names(policy: Policy) -> list[tuple[nn.Module, str]]:
    """The decoder's layers, each with its name in the whole model."""
    names = {module: name for name, module in policy.model.named_modules()}
    return [(layer, names[layer]) for layer in policy.backbone.layers]


def _linear_names(layer: nn.Module, prefix: str) -> list[str]:
    return [f"{prefix}.{name}" for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
