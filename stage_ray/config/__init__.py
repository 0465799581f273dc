"""A run's configuration: schema, file, paths, and the hardware it meets. Imports neither torch, ray nor vllm."""

# ruff: noqa: F401  they are here for other rooms
from stage_ray.config.lora import LoraConfig
from stage_ray.config.schema import (
    AlgorithmConfig,
    EvaluationConfig,
    LearnerConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
)
from stage_ray.config.sections import (
    OWN_POOL,
    MeasureConfig,
    PromptsConfig,
    RewardConfig,
    RuntimeEnvConfig,
    ScoringConfig,
    ScoringPool,
    Section,
    SuiteConfig,
)
