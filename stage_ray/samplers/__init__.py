"""Token rules, one file each; ``rollout.sampler`` names the file, or the dotted path of a class from elsewhere."""

from stage_ray.samplers.base import Context, TokenRule
from stage_ray.samplers.params import (
    SAMPLERS,
    SamplingParams,
    keep_top_k,
    keep_top_p,
    load_rule,
    process_logits,
    resolve_sampler,
)

__all__ = [
    "SAMPLERS",
    "Context",
    "SamplingParams",
    "TokenRule",
    "keep_top_k",
    "keep_top_p",
    "load_rule",
    "process_logits",
    "resolve_sampler",
]
