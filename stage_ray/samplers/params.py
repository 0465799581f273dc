"""`SamplingParams`: how tokens are drawn, a token rule included. `process_logits` gives the distribution itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stage_ray.config import RolloutConfig
from stage_ray.registry import import_dotted
from stage_ray.samplers.base import Context, TokenRule
from stage_ray.samplers.guidance import GuidanceSchedule
from stage_ray.samplers.guided import GuidedRule
from stage_ray.samplers.load import load_rule


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What happens to logits before a token is drawn; the defaults change nothing.

    Example:
        >>> SamplingParams(guidance_scale=5.0).guided
        True
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rule: TokenRule = GuidedRule()
    schedule: GuidanceSchedule = GuidanceSchedule()

    @classmethod
    def of(cls, rollout: RolloutConfig) -> SamplingParams:
        """The parameters of a config's ``rollout`` section.

        Raises:
            ConfigError: of `load_rule`.
        """
        numbers = (rollout.guidance_scale, rollout.temperature, rollout.top_k, rollout.top_p)
        return cls(*numbers, load_rule(rollout), GuidanceSchedule.of(rollout))

    def dump(self) -> dict[str, Any]:
        """Plain values, from which `load` makes the same parameters in any process that can import the rule's class."""
        kind = type(self.rule)
        numbers = {name: getattr(self, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
        return numbers | {
            "rule": f"{kind.__module__}.{kind.__qualname__}",
            "options": self.rule.model_dump(mode="json"),
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> SamplingParams:
        """The parameters of `dump`."""
        numbers = dict(values)
        kind, options = import_dotted(numbers.pop("rule"), "rule"), numbers.pop("options")
        schedule = numbers.pop("schedule")
        schedule = GuidanceSchedule(**schedule | {"interval": tuple(schedule["interval"])})
        return cls(**numbers, rule=kind.model_validate(options), schedule=schedule)

    @property
    def guided(self) -> bool:
        """Whether the unconditional branch is needed at all."""
        return self.schedule.guides(self.guidance_scale)

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the conditional distribution as it is."""
        return self == SamplingParams()

    def guide(self, conditional: Tensor, unconditional: Tensor | None, context: Context) -> Tensor:
        """Classifier-free guidance ``u + w (c - u)``, w by the schedule: float32 [B, V]; c itself where it is off.

        Raises:
            ValueError: guidance without unconditional logits, or a schedule without the images' tokens.
        """
        if not self.guided:
            return conditional
        if unconditional is None:
            raise ValueError(f"guidance {self.guidance_scale} needs unconditional logits")
        if self.schedule.constant and context.guided is None:
            return unconditional + self.guidance_scale * (conditional - unconditional)
        scales = self.schedule.scales(self.guidance_scale, context).unsqueeze(-1)  # [B, 1]
        guided = unconditional + scales * (conditional - unconditional)
        return torch.where(scales == 1, conditional, guided)  # to the bit

    def truncate(self, logits: Tensor) -> Tensor:
        """Top-k, then top-p: logits [B, V] with minus infinity for what they leave out."""
        if 0 < self.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1.0:
            logits = keep_top_p(logits, self.top_p)
        return logits


def process_logits(
    conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context | None = None
) -> Tensor:
    """Logits of the distribution that is sampled, float32 [B, V]; minus infinity for what top-k and top-p leave out.

    Args:
        conditional, unconditional: logits [B, V], any float dtype; the latter may be None where ``params.guided`` is
            False.
        context: of the B tokens; None: they are the first of their images.

    Raises:
        ValueError: of `SamplingParams.guide`, or a rule whose logits have another shape.
    """
    conditional = conditional.float()
    if context is None:
        rows, device = conditional.shape[:-1], conditional.device
        positions, none = torch.zeros(rows, dtype=torch.int64, device=device), (*rows, 0)
        context = Context(positions, torch.zeros(none, dtype=torch.int64, device=device))
    other = None if unconditional is None else unconditional.float()
    if other is not None and context.guided is not None:
        other = torch.where(context.guided.unsqueeze(-1), other, conditional)
    logits = params.rule.logits(conditional, other, params, context)
    if logits.shape != conditional.shape:
        shapes = f"{tuple(logits.shape)} for logits {tuple(conditional.shape)}"
        raise ValueError(f"{type(params.rule).__name__} gives {shapes}; a rule keeps their shape")
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest of each row; the rest, minus infinity. Ties with the k-th stay."""
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[..., -1:], -torch.inf)  # below the k-th


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of each row that holds probability p, at least one token; the rest, minus infinity."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    left_out = probabilities.cumsum(dim=-1) - probabilities >= p  # the mass before a token already reaches p
    left_out[..., 0] = False  # the likeliest always stays
    return logits.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), -torch.inf)
