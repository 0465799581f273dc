"""The tests of nodes_case.py, in a process of their own: several nodes change what Ray keeps in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASE = Path(__file__).with_name("nodes_case.py")
LINES = CASE.read_text().splitlines()
NAMES = [line.split("(")[0].removeprefix("def ") for line in LINES if line.startswith("def test_")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nodes(name):
    command = [sys.executable, "-m", "pytest", f"{CASE}::{name}", "-q"]
    done = subprocess.run(command, cwd=CASE.parents[2], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
