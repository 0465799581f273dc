"""What the sections of a config have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: closed to unknown keys, frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PoolConfig(Section):
    """A pool of actors that do the same work, each on groups of its own."""

    workers: int = Field(1, ge=1, description="Actors that the run needs")
    max_workers: int | None = Field(None, ge=1, description="Most actors, where the cluster has room; null: as workers")
    gpus: float = Field(0.0, ge=0, description="GPUs reserved for one worker, or each of its processes")
    resources: dict[str, float] = Field({}, description="Custom Ray resources of one worker (or process): {rollout: 1}")
