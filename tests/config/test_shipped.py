"""The shipped configs: found by name from everywhere, listed, and written to be edited."""

from __future__ import annotations

from pathlib import Path

import pytest

from stage_ray.cli import main
from stage_ray.config.load import load_config
from stage_ray.config.shipped import config_path, shipped_configs
from stage_ray.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
STUDIES = [name for name in FILES if name.startswith("study_")]
NAMES = [name for name in FILES if name not in STUDIES]


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_files_at_the_top_are_the_ones_that_ship() -> None:
    assert list(shipped_configs()) == NAMES
    assert all(file.samefile(CONFIGS / file.name) for file in shipped_configs().values())


@pytest.mark.parametrize("name", ["stage_shapeworld", "stage_shapeworld.yaml"])
def test_a_name_is_enough_and_a_file_here_goes_first(name: str, empty: Path) -> None:
    (empty / "stage_shapeworld").mkdir()  # a directory is no config
    assert load_config(name) == load_config(CONFIGS / "stage_shapeworld.yaml")
    (empty / name.removesuffix(".yaml")).rmdir()
    (empty / name).write_text("steps: 3")
    assert config_path(name) == Path(name)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("stage_shapewrld", "; did you mean 'stage_shapeworld'?"),
        ("configs/stage_shapeworld.yaml", "; did you mean 'stage_shapeworld'?"),
        ("sub/stage_shapeworld", "; did you mean 'stage_shapeworld'?"),
        ("mine", "; known here: ar_grpo_shapeworld, "),
        ("mine.yaml", ""),
    ],
)
@pytest.mark.parametrize("command", ["train", "fetch", "submit"])
def test_a_name_that_is_none_is_answered_with_the_nearest(
    command: str, name: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, name]) == 2
    error = capsys.readouterr().err
    assert f"config file {name} does not exist{fix}" in error and error.count("\n") == 1


def test_each_is_listed_with_its_three_opening_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    expected = []
    for name in NAMES + STUDIES:
        first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[:3]
        expected += [name, *("    " + line.removeprefix("# ") for line in first)]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_written_to_be_edited_means_the_same_wherever_it_lies(name: str, empty: Path) -> None:
    for file in NAMES:  # other configs beside it are not its base
        (empty / f"{file}.yaml").write_text("steps: 1")
    written = empty / "deeper" / "grpo_shapeworld.yaml"
    assert main(["init", f"{name}.yaml", "--out", str(written)]) == 0
    assert load_config(written) == load_config(CONFIGS / f"{name}.yaml")
    assert written.read_text().splitlines()[:3] == (CONFIGS / f"{name}.yaml").read_text().splitlines()[:3]


def test_nothing_is_overwritten_and_the_nearest_name_is_said(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "gcpo_shapeworld"]) == 0
    (empty / "gcpo_shapeworld.yaml").write_text("steps: 1")
    (empty / "link.yaml").symlink_to("nowhere.yaml")
    for more in ([], ["--out", "."], ["--out", "link.yaml"]):
        assert main(["init", "gcpo_shapeworld", *more]) == 2
    assert main(["init", "gcpo_shapewold"]) == 2
    error = capsys.readouterr().err
    assert error.count("exists and is not overwritten; name another with --out FILE") == 3
    assert "no config 'gcpo_shapewold' ships with stage_ray; did you mean 'gcpo_shapeworld'?" in error
    assert {file.name for file in empty.iterdir()} == {"gcpo_shapeworld.yaml", "link.yaml"}
    assert (empty / "gcpo_shapeworld.yaml").read_text() == "steps: 1"


def test_a_base_that_ships_no_more_is_named(empty: Path) -> None:
    (empty / "mine.yaml").write_text("base: package:stage_ray/configs/none.yaml")
    with pytest.raises(ConfigError, match="package:stage_ray/configs/none.yaml does not exist"):
        load_config("mine.yaml")


def test_the_lines_of_the_readme_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "stage_shapeworld", "--out", "mine.yaml"]) == 0
    assert main(["train", "mine.yaml", "--dry-run"]) == 0
    assert "run_dir: runs/stage_shapeworld\n" in capsys.readouterr().out
