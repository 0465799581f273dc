"""Interleaved timing: every variant in a fresh process of its own, one trial of each in turn.

State that leaks (vLLM's environment, Ray, the peak of the resident memory) stays in its process, and what slows the
machine for a minute slows all variants alike.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stage_ray.config.hardware import usable_cpus
from stage_ray.errors import RunError
from stage_ray.observability.progress import Progress

Measurement = Mapping[str, Any]
Trial = Callable[[], Measurement]
REST_S = 0.3  # OpenMP's threads spin for a while after their last work; the next variant must not pay for that
_trials: list[Trial] = []  # in a variant's process: its only trial


@dataclass(frozen=True, slots=True)
class Variant:
    """One of what is compared: ``build(**options)`` loads everything and returns the trial that is timed.

    ``build`` is a function of a module, and its options are plain values: they travel to another process. A trial
    times itself and returns what it measured by name; ``seconds`` above all.

    Example:
        >>> def build(size: int) -> Trial:
        ...     return lambda: {"seconds": 0.0, "size": size}
        >>> Variant("empty", build, {"size": 3}).options["size"]
        3
    """

    name: str
    build: Callable[..., Trial]
    options: Mapping[str, Any] = field(default_factory=dict)


def interleave(
    variants: Sequence[Variant], *, repeats: int, progress: Progress, title: str, warmups: int = 1
) -> dict[str, list[Measurement]]:
    """Run the trials of the variants in turn, A B A B, each with every core while the others wait.

    Args:
        variants: built one after the other, each in a fresh process that keeps what it built.
        repeats: trials of each variant that count.
        warmups: trials of each variant before them that do not.
        title: what the progress bar calls it.

    Returns:
        The measurements of the trials that count, by the name of the variant.

    Raises:
        RunError: a variant failed; says why and where its log is.
    """
    logs = Path(tempfile.mkdtemp(prefix="stage-ray-bench-"))
    measured: dict[str, list[Measurement]] = {variant.name: [] for variant in variants}
    rounds = warmups + repeats
    with ExitStack() as stack, progress.bar(title, total=(1 + rounds) * len(variants)) as advance:
        trials = {}
        for variant in variants:
            trials[variant.name] = stack.enter_context(_process(variant, logs))
            advance()
        for number in range(rounds):
            for name, trial in trials.items():
                time.sleep(REST_S)
                found = trial()
                if number >= warmups:
                    measured[name].append(found)
                advance()
    shutil.rmtree(logs)
    return measured


@contextmanager
def _process(variant: Variant, logs: Path) -> Iterator[Trial]:
    """A variant built in its own process; yields the call that runs one trial there."""
    log = logs / f"{variant.name.replace('/', '-')}.log"
    spawn = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(1, spawn, _prepare, (str(log), usable_cpus())) as pool:

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return pool.submit(_logged, function, *arguments).result()
            except BrokenProcessPool:
                process.join()
                reason = f"its process ended with exit code {process.exitcode}"
            except RunError as error:
                reason = str(error)
            raise RunError(f"bench: {variant.name} failed: {reason}; its log is {log}")

        pool.submit(int)  # the first task starts the process; an executor tells no exit codes, the process does
        (process,) = (child for child in multiprocessing.active_children() if child not in others)
        call(_build, variant)
        yield lambda: call(_run_trial)


def _prepare(log: str, cpus: int) -> None:
    """First of all in the new process, before torch is imported: OpenMP reads its variable when it is loaded."""
    os.environ.update(OMP_NUM_THREADS=str(cpus), TOKENIZERS_PARALLELISM="false")
    from stage_ray.observability.logs import redirect_output

    redirect_output(log)


def _build(variant: Variant) -> None:
    _trials.append(variant.build(**variant.options))


def _run_trial() -> Measurement:
    return _trials[0]()


def _logged(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; its error goes to the log, and as text to the other process, which may not unpickle it."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        raise RunError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
