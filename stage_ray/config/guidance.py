"""Keys of ``rollout`` that say how much guidance a token and a group have."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stage_ray.config.sections import PoolConfig


class GuidanceConfig(PoolConfig):
    """Classifier-free guidance ``u + w (c - u)``: its scale w over an image's tokens, and groups without it."""

    guidance_scale: float = Field(5.0, ge=1.0, description="w in u + w (c - u); 1 is off")
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How w goes from guidance_scale at an image's first token to guidance_end at its last"
    )
    guidance_end: float = Field(1.0, ge=1.0, description="w at an image's last token, of linear and cosine")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="Share of an image's tokens before guidance begins, and before it ends; w is 1 outside"
    )
    unguided_share: float = Field(
        0.0, ge=0, le=1, description="Share of training groups drawn without guidance; evaluations always have it"
    )

    @model_validator(mode="after")
    def _guidance_is_read(self) -> GuidanceConfig:
        low, high = self.guidance_interval
        constant = self.guidance_schedule == "constant"
        if not 0 <= low < high <= 1:
            raise ValueError(f"rollout.guidance_interval = [{low:g}, {high:g}]: needs 0 <= low < high <= 1")
        if constant and self.guidance_end != 1:
            raise ValueError(
                f"rollout.guidance_end = {self.guidance_end:g} is read by a schedule; set rollout.guidance_schedule to "
                "linear or cosine, or guidance_end to 1"
            )
        if self.unguided_share and self.guidance_scale == 1 and (constant or self.guidance_end == 1):
            raise ValueError(
                f"rollout.unguided_share = {self.unguided_share:g} leaves guidance out, and rollout.guidance_scale = 1 "
                "has none; set unguided_share to 0, or a higher scale"
            )
        return self
