"""A run's configuration: schema, file, paths, and the hardware it meets. Imports neither torch, ray nor vllm."""

# ruff: noqa: F401  they are here for other rooms
from stage_ray.config.base import Section
from stage_ray.config.prompts import PromptFile, PromptsConfig
from stage_ray.config.schema import (
    AlgorithmConfig,
    LearnerConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
    SuiteConfig,
)
from stage_ray.config.scoring import OWN_POOL, RewardConfig, RuntimeEnvConfig, ScoringConfig, ScoringPool
