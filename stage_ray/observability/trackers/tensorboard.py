"""TensorBoard: event files in ``RUN_DIR/tensorboard``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from stage_ray.observability.trackers.base import TrackedRun


class TensorBoardTracker:
    """One scalar a metric and step, one picture a PNG; the config is a text."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: takes a second, which a dry run need not wait for

        directory = run.run_dir / "tensorboard"
        # A purge hides the later steps that were written before, by whichever run began here.
        purge_step = run.step + 1 if directory.exists() else None
        # Files are read in the order of their names, which hold the second: a purge must follow what it purges.
        while any(f".{int(time.time())}." in path.name for path in directory.glob("events.*")):
            time.sleep(0.05)
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        if run.config:
            text = yaml.safe_dump(dict(run.config), sort_keys=False)
            self._writer.add_text("config", f"```yaml\n{text}```", run.step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.step`; it is on disk when this returns."""
        for name, number in metrics.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def image(self, name: str, step: int, path: Path) -> None:
        """See `Tracker.image`."""
        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
