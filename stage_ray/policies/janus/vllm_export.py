"""A Janus checkpoint as vLLM reads it: a flat, Llama-like config in its own directory, beside links to the weights.

**Image-first vocabulary**: ids 0..V-1 are image tokens and text ids are shifted by V. Logits are V wide, a sampled id
is fed back as it is, and the embedding tells the two kinds apart by value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import JanusConfig

from stage_ray.engines.vllm.plugin import ARCHITECTURE
from stage_ray.policies.checkpoint_files import WEIGHTS_INDEX, weight_files

# Facts of a checkpoint that a flat config must not inherit: names, dtypes and tokens that mean something else here.
LEFT_OUT = ("architectures", "model_type", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path")


def export_for_vllm(checkpoint: Path, config: JanusConfig, directory: Path) -> None:
    """Fill ``directory`` with a config for vLLM and links to the checkpoint's safetensors."""
    (directory / "config.json").write_text(json.dumps(flat_config(config), indent=2), encoding="utf-8")
    files = weight_files(checkpoint)
    if (checkpoint / WEIGHTS_INDEX).is_file():
        files.append(checkpoint / WEIGHTS_INDEX)
    for file in files:
        (directory / file.name).symlink_to(file.resolve())


def flat_config(config: JanusConfig) -> dict[str, Any]:
    """The language model's config at the top level, and under ``janus`` what the image modules need."""
    text, vq = config.text_config.to_dict(), config.vq_config
    flat = {key: value for key, value in text.items() if key not in LEFT_OUT}
    return flat | {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": vq.num_embeddings + text["vocab_size"],
        "tie_word_embeddings": False,
        "janus": {"vq_config": vq.to_dict(), "text_vocab_size": text["vocab_size"], "image_tokens": vq.num_patches**2},
    }
