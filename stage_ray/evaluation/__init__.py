"""Benchmarks, and the one loop that evaluates a policy with them. One file for every benchmark."""

from stage_ray.evaluation.base import Benchmark, EvaluationResult, MetricValue, find_benchmark, summarise
from stage_ray.evaluation.loop import Backend, EngineBackend, JudgedGroup, evaluate, judge_in_batches, requests_for

__all__ = [
    "Backend",
    "Benchmark",
    "EngineBackend",
    "EvaluationResult",
    "JudgedGroup",
    "MetricValue",
    "evaluate",
    "find_benchmark",
    "judge_in_batches",
    "requests_for",
    "summarise",
]
