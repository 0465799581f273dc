"""Image engines: one base, two ways to sample; `build_engine` picks by ``rollout.engine``. Imports no torch."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.errors import ConfigError

if TYPE_CHECKING:
    from stage_ray.engines.base import ImageEngine


def build_engine(
    policy: PolicyConfig, rollout: RolloutConfig, *, worker: str, rank: int = 0, address: str = ""
) -> ImageEngine:
    """Start the engine that a config names, at policy version 0.

    Args:
        worker: name in groups and messages.
        rank, address: with ``rollout.tensor_parallel`` over 1, which of its ranks this is and where they meet.

    Raises:
        ConfigError: the checkpoint does not load, vLLM is not installed, a generation batch does not fit memory, or the
            token rule does not fit the model.
    """
    engine = _build(policy, rollout, worker, rank, address)
    try:
        if rank == 0:  # others have no codebook
            engine.params.rule.check(engine.codec, loaded=True)
    except ConfigError:
        engine.close()
        raise
    return engine


def _build(policy: PolicyConfig, rollout: RolloutConfig, worker: str, rank: int, address: str) -> ImageEngine:
    if rollout.engine == "torch":
        from stage_ray.engines.torch import TorchEngine

        return TorchEngine(policy, rollout, worker=worker)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine is vllm, but vLLM is not installed: run `make install`, or install the extra cpu or gpu "
            "of this package, or set rollout.engine=torch"
        )
    from stage_ray.engines.vllm.engine import VllmEngine

    return VllmEngine(policy, rollout, worker=worker, rank=rank, address=address)
