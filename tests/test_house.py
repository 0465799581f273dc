"""The house: which room imports from which, how many files stand at the top, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stage_ray"
LEVELS = (
    "errors",
    "registry records files signals",
    "config",
    "pretrained",
    "algorithm samplers",
    "recipes",
    "policies rewards observability actors",
    "weights",
    "engines learner",
    "evaluation workers",
    "cluster report",
    "pipeline",
    "run",
    "inference study",
    "train bench",
    "commands",
    "cli",
)
"""Rooms in the direction the data flows: each imports only from those of the lines before."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms.split()}
APART = {"shapeworld": {"commands", "bench"}, "__init__": set(LEVEL) | {"shapeworld"}, "__main__": set()}
"""Rooms outside the order -> who may import them; ShapeWorld itself may import everything but the programs."""
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """``stage_ray.engines.torch`` is in the room ``engines``; ``stage_ray`` itself in ``__init__``."""
    return (module.split(".") + ["__init__"])[1]


def imported(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import of ours below a node, functions included, ``if TYPE_CHECKING:`` left out."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        # `from stage_ray import engines` is an import of the room, not of the package.
        whole = node.module == "stage_ray"
        names = [f"stage_ray.{alias.name}" if whole else str(node.module) for alias in node.names]
    else:
        names = []
    for name in dict.fromkeys(names):
        if name.partition(".")[0] == "stage_ray":
            known = room_of(name) in LEVEL or room_of(name) in APART
            yield node.lineno, name if known else "stage_ray"  # `from stage_ray import __version__`
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def allowed(room: str, other: str) -> bool:
    """Whether a file of ``room`` may import from ``other``."""
    if room == other or room == "__main__":
        return True
    if other in APART:
        return room in APART[other]
    if room == "shapeworld":
        return LEVEL.get(other, 0) < LEVEL["train"]
    return room in LEVEL and LEVEL[other] < LEVEL[room]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_from_rooms_before_its_own(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    wrong = [
        f"{file.relative_to(PACKAGE.parent)}:{line} imports {name}"
        for line, name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if not allowed(room, room_of(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_place_in_the_order():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")}
    assert rooms <= LEVEL.keys() | APART.keys()


def test_at_most_eight_files_stand_at_the_top():
    assert len([path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__")]) <= 8


def test_no_file_is_over_400_lines():
    long = {str(file.relative_to(PACKAGE)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 400}
