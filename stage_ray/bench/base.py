"""The frame: a bench declares variants, their trials run in turn, and each claim about them is a row.

Every variant has a fresh process: what leaks (vLLM's environment, Ray, the peak of the resident memory) stays there.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from stage_ray.config import RunConfig
from stage_ray.config.hardware import usable_cpus
from stage_ray.config.load import validate_config
from stage_ray.errors import RunError
from stage_ray.observability.logs import redirect_output
from stage_ray.observability.progress import Progress

Measurement = Mapping[str, Any]
Trials = Iterator[Measurement]
REST_S = 0.3  # OpenMP's threads spin for a while after their last work; the next variant must not pay for that


@dataclass(frozen=True, slots=True)
class Row:
    """One claim: a ratio against a named baseline of the same run, its target, and how far the limit is."""

    name: str  # bench/case/what, unique in a run
    target: float  # the ratio that was aimed for; reached from above or from below, as `better` says
    baseline: float  # as `ours` a median in `unit`
    ours: float
    ratio_is: str  # in words, such as "times as fast"
    baseline_is: str  # what was measured for it
    unit: Literal["s", "ms", "MiB"] = "s"
    better: Literal["higher", "lower"] = "higher"  # higher: the ratio is baseline by ours; lower: ours by baseline
    limit: float | None = None  # the least that is possible here, in `unit`; None where nothing sets one
    limit_is: str = ""  # what sets it
    details: Mapping[str, float] = field(default_factory=dict)  # further numbers; their names carry their units
    notes: Sequence[str] = ()  # what a reader must know to judge the ratio

    @property
    def ratio(self) -> float:
        """What the claim is about."""
        return self.baseline / self.ours if self.better == "higher" else self.ours / self.baseline

    @property
    def met(self) -> bool:
        """Whether the ratio is at least (or, where lower is better, at most) the target; a NaN never is."""
        return self.ratio >= self.target if self.better == "higher" else self.ratio <= self.target

    @property
    def share_of_limit(self) -> float | None:
        """Limit by ours: 1 is as good as this machine can do."""
        return None if self.limit is None else self.limit / self.ours

    def to_json(self) -> dict[str, Any]:
        """Everything above, in one flat object but for ``details`` and ``notes``."""
        return asdict(self) | {"ratio": self.ratio, "met": self.met, "share_of_limit": self.share_of_limit}


@dataclass(frozen=True, slots=True)
class Bench(ABC):
    """A comparison: a subclass declares its variants, its targets and its limits."""

    device: str  # cpu or cuda
    quick: bool  # small sizes and few repeats, to see that it works; the ratios are then no claims
    progress: Progress

    @abstractmethod
    def rows(self) -> list[Row]:
        """Measure with `interleave`, and state each claim."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One of what is compared: ``trials(**options)``, a generator of a module, loads everything and yields for ever.

    Each trial times itself and yields what it measured by name; ``seconds`` above all.
    """

    name: str
    trials: Callable[..., Trials]
    options: Mapping[str, Any] = field(default_factory=dict)


def interleave(
    variants: Sequence[Variant], *, repeats: int, progress: Progress, title: str, warmups: int = 1
) -> dict[str, list[Measurement]]:
    """Run the trials of the variants in turn, A B A B, so that what slows the machine for a minute slows all alike.

    Returns the measurements of each variant by its name, without the first ``warmups``. Raises a RunError where a
    variant fails; it says why and where its log is.
    """
    logs = Path(tempfile.mkdtemp(prefix="stage-ray-bench-"))
    measured: dict[str, list[Measurement]] = {variant.name: [] for variant in variants}
    with ExitStack() as stack, progress.bar(title, total=(warmups + repeats) * len(variants)) as advance:
        trials = {variant.name: stack.enter_context(_process(variant, logs)) for variant in variants}
        for _ in range(warmups + repeats):
            for name, trial in trials.items():
                time.sleep(REST_S)
                measured[name].append(trial())
                advance()
    shutil.rmtree(logs)
    return {name: found[warmups:] for name, found in measured.items()}


def median(trials: Sequence[Measurement], name: str) -> float:
    """Median of one number over the trials of a variant."""
    return statistics.median(float(trial[name]) for trial in trials)


def bench_run(model: str = "none", **sections: Any) -> RunConfig:
    """A run's config with the defaults everywhere but in ``sections``; it names no prompts and evaluates nothing."""
    data = {"steps": 1000, "prompts": {"train": "none"}, "policy": {"path": model}, "rewards": [{"type": "geneval"}]}
    return validate_config(data | {"evaluation": {"enabled": False}} | sections)


@contextmanager
def _process(variant: Variant, logs: Path) -> Iterator[Callable[[], Measurement]]:
    """A process for a variant; yields the call that runs one trial there."""
    log = logs / f"{variant.name.replace('/', '-')}.log"
    spawn = multiprocessing.get_context("spawn")
    pipe, other_end = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(other_end, str(log), usable_cpus()))
    process.start()
    other_end.close()

    def trial() -> Measurement:
        try:
            pipe.send(True)
            found, error = pipe.recv()
        except (EOFError, OSError):
            process.join()
            found, error = {}, f"its process ended with exit code {process.exitcode}"
        if error:
            raise RunError(f"bench: {variant.name} failed: {error}; its log is {log}")
        return found

    try:
        pipe.send(variant)
        yield trial
    finally:
        with suppress(OSError):  # it has ended already
            pipe.send(False)
        process.join()


def _serve(pipe: Connection, log: str, cpus: int) -> None:
    """In the new process: import the variant that comes first, then run a trial for each True."""
    # Before the variant's module comes and imports torch: OpenMP reads its variable when it is loaded.
    os.environ.update(OMP_NUM_THREADS=str(cpus), TOKENIZERS_PARALLELISM="false")
    redirect_output(log)
    try:
        variant: Variant = pipe.recv()
        trials = variant.trials(**variant.options)
        while pipe.recv():
            pipe.send((next(trials), ""))
    except Exception as error:  # as text: the other process may not unpickle it
        pipe.send(({}, f"{type(error).__name__}: {' '.join(str(error).split())}"))
        raise
