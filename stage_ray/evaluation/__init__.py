"""Benchmarks, one file each, and the one loop that evaluates a policy with them."""

# ruff: noqa: F401  they are here for other rooms and for a user's own benchmarks
from stage_ray.evaluation.base import Benchmark
from stage_ray.evaluation.metrics import MetricValue, mean_of_metrics, mean_over_images
