"""A run small enough for a repository: all that a comparison reads of it but the pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from stage_ray.errors import ConfigError
from stage_ray.evaluation.suites import suite_dirs
from stage_ray.files import atomic_write, read_json
from stage_ray.observability.metrics_logger import METRICS_FILE, read_steps
from stage_ray.report.curves import COLUMNS
from stage_ray.report.page import config_of
from stage_ray.run.run_dir import INPUTS, SMALL

AFTER = "after.json"
LARGE = ("by_prompt", "draws")  # of a metric: what intervals are made of, which only the end has


def export_runs(runs: Mapping[Path, Path]) -> None:
    """Write of each run directory a small one: source -> target, which must not exist.

    ``stage-ray compare`` makes the same numbers of the small ones. Of the evaluation after training each prompt's value
    in each metric is kept, of those between the metrics, of the steps `COLUMNS`.

    Raises:
        ConfigError: a source holds no run, or a target exists; nothing was written.
        RunError: a file of a run is damaged.
    """
    for source, target in runs.items():
        config_of(source)
        if target.exists():
            raise ConfigError(f"{target} exists; remove it, or export to another directory")
    for source, target in runs.items():
        target.mkdir(parents=True)
        for name in ("config.yaml", INPUTS, "machine.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        rows = [{name: row[name] for name in COLUMNS if name in row} for row in read_steps(source / METRICS_FILE)]
        atomic_write(target / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
        for directory in suite_dirs(source):
            for path in [directory / "before.json", *sorted(directory.glob("step-*.json")), directory / AFTER]:
                if (result := read_json(path)) is not None:
                    slim = dict(result) | {"images": []}
                    if path.name != AFTER:
                        slim["metrics"] = {
                            name: {key: value for key, value in metric.items() if key not in LARGE}
                            for name, metric in result["metrics"].items()
                        }
                    atomic_write(target / path.relative_to(source), json.dumps(slim, separators=(",", ":")))
        atomic_write(target / SMALL, "A small copy of a finished run: no weights, no pictures, nothing by image.\n")
