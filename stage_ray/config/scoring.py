"""Scorers and the pools of actors that they run in: the sections ``rewards[]`` and ``scoring``."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from stage_ray.config.base import PoolConfig, Section

OWN_POOL = ("workers", "max_workers", "cpus", "gpus", "resources", "groups_per_call", "timeout_s", "runtime_env")


class RuntimeEnvConfig(Section):
    """What Ray gives the processes of a pool beside what is installed; same Python and Ray."""

    pip: list[str] | None = Field(
        None, description="Packages that pip installs for this pool: names, or paths of wheels"
    )
    py_modules: list[str] | None = Field(None, description="Directories of packages, or wheels, put before all others")
    env_vars: dict[str, str] = Field({}, description='Variables of the environment: {DEBUG: "1"}')

    @property
    def brings_packages(self) -> bool:
        """Whether a scorer in it may be missing in this process, or another version of it may be here."""
        return bool(self.pip or self.py_modules)


class RewardConfig(Section):
    """One scorer. ``type`` is a name of the registry (geneval, clip, win_rate) or the dotted path of your own class.

    With any key of `OWN_POOL` it has actors of its own; the others of these keys are as in ``scoring``.
    """

    type: str = Field(description="geneval, clip, win_rate, or package.module.Class")
    name: str | None = Field(None, description="Column name in metrics; the type by default")
    weight: float = Field(1.0, description="Weight in the sum of scorers")
    options: dict[str, Any] = Field({}, description="Keyword arguments of the scorer")
    workers: int | None = Field(None, ge=1, description="Actors of this scorer that the run needs")
    max_workers: int | None = Field(None, ge=1, description="Most actors of this scorer")
    cpus: float | None = Field(None, gt=0, description="CPUs reserved for one of them")
    gpus: float | None = Field(None, ge=0, description="GPUs reserved for one of them")
    resources: dict[str, float] | None = Field(None, description="Custom Ray resources of one of them")
    groups_per_call: int | None = Field(None, ge=1, description="Groups that it scores in one batched call")
    timeout_s: float | None = Field(None, gt=0, description="Seconds one of its calls may take")
    runtime_env: RuntimeEnvConfig | None = Field(None, description="Packages and variables of its actors")

    @property
    def column(self) -> str:
        """Name of this scorer's column."""
        return self.name or self.type.rsplit(".", 1)[-1]

    @property
    def own(self) -> dict[str, Any]:
        """What sets its actors apart from the other scorers'; none where it shares theirs."""
        return {name: value for name in OWN_POOL if (value := getattr(self, name)) is not None}


class ScoringConfig(PoolConfig):
    """The pool of reward actors; each holds every scorer that has no pool of its own. Defaults of those pools too."""

    groups_per_call: int = Field(8, ge=1, description="Groups scored in one batched call")
    timeout_s: float = Field(120.0, gt=0, description="Seconds a call may take before its groups are scored again")
    outage_s: float = Field(
        600.0,
        gt=0,
        description="Seconds that a service which a scorer asks may be down, the run waiting; then it fails",
    )
    attempts: int = Field(2, ge=1, description="Times a group is scored, dead workers apart, before it is replaced")
    cpus: float = Field(0.5, gt=0, description="CPUs reserved for one worker")
    runtime_env: RuntimeEnvConfig = Field(RuntimeEnvConfig(), description="Packages and variables of the actors")


class ScoringPool(ScoringConfig):
    """One pool of reward actors as it is started: the scorers that share it, and what they have of `ScoringConfig`."""

    role: str
    columns: tuple[str, ...]
