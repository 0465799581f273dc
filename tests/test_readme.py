"""What the README tells people to type works as written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from stage_ray.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHIPPED = ROOT / "stage_ray" / "world" / "assets" / "janus"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in re.sub(r"\\\n", " ", block).splitlines()]
    words = [shlex.split(re.sub(r"\s+#.*", "", line.replace("; do ", "\n"))) for line in lines if "stage-ray " in line]
    return [line[line.index("stage-ray") + 1 :] for line in words if "stage-ray" in line]


def test_the_readme_has_commands():
    assert len(commands()) >= 6


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_line_of_the_readme_is_one_that_the_program_takes(arguments):
    group = get_command(app)
    name, *rest = arguments
    if ";" in rest:
        rest = rest[: rest.index(";")]
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, [part.rstrip(";") for part in rest])


def test_the_plain_transformers_script_draws_a_picture(tmp_path):
    (script,) = blocks("python")
    assert script.count("runs/stage_shapeworld/final") == 2
    script = script.replace("runs/stage_shapeworld/final", str(SHIPPED))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=200)
    assert Image.open(tmp_path / "rings.png").size == (64, 64)
