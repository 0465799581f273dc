"""The models that the benches run: the shipped one, and larger ones with random weights, whose pictures are noise."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils.logging import disable_progress_bar

from stage_ray.config.paths import resolve_path
from stage_ray.policies.janus.builder import JanusSizes, build_model, write_checkpoint

SHIPPED = "package:stage_ray/shapeworld/assets/janus"
FIFTY_MILLION = JanusSizes(hidden=512, layers=12, heads=8, intermediate=1536, codes=16384, side=16, prompt_tokens=128)
SMALL = JanusSizes(hidden=128, layers=2, heads=2, intermediate=256, codes=1024, side=8, prompt_tokens=128)


def write_model(directory: Path, sizes: JanusSizes) -> Path:
    """Write a checkpoint of these sizes, with the shipped model's words and template; its directory."""
    disable_progress_bar()
    processor = AutoProcessor.from_pretrained(resolve_path(SHIPPED))
    return write_checkpoint(directory, build_model(sizes, processor.tokenizer, seed=0), processor)


@contextmanager
def model_of(sizes: JanusSizes | None) -> Iterator[str]:
    """The shipped model, or one of other sizes that is made now and removed afterwards."""
    if sizes is None:
        yield SHIPPED
        return
    with tempfile.TemporaryDirectory(prefix="stage-ray-bench-model-") as directory:
        yield str(write_model(Path(directory), sizes))
