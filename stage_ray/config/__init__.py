"""A run's configuration: its schema, its file, where its paths lead, and the hardware it meets. No torch, ray or vllm."""

from stage_ray.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    LearnerConfig,
    LogsConfig,
    PipelineConfig,
    PolicyConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    ScoringConfig,
    Section,
)

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "EvaluationConfig",
    "LearnerConfig",
    "LogsConfig",
    "PipelineConfig",
    "PolicyConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "ScoringConfig",
    "Section",
]
