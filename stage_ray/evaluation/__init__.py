"""Benchmarks, one file each, and the one loop that evaluates a policy with them."""

from stage_ray.evaluation.base import Benchmark, MetricValue, mean_of_metrics, mean_over_images

__all__ = ["Benchmark", "MetricValue", "mean_of_metrics", "mean_over_images"]
