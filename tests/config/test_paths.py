"""Where results of a command would be lost, it says so and begins nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from stage_ray.cli import main
from stage_ray.config.paths import require_lasting

CONFIG = str(Path(__file__).parents[2] / "configs" / "stage_shapeworld.yaml")


@pytest.mark.parametrize(
    "command",
    [
        ["train", CONFIG],
        ["train", CONFIG, "--run-dir", "mine", "--dry-run"],
        ["evaluate", "some/model", "--json", "mine.json"],
        ["generate", "some/model", "--prompt", "a ring", "--out", "mine"],
        ["pretrain", "--out", "mine"],
        ["bench", "sync", "--json", "mine.json"],
    ],
    ids=lambda command: " ".join(command[::2]),
)
def test_where_a_ray_job_lies_nothing_is_written_that_would_be_lost_with_it(command, tmp_path, monkeypatch, capsys):
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    assert main(command) == 2
    assert "is relative: it would lie in this Ray job's temporary directory" in capsys.readouterr().err
    assert not list(package.iterdir())
    (package / "shared").symlink_to(tmp_path)  # storage that lasts
    for location in (package / "mine", "shared/mine", "../../../mine", None):
        require_lasting(location, "--out")
