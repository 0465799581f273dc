"""What is particular to the vLLM engine: pairs stay together, a whole batch fits, and torch draws the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines.sampling import SamplingParams
from stage_ray.engines.torch import TorchEngine
from stage_ray.engines.vllm.environment import vllm_environment
from stage_ray.errors import ConfigError
from stage_ray.policies.janus.codec import JanusCodec
from stage_ray.records import Prompt, RolloutRequest
from tests.tiny import CODES, tiny_janus

pytest.importorskip("vllm")


def configs(directory: Path, **settings: object) -> tuple[PolicyConfig, RolloutConfig]:
    chosen = {"dtype": "float32", "images_per_batch": 12, "guidance_scale": 2.0, "kv_cache_gib": 0.25}
    return PolicyConfig.model_validate({"path": str(directory)}), RolloutConfig.model_validate(chosen | settings)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_janus(tmp_path_factory.mktemp("tiny") / "janus")


def test_a_row_without_its_partner_stops_the_batch() -> None:
    from stage_ray.engines.vllm.guidance import CONDITIONAL, UNCONDITIONAL, _lay_out, _Row

    guided, cpu = SamplingParams(guidance_scale=2.0), torch.device("cpu")
    rows = {
        0: _Row(image=4, branch=UNCONDITIONAL, seed=1, params=guided, output=[]),
        1: _Row(image=3, branch=CONDITIONAL, seed=2, params=guided, output=[]),
        2: _Row(image=4, branch=CONDITIONAL, seed=1, params=guided, output=[]),
    }
    with pytest.raises(RuntimeError, match="image 3: .* rollout.images_per_batch"):
        _lay_out(rows, cpu)
    del rows[1]
    layout = _lay_out(rows, cpu)
    assert layout.conditional.tolist() == [2] and layout.unconditional is not None
    assert layout.unconditional.tolist() == [0] and layout.images.tolist() == [4]


def test_the_exported_vocabulary_holds_image_ids_first(directory: Path) -> None:
    codec = JanusCodec.load(PolicyConfig.model_validate({"path": str(directory)}))
    config, flat = codec.config, codec.vllm_spec().config
    assert flat["vocab_size"] == CODES + config.text_config.vocab_size
    assert flat["hidden_size"] == config.text_config.hidden_size and flat["model_type"] == "llama"


def test_the_environment_keeps_vllm_in_its_process_and_within_its_cpus() -> None:
    environment = vllm_environment(RolloutConfig.model_validate({"cpus": 2.5}))
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["OMP_NUM_THREADS"] == "2"


def watch_addresses(worker: Any) -> list[tuple[int | None, ...]]:
    """Where the inputs of what vLLM compiles lie, in every step from now on."""
    model = worker.model_runner.model.language_model
    forward, seen = model.forward, []

    def watched(*inputs: torch.Tensor | None) -> torch.Tensor:
        seen.append(tuple(None if tensor is None else tensor.data_ptr() for tensor in inputs))
        return forward(*inputs)

    model.forward = watched
    return seen


@pytest.mark.slow
def test_engines_draw_the_same_images_a_batch_that_does_not_fit_and_a_long_prompt_are_named(directory: Path) -> None:
    """One start of vLLM for four statements, the fourth: a captured CUDA graph would find every input in its place."""
    from stage_ray.engines.vllm.engine import VllmEngine

    with pytest.raises(ConfigError, match="rollout.images_per_batch = 12 needs .* rollout.kv_cache_gib = 0.0002"):
        VllmEngine(*configs(directory, kv_cache_gib=0.0002), worker="w")

    engine = VllmEngine(*configs(directory), worker="vllm")
    (addresses,) = engine._llm.collective_rpc(watch_addresses)
    reference = TorchEngine(*configs(directory), worker="torch")
    requests = [
        RolloutRequest(i, Prompt(i, "a photo of a red circle"), tuple(range(8 * i, 8 * i + 8))) for i in range(6)
    ]
    pairs = list(zip(engine.generate(requests), reference.generate(requests), strict=True))
    different = np.concatenate([(a.tokens != b.tokens).any(axis=1) for a, b in pairs])
    assert different.mean() <= 0.05, f"{different.sum()} of {different.size} images differ"
    same = ~different
    delta = np.concatenate([np.abs(a.logprobs - b.logprobs) for a, b in pairs])[same]
    assert delta.max() < 2e-3

    with pytest.raises(ValueError, match="tokens, at most"):
        engine.generate([RolloutRequest(0, Prompt(0, "circle " * 200), (1,))])
    assert len(addresses) > 16 and len(set(addresses)) == 1, "vLLM replays graphs, which read where inputs lay at first"
    exported = Path(engine._directory.name)
    assert exported.is_dir()
    engine.close()
    assert not exported.exists()
