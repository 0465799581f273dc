"""What vLLM needs around it: a build for the hardware, and environment variables, set before it is imported.

Imports neither torch nor vLLM: the driver asks before anything is started.
"""

from __future__ import annotations

from stage_ray.config import RolloutConfig
from stage_ray.config.hardware import package_version
from stage_ray.errors import ConfigError

ON_A_GPU = "--set rollout.gpus=0.5 --set learner.gpus=0.5"
"""What lets a run that was written for CPUs share one GPU."""


def needs_gpu() -> bool:
    """Whether the vLLM that is installed is a build for GPUs, as vLLM itself tells: such a build has no CPU code."""
    version = package_version("vllm")
    return version is not None and "cpu" not in version


def require_fitting_build(rollout: RolloutConfig) -> None:
    """Raise a `ConfigError` where vLLM is to run without a GPU and cannot. It would take one that is not reserved."""
    if rollout.engine == "vllm" and rollout.gpus == 0 and needs_gpu():
        raise ConfigError(
            f"rollout.gpus is 0, but the vLLM that is installed (vllm {package_version('vllm')}) is a build for GPUs; "
            f"{ON_A_GPU} shares one GPU (1 each where there are two), --set rollout.engine=torch needs none"
        )


def vllm_environment(rollout: RolloutConfig) -> dict[str, str]:
    """Variables for the process that holds the engine (a Ray actor's ``runtime_env``, for instance).

    Pairs of requests stay together only in an in-process engine, so vLLM's own subprocess is off. Guidance is written
    against the logits processors of the V1 model runner. Large tensors lie in huge pages: attention over a CPU's
    key-value cache reads a few kilobytes here and there, each from a page of its own otherwise.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, int(rollout.cpus))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "THP_MEM_ALLOC_ENABLE": "1",
    }
