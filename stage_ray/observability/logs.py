"""Logs of the driver and its workers; with ``logs.format: json`` every line of Python's logging is one JSON object.

Fields: ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, ``run`` (the run directory's name), ``role`` and
``worker`` of the process, ``step`` and ``group_id`` (a list) where known, ``exc_info`` where something was raised, and
whatever a line brings along (``alarm``, ``metrics``).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from stage_ray.files import deny_others_writing

log = logging.getLogger("stage_ray")

FORMAT = "STAGE_RAY_LOG_FORMAT"
RUN = "STAGE_RAY_LOG_RUN"

_context: dict[str, Any] = {}
_handler: logging.Handler | None = None


def start_logs(form: str, run_id: str, stream: TextIO | None = None) -> None:
    """Let the driver's logging, and that of the workers it starts, be ``text`` (as Python does it) or ``json``.

    Example:
        start_logs("json", "stage_shapeworld")
        log.warning("slow")  # {"level": "WARNING", "logger": "stage_ray", "message": "slow", "run": ..., "time": ...}
    """
    for name in (FORMAT, RUN):
        os.environ.pop(name, None)
    if _handler is not None:
        _remove_handler()
        logging.captureWarnings(False)
        log.setLevel(logging.NOTSET)
        sys.excepthook = sys.__excepthook__
    if form == "json":
        os.environ.update({FORMAT: form, RUN: run_id})
        _start({"run": run_id, "role": "driver"}, stream)
        sys.excepthook = _log_uncaught


def worker_environment() -> dict[str, str]:
    """Variables that tell a worker's process how to log: a local Ray's inherits them, another's ``runtime_env``."""
    return {name: os.environ[name] for name in (FORMAT, RUN) if name in os.environ}


def redirect_output(log_file: str | None, role: str = "worker", worker: str = "worker") -> None:
    """Send this worker's stdout and stderr, C++ included, to a file; None leaves them to Ray's own log files.

    Args:
        log_file: it need not exist.
        role: rollout, reward or learner.
        worker: what the driver and the metrics call this worker; its lines carry that name.

    Every actor begins with this, so from here on files of a run are also writable by their owner only: a worker of a
    cluster that the run joined has that cluster's umask.
    """
    deny_others_writing()
    if log_file is not None:
        path = Path(log_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    if os.environ.get(FORMAT) == "json":
        _start({"run": os.environ.get(RUN, ""), "role": role, "worker": worker}, None)


def bind_context(**facts: Any) -> None:
    """What the lines from here on are about, such as ``step=3`` or ``group_id=[7, 8]``; None takes a field away."""
    if _handler is not None:
        _context.update(facts)
        for name in [name for name, value in facts.items() if value is None]:
            del _context[name]
        _remove_other_consoles()


def log_error(sentence: str) -> None:
    """Why a command ends: a line on stderr, or of the log where it is JSON."""
    if _handler is None:
        print(sentence, file=sys.stderr)
    else:
        log.error(sentence)


def _start(context: dict[str, Any], stream: TextIO | None) -> None:
    global _handler
    from pythonjsonlogger.json import JsonFormatter  # late: not every run logs JSON

    _remove_handler()
    _context.clear()
    _context.update(context)
    _handler = logging.StreamHandler(stream or sys.stdout)
    _handler.addFilter(_add_context)
    renamed = {"levelname": "level", "name": "logger"}
    fields = "{message}{levelname}{name}"
    _handler.setFormatter(JsonFormatter(fields, style="{", rename_fields=renamed, timestamp="time"))
    logging.getLogger().addHandler(_handler)
    logging.captureWarnings(True)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars are no lines
    log.setLevel(logging.INFO)
    _remove_other_consoles()


def _remove_handler() -> None:
    global _handler
    if _handler is not None:
        logging.getLogger().removeHandler(_handler)
        _handler = None


def _add_context(record: logging.LogRecord) -> bool:
    for name in ("_ray_timestamp_ns", "vllm_process_name"):  # libraries' own fields in every record of the process
        record.__dict__.pop(name, None)
    for name, value in _context.items():
        record.__dict__.setdefault(name, value)
    return True


def _remove_other_consoles() -> None:
    """Remove the terminal handlers of Ray, vLLM and transformers, so that their lines reach ours.

    Some of them are added long after our start.
    """
    consoles = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    for logger in (logging.getLogger(), *list(logging.root.manager.loggerDict.values())):
        if not isinstance(logger, logging.Logger):
            continue
        for handler in [h for h in logger.handlers if h is not _handler and getattr(h, "stream", None) in consoles]:
            logger.removeHandler(handler)
            logger.propagate = True


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
