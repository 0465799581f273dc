"""Fair timing: every side of a comparison in a fresh process of its own, and the sides take turns.

State that leaks (vLLM's environment, Ray, the peak of the resident memory) stays in its process, and what slows the
machine for a minute slows all sides alike.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stage_ray.config.hardware import usable_cpus
from stage_ray.errors import RunError
from stage_ray.observability.progress import Progress

Facts = Mapping[str, Any]
Trial = Callable[[], Facts]
REST_S = 0.3  # OpenMP's threads spin for a while after their last work; the next side must not pay for that


@dataclass(frozen=True, slots=True)
class Variant:
    """One side of a comparison: ``build(**options)`` loads everything and returns the turn that is timed.

    ``build`` is a function of a module, and its options are plain values: they travel to another process. A turn times
    itself and returns what it found by name; ``seconds`` above all.

    Example:
        >>> def build(size: int) -> Turn:
        ...     return lambda: {"seconds": 0.0, "size": size}
        >>> Variant("empty", build, {"size": 3}).options["size"]
        3
    """

    name: str
    build: Callable[..., Trial]
    options: Mapping[str, Any] = field(default_factory=dict)


def compare(
    sides: Sequence[Variant], *, repeats: int, progress: Progress, title: str, warmups: int = 1
) -> dict[str, list[Facts]]:
    """Let the sides take turns, A B A B, each with every core while the others wait.

    Args:
        sides: built one after the other, each in a fresh process.
        repeats: turns of each side that count.
        warmups: turns of each side before them that do not.
        title: what the progress bar calls it.

    Returns:
        The facts of the turns that count, by the name of the side.

    Raises:
        RunError: a side failed; says why and where its log is.
    """
    logs = Path(tempfile.mkdtemp(prefix="stage-ray-bench-"))
    facts: dict[str, list[Facts]] = {side.name: [] for side in sides}
    rounds = warmups + repeats
    with ExitStack() as stack, progress.bar(title, total=(1 + rounds) * len(sides)) as advance:
        opened = []
        for side in sides:
            opened.append(stack.enter_context(_contestant(side, logs)))
            advance()
        for number in range(rounds):
            for side, turn in zip(sides, opened, strict=True):
                time.sleep(REST_S)
                found = turn()
                if number >= warmups:
                    facts[side.name].append(found)
                advance()
    shutil.rmtree(logs)
    return facts


@contextmanager
def _contestant(side: Variant, logs: Path) -> Iterator[Trial]:
    """A side in its process, loaded; yields the call that makes it take a turn."""
    log = logs / f"{side.name.replace('/', '-')}.log"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(side, theirs, str(log)))
    with _environment({"OMP_NUM_THREADS": str(usable_cpus()), "TOKENIZERS_PARALLELISM": "false"}):
        process.start()
    theirs.close()

    def answer() -> Facts:
        try:
            found, error = ours.recv()
        except EOFError:
            process.join()
            found, error = {}, f"its process ended with exit code {process.exitcode}"
        if error:
            raise RunError(f"bench: {side.name} failed: {error}; its log is {log}")
        return dict(found)

    def turn() -> Facts:
        ours.send("turn")
        return answer()

    try:
        answer()
        yield turn
    finally:
        ours.close()  # the other end reads end of file and leaves
        process.join(timeout=30)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(side: Variant, pipe: Connection, log: str) -> None:
    """The other process: build, then one turn for each word that arrives."""
    from stage_ray.observability.logs import redirect_output

    redirect_output(log)
    try:
        turn = side.build(**side.options)
        pipe.send(({}, ""))
        while _asked(pipe):
            pipe.send((turn(), ""))
    except Exception as error:
        traceback.print_exc()
        pipe.send(({}, f"{type(error).__name__}: {' '.join(str(error).split())}"))
        raise


def _asked(pipe: Connection) -> bool:
    try:
        return bool(pipe.recv())
    except EOFError:
        return False


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started meanwhile: OpenMP reads its own when it is loaded."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
