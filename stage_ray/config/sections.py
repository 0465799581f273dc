"""What all sections of a config have in common, and the sections ``prompts``, ``rewards[]`` and ``scoring``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

OWN_POOL = ("workers", "max_workers", "cpus", "gpus", "resources", "groups_per_call", "timeout_s", "runtime_env")
Value = str | int | float | bool  # of a key of a prompt's line
FORMS = ("(file)", "(files)")  # of prompts.train, as pydantic names them in the place of an error


class Section(BaseModel):
    """Base of every section: closed to unknown keys, frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PoolConfig(Section):
    """A pool of actors that do the same work, each on groups of its own."""

    workers: int = Field(1, ge=1, description="Actors that the run needs")
    max_workers: int | None = Field(None, ge=1, description="Most actors, where the cluster has room; null: as workers")
    gpus: float = Field(0.0, ge=0, description="GPUs reserved for one worker, or each of its processes")
    resources: dict[str, float] = Field({}, description="Custom Ray resources of one worker (or process): {rollout: 1}")


class PromptFile(Section):
    """One of several prompt files that are mixed."""

    path: str = Field(description="As prompts.train, where that is one file")
    weight: float = Field(1.0, gt=0, description="Prompts that are drawn of it, relative to the other files")


class PromptsConfig(Section):
    """Which prompts are trained on, and which are held out."""

    train: Annotated[
        Annotated[str, Tag(FORMS[0])] | Annotated[list[PromptFile], Field(min_length=1), Tag(FORMS[1])],
        Discriminator(lambda value: FORMS[not isinstance(value, str)]),
    ] = Field(
        description="JSON Lines (GenEval's format) or text, a prompt a line; package:MODULE/FILE; or "
        "hf://datasets/OWNER/NAME[@REVISION]/FILE of a hub; geneval:train or geneval:test, which are made here; "
        "or several files: [{path: FILE, weight: 3}, ...]"
    )
    heldout: str | None = Field(None, description="Prompts of the evaluation before and after; same formats")
    shuffle: bool = Field(True, description="A new order every epoch, fixed by the run's seed")
    too_long: Literal["refuse", "drop"] = Field(
        "refuse", description="What becomes of prompts longer than rollout.max_prompt_tokens"
    )

    @property
    def files(self) -> dict[str, PromptFile]:
        """The files that are trained on, by the config's keys of their paths."""
        if isinstance(self.train, str):
            return {"prompts.train": PromptFile(path=self.train)}
        return {f"prompts.train.{index}.path": file for index, file in enumerate(self.train)}


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
    """One scorer. With any key of `OWN_POOL` it has actors of its own; the rest of them is as in ``scoring``."""

    type: str = Field(description="A scorer of stage_ray/rewards: geneval, clip, hps, ...; or package.module.Class")
    name: str | None = Field(None, description="Column name in metrics; the type by default")
    weight: float = Field(1.0, description="Weight in the sum of scorers; 0: it is watched, not trained on")
    options: dict[str, Any] = Field({}, description="Keyword arguments of the scorer")
    when: Annotated[dict[str, Value | Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)] | None = Field(
        None,
        description="Ask it only where the prompt's line says so: {task_type: spatial} or {tag: [colors, counting]}",
    )
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


class SuiteConfig(Section):
    """A further benchmark of a run; its name alone stands for one with all defaults."""

    benchmark: str = Field(description="A file of stage_ray/evaluation, or package.module.Class")
    name: str | None = Field(
        None, pattern=r"^\w[\w.-]*$", description="In metrics, files and checkpoint.keep_best; null: the benchmark's"
    )
    prompts: str | None = Field(None, description="As prompts.heldout; null: the benchmark's own")
    images_per_prompt: int | None = Field(None, ge=1, description="Images of each prompt; null: the benchmark's own")
    rewards: list[RewardConfig] | None = Field(
        None, description="Its scorers, which train nothing; null: the benchmark's own, or where it has none the run's"
    )
    search: str | None = Field(None, description="As rollout.search, for this suite")
    search_options: dict[str, Any] = Field({}, description="The search's own options")


class MeasureConfig(Section):
    """What an evaluation measures beside its benchmark; its name alone stands for one with all defaults."""

    measure: str = Field(description="A file of stage_ray/evaluation/measures, or package.module.Class")
    options: dict[str, Any] = Field({}, description="Keyword arguments of the scorer that it asks")
    scorer: str | None = Field(None, description="That scorer, as rewards[].type; null: the measure's own")
    name: str | None = Field(None, description="Of the scorer's column; null: the measure's own")

    @property
    def column(self) -> str:
        """Name of its scorer's column."""
        return self.name or self.measure.rsplit(".", 1)[-1]

    @property
    def reward(self) -> RewardConfig:
        """The scorer that it asks, once that is written out."""
        return RewardConfig(type=str(self.scorer), name=self.column, weight=0.0, options=self.options)


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
