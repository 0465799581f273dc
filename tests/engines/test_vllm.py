"""What is particular to the vLLM engine: pairs stay together, a whole batch fits, and torch draws the same images."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines.torch import TorchEngine
from stage_ray.engines.vllm.environment import vllm_environment
from stage_ray.errors import ConfigError
from stage_ray.policies.janus.codec import JanusCodec
from stage_ray.records import Prompt, RolloutRequest
from stage_ray.samplers import SamplingParams
from stage_ray.samplers.patch_index import PatchIndex
from stage_ray.samplers.retrieval import RetrievalRule
from stage_ray.weights.manifest import describe
from stage_ray.weights.process_groups import BroadcastGroup, GroupMember
from tests.tiny import CODES, tiny_janus

pytest.importorskip("vllm")


def configs(directory: Path, **settings: object) -> tuple[PolicyConfig, RolloutConfig]:
    chosen = {"dtype": "float32", "images_per_batch": 12, "guidance_scale": 2.0}
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
    assert layout.unconditional.tolist() == [0] and layout.images.tolist() == [4] and layout.guided is None


def test_an_image_without_guidance_has_one_row_which_stands_for_both() -> None:
    from stage_ray.engines.vllm.guidance import CONDITIONAL, UNCONDITIONAL, _lay_out, _Row

    params, cpu = SamplingParams(guidance_scale=2.0), torch.device("cpu")
    rows = {
        0: _Row(image=3, branch=CONDITIONAL, seed=2, params=params, output=[], guided=False),
        1: _Row(image=4, branch=CONDITIONAL, seed=1, params=params, output=[]),
        2: _Row(image=4, branch=UNCONDITIONAL, seed=1, params=params, output=[]),
    }
    layout = _lay_out(rows, cpu)
    assert layout.unconditional is not None and layout.guided is not None
    assert (layout.conditional.tolist(), layout.unconditional.tolist()) == ([0, 1], [0, 2])
    assert layout.guided.tolist() == [False, True]


def test_a_step_of_guidance_costs_the_host_the_same_for_any_number_of_images_and_fetches_nothing() -> None:
    """Every call, of Python's functions and of C's, is counted: a loop over rows would call something for each."""

    def calls(images: int) -> Counter[str]:
        guidance, outputs = guidance_of(images)
        logits, counted = torch.randn(2 * images, CODES), Counter[str]()
        for step in range(3):
            if step == 2:  # the first lays the batch out, and both fill caches
                sys.setprofile(
                    lambda frame, event, what: counted.update(
                        [frame.f_code.co_name] if event == "call" else [what.__name__] if event == "c_call" else []
                    )
                )
            try:
                guidance.update_state(None)
                guidance.apply(logits.clone())
            finally:
                sys.setprofile(None)
            for output in outputs:
                output.append(0)
        return counted

    few, many = calls(2), calls(64)
    assert few == many and few["argmax"] == 1
    assert not few.keys() & {"cpu", "item", "tolist", "numpy", "synchronize"}


def test_images_of_a_batch_that_are_not_equally_far_are_recorded_where_they_are() -> None:
    guidance, outputs = guidance_of(2)
    outputs[2].append(1), outputs[3].append(1)  # the second image is one token ahead
    for step in range(2):
        guidance.apply(torch.randn(4, CODES))
        written = guidance._records[0] != 0
        assert written.int().tolist() == [[1, step, 0, 0], [0, 1, step, 0]]
        for output in outputs:
            output.append(0)


def guidance_of(images: int) -> tuple[Any, list[list[int]]]:
    """Guidance over a batch of pairs that has just begun, and the tokens of each row as vLLM keeps them."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    from stage_ray.engines.vllm.guidance import PairedGuidance, image_params

    said = SimpleNamespace(image_tokens=4, row_end=None)
    model, scheduler = SimpleNamespace(hf_config=said), SimpleNamespace(max_num_seqs=images)
    config: Any = SimpleNamespace(model_config=model, scheduler_config=scheduler)
    guidance, params = PairedGuidance(config, torch.device("cpu"), False), SamplingParams(guidance_scale=2.0)
    outputs: list[list[int]] = [[] for _ in range(2 * images)]
    added = [(row, image_params(4, row // 2, row % 2, row // 2, params), [], outputs[row]) for row in range(2 * images)]
    guidance.update_state(BatchUpdate(batch_size=2 * images, removed=[], added=added, moved=[]))
    return guidance, outputs


def test_requests_with_one_prompt_share_its_whole_blocks_and_copy_the_one_that_it_ends_in() -> None:
    from stage_ray.engines.vllm.batch import place_blocks

    long, short = tuple(range(11)), (7,)  # of blocks of 4: all but the last token fill two blocks and a half, and none
    placed = place_blocks([long, short, long, long, short], tokens=4, size=4)
    assert placed.of_prompts == {long: [1, 2, 3, 4], short: [5, 6]}
    assert placed.of_requests == [[1, 2, 3, 4], [5, 6], [1, 2, 7, 8], [1, 2, 9, 10], [11, 12]]
    assert placed.copies == [(3, 7), (3, 9)]
    whole = tuple(range(9))  # its last token is the first of a block
    assert place_blocks([whole, whole], tokens=3, size=4).of_requests == [[1, 2, 3], [1, 2, 4]]
    assert place_blocks([whole, whole], tokens=3, size=4).copies == []


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


SENDER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from stage_ray.weights.process_groups import BroadcastGroup, GroupMember
group, tensors = BroadcastGroup(), load_file(sys.argv[1])
print(group.open("127.0.0.1", 60), flush=True)
group.send(GroupMember(1, sys.stdin.readline().strip(), 0, 2, "gloo", 60), sorted(tensors.items()))
"""


def broadcast(tensors: dict[str, torch.Tensor], file: Path) -> list[tuple[str, torch.Tensor]]:
    """A version as a learner in another process sends it to this one, which vLLM has process groups of its own in."""
    save_file(tensors, file)
    command = [sys.executable, "-c", SENDER, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdin is not None and sender.stdout is not None
        address = sender.stdout.readline().strip()
        sender.stdin.write(f"{address}\n")
        sender.stdin.flush()
        manifest = describe(1, sorted(tensors.items()), torch.device("cpu"))
        return BroadcastGroup().receive(GroupMember(1, address, 1, 2, "gloo", 60), manifest)


@pytest.mark.slow
def test_engines_draw_the_same_images_a_batch_that_does_not_fit_and_a_long_prompt_are_named(
    directory: Path, tmp_path: Path
) -> None:
    """One start of vLLM for six statements: also that a captured CUDA graph would find every input in its place, and
    that a version which comes by broadcast is the one that is served."""
    from stage_ray.engines.vllm.engine import VllmEngine

    with pytest.raises(ConfigError, match="rollout.images_per_batch = 12 needs .* rollout.kv_cache_gib = 0.0002"):
        VllmEngine(*configs(directory, kv_cache_gib=0.0002), worker="w")

    drawn = "a photo of a photo of a red circle, high quality"
    codec = JanusCodec.load(PolicyConfig.model_validate({"path": str(directory)}))
    longest = codec.encode_prompt(drawn).longest  # and no memory for more, as preflight has it
    settings = configs(directory, prompt_transform="template", max_prompt_tokens=longest)
    engine = VllmEngine(*settings, worker="vllm")
    (addresses,) = engine._llm.collective_rpc(watch_addresses)
    reference = TorchEngine(*settings, worker="torch")
    requests = [
        RolloutRequest(i, Prompt(i, "a photo of a red circle"), tuple(range(8 * i, 8 * i + 8))) for i in range(6)
    ]
    pairs = list(zip(engine.generate(requests), reference.generate(requests), strict=True))
    different = np.concatenate([(a.tokens != b.tokens).any(axis=1) for a, b in pairs])
    assert all(a.prompt == b.prompt and a.prompt.drawn == drawn for a, b in pairs)
    assert different.mean() <= 0.05, f"{different.sum()} of {different.size} images differ"
    same = ~different
    delta = np.concatenate([np.abs(a.logprobs - b.logprobs) for a, b in pairs])[same]
    assert delta.max() < 2e-3

    codes = torch.randint(CODES, (8, *reference.codec.grid), generator=torch.Generator().manual_seed(0)).int()
    PatchIndex(codes, reference.codec.codebook()).save(tmp_path / "patches.safetensors")
    rule = RetrievalRule(index=str(tmp_path / "patches.safetensors"), lam=0.5, k=8)
    retrieving = SamplingParams(guidance_scale=2.0, rule=rule)
    (served,), (wanted,) = (one.generate(requests[:1], retrieving) for one in (engine, reference))
    equal = (served.tokens == wanted.tokens).all(axis=1)
    assert equal.mean() >= 0.75 and np.abs(served.guided_logprobs - wanted.guided_logprobs)[equal].max() < 2e-3
    assert (served.tokens != pairs[0][0].tokens).any(), "a rule that reads a file and the neighbours, in vLLM too"

    with pytest.raises(ValueError, match=rf"at most {longest} fit \(rollout.max_prompt_tokens\)"):
        engine.generate([RolloutRequest(0, Prompt(0, "a photo of a red circle and more"), (1,))])
    assert len(addresses) > 16 and len(set(addresses)) == 1, "vLLM replays graphs, which read where inputs lay at first"
    trained = {name: parameter * 1.2 for name, parameter in reference._policy.trained_parameters().items()}
    received = broadcast({name: tensor.detach().contiguous() for name, tensor in trained.items()}, tmp_path / "version")
    for one in (engine, reference):
        one.load_weights(1, received)
    (served,), (wanted,) = engine.generate(requests[:1]), reference.generate(requests[:1])
    assert served.policy_version == 1 and (served.tokens != pairs[0][1].tokens).any()
    equal = (served.tokens == wanted.tokens).all(axis=1)
    assert equal.mean() >= 0.75 and np.abs(served.logprobs - wanted.logprobs)[equal].max() < 2e-3

    exported = Path(engine._directory.name)
    assert exported.is_dir()
    engine.close()
    assert not exported.exists()
