"""Prints what pip is configured to install from as shell assignments of uv's variables: uv reads no pip configuration.

    eval "$(.venv/bin/python deploy/pip_settings.py)"

A variable that is set already is left as it is. As for pip, one setting of an environment variable goes before
``[install]`` of its files, and that before ``[global]``; lists replace each other.
"""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping

SECTIONS = ("global", "install", ":env:")  # the later the stronger
VARIABLES = {  # pip's option -> uv's variable, and what stands between the parts of a list there
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}


def settings(lines: Iterable[str]) -> dict[str, str]:
    """Lines of ``pip config list``, ``SECTION.OPTION='VALUE'`` -> uv's variables."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in lines:
        name, _, value = line.partition("=")
        section, _, option = name.partition(".")
        if section in found:
            found[section][option.removeprefix("default-")] = str(ast.literal_eval(value))
    merged = {option: value for section in SECTIONS for option, value in found[section].items()}
    return {
        variable: between.join(merged[option].split())
        for option, (variable, between) in VARIABLES.items()
        if merged.get(option, "").split()
    }


def assignments(found: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """Lines for a shell. pip's order of indexes has no meaning, so the newest of what all have is taken."""
    chosen = {"UV_INDEX_STRATEGY": "unsafe-best-match", **found}
    return [f"export {name}={shlex.quote(value)}" for name, value in chosen.items() if name not in environment]


if __name__ == "__main__":
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    print("\n".join(assignments(settings(listed.stdout.splitlines()), os.environ)))
