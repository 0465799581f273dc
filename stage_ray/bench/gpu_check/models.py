"""The models of the checks: random weights, the shipped model's words, distributions far from flat."""

from __future__ import annotations

import torch
from transformers import AutoProcessor, JanusForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from stage_ray.bench.gpu_check.base import Figures, Setting
from stage_ray.bench.inputs import FIFTY_MILLION, JANUS_PRO_1B, SHIPPED
from stage_ray.config.paths import resolve_path
from stage_ray.policies.janus.builder import JanusSizes, build_model, checkpoint_sizes, write_checkpoint

TINY = JanusSizes(hidden=64, layers=2, heads=2, intermediate=128, codes=256, side=4, prompt_tokens=128)
HEAD_GAIN = 3.0  # of the image head, in place of 1: distributions are then far from flat


def model_path(setting: Setting, name: str) -> str:
    """The checkpoint of the checks on numbers (``exact``), or of those at Janus-Pro-1B's shapes (``large``)."""
    return str(setting.scratch / f"model-{name}")


def write_models(setting: Setting, figures: Figures) -> None:
    """Write both checkpoints, which all other checks load."""
    disable_progress_bar()
    processor = AutoProcessor.from_pretrained(resolve_path(SHIPPED))
    for name, sizes in (("exact", FIFTY_MILLION), ("large", JANUS_PRO_1B)):
        model = build_model(TINY if setting.small else sizes, processor.tokenizer, seed=0)
        if name == "exact":
            spread(model)
        path = model_path(setting, name)
        write_checkpoint(setting.scratch / f"model-{name}", model, processor)
        figures[f"{name}_million_parameters"] = checkpoint_sizes(path).total / 1e6


@torch.no_grad()
def spread(model: JanusForConditionalGeneration) -> None:
    """Fill every matrix with values of unit gain: a wrong mask, position or branch shows in each log-probability."""
    noise = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            inputs = 1 if "embed" in name and "patch" not in name else parameter[0].numel()
            gain = HEAD_GAIN if name.endswith("vision_head.weight") else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * gain / inputs**0.5)
