"""Logs of the driver and its workers; with ``logs.format: json`` every line of Python's logging is one JSON object.

Fields: ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, ``run`` (the run directory's name), ``role`` and
``worker`` of the process, ``step`` and ``group_id`` (a list) where known, ``exc_info`` where something was raised, and
whatever a line brings along (``alarm``, ``metrics``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from stage_ray.files import deny_others_writing
from stage_ray.signals import ignore_signals

log = logging.getLogger("stage_ray")

MOST_BYTES, LOOK_S = 32 * 2**20, 2.0
"""Size above which a worker's log moves to ``NAME.log.1``, in place of what is there, and seconds between two looks."""
RUN = "STAGE_RAY_JSON_LOGS"  # set where logs are JSON, to the name of the run

_context: dict[str, Any] = {}
_handler: logging.Handler | None = None


def start_logs(form: str, run_id: str) -> None:
    """Let the driver's logging, and that of the workers it starts, be ``text`` (as Python does it) or ``json``."""
    global _handler
    os.environ.pop(RUN, None)
    if _handler is not None:
        logging.getLogger().removeHandler(_handler)
        logging.captureWarnings(False)
        log.setLevel(logging.NOTSET)
        sys.excepthook, _handler = sys.__excepthook__, None
    if form == "json":
        os.environ[RUN] = run_id
        _start(run=run_id, role="driver")
        sys.excepthook = _log_uncaught


def worker_environment() -> dict[str, str]:
    """Variables that tell a worker's process how to log: a local Ray's inherits them, another's ``runtime_env``."""
    return {RUN: os.environ[RUN]} if RUN in os.environ else {}


def redirect_output(log_file: str | None, role: str = "worker", worker: str = "worker") -> None:
    """Send this worker's stdout and stderr, C++ included, to a file; None leaves them to Ray's own, which Ray rotates.

    Every actor begins with this, so from here on files of a run are also writable by their owner only (a worker of a
    cluster that the run joined has that cluster's umask), and signals that end a job are the driver's alone. JSON lines
    carry ``role`` and ``worker``.
    """
    deny_others_writing()
    ignore_signals()
    if log_file is not None:
        path = Path(log_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        threading.Thread(target=_keep_short, args=(path,), daemon=True).start()
    if RUN in os.environ:
        _start(run=os.environ[RUN], role=role, worker=worker)


def _keep_short(path: Path) -> None:
    """Look at a log from time to time: what a scorer prints at every call would fill the disk.

    It is emptied, not renamed, so that whatever holds it open goes on at its beginning, the worker's own processes too.
    """
    while True:
        time.sleep(LOOK_S)
        with contextlib.suppress(OSError):
            if path.stat().st_size > MOST_BYTES:
                with contextlib.suppress(OSError):  # no room for it
                    _copy(path, path.with_name(f"{path.name}.1"), 2 * MOST_BYTES)
                os.truncate(path, 0)


def _copy(path: Path, to: Path, most: int) -> None:
    """Copy a file that may grow faster than it is read, ``most`` bytes of it or a little more."""
    with path.open("rb") as source, to.open("wb") as target:
        while target.tell() < most and (part := source.read(2**20)):
            target.write(part)


def bind_context(**fields: Any) -> None:
    """What the lines from here on are about, such as ``step=3`` or ``group_id=[7, 8]``; None takes a field away.

    It also removes the terminal handlers of Ray, vLLM and transformers, so that their lines reach the log; some of them
    are added long after its start.
    """
    if _handler is None:
        return
    _context.update(fields)
    for name in [name for name, value in _context.items() if value is None]:
        del _context[name]
    consoles = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    named = [*logging.root.manager.loggerDict.values()]  # loggers, and placeholders for names without one
    loggers = [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]
    for logger in loggers:
        for handler in [it for it in logger.handlers if it is not _handler and getattr(it, "stream", None) in consoles]:
            logger.removeHandler(handler)
            logger.propagate = True


def log_error(sentence: str) -> None:
    """Why a command ends: a line on stderr, or of the log where it is JSON."""
    if _handler is None:
        print(sentence, file=sys.stderr)
    else:
        log.error(sentence)


def _start(**context: str) -> None:
    """Log JSON from here on, each line with this context."""
    global _handler
    from pythonjsonlogger.core import RESERVED_ATTRS  # late: not every run logs JSON
    from pythonjsonlogger.json import JsonFormatter

    _context.clear()
    _handler = logging.StreamHandler(sys.stdout)
    form = JsonFormatter(
        ("message", "levelname", "name"),
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
        defaults=_context,  # by reference: later fields are in later lines
        reserved_attrs=[*RESERVED_ATTRS, "vllm_process_name"],  # vLLM's own field, in every record of the process
    )
    _handler.setFormatter(form)
    logging.getLogger().addHandler(_handler)
    logging.captureWarnings(True)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars are no lines
    log.setLevel(logging.INFO)
    bind_context(**context)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
