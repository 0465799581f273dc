"""The exam: held-out prompts drawn and judged by the run's own workers, before and after; and the sample pictures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stage_ray.cluster.cluster import Cluster
from stage_ray.config import RunConfig
from stage_ray.errors import GroupsLostError, RunError
from stage_ray.evaluation import requests_for, summarise
from stage_ray.files import atomic_write
from stage_ray.observability.progress import Progress
from stage_ray.records import GroupRefs, Prompt, RolloutRequest, ScoredGroup
from stage_ray.report.samples import contact_sheet


class HeldOutEvaluation:
    """Every sitting has the same prompts and seeds, so its pictures can be laid side by side."""

    def __init__(
        self, cluster: Cluster, run: RunConfig, prompts: Sequence[Prompt], run_dir: Path, progress: Progress
    ) -> None:
        self._cluster, self._run, self._prompts = cluster, run, list(prompts)
        self._dir, self._progress = run_dir, progress
        self._drawing: asyncio.Task[None] | None = None
        stride = max(1, len(self._prompts) // run.evaluation.sample_prompts)
        self._sample_prompts = self._prompts[::stride][: run.evaluation.sample_prompts]

    async def evaluate(self, name: str, policy_version: int) -> float | None:
        """Evaluate all held-out prompts, write ``evaluation/NAME.json`` and a picture; the strict score, 0..1.

        A sitting that is on disk already (a resumed run's "before") is read, not repeated.
        """
        settings = self._run.evaluation
        if not settings.enabled:
            return None
        path = self._dir / "evaluation" / f"{name}.json"
        if path.exists() and name == "before":
            return json.loads(path.read_text(encoding="utf-8"))["overall"]
        requests = requests_for(self._prompts, settings.images_per_prompt, settings.seed)
        with self._progress.bar(f"evaluation {name}", len(requests)) as advance:
            scored = await self._judge(requests, advance)
        result = summarise(self._prompts, [verdicts for _, verdicts in scored])
        atomic_write(path, json.dumps({**result.to_json(), "policy_version": policy_version}, indent=1))
        await self._picture(self._dir / "evaluation" / f"{name}.png")
        shown = {"GenEval": result.overall} | {scorer: mean for scorer, mean in result.scores.items()}
        told = ", ".join(f"{scorer} {mean:.3f}" for scorer, mean in shown.items() if mean is not None)
        self._progress.note(f"evaluation {name}: held-out {told}")
        return result.overall

    async def sample(self, step: int) -> None:
        """Draw the fixed sample prompts with their fixed seeds, when a picture is due; training does not wait for it,
        unless it is synchronous."""
        if step % self._run.evaluation.sample_every == 0:
            await self.drawn()
            self._drawing = asyncio.create_task(self._picture(self._dir / "samples" / f"step-{step:06d}.png"))
        if self._run.pipeline.max_staleness == 0:
            await self.drawn()

    async def drawn(self) -> None:
        """Wait for the picture that is being drawn."""
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            await drawing

    async def _picture(self, path: Path) -> None:
        requests = requests_for(self._sample_prompts, 1, self._run.evaluation.seed)
        scored = await self._judge(requests, lambda count: None)
        pictures = await self._cluster.fetch([group.images for group, _ in scored])
        captions = [request.prompt.text for request in requests]
        contact_sheet(np.concatenate(pictures), captions, [_verdict(verdicts) for _, verdicts in scored], path)

    async def _judge(
        self, requests: Sequence[RolloutRequest], advance: Callable[[int], object]
    ) -> list[tuple[GroupRefs, ScoredGroup]]:
        """Generate in waves on all workers and score each wave; groups in the order of the requests."""
        groups_per_wave = max(1, self._run.rollout.images_per_batch // len(requests[0].seeds))
        waves = [requests[i : i + groups_per_wave] for i in range(0, len(requests), groups_per_wave)]

        async def judge(wave: Sequence[RolloutRequest]) -> list[tuple[GroupRefs, ScoredGroup]]:
            results = await self._scored(wave)
            scored = await self._cluster.fetch([group.scores for group in results])
            advance(len(wave))
            return list(zip(results, scored, strict=True))

        return [pair for judged in await asyncio.gather(*map(judge, waves)) for pair in judged]

    async def _scored(self, wave: Sequence[RolloutRequest]) -> list[GroupRefs]:
        """Generate and score one wave; as often as `cluster.attempts` allows where workers or nodes are lost."""
        error = ""
        for _ in range(self._run.cluster.attempts):
            groups = await self._cluster.generate(wave)
            try:
                results = await self._cluster.score(groups)
            except GroupsLostError as lost:
                error = str(lost)
                continue
            error = next((group.error for group in results if group.scores is None), "")
            if not error:
                return results
        raise RunError(f"evaluation: {error}")


def _verdict(scored: ScoredGroup) -> bool | None:
    """The strict verdict of a group's first image, where a scorer gave one."""
    return next((bool(said["correct"]) for said in scored.details[0].values() if "correct" in said), None)
