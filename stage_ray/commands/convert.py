"""``stage-ray convert``: published weights that transformers does not read, into a checkpoint that it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option, echo

from stage_ray.config.paths import require_lasting

SOURCE = (
    "A directory with weights (.safetensors, .bin, .pt) and what describes them, or a hub id: OWNER/NAME[@REVISION]"
)
TEMPLATE = "Roles in the chat template: <|User|> as in Janus-Pro, or User as STAGE and T2I-R1 train"


def convert(
    source: Annotated[str, Argument(metavar="SOURCE", help=SOURCE)],
    out: Annotated[Path, Argument(metavar="OUT", help="A new directory, for policy.path")],
    template: Annotated[Literal["official", "paper"], Option(help=TEMPLATE)] = "official",
    file: Annotated[
        list[str] | None, Option(help="A file of SOURCE to take, where that holds several models; once for each")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, Option(help="Of all weights; by default each as it came")
    ] = None,
) -> None:
    """Convert published weights that transformers does not read into a directory for policy.path.

    DeepSeek's own layout (Janus-Pro's, and what STAGE, GCPO and T2I-R1 train); LlamaGen's .pt of transformer and image
    tokenizer (--file c2i_B_256.pt --file vq_ds16_c2i.pt).

    Shard by shard, in the memory of one. Names and shapes are compared with the model's before anything is written.
    If it is stopped, the same command again keeps the shards that are whole.

    Example: stage-ray convert deepseek-ai/Janus-Pro-1B models/janus-pro-1b
    """
    require_lasting(out, "OUT")
    import torch

    from stage_ray.config.hub import download, hub_uri
    from stage_ray.config.paths import resolve_path
    from stage_ray.files import require_writable
    from stage_ray.observability.progress import Progress
    from stage_ray.policies.conversion import KEY, SOURCE_FILES, convert_checkpoint

    require_writable(out, "OUT")
    uri = hub_uri(source)
    directory = resolve_path(source) if uri is None else download(uri, file or SOURCE_FILES, KEY)
    with Progress() as progress:
        convert_checkpoint(
            directory,
            out,
            template=template,
            files=file or (),
            dtype=getattr(torch, dtype) if dtype else None,
            bar=progress.bar,
        )
    echo(f"{out}: name it in policy.path")
