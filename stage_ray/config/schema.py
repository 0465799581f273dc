"""The configuration of a run: pydantic models, closed to unknown keys. `load` reads them from YAML.

Imports neither torch, ray nor vllm: ``stage-ray train --dry-run`` and every error about a config answer at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from stage_ray.config.guidance import GuidanceConfig
from stage_ray.config.lora import LoraConfig, check_lora
from stage_ray.config.sections import (
    MeasureConfig,
    PromptsConfig,
    RewardConfig,
    ScoringConfig,
    ScoringPool,
    Section,
    SuiteConfig,
)

TAKEN = {"mean", "std", "informative"}  # reward/mean and its like, which no scorer may be called

SECRET_NAME = re.compile(r"(?i)(^|_)(key|secret|token|password)$|apikey")
SECRET_VALUE = re.compile(r"\b[0-9a-f]{40}\b|\bwandb_v\d+_")  # W&B's keys of both kinds


class PolicyConfig(Section):
    """The model that is trained."""

    family: str = Field("janus", description="Model family, a folder in stage_ray/policies, or package.module.Class")
    path: str = Field(description="A Hugging Face directory, package:MODULE/DIR, or a hub id: OWNER/NAME[@REVISION]")
    reference: str | None = Field(
        None, description="Anchor of the KL and of entropy, another checkpoint of this model; null: policy.path"
    )
    template: Literal["official", "paper"] = Field("official", description="Roles: <|User|>, or User as in the paper")
    export_dtype: Literal["checkpoint", "float32", "bfloat16"] = Field(
        "checkpoint", description="Type of the trained weights in final/; checkpoint: as they came"
    )
    lora: LoraConfig | None = Field(None, description="Train adapters (LoRA) and not the weights; null: all weights")
    trust_remote_code: bool = Field(False, description="Run code that comes with a checkpoint. Off unless you wrote it")


class RolloutConfig(GuidanceConfig):
    """How images are sampled."""

    engine: Literal["vllm", "torch"] = Field("vllm", description="vllm scales; torch is best for tiny models")
    group_size: int = Field(8, ge=2, description="G, images of one prompt")
    groups_per_step: int = Field(8, ge=1, description="N, groups (prompts) of one update")
    temperature: float = Field(1.0, gt=0.0, description="Sampling temperature after guidance")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0 is off")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="Keep the smallest set of tokens with this mass; 1 is off")
    sampler: str = Field(
        "guided",
        description="Token rule: guided, entropy_informed, retrieval or package.module.Class; gets the four keys above",
    )
    sampler_options: dict[str, Any] = Field({}, description="The token rule's own options")
    prompt_transform: str | None = Field(
        None, description="From a prompt to the text that is drawn: template, or package.module.Class; null: as it is"
    )
    prompt_transform_options: dict[str, Any] = Field({}, description="The prompt transform's own options")
    search: str | None = Field(
        None,
        description="What evaluate and generate keep: best_of, parm, parm_plus or package.module.Class; null: all",
    )
    search_options: dict[str, Any] = Field({}, description="The search's own options")
    images_per_batch: int = Field(64, ge=1, description="Images in flight at once on one worker")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 if the hardware has it")
    tensor_parallel: int = Field(1, ge=1, description="Processes of one machine that share a worker's model (vLLM)")
    colocated: bool = Field(
        False, description="A worker and a rank of the learner take turns on one GPU; as many of both, max_staleness 0"
    )
    cpus: float = Field(1.0, gt=0, description="CPUs reserved for one worker, or each of its processes")
    threads: int | None = Field(
        None, ge=1, description="Threads of a worker; null: its share of the cores, half if asynchronous"
    )
    max_prompt_tokens: int = Field(
        256, ge=1, description="Longest prompt that is drawn; a run reserves memory for its own longest"
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, description="vLLM's key-value cache on a CPU, GiB; null: what images_per_batch needs"
    )
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1, description="vLLM's share of a GPU's memory")
    timeout_s: float = Field(600.0, gt=0, description="Seconds one generation batch may take")


class AlgorithmConfig(Section):
    """What every recipe shares. The recipe's own options stand beside it, and are checked by ``stage_ray.recipes``."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    combine: Literal["sum", "zscore"] = Field(
        "sum", description="Weighted sum of the scores, or of each scorer's z-scores inside the group (Pref-GRPO)"
    )
    drop_constant: bool = Field(True, description="Ignore, per group, scorers that gave every image the same score")
    redraw_silent: int = Field(
        0,
        ge=0,
        description="Most prompts in a row whose group is dropped, not trained, as its scores are equal; 0 is off",
    )
    reference_refresh: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="After so many updates the reference becomes the policy as it is then; empty: never"
    )
    advantage_eps: float = Field(1e-4, gt=0, description="Added to the standard deviation of a group's rewards")
    clip: float | None = Field(None, gt=0, description="PPO clip of the importance ratio; null is off")
    correction: Literal["none", "truncate", "mask"] = Field(
        "truncate", description="An older version's tokens weigh: ratio; min(ratio, ratio_cap); or 0 off ratio_range"
    )
    ratio_cap: float = Field(2.0, ge=1, description="Greatest ratio of correction=truncate")
    ratio_range: tuple[float, float] = Field((0.5, 2.0), description="Ratios that correction=mask keeps, low and high")
    ratio_on: Literal["conditional", "guided"] = Field(
        "conditional", description="Ratio of the branch that is trained, or of what was sampled: one more forward"
    )
    kl_ratio_cap: float | None = Field(
        None, gt=1, description="Greatest p_ref / p of a token in the KL; null is off, as published"
    )

    @model_validator(mode="after")
    def _range_encloses_one(self) -> AlgorithmConfig:
        low, high = self.ratio_range
        if not 0 <= low < 1 < high:
            raise ValueError(f"algorithm.ratio_range = [{low}, {high}]: needs 0 <= low < 1 < high")
        return self


def _off_is_no_boolean(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare off as false


class LearnerConfig(Section):
    """The optimiser and how the update is cut to fit memory."""

    lr: float = Field(5e-6, gt=0, description="Peak learning rate of AdamW")
    schedule: Literal["linear", "constant"] = Field("linear", description="linear: to 0 at the last step")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm is clipped to this")
    micro_batch_images: int | None = Field(
        None, ge=1, description="Images in one forward and backward pass; null: as many as fit memory, at most 32"
    )
    autocast: Annotated[Literal["auto", "off", "bfloat16"], BeforeValidator(_off_is_no_boolean)] = Field(
        "auto", description="auto: bfloat16 where the hardware computes in it"
    )
    updates_per_batch: int = Field(1, ge=1, description="Passes over a batch's groups; several need algorithm.clip")
    groups_per_update: int | None = Field(
        None, ge=1, description="Groups of one optimizer step; null: all of a batch. Fewer need algorithm.clip"
    )
    gradient_checkpointing: bool | None = Field(None, description="Recompute activations; null: where they do not fit")
    reference_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Kept and computed in, with policy.lora kept in; auto: what the policy is computed in"
    )
    reference_offload: bool = Field(False, description="Keep the reference off the GPU but while it runs")
    max_mismatch: float | None = Field(
        0.5, gt=0, description="A synchronous run stops where mean |delta log p| to rollout exceeds this; null is off"
    )
    ranks: int = Field(1, ge=1, description="Actors that share one update (FSDP2), whole groups each")
    cpus: float = Field(1.0, gt=0, description="CPUs reserved for one rank")
    threads: int | None = Field(
        None, ge=1, description="Threads of a rank; null: its share of the cores, half if asynchronous"
    )
    gpus: float = Field(0.0, ge=0, description="GPUs reserved for one rank")
    resources: dict[str, float] = Field({}, description="Custom Ray resources of one rank")
    timeout_s: float = Field(3600.0, gt=0, description="Seconds an update may take before the learner is replaced")

    @property
    def several_updates(self) -> bool:
        """Whether a batch makes more than one optimizer step."""
        return self.updates_per_batch > 1 or self.groups_per_update is not None


class PipelineConfig(Section):
    """How far generation may run ahead of training."""

    max_staleness: int = Field(0, ge=0, description="Updates a group may lag behind the learner; 0 is synchronous")
    order: Literal["strict", "arrival"] = Field(
        "strict", description="strict: a fixed order, repeatable bit for bit; arrival: what is ready, within the bound"
    )
    record: bool = Field(False, description="Keep every trained group in RUN_DIR/groups, for train --replay")


class CheckpointConfig(Section):
    """When to save, and how much to keep."""

    every: int = Field(50, ge=1, description="Steps between checkpoints; the last step is always saved")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept")
    keep_best: str | None = Field(
        None, description="Suite by whose headline the best evaluated step is saved, kept, and exported to best/"
    )


def _named(key: str) -> BeforeValidator:
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class EvaluationConfig(Section):
    """Evaluation before the first step, after the last one and between, and the fixed sample grid."""

    enabled: bool = Field(True, description="Evaluate on prompts.heldout, and every suite")
    benchmark: str = Field("geneval", description="What the run's scores add up to: geneval, or package.module.Class")
    suites: list[Annotated[SuiteConfig, _named("benchmark")]] = Field(
        [], description="Benchmarks beside that one, each with prompts and scorers of its own: names, or SuiteConfig"
    )
    measures: list[Annotated[MeasureConfig, _named("measure")]] = Field(
        [], description="Beside evaluation.benchmark on the same images: names, or MeasureConfig"
    )
    every: int | None = Field(None, ge=1, description="Steps between evaluations; null: only before and after")
    images_per_prompt: int = Field(4, ge=1, description="Images of each held-out prompt")
    seed: int = Field(20, ge=0, description="Seed of evaluation and sample images")
    sample_every: int = Field(50, ge=1, description="Steps between pictures of samples")
    sample_prompts: int = Field(12, ge=1, description="Held-out prompts in a sample picture")


class ClusterConfig(Section):
    """Where Ray runs."""

    address: str | None = Field(None, description="null: this Ray job's cluster, or a new one; auto, HOST:PORT: attach")
    num_cpus: int | None = Field(
        None, ge=1, description="CPUs of a local cluster; null: the machine's, or more if asked"
    )
    object_store_mb: int | None = Field(
        None, ge=80, description="Object store of a local cluster, MB; null: two versions of the weights, and images"
    )
    dashboard: bool = Field(False, description="Ray's dashboard on a local cluster, on 127.0.0.1")
    metrics_port: int | None = Field(0, ge=0, le=65535, description="Prometheus port; 0 picks a free one, null is off")
    metrics_host: str = Field("127.0.0.1", description="Address the Prometheus endpoint binds to")
    start_timeout_s: float = Field(300.0, gt=0, description="Seconds a worker may wait for its place, and to load")
    sync_timeout_s: float = Field(120.0, gt=0, description="Seconds a rollout worker may take to load a version")
    weight_transport: Literal["object_store", "gloo", "nccl"] = Field(
        "object_store", description="object_store: a worker loads when free; gloo (CPUs), nccl (GPUs): one broadcast"
    )
    attempts: int = Field(3, ge=1, description="Times a call is tried, each on a new worker, before the run stops")
    heartbeat_s: float = Field(5.0, gt=0, description="Seconds between pings of every worker")
    heartbeat_deadline_s: float = Field(60.0, gt=0, description="A worker that answers no ping for so long is killed")


def _home_expanded(value: Any) -> Any:
    """A path with ``~`` written out. Variables are not: a shell's and YAML's meaning of ``$`` differ."""
    if not isinstance(value, str):
        return value
    if "$" in value:
        raise ValueError(f"run_dir = {value!r}: $ is no variable here; write the path out, or begin it with ~")
    return str(Path(value).expanduser()) if value.startswith("~") else value


class LogsConfig(Section):
    """What a run says of itself while it works."""

    format: Literal["text", "json"] = Field("text", description="json: one object a line, of driver and workers")
    trackers: list[str] = Field(
        ["tensorboard"], description="Where numbers and pictures go: tensorboard, wandb, or package.module.Class"
    )
    tracker_options: dict[str, dict[str, Any]] = Field(
        {}, description="Keyword arguments of a tracker, by its name: {wandb: {project: mine, mode: offline}}"
    )

    @model_validator(mode="after")
    def _trackers_known_and_without_secrets(self) -> LogsConfig:
        repeated = next((name for name in self.trackers if self.trackers.count(name) > 1), None)
        if repeated:
            raise ValueError(f"logs.trackers: {repeated!r} stands there twice; remove one")
        for tracker, options in self.tracker_options.items():
            if tracker not in self.trackers:
                raise ValueError(f"logs.tracker_options.{tracker}: logs.trackers = {self.trackers} has no such tracker")
            for name, value in options.items():
                if SECRET_NAME.search(name) or (tracker == "wandb" and SECRET_VALUE.search(str(value))):
                    raise ValueError(
                        f"logs.tracker_options.{tracker}.{name} looks like a key, and a config is no place for one; "
                        "remove it, and set it in the environment (WANDB_API_KEY)"
                    )
        return self


class RunConfig(Section):
    """A whole run. ``stage-ray train CONFIG --set learner.lr=1e-5`` overrides any key by its dotted name."""

    steps: int = Field(ge=1, description="Updates of the policy")
    seed: int = Field(20, ge=0, lt=2**31, description="Fixes prompts' order, every image's seed and the learner")
    run_dir: Annotated[str, BeforeValidator(_home_expanded)] = Field(
        "runs/default", description="Everything the run writes"
    )
    prompts: PromptsConfig
    policy: PolicyConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardConfig] = Field(min_length=1)
    scoring: ScoringConfig = ScoringConfig()
    recipe: str = Field("stage", description="stage, grpo, or package.module.Class; its options stand under algorithm")
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    pipeline: PipelineConfig = PipelineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    logs: LogsConfig = LogsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        rollout, learner, transport = self.rollout, self.learner, self.cluster.weight_transport
        columns = [reward.column for reward in self.rewards]
        repeated = next((name for name in sorted(columns) if columns.count(name) > 1), None)
        if repeated:
            raise ValueError(f"rewards: the name {repeated!r} is used twice; give each scorer a name of its own")
        served: dict[str, str] = {}
        for name in columns:
            if name in TAKEN or not name.strip():
                raise ValueError(f"rewards: reward/{name} is a metric of its own; give the scorer another name")
            other = served.setdefault(re.sub(r"\W", "_", name), name)  # as Prometheus has it
            if other != name:
                raise ValueError(f"rewards: {other!r} and {name!r} would share one metric; rename one of them")
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("rewards: every weight is 0, so nothing would be trained")
        self._check_evaluation()
        own = [(f"rewards.{index}", self._own_pool(reward)) for index, reward in enumerate(self.rewards)]
        for name, pool in (("rollout", rollout), ("scoring", self.scoring), *own):
            if (most := pool.max_workers or pool.workers) < pool.workers:
                raise ValueError(f"{name}.max_workers = {most} is less than {name}.workers = {pool.workers}")
        if rollout.tensor_parallel > 1 and rollout.engine != "vllm":
            raise ValueError(f"rollout.tensor_parallel = {rollout.tensor_parallel} needs rollout.engine = vllm")
        if rollout.colocated:
            self._check_colocated()
        check_lora(self)
        if transport != "object_store" and (rollout.tensor_parallel > 1 or rollout.colocated):
            raise ValueError(
                f"cluster.weight_transport = {transport} reaches workers of one process each, on "
                "hardware of their own; use object_store with rollout.tensor_parallel or rollout.colocated"
            )
        if transport == "nccl" and min(rollout.gpus, learner.gpus) < 1:
            raise ValueError(
                f"cluster.weight_transport = nccl needs a whole GPU for each end, but rollout.gpus = "
                f"{rollout.gpus:g} and learner.gpus = {learner.gpus:g}; set both to 1, or use object_store"
            )
        if rollout.groups_per_step % learner.ranks:
            raise ValueError(
                f"learner.ranks = {learner.ranks} does not divide rollout.groups_per_step = "
                f"{rollout.groups_per_step}: every rank trains as many whole groups as the others"
            )
        some = learner.groups_per_update
        if some is not None and (rollout.groups_per_step % some or some % learner.ranks):
            raise ValueError(
                f"learner.groups_per_update = {some} must divide rollout.groups_per_step = {rollout.groups_per_step}, "
                f"and be a multiple of learner.ranks = {learner.ranks}"
            )
        return self

    def _check_evaluation(self) -> None:
        """Raise a ValueError where something is asked of an evaluation that does not take place."""
        config, best = self.evaluation, self.checkpoint.keep_best
        if config.enabled and self.prompts.heldout is None and not config.suites:
            raise ValueError("prompts.heldout is not set; set it, or evaluation.suites, or evaluation.enabled=false")
        if config.every is not None and not config.enabled:
            raise ValueError(
                f"evaluation.every = {config.every} needs evaluation.enabled = true; set that, or evaluation.every=null"
            )
        if best is not None and config.every is None:
            raise ValueError(
                f"checkpoint.keep_best = {best!r} needs evaluation.every: without it only the last step is evaluated"
            )

    @property
    def scoring_pools(self) -> list[ScoringPool]:
        """The pools of reward actors: the one that scorers share, unless each has its own, then those."""
        shared = tuple(reward.column for reward in self.rewards if not reward.own)
        common = [ScoringPool(**dict(self.scoring), role="reward", columns=shared)] if shared else []
        return common + [self._own_pool(reward) for reward in self.rewards if reward.own]

    def _own_pool(self, reward: RewardConfig) -> ScoringPool:
        role = "reward-" + re.sub(r"\W", "_", reward.column)  # no two columns make the same
        return ScoringPool(**dict(self.scoring) | reward.own, role=role, columns=(reward.column,))

    def _check_colocated(self) -> None:
        """Raise a ValueError unless each rollout worker can share a GPU with one rank of the learner."""
        rollout, learner = self.rollout, self.learner
        wanted = {  # key -> its value, and what it must be
            "pipeline.max_staleness": (self.pipeline.max_staleness, 0),
            "rollout.tensor_parallel": (rollout.tensor_parallel, 1),
            "rollout.workers": (rollout.workers, learner.ranks),
            "rollout.max_workers": (rollout.max_workers or rollout.workers, rollout.workers),
        }
        for key, (value, needed) in wanted.items():
            if value != needed:
                raise ValueError(
                    f"{key} = {value} must be {needed} where rollout.colocated is true: a worker and a rank of the "
                    "learner take turns on one GPU"
                )
        share, rest = rollout.gpus, learner.gpus
        if (share or rest) and (0 in (share, rest) or abs(share + rest - 1) > 1e-6):
            raise ValueError(
                f"rollout.gpus = {share:g} and learner.gpus = {rest:g} must add up to 1 where rollout.colocated is "
                "true, such as 0.5 each"
            )
