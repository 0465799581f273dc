"""TensorBoard events in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker:
    """One scalar a metric and step, under ``RUN_DIR/tensorboard``."""

    def __init__(self, run_dir: Path) -> None:
        self._directory = run_dir / "tensorboard"
        self._writer: SummaryWriter | None = None

    def open(self, step: int) -> None:
        """As `Tracker.open`."""
        self.close()
        self._writer = SummaryWriter(str(self._directory), purge_step=step + 1 if step else None)

    def step(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """As `Tracker.step`."""
        if self._writer is not None:
            for name, number in numbers.items():
                if number is not None and name != "step":
                    self._writer.add_scalar(name, number, step)
            self._writer.flush()

    def alarm(self, name: str) -> None:
        """Alarms are in ``alarms``, their number in a step."""

    def close(self) -> None:
        """As `Tracker.close`."""
        if self._writer is not None:
            self._writer.close()
