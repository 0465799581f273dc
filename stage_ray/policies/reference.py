"""The reference of a run: ``policy.reference``, or the policy's own checkpoint, as what training must not leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from stage_ray.config import PolicyConfig
from stage_ray.config.model_sizes import ModelSizes
from stage_ray.errors import ConfigError
from stage_ray.policies import policy_class
from stage_ray.policies.codec import ImageCodec
from stage_ray.pretrained import base_location, located, tensor_shapes


def reference_config(config: PolicyConfig) -> PolicyConfig:
    """The reference's own config."""
    return config.model_copy(update={"path": config.reference or config.path, "reference": None})


def reference_location(config: PolicyConfig) -> str:
    """Where the reference's weights come from: with ``policy.lora`` from the base of an adapter that goes on."""
    return config.reference or (base_location(config.path) if config.lora is not None else config.path)


@contextmanager
def naming_reference(config: PolicyConfig) -> Iterator[None]:
    """Let errors about a model that is loaded meanwhile name ``policy.reference``, where that is the key."""
    try:
        yield
    except ConfigError as error:
        if config.reference is None:
            raise
        raise ConfigError(f"policy.reference: {str(error).removeprefix('policy.path: ')}") from error


def check_reference(config: PolicyConfig, *, fetch: bool = False) -> None:
    """Check that ``policy.reference``, where it is set, is another state of the model at ``policy.path``.

    Loads image tokenizers, no backbone. What would come from a hub is left out, unless it is to ``fetch`` it.

    Raises:
        ConfigError: it is no usable checkpoint, or another model; says what differs.
    """
    if config.reference is None:
        return
    family, other = policy_class(config), reference_config(config)
    with naming_reference(config):
        family.check(other)
        if not fetch and None in (located(config.path), located(other.path)):
            return
        theirs = family.load_codec(other, device=torch.device("cpu"))
    ours = family.load_codec(config, device=torch.device("cpu"))
    prefix, codes, others = (family.trained_prefix,), ours.codebook(), theirs.codebook()
    same_codes = codes.shape == others.shape and torch.allclose(
        codes, others, atol=0.02
    )  # but for rounding to bfloat16
    same = {
        "trained tensors": tensor_shapes(ours.location, prefix) == tensor_shapes(theirs.location, prefix),
        "sizes": _sizes(ours) == _sizes(theirs),
        "image tokens": ours.grid == theirs.grid and same_codes,
        "prompt tokens": ours.prompt_encoding() == theirs.prompt_encoding(),
    }
    if differing := [name for name, equal in same.items() if not equal]:
        raise ConfigError(
            f"policy.reference = {config.reference} is not of the model that policy.path = {config.path} holds: "
            f"{' and '.join(differing)} differ; give another checkpoint of that model, or null"
        )


def _sizes(codec: ImageCodec) -> ModelSizes | None:
    """Without what tells two checkpoints of one model apart."""
    sizes = codec.sizes()
    return sizes and replace(sizes, name="", path="")
