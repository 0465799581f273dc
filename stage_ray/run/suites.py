"""Every suite of a run, before, during and after training, and what follows: metrics, an alarm, the best step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from stage_ray.cluster.cluster import Cluster
from stage_ray.config import RunConfig
from stage_ray.evaluation.base import EvaluationResult, changes, unlike
from stage_ray.evaluation.suites import BEST_FILE, is_rewarded, results
from stage_ray.files import atomic_write
from stage_ray.observability.alarms import overoptimization
from stage_ray.observability.metrics_logger import METRICS_FILE, read_steps
from stage_ray.observability.progress import Progress
from stage_ray.run.heldout import HeldOutEvaluation
from stage_ray.run.preflight import RunPrompts


class SuiteEvaluations:
    """The evaluations of a run, suite by suite, each by a single policy version: the learner waits for it.

    Attributes:
        own: that of the run's own prompts, which also draws the sample pictures.
    """

    def __init__(
        self,
        cluster: Cluster,
        run: RunConfig,
        prompts: RunPrompts,
        run_dir: Path,
        progress: Progress,
        image: Callable[[str, int, Path], None] = lambda name, step, path: None,
    ) -> None:
        """``image`` gets name, step and PNG of each picture that was drawn."""
        build = partial(HeldOutEvaluation, cluster, run, run_dir=run_dir, progress=progress, image=image)
        self.own = build(prompts=prompts.heldout)
        further = run.evaluation.suites if run.evaluation.enabled else []
        evaluations = [self.own] * (run.evaluation.enabled and run.prompts.heldout is not None)
        evaluations += [build(prompts=prompts.suites[str(suite.name)], suite=suite) for suite in further]
        self._evaluations = {str(evaluation.suite.name): evaluation for evaluation in evaluations}
        self._run, self._run_dir, self._progress = run, run_dir, progress
        self._found: dict[str, dict[int, EvaluationResult]] = {}  # suite -> updates done -> result

    async def before(self, step: int) -> float | None:
        """Evaluate before training, or read what a resumed run has found up to ``step``; the first suite's headline."""
        self._found = {}
        for name, evaluation in self._evaluations.items():
            first = await evaluation.evaluate("before", step)
            before_last = min(step, self._run.steps - 1)  # "after" is evaluated anew
            known = results(evaluation.directory) if step else {}
            known = {at: result for at, result in known.items() if at <= before_last}
            self._found[name] = known if first is None else {**known, 0: first}
        return self._headline(0)

    async def during(self, step: int, reward: float | None) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Evaluate after update ``step`` where that is due: metrics ``eval/SUITE/METRIC``, and alarms.

        Args:
            reward: ``reward/mean`` of that update, which is not in ``metrics.jsonl`` yet.
        """
        every, last = self._run.evaluation.every, step == self._run.steps
        if every is None or (step % every and not last):
            return {}, []
        await self._evaluate("after" if last else f"step-{step:06d}", step)
        metrics = {
            f"eval/{name}/{metric}": value.value
            for name, found in self._found.items()
            for metric, value in found[step].metrics.items()
        }
        return metrics, self._alarms(step, reward)

    async def after(self) -> float | None:
        """Evaluate after training, unless `during` did; the first suite's headline."""
        if any(self._run.steps not in found for found in self._found.values()):
            await self._evaluate("after", self._run.steps)
        return self._headline(self._run.steps)

    def scores(self) -> dict[int, float]:
        """Headline of the suite ``checkpoint.keep_best`` by the updates done, where it was found as the newest was."""
        found = self._found.get(self._run.checkpoint.keep_best or "", {})
        newest = found[max(found)] if found else None
        return {
            step: result.headline_value
            for step, result in found.items()
            if newest and result.headline_value is not None and not unlike(result.conditions, newest.conditions)
        }

    def record_best(self, step: int | None) -> None:
        """Say and write which step the model in ``best/`` is of."""
        if step is None:
            return
        suite, score = str(self._run.checkpoint.keep_best), self.scores()[step]
        headline = self._found[suite][step].headline
        best = {"suite": suite, "step": step, "headline": headline, "value": score}
        atomic_write(self._run_dir / BEST_FILE, json.dumps(best))
        self._progress.note(f"best/ is of step {step}: {headline} {score:.3f} of suite {suite}")

    async def _evaluate(self, label: str, step: int) -> None:
        for name, evaluation in self._evaluations.items():
            if (result := await evaluation.evaluate(label, step)) is not None:
                self._found[name][step] = replace(result, images=())  # of hundreds of evaluations they are too many

    def _headline(self, step: int) -> float | None:
        result = next(iter(self._found.values()), {}).get(step)
        return None if result is None else result.headline_value

    def _alarms(self, step: int, reward: float | None) -> list[tuple[str, str]]:
        """One for the first suite that falls while the reward rises, since the step at which that suite was best."""
        rows = {row["step"]: row.get("reward/mean") for row in read_steps(self._run_dir / METRICS_FILE)}
        rows[step] = reward
        for name, found in self._found.items():
            now, suite = found[step], self._evaluations[name].suite
            like = {at: it for at, it in found.items() if at < step and not unlike(it.conditions, now.conditions)}
            judged = {at: value for at, it in like.items() if (value := it.headline_value) is not None}
            if not judged or is_rewarded(self._run, suite):
                continue
            best = max(judged, key=judged.__getitem__)
            change = changes(like[best], now).get(now.headline)
            rewards = [value for at, value in sorted(rows.items()) if best < at <= step and value is not None]
            metric = f"{now.headline} of suite {name}"
            if change and (alarm := overoptimization(metric, best, change.value, change.error, rewards)):
                return alarm
        return []
