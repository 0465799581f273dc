"""Whether the build of vLLM that is installed fits what a config reserves. Imports neither torch nor vLLM."""

from __future__ import annotations

from stage_ray.config import RolloutConfig
from stage_ray.errors import ConfigError
from stage_ray.machine import package_version

ON_A_GPU = "--set rollout.gpus=0.5 --set learner.gpus=0.5"
"""What lets a run that was written for CPUs share one GPU."""


def needs_gpu() -> bool:
    """Whether the vLLM that is installed here is a build for GPUs, as vLLM itself tells: such a build has no CPU code.

    Example:
        >>> needs_gpu() and package_version("vllm") is None
        False
    """
    version = package_version("vllm")
    return version is not None and "cpu" not in version


def require_fitting_build(rollout: RolloutConfig) -> None:
    """Raise a `ConfigError` where vLLM is to run without a GPU and cannot. It would take one that is not reserved."""
    if rollout.engine == "vllm" and rollout.gpus == 0 and needs_gpu():
        raise ConfigError(
            f"rollout.gpus is 0, but the vLLM that is installed (vllm {package_version('vllm')}) is a build for GPUs; "
            f"{ON_A_GPU} shares one GPU (1 each where there are two), --set rollout.engine=torch needs none"
        )
