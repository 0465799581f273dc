"""Benchmarks over an engine and scorers: pure pieces for a driver (`requests_for`, `summarise`), or all at once."""

from stage_ray.evaluation.geneval import requests_for, summarise
from stage_ray.evaluation.result import EvaluationResult, TaskScore
from stage_ray.evaluation.suites import SUITES, Suite, evaluate, find_suite

__all__ = [
    "SUITES",
    "EvaluationResult",
    "Suite",
    "TaskScore",
    "evaluate",
    "find_suite",
    "requests_for",
    "summarise",
]
