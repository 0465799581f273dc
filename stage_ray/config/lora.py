"""The section ``policy.lora``, and the keys that do not go with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from stage_ray.config.sections import Section

if TYPE_CHECKING:
    from stage_ray.config.schema import RunConfig

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a Llama's layer


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685): W + alpha / rank * B A, no dropout.

    Dropout would make the ratio of a policy to itself other than 1.
    """

    rank: int = Field(32, ge=1, description="r of peft: rows of A, columns of B")
    alpha: float = Field(64.0, gt=0, description="lora_alpha of peft: B A is scaled by alpha / rank")
    target_modules: tuple[str, ...] = Field(
        LINEAR, min_length=1, description="Names of the linear maps in the decoder's layers that get an adapter"
    )
    export: Literal["merged", "adapters"] = Field(
        "merged", description="What final/ and best/ hold: a whole checkpoint, or the adapters alone in peft's layout"
    )

    @field_validator("target_modules")
    @classmethod
    def _once_each(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{repeated!r} stands there twice; remove one")
        return names


def check_lora(run: RunConfig) -> None:
    """Raise a ValueError where a key wants a second model beside the base, or the base in what nothing computes in."""
    learner = run.learner
    wrong = {
        "policy.reference": run.policy.reference is not None,
        "algorithm.reference_refresh": bool(run.algorithm.reference_refresh),
        "learner.reference_offload": learner.reference_offload,
        "learner.reference_dtype = bfloat16": (learner.reference_dtype, learner.autocast) == ("bfloat16", "off"),
    }
    if key := next((key for key, is_wrong in wrong.items() if is_wrong and run.policy.lora), None):
        raise ValueError(
            f"{key} does not go with policy.lora: there the reference is the policy's own base with its adapters off, "
            "no second model, and kept in bfloat16 only under autocast; remove one of the two"
        )
