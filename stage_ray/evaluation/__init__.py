"""Benchmarks, one file each, and the one loop that evaluates a policy with them."""
