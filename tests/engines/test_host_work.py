"""Host work of the torch engine's decoded steps: operators a step, none of which waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines.base import ImageSequence
from stage_ray.engines.torch import TorchEngine
from stage_ray.policies.static_decoder import StaticDecoder
from stage_ray.samplers import SamplingParams
from stage_ray.samplers.guidance import GuidanceSchedule
from tests.tiny import IMAGE_TOKENS, SIZES, tiny_janus

# What would wait for a GPU: operators that read a value, or whose result's size depends on one, and calls that bring a
# tensor to the host, of which the dispatcher sees nothing where it lies there already.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}
WAITING |= {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"}
A_LAYER = 45  # operators of one layer and step, views included
OF_A_STEP = 110  # head, guidance, noise, draw, statistics and the next embedding


class Calls(TorchFunctionMode):
    """Counts in the last of ``steps`` what Python asks of tensors that would wait; the rest are `Operators`."""

    def __init__(self, steps: list[Counter[str]]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.steps and name in WAITING:
            self.steps[-1][name] += 1
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts in the last of ``steps`` the operators that reach the dispatcher."""

    def __init__(self, steps: list[Counter[str]]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.steps:
            name = func.overloadpacket.__name__
            given = [one.device for one in args if isinstance(one, torch.Tensor)]
            moved = isinstance(result, torch.Tensor) and any(device != result.device for device in given)
            self.steps[-1][f"{name} to another device" if moved else name] += 1
        return result


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchEngine]:
    path: Path = tiny_janus(tmp_path_factory.mktemp("tiny") / "janus")
    rollout = RolloutConfig.model_validate({"engine": "torch", "dtype": "float32", "guidance_scale": 2.0})
    engine = TorchEngine(PolicyConfig.model_validate({"path": str(path)}), rollout, worker="test")
    yield engine
    engine.close()


def operators(
    engine: TorchEngine, images: int, monkeypatch: pytest.MonkeyPatch, params: SamplingParams | None = None
) -> list[Counter[str]]:
    """The operators of every step, from one step of the decoder to the next, while ``images`` are sampled.

    With ``params`` every third image has no guidance.
    """
    texts = ("a photo of a red circle", "circle")  # of different lengths, so that there is padding to mask
    prompts = [engine.encode_prompt(texts[index % 2]) for index in range(images)]
    sequences = [ImageSequence(one, seed, not params or seed % 3 > 0) for seed, one in enumerate(prompts)]
    step, steps = StaticDecoder.step, list[Counter[str]]()

    def counted(decoder: StaticDecoder, embeds: torch.Tensor) -> torch.Tensor:
        steps.append(Counter())
        return step(decoder, embeds)

    with monkeypatch.context() as patch, Operators(steps), Calls(steps):
        patch.setattr(StaticDecoder, "step", counted)
        engine.sample(sequences, params or engine.params)
    return steps[:-1]  # the last one goes on into the records' copy to the host


def test_a_step_never_waits_and_its_operators_do_not_grow_with_images_or_positions(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (operators(engine, images, monkeypatch) for images in (2, 12))
    assert len(few) == IMAGE_TOKENS - 2  # of T - 1 steps
    for step in (*few, *many):
        assert step == few[0]
        assert not WAITING & step.keys() and not any("to another device" in name for name in step)
    assert few[0].total() <= SIZES.layers * A_LAYER + OF_A_STEP, few[0].most_common()


def test_a_guidance_schedule_and_images_without_guidance_never_wait_either(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(guidance_scale=2.0, schedule=GuidanceSchedule("cosine", 1.5, (0.1, 0.9)))
    few, many = (operators(engine, images, monkeypatch, params) for images in (2, 12))
    for step in (*few, *many):
        assert step == few[0]
        assert not WAITING & step.keys() and not any("to another device" in name for name in step)


def test_the_count_sees_an_operator_that_waits() -> None:
    steps = [Counter[str]()]
    with Operators(steps), Calls(steps):
        torch.ones(2).sum().item()
        torch.ones(2).cpu()
        torch.ones(2, device="meta").add(1)
        torch.empty_like(torch.ones(2), device="meta")
    assert steps[0]["_local_scalar_dense"] == steps[0]["item"] == steps[0]["cpu"] == 1
    assert steps[0]["empty_like to another device"] == 1
