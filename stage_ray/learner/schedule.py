"""The learning rate, as a function of the updates done: a resumed run needs no state of it."""

from __future__ import annotations

from stage_ray.config import LearnerConfig


def learning_rate(step: int, steps: int, config: LearnerConfig) -> float:
    """Learning rate of update ``step`` (0-based) out of ``steps``: linear warm-up, then linear decay or none.

    Example:
        >>> [learning_rate(step, 4, LearnerConfig(lr=1.0)) for step in range(4)]
        [1.0, 0.75, 0.5, 0.25]
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    return config.lr * max(0.0, (steps - step) / max(1, steps - config.warmup_steps))  # 0 after the last planned step
