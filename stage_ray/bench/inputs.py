"""What the benches run on: models with random weights, shipped prompts of equal length, and groups of any tokens."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from transformers import AutoProcessor
from transformers.utils.logging import disable_progress_bar

from stage_ray.config.paths import resolve_path
from stage_ray.pipeline.prompt_files import load_prompts
from stage_ray.policies.codec import PromptIds
from stage_ray.policies.janus.builder import JanusSizes, build_model, write_checkpoint
from stage_ray.records import Prompt, RolloutGroup

SHIPPED = "package:stage_ray/shapeworld/assets/janus"
TRAIN = "package:stage_ray/shapeworld/assets/prompts/train.jsonl"
GIGABYTE = JanusSizes(hidden=1024, layers=20, heads=16, intermediate=2688, codes=1024, side=8, prompt_tokens=128)
FIFTY_MILLION = JanusSizes(hidden=512, layers=12, heads=8, intermediate=1536, codes=16384, side=16, prompt_tokens=128)
JANUS_PRO_1B = JanusSizes(
    hidden=2048,
    layers=24,
    heads=16,
    intermediate=5632,
    codes=16384,
    side=24,
    vocabulary=102_400,
    prompt_tokens=1024,
    tied=False,
    channel_multiplier=(1, 1, 2, 2, 4),
    latent_channels=256,
    base_channels=128,
    res_blocks=2,
)
"""The published model's shapes, but for the image encoder, which generation never runs."""
SMALL = JanusSizes(hidden=128, layers=2, heads=2, intermediate=256, codes=1024, side=8, prompt_tokens=128)


def write_model(directory: Path, sizes: JanusSizes) -> Path:
    """Write a checkpoint of these sizes, with the shipped model's words and template; its directory."""
    disable_progress_bar()
    processor = AutoProcessor.from_pretrained(resolve_path(SHIPPED))
    return write_checkpoint(directory, build_model(sizes, processor.tokenizer, seed=0), processor)


@contextmanager
def model_of(sizes: JanusSizes | None) -> Iterator[str]:
    """The shipped model, or one of other sizes that is made now and removed afterwards; its pictures are noise."""
    if sizes is None:
        yield SHIPPED
        return
    with tempfile.TemporaryDirectory(prefix="stage-ray-bench-model-") as directory:
        yield str(write_model(Path(directory), sizes))


def equal_prompts(encode: Callable[[str], PromptIds], path: str = TRAIN) -> list[tuple[Prompt, PromptIds]]:
    """The prompts of a file that have its most frequent length in tokens, so that nothing needs padding."""
    pairs = [(prompt, encode(prompt.text)) for prompt in load_prompts(path)]
    length = statistics.mode(len(ids.conditional) for _, ids in pairs)
    return [(prompt, ids) for prompt, ids in pairs if len(ids.conditional) == length]


def groups_of(
    prompts: Sequence[Prompt], tokens: np.ndarray, images: np.ndarray, *, codes: int, version: int
) -> list[RolloutGroup]:
    """Tokens int32 [N, G, T] and images uint8 [N, G, H, W, 3] as groups whose log-probabilities are a flat model's."""
    entropy = np.full(tokens.shape[1:], math.log(codes), np.float32)
    seeds = tuple(range(tokens.shape[1]))
    return [
        RolloutGroup(
            i, prompt, seeds, tokens[i], -entropy, -entropy, entropy, entropy, images[i], version, "bench", 0.0
        )
        for i, prompt in enumerate(prompts)
    ]
