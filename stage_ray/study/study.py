"""A study: arms that differ in a few keys, each with its learning rate searched alike, on several seeds, compared.

A run is a process of its own, ``stage-ray train``, in a directory of its own, on this machine or on a node of a cluster
(`stage_ray.study.places`): one that is done is skipped, one that was cut off goes on, so a study may be stopped at
any time and started again.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from stage_ray.config import RunConfig
from stage_ray.config.load import load_config
from stage_ray.errors import ConfigError, RunError
from stage_ray.evaluation.base import read_result
from stage_ray.evaluation.suites import EVALUATION, resolve_suites
from stage_ray.files import atomic_write, read_json
from stage_ray.observability.metrics_logger import METRICS_FILE
from stage_ray.observability.progress import Progress
from stage_ray.report.compare import write_comparison
from stage_ray.run.run_dir import SMALL, is_finished
from stage_ray.run.stop import StopSignal
from stage_ray.study.config import Overrides, StudyConfig, slug
from stage_ray.study.places import ABSENT, TrainRun, places
from stage_ray.study.small_copy import export_runs

SEARCHED = "search.json"
LOOK_EVERY_S = 5.0  # at how far the runs are


@dataclass(frozen=True, slots=True)
class StudyRun:
    """One run of a study: a whole config with its own seed and directory."""

    label: str
    config: RunConfig

    @property
    def directory(self) -> Path:
        """Where the run writes."""
        return Path(self.config.run_dir)

    def is_done(self) -> bool:
        """Whether its directory holds it finished; a ConfigError where another run is there."""
        try:
            return is_finished(self.config)
        except ConfigError as error:
            raise ConfigError(
                f"{self.directory} holds another run than {self.label} of this study; move it away, or give the study "
                f"another dir ({error})"
            ) from error

    def steps_done(self) -> int:
        """How many updates it has recorded: its metrics have a line for each."""
        try:
            return (self.directory / METRICS_FILE).read_bytes().count(b"\n")
        except OSError:  # it has not begun, or its storage is away
            return 0

    def headline(self) -> float:
        """Its first suite's headline after training; a RunError where it has none."""
        result = read_result(self.directory / EVALUATION / "after.json")
        if result is None or result.headline_value is None:
            raise RunError(f"{self.directory} was not evaluated after training, so its value cannot be judged")
        return result.headline_value


class Study:
    """The runs of a study file, in the order in which they are done."""

    def __init__(self, study: StudyConfig, progress: Progress, name: str = "study") -> None:
        """Read every config. ``name``: of the page and its numbers.

        Raises:
            ConfigError: of `load_config`, with the arm; nothing was started.
        """
        self._study, self._progress, self._name = study, progress, name
        self.directory = Path(study.dir)
        self.searched = {name: self._search_runs(name) for name in study.arms} if study.search else {}
        self.reported = {name: self._reported_runs(name, []) for name in study.arms}

    def run(self) -> Path:
        """Do what is not done yet; the page that compares the arms.

        Raises:
            RunError: a run failed; names its log. Or no cluster answers.
            ConfigError: a directory holds a run of another config, or GPUs are to be shared out without a cluster.
            Interrupted: by a signal; runs under way have saved what they had.
        """
        study = self._study
        with places(study.address, study.cpus_per_run, study.gpus_per_run) as (train, room):
            return asyncio.run(self._run(train, room))

    async def _run(self, train: TrainRun, room: int | None) -> Path:
        async with StopSignal(self._progress, "the same command goes on with the study"):
            await self._train(self._searches(), train, room)
            self._choose()
            await self._train(self._reports(), train, room)
        arms = {run.directory: name for name, runs in self.reported.items() for run in runs}
        page = self.directory / f"{self._name}.html"
        return write_comparison(list(arms), page, page.with_suffix(".json"), arms)

    def export(self, directory: Path) -> int:
        """Write every run that is done small (`export_runs`), and what the study found, below a directory.

        Returns:
            How many runs; those that lie there already stay as they are.

        Raises:
            ConfigError: no run is done.
            RunError: a file of a run is damaged.
        """
        done = [run.directory for run, done in self.plan() if done]
        if not done:
            raise ConfigError(f"{self.directory} holds no run that is done, so there is nothing to export")
        small = {run: directory / run.relative_to(self.directory) for run in done}
        export_runs({run: target for run, target in small.items() if not target.exists()})
        for name in (f"{self._name}.json", SEARCHED):
            if (file := self.directory / name).is_file():
                shutil.copyfile(file, directory / name)
        return len(done)

    def keep(self, small: Path) -> None:
        """Take in what `export` wrote: small copies of runs that ``dir`` has not, which then count as done.

        Raises:
            ConfigError: the directory holds none.
        """
        found = sorted(path.parent for path in small.rglob(SMALL))
        if not found:
            raise ConfigError(f"--kept {small} holds no small copy of a run; name what --export wrote")
        for run in found:
            target = self.directory / run.relative_to(small)
            if not target.exists():
                scratch = target.with_name(target.name + ".tmp")
                shutil.rmtree(scratch, ignore_errors=True)
                shutil.copytree(run, scratch)
                scratch.replace(target)

    def plan(self) -> list[tuple[StudyRun, bool]]:
        """Every run in the order in which they are done, and whether it is."""
        searched = [(run, run.is_done()) for run in self._searches()]
        if found := all(done for _, done in searched):
            self._choose()
        return searched + [(run, found and run.is_done()) for run in self._reports()]

    def _searches(self) -> list[StudyRun]:
        return [run for values in self.searched.values() for runs in values.values() for run in runs]

    def _reports(self) -> list[StudyRun]:
        """Seed by seed, so that a study that is cut off has compared all arms on some."""
        return [runs[i] for i in range(len(self._study.seeds)) for runs in self.reported.values()]

    def _search_runs(self, name: str) -> dict[float, list[StudyRun]]:
        search = self._study.search
        assert search is not None
        return {
            value: [
                self._run_of(name, [*search.set, f"{search.key}={value!r}"], seed, f"search/{slug(name)}/{value:g}")
                for seed in search.seeds
            ]
            for value in search.values
        }

    def _reported_runs(self, name: str, more: Overrides) -> list[StudyRun]:
        return [self._run_of(name, more, seed, slug(name)) for seed in self._study.seeds]

    def _run_of(self, name: str, more: Overrides, seed: int, place: str) -> StudyRun:
        arm = self._study.arms[name]
        run_dir = self.directory / place / f"seed-{seed}"
        overrides = [*self._study.set, *arm.set, *more, f"seed={seed}", "cluster.metrics_port=null"]
        try:
            config = resolve_suites(load_config(arm.config or self._study.config, overrides, run_dir))
        except ConfigError as error:
            raise ConfigError(f"arm {name!r}: {error}") from error
        return StudyRun(f"{name}, {', '.join([*more, f'seed {seed}'])}", config)

    def _choose(self) -> None:
        """Give each arm the value with the highest mean headline; ``search.json`` has all that were found.

        Arms of other studies in the same directory keep their lines.
        """
        chosen: dict[str, dict[str, Any]] = {}
        for name, values in self.searched.items():
            found = {value: fmean(run.headline() for run in runs) for value, runs in values.items()}
            assert self._study.search is not None
            best = max(found, key=lambda value: found[value])
            chosen[name] = {"key": self._study.search.key, "value": best, "found": found}
            self.reported[name] = self._reported_runs(name, [f"{self._study.search.key}={best!r}"])
        if chosen:
            file = self.directory / SEARCHED
            text = json.dumps({**(read_json(file) or {}), **chosen}, indent=1)
            if not (file.is_file() and file.read_text(encoding="utf-8") == text):
                atomic_write(file, text)

    async def _train(self, runs: Sequence[StudyRun], train: TrainRun, room: int | None) -> None:
        """Train those that are not finished, as many at once as there is room for; one that fails stops the others."""
        left = [run for run in runs if not run.is_done()]
        if not left:
            return
        at_once = "as a cluster has room" if room is None else f"{room} at a time"
        steps = sum(run.config.steps for run in left)
        with self._progress.bar(f"steps of {len(left)} runs, {at_once}", steps) as advance:
            free = asyncio.Semaphore(room or len(left))
            looking = asyncio.create_task(follow(left, advance))
            try:
                async with asyncio.TaskGroup() as group:
                    for run in left:
                        group.create_task(self._train_one(run, train, free))
            except* RunError as failed:
                raise failed.exceptions[0] from None
            finally:
                looking.cancel()

    async def _train_one(self, run: StudyRun, train: TrainRun, free: asyncio.Semaphore) -> None:
        """One run to its end; its config and what it says lie below ``configs/``."""
        config = self.directory / "configs" / f"{run.directory.relative_to(self.directory)}.yaml"
        log = config.with_suffix(".log")
        async with free:
            self._progress.note(f"{run.label}: what it says is in {log}")
            config.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(config, yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
            code = await train(config, log)
        if code == ABSENT:
            raise RunError(
                f"the run of {run.label} found no {config} on its node: put dir on storage that all nodes share"
            )
        if code:
            said = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else ""
            last = (said.splitlines() or ["it said nothing"])[-1]
            raise RunError(f"the run of {run.label} ended with exit code {code}: {last} (all it said: {log})")
        self._progress.note(f"{run.label}: done")


async def follow(runs: Sequence[StudyRun], advance: Callable[[int], None]) -> None:
    """Move a bar by the steps of runs, wherever on shared storage they train, until cancelled."""
    seen = 0
    while True:
        done = sum(run.steps_done() for run in runs)
        advance(done - seen)
        seen = done
        await asyncio.sleep(LOOK_EVERY_S)
