"""Environment variables that vLLM needs here. They must be set before it is imported; nothing here imports it."""

from __future__ import annotations

import os

from stage_ray.config import RolloutConfig


def vllm_environment(rollout: RolloutConfig) -> dict[str, str]:
    """Variables for the process that holds the engine (a Ray actor's ``runtime_env``, for instance).

    Pairs of requests stay together only in an in-process engine, so vLLM's own subprocess is off. Guidance is written
    against the logits processors of the V1 model runner.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, int(rollout.cpus))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def set_environment(rollout: RolloutConfig) -> None:
    """Set in this process what is not set yet, for an engine that is built without an actor around it."""
    for name, value in vllm_environment(rollout).items():
        os.environ.setdefault(name, value)
