"""Scorers that no config of the paper's runs names, in the actors of a real run: from the config to the metrics."""

from __future__ import annotations

import numpy as np
import pytest

from stage_ray.train import train
from tests.rewards.checkpoints import save_clip, save_dino, save_head, save_image_reward
from tests.rewards.services import chat, service
from tests.runs import lines, tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_ray")]


def test_every_further_scorer_scores_in_a_run(tmp_path, plain):
    clip, dino = str(save_clip(tmp_path / "clip")), str(save_dino(tmp_path / "dino"))
    save_head(tmp_path / "head.pth")
    save_image_reward(tmp_path / "ImageReward.pt")
    with service(chat(lambda images, question: f"Final Score: {1 + 4 * images[0].mean() / 255:.4f}")) as url:
        rewards = [
            {"type": "clip", "options": {"path": clip}},
            {"type": "pickscore", "options": {"path": clip, "processor": None}},
            {"type": "aesthetic", "options": {"path": clip, "head": str(tmp_path / "head.pth")}},
            {"type": "image_reward", "options": {"path": str(tmp_path / "ImageReward.pt"), "processor": clip}},
            {"type": "features", "weight": 0.0, "options": {"path": dino}},
            {"type": "vlm_judge", "workers": 1, "options": {"model": "m", "url": f"{url}/v1"}},
        ]
        train(tiny_run(tmp_path, plain, steps=1, rewards=rewards, evaluation={"enabled": False}))
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    found = {reward["type"]: row[f"reward/{reward['type']}"] for reward in rewards}
    assert np.isfinite(list(found.values())).all() and 0 < found["vlm_judge"] < 1
    assert -1 <= found["clip"] <= 1 and 0 < found["features"] < 2
    assert found["pickscore"] == pytest.approx(found["clip"] * np.exp(2.6592), rel=1e-3)  # CLIP's first logit scale
    assert (row["scoring/rescored"], row["scoring/replaced"]) == (0, 0)
