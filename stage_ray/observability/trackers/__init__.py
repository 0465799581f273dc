"""Mirrors of a run's numbers beside ``metrics.jsonl``: one file for each tracker."""
