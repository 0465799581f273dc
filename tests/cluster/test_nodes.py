"""The tests of nodes_case.py, in a process of their own: several nodes change what Ray keeps in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASE = Path(__file__).with_name("nodes_case.py")


@pytest.mark.slow
def test_nodes_that_die_and_join():
    command = [sys.executable, "-m", "pytest", str(CASE), "-q"]
    done = subprocess.run(command, cwd=CASE.parents[2], capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
