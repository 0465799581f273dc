"""One suite's evaluation by the run's own workers; and the sample pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from stage_ray.cluster.backend import ClusterBackend
from stage_ray.cluster.cluster import Cluster
from stage_ray.config import RunConfig, SuiteConfig
from stage_ray.errors import GroupsLostError
from stage_ray.evaluation.base import EvaluationResult, find_benchmark, read_result, unlike, write_result
from stage_ray.evaluation.loop import conditions, evaluate, judge_in_batches, requests_for
from stage_ray.evaluation.measures.base import find_measure
from stage_ray.evaluation.measures.drift import IMAGES, drift_metrics
from stage_ray.evaluation.metrics import MetricValue
from stage_ray.evaluation.searching import searching
from stage_ray.evaluation.suites import EVALUATION, REFERENCE, own_suite
from stage_ray.observability.progress import Progress
from stage_ray.policies.reference import reference_location
from stage_ray.records import Prompt
from stage_ray.report.samples import contact_sheet


class HeldOutEvaluation:
    """The evaluations of one ``suite``, by default the run's own, by the run's workers.

    All have the same prompts and seeds, so that their pictures can be laid side by side.
    """

    def __init__(
        self,
        cluster: Cluster,
        run: RunConfig,
        prompts: Sequence[Prompt],
        run_dir: Path,
        progress: Progress,
        image: Callable[[str, int, Path], None] = lambda name, step, path: None,
        suite: SuiteConfig | None = None,
    ) -> None:
        """``image`` gets name, step and PNG of each picture that was drawn."""
        self._own, self.suite = suite is None, suite or own_suite(run)
        self._run, self._config = run, run.evaluation
        choice = {"search": self.suite.search, "search_options": self.suite.search_options}
        rollout = run.rollout.model_copy(update=choice)
        self._judged_by = run.model_copy(update={"rewards": self.suite.rewards, "rollout": rollout})
        plain = ClusterBackend(cluster, run, suite=None if suite is None else suite.name)
        self._measuring = ClusterBackend(cluster, run, measuring=True)
        self._measures = run.evaluation.measures if suite is None else []
        self._cluster, self._backend = cluster, searching(plain, self._judged_by)
        self._prompts, self._dir, self._progress, self._image = list(prompts), run_dir, progress, image
        self.directory = run_dir / EVALUATION / ("" if suite is None else str(suite.name))
        self._benchmark = find_benchmark(self.suite.benchmark)
        self._wait_for_pictures = run.pipeline.max_staleness == 0
        self._drawing: asyncio.Task[None] | None = None

    async def evaluate(self, name: str, policy_version: int) -> EvaluationResult | None:
        """Evaluate all prompts and write ``NAME.json``, and of the run's own prompts before and after a picture.

        An evaluation "before" that is on disk already, in a resumed run, is read, not repeated.
        """
        if not self._config.enabled:
            return None
        path, title = self.directory / f"{name}.json", f"evaluation {'' if self._own else f'{self.suite.name} '}{name}"
        requests = requests_for(self._prompts, self.suite.images_per_prompt or 1, self._config.seed)
        now = conditions(self._judged_by, self._benchmark, requests, self._config.seed, self._measures)
        if name == "before" and (kept := read_result(path)):  # the run before this one evaluated it
            if why := unlike(kept.conditions, now):
                self._progress.note(why)
            return kept
        if name == "before" and policy_version:
            self._progress.note(f"no {title} training: this run began without one")
            return None
        with self._progress.bar(title, len(self._prompts)) as advance:
            backend = self._measuring if self._measures else self._backend
            self._measuring.drawn.clear()
            found = await evaluate(backend, self._benchmark, requests, advance, self._measures)
        drift = await self._drift(policy_version) if self._measures else {}
        result = replace(found.with_metrics(drift), conditions=now)
        write_result(path, result, policy_version=policy_version)
        if self._own and name in ("before", "after"):
            await self._draw(f"evaluation/{name}", policy_version, path.with_suffix(".png"))
        shown = {result.headline: result.headline_value, **result.scores}
        told = ", ".join(f"{metric} {value:.3f}" for metric, value in shown.items() if value is not None)
        self._progress.note(f"{title}: held-out {told}")
        return result

    async def _drift(self, policy_version: int) -> dict[str, MetricValue]:
        """What the learner says of the groups that were just drawn, where a measure asks it."""
        groups = sorted(self._measuring.drawn, key=lambda group: group.group_id)
        if not any(find_measure(measure.measure).of_learner for measure in self._measures):
            return {}
        # Before the first update the policy is its own reference, unless another one is set or takes its place later.
        policy = self._run.policy
        fixed = reference_location(policy) == policy.path and not self._run.algorithm.reference_refresh
        anchor = policy_version == 0 and fixed
        directory = self.directory / REFERENCE
        try:
            found = await self._cluster.learner.drift(groups, directory, images=IMAGES, anchor=anchor)
        except GroupsLostError as lost:
            self._progress.note(f"how far the policy has moved is not known: {lost}")
            return {}
        return drift_metrics(*found)

    async def sample(self, step: int) -> None:
        """Draw the fixed sample prompts when a picture is due; only synchronous training waits for it."""
        if step % self._config.sample_every == 0:
            await self.drawn()
            path = self._dir / "samples" / f"step-{step:06d}.png"
            self._drawing = asyncio.create_task(self._draw("samples", step, path))
        if self._wait_for_pictures:
            await self.drawn()

    async def drawn(self) -> None:
        """Wait for the picture that is being drawn."""
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            await drawing

    async def _draw(self, name: str, step: int, path: Path) -> None:
        """Draw the fixed sample prompts, and hand their picture over."""
        count = self._config.sample_prompts
        prompts = self._prompts[:: max(1, len(self._prompts) // count)][:count]  # spread evenly over the tasks
        requests = requests_for(prompts, 1, self._config.seed)
        groups = await judge_in_batches(self._backend, requests, lambda group: group, images=True)
        images = np.concatenate([group.images for group in groups if group.images is not None])
        contact_sheet(images, [prompt.text for prompt in prompts], [group.verdict(0) for group in groups], path)
        self._image(name, step, path)
