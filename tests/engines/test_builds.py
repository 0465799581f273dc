"""A role that reserves no GPU gets none, and one that reserves a GPU gets that or a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stage_ray.cli import main
from stage_ray.commands import doctor
from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines import build_engine
from stage_ray.engines.vllm.environment import ON_A_GPU, needs_gpu, require_fitting_build
from stage_ray.errors import ConfigError
from stage_ray.policies.devices import device_for

DEFAULT_JOB = str(Path(__file__).parents[2] / "configs" / "stage_shapeworld.yaml")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a vLLM of some version in front of what is installed: its metadata, which is what vLLM itself goes by."""

    def install(version: str) -> None:
        facts = tmp_path / f"vllm-{version}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_vllm_for_gpus_without_a_gpu_is_refused_with_two_ways_out(installed):
    installed("0.32.0+cu129")
    assert needs_gpu()
    with pytest.raises(ConfigError, match=r"rollout.gpus is 0, .* 0.32.0\+cu129\) .* --set rollout.gpus=0.5 .*=torch"):
        require_fitting_build(RolloutConfig())
    require_fitting_build(RolloutConfig(gpus=0.5))
    require_fitting_build(RolloutConfig(engine="torch"))


def test_vllm_for_cpus_needs_none(installed):
    installed("0.32.0+cpu")
    require_fitting_build(RolloutConfig())


def test_the_engine_does_not_take_a_gpu_that_its_worker_did_not_reserve(installed):
    pytest.importorskip("vllm")
    installed("0.32.0")
    with pytest.raises(ConfigError, match="build for GPUs"):
        build_engine(PolicyConfig(path="nowhere"), RolloutConfig(), worker="w")


def test_on_a_machine_with_gpus_the_default_job_ends_in_a_sentence_and_the_doctor_knows_the_command(installed, capsys):
    installed("0.32.0")
    assert main(["train", DEFAULT_JOB, "--dry-run"]) == 2
    assert "rollout.gpus is 0" in capsys.readouterr().err
    (finding,) = doctor._vllm_build()
    assert finding.state == "missing" and finding.fix.startswith("stage-ray train stage_shapeworld --set")
    assert main(["train", DEFAULT_JOB, *ON_A_GPU.split(), "--dry-run"]) == 0
    assert "learner: 1 x 1 CPU, 0.5 GPU" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_a_reserved_gpu_that_torch_cannot_use_is_no_reason_to_use_the_cpu_in_silence():
    with pytest.raises(ConfigError, match=r"learner.gpus = 0.5 reserves a GPU, but torch .* sees none: it is a build "):
        device_for(0.5, "learner.gpus")
    assert device_for(0).type == "cpu"
