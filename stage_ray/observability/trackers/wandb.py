"""Weights & Biases, on its servers or offline in ``RUN_DIR/wandb`` (``wandb sync`` sends that later)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from stage_ray.errors import ConfigError, RunError
from stage_ray.observability.trackers.base import TrackedRun

INIT_TIMEOUT_S = 30  # shorter than the heartbeat's deadline: the driver waits for it

log = logging.getLogger(__name__)


class WandbTracker:
    """Every start of a training run is one W&B run with the whole history, in the group of the run directory's name.

    W&B takes no step back and cannot resume offline. So a run that goes on, or back to a checkpoint, begins a new W&B
    run with the steps before it; the one before stays as it was.
    """

    def __init__(
        self,
        run: TrackedRun,
        *,
        project: str = "stage-ray",
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
    ) -> None:
        """Options as of ``wandb.init``; ``name``: null is the run directory's, ``mode``: null is ``WANDB_MODE``'s."""
        wandb = _imported()
        group = run.run_dir.resolve().name
        try:
            self._run = wandb.init(
                project=project,
                entity=entity,
                name=name or group,
                group=group,
                mode=mode,
                dir=str(run.run_dir),
                config=dict(run.config),
                settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_TIMEOUT_S),
            )
        except wandb.Error as error:
            raise RunError(
                f"logs.trackers: wandb did not start a run ({error}); check WANDB_API_KEY and the network, or set "
                "logs.tracker_options.wandb.mode=offline"
            ) from error
        self._picture = wandb.Image
        # Its own counter refuses what comes late, as pictures do: they are drawn while training goes on.
        self._run.define_metric("*", step_metric="step")
        if not self._run.offline:
            log.info("W&B run: %s", self._run.url)
        for step, metrics in run.history:
            self.step(step, metrics)
        for picture in run.pictures:
            self.image(*picture)

    @classmethod
    def check(cls, *, mode: str | None = None, **names: object) -> None:
        """Raise a ConfigError where wandb is not installed, would ask for a key, or gets an option that is no text."""
        _imported()
        for name, value in names.items():
            if not isinstance(value, str | None):
                raise ConfigError(f"logs.tracker_options.wandb.{name} = {value!r} is no text; put it in quotes")
        mode = mode or os.environ.get("WANDB_MODE") or "online"
        if mode not in ("online", "offline", "disabled"):
            raise ConfigError(f"logs.tracker_options.wandb.mode = {mode!r}: known are online, offline and disabled")
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise ConfigError(
                "logs.trackers: wandb needs its key in the environment; set WANDB_API_KEY, or "
                "logs.tracker_options.wandb.mode=offline"
            )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.step`."""
        self._run.log({"step": step, **metrics})

    def image(self, name: str, step: int, path: Path) -> None:
        """See `Tracker.image`."""
        self._run.log({"step": step, name: self._picture(str(path))})

    def close(self) -> None:
        """Send what is left, and end the W&B run."""
        self._run.finish()


def _imported() -> ModuleType:
    try:
        import wandb  # late: an extra
    except ModuleNotFoundError as error:
        raise ConfigError(
            "logs.trackers names wandb, which is not installed here; pip install 'stage-ray[wandb]', or leave it out"
        ) from error
    return wandb
