"""The main job on a tiny random Janus: real Ray, real actors, the torch engine."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import JanusForConditionalGeneration

from stage_ray.errors import ConfigError, RunError
from stage_ray.train import train
from tests.runs import lines, tiny_run

pytestmark = pytest.mark.slow


def test_a_directory_that_holds_a_run_is_never_overwritten(tmp_path, model):
    run = tiny_run(tmp_path, model)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("steps: 1\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        train(run)
    assert (tmp_path / "run" / "config.yaml").read_text() == "steps: 1\n"


def test_a_broken_model_directory_is_a_config_error_that_names_it(tmp_path, model):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="empty has no config.json"):
        train(tiny_run(tmp_path, empty))
    assert not (tmp_path / "run").exists()


def test_more_object_store_than_memory_is_one_sentence(tmp_path, model):
    with pytest.raises(RunError, match="cluster.object_store_mb = 99999999 is more than"):
        train(tiny_run(tmp_path, model, cluster={"object_store_mb": 99999999, "metrics_port": None}))


def test_a_run_leaves_everything_a_user_looks_for(tmp_path, model):
    summary = train(tiny_run(tmp_path, model))
    run = summary.run_dir
    metrics = lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    promised = {
        "reward/mean",
        "reward/Brightness",
        "kl",
        "entropy/policy",
        "entropy/reference",
        "loss",
        "grad_norm",
        "similarity/mean",
    }
    promised |= {"staleness/max", "mismatch/abs_logprob", "images_per_s", "time/rollout_s", "alarms"}
    assert promised <= set(metrics[0])
    assert all(row["staleness/max"] == 0 for row in metrics)
    assert max(row["mismatch/abs_logprob"] for row in metrics) < 1e-4
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 0
    events = Counter(row["event"] for row in lines(run / "ledger.jsonl"))
    assert events == {"admitted": 8, "generated": 8, "scored": 8, "trained": 8}
    for name in (
        "config.yaml",
        "samples/step-000002.png",
        "evaluation/before.png",
        "evaluation/after.json",
        "report.html",
        "logs/rollout-0.log",
    ):
        assert (run / name).exists(), name
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]

    trained = JanusForConditionalGeneration.from_pretrained(run / "final").model.language_model.state_dict()
    base = JanusForConditionalGeneration.from_pretrained(model).model.language_model.state_dict()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
