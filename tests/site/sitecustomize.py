"""Python reads this first in every process of the tests (`make test` puts it on the path).

Garbage is collected less often: while large modules are imported the collector walks what stays, again and again, and
the tests start some hundred processes that do little else.

A worker of Ray with variables of its own is first a program that sets them (Ray's setup_worker.py), and imports Ray for
that: a tenth of the processor time of all tests. Here the variables are set and the worker begins.
"""

import gc
import sys

gc.set_threshold(200_000, 50, 50)


def start_worker(context: str, command: list[str]) -> None:
    """Become a worker in the environment of a ``context``; return where that asks for more than variables."""
    import json
    import os
    import re

    wanted = json.loads(context)
    variables = wanted.pop("env_vars", {})
    if wanted.pop("py_executable", sys.executable) == sys.executable and not any(wanted.values()):
        for name, value in variables.items():  # as Ray's `update_envs`
            os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
        os.execv(sys.executable, [sys.executable, *command])


match sys.orig_argv:
    case [_, program, *command, "--language=PYTHON", last] if program.endswith("/ray/_private/workers/setup_worker.py"):
        start_worker(last.removeprefix("--serialized-runtime-env-context="), command)
