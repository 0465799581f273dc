"""What a run keeps of its steps is forgotten only as others take their place."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from stage_ray.observability.progress import Progress
from stage_ray.run.recording import GROUPS, StepRecorder
from tests.fake_run import metrics_of
from tests.flaky import timed_run


def test_recorded_groups_stay_until_a_resumed_run_trains_their_step_again(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / GROUPS / f"step-{step:06d}").mkdir(parents=True)

    def kept() -> list[str]:
        return sorted(path.name for path in (tmp_path / GROUPS).iterdir())

    with closing(StepRecorder(timed_run(tmp_path), tmp_path, 9, Progress(), resume_step=1)) as recorder:
        assert kept() == ["step-000001", "step-000002", "step-000003"]
        recorder.step(2, metrics_of(2, np.random.default_rng(0)))
        assert kept() == ["step-000001"]
