"""Two evaluations of one benchmark, before and after training: the change of every metric with its standard error."""

from __future__ import annotations

from stage_ray.evaluation.base import EvaluationResult, MetricValue, mean_of_metrics, mean_over_images


def changes(before: EvaluationResult, after: EvaluationResult) -> dict[str, MetricValue]:
    """Change of each metric that both evaluations have.

    Both draw the same prompts with the same seeds, so the change is estimated prompt by prompt: its standard error is
    that of the prompts' differences, which is smaller than what the two values' errors suggest. The change of a mean
    of metrics is the mean of their changes.
    """
    found: dict[str, MetricValue] = {}
    for name in [name for name in before.metrics if name in after.metrics]:
        was, now = before.metrics[name], after.metrics[name]
        parts = {part: found[part] for part in was.parts if part in found}
        both = was.by_prompt.keys() & now.by_prompt.keys()
        differences = {prompt: [now.by_prompt[prompt] - was.by_prompt[prompt]] for prompt in sorted(both)}
        complete = len(parts) == len(was.parts)
        change = (mean_of_metrics(parts) if complete else None) if was.parts else mean_over_images(differences)
        if change is not None:
            found[name] = change
    return found


def clear(change: MetricValue) -> bool:
    """Whether a change is more than two standard errors away from zero."""
    return change.error is not None and abs(change.value) > 2 * change.error
