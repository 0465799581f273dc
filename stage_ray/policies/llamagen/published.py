"""LlamaGen as it is published: two pickles, ``c2i_B_256.pt`` or its like and the image tokenizer ``vq_ds16_c2i.pt``.

Names are those of github.com/FoundationVision/LlamaGen, ``autoregressive/models/gpt.py`` and ``vq_model.py``. No config
comes with them: sizes are read from the tensors, the pixels of an image from the file's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage_ray.errors import ConfigError
from stage_ray.policies import image_tokenizer
from stage_ray.policies.conversion import KEY, Layout, read_weights

MODELS, TOKENIZERS = re.compile(r"[ct]2i\w*\.pt"), re.compile(r"vq\w*\.pt")
TEXT_ENCODER = "google/flan-t5-xl"  # ``language/README.md``
HEADS = {  # ``GPT_models``: width and layers -> attention heads, which no shape tells
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 36): 20,
    (1536, 48): 24,
    (2560, 48): 40,
    (2048, 22): 32,
    (3200, 24): 32,
    (4096, 32): 32,
}
UNUSED = re.compile(r"freqs_cis$|causal_mask$|.*\.kv_cache\.|quantize\.codebook_used$")
VQ = re.compile(r"(encoder|decoder|quantize|quant_conv|post_quant_conv)\.")
NAMES = {
    "tok_embeddings.weight": "gpt.image_embedding.weight",
    "output.weight": "gpt.head.weight",
    "norm.weight": "gpt.transformer.norm.weight",
    "cls_embedding.embedding_table.weight": "gpt.transformer.embed_tokens.weight",
    "cls_embedding.cap_proj.fc1.weight": "gpt.transformer.embed_tokens.up.weight",
    "cls_embedding.cap_proj.fc2.weight": "gpt.transformer.embed_tokens.down.weight",
    "cls_embedding.uncond_embedding": "unconditional",
}
LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
IN_LAYER = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class PublishedLayout(Layout):
    """One file of a transformer and one of an image tokenizer.

    A ``config.json`` beside them may say what is otherwise known of published files only: ``image_size`` in pixels,
    ``num_attention_heads``, ``text_encoder``.
    """

    title = "LlamaGen's published files"

    @staticmethod
    def matches(source: Path, config: Mapping[str, Any]) -> bool:
        """By the names of its files, ``c2i*.pt`` or ``t2i*.pt``."""
        return "model_type" not in config and any(MODELS.fullmatch(file.name) for file in source.glob("*.pt"))

    def __init__(self, source: Path, config: Mapping[str, Any], template: str, files: Sequence[str] = ()) -> None:
        names = files or [file.name for file in sorted(source.glob("*.pt"))]
        model, tokenizer = (_only(source, names, kind) for kind in (MODELS, TOKENIZERS))
        self.files = [model, tokenizer]
        shapes = {name: tuple(tensor.shape) for file in self.files for name, tensor in read_weights(file).items()}
        try:
            self.config = _config(model, shapes, config)
        except KeyError as error:
            raise ConfigError(f"{KEY}: {source}: {model.name} and {tokenizer.name} lack tensor {error}") from error

    def expected(self) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Of `LlamaGenModel` on the meta device."""
        from stage_ray.policies.llamagen.model import LlamaGenModel

        with torch.device("meta"):
            model = LlamaGenModel(self.config)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, set()

    def convert(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Rename; fused attention becomes three, rotated pairs of a head's rows become two halves."""
        if UNUSED.match(name):
            return {}
        if VQ.match(name):
            return {f"vq.{image_tokenizer.renamed(name)}": tensor}
        match = LAYER.fullmatch(name)
        if match is None:
            return {NAMES.get(name, name): tensor}
        layer = f"gpt.transformer.layers.{match[1]}"
        if match[2] != "attention.wqkv":
            return {f"{layer}.{IN_LAYER.get(match[2], match[2])}.weight": tensor}
        width, kv = self.config.hidden_size, self.config.num_key_value_heads * self.config.head_dim
        if tensor.shape != (width + 2 * kv, width):
            return {name: tensor}
        query, key, value = tensor.split([width, kv, kv])
        parts = {"q": self._halves(query), "k": self._halves(key), "v": value}
        return {f"{layer}.self_attn.{part}_proj.weight": found for part, found in parts.items()}

    def _halves(self, rows: Tensor) -> Tensor:
        """Rows (0, 1), (2, 3), ... of each head, which turn against each other, as (0, D / 2), (1, D / 2 + 1), ..."""
        heads = rows.unflatten(0, (-1, self.config.head_dim // 2, 2))
        return heads.transpose(1, 2).flatten(0, 2)

    def write_files(self, directory: Path, dtype: torch.dtype) -> None:
        """config.json alone; the text encoder stays where it is."""
        self.config.dtype = dtype
        self.config.architectures = ["LlamaGenModel"]
        self.config.save_pretrained(directory)


def _only(source: Path, names: Sequence[str], kind: re.Pattern[str]) -> Path:
    """The one file of a kind among those of these names."""
    found = [name for name in names if kind.fullmatch(name)]
    if len(found) != 1 or not (source / found[0]).is_file():
        wanted = "one of c2i*.pt or t2i*.pt" if kind is MODELS else "one vq*.pt"
        raise ConfigError(
            f"{KEY}: {source}: {wanted} is needed, and {', '.join(found) or 'none'} was found; name both files, as in "
            "--file c2i_B_256.pt --file vq_ds16_c2i.pt"
        )
    return source / found[0]


def _config(file: Path, shapes: Mapping[str, tuple[int, ...]], said: Mapping[str, Any]) -> Any:
    """`LlamaGenConfig` of the tensors' shapes.

    Raises:
        ConfigError: neither name nor ``config.json`` says what shapes do not.
        KeyError: of a tensor that is missing.
    """
    from stage_ray.policies.llamagen.model import LlamaGenConfig

    codes, width = shapes["tok_embeddings.weight"]
    layers = 1 + max((int(match[1]) for name in shapes if (match := LAYER.fullmatch(name))), default=-1)
    heads = said.get("num_attention_heads") or HEADS.get((width, layers))
    if not isinstance(heads, int) or width % heads:
        raise ConfigError(
            f"{KEY}: {file} has {layers} layers of {width}, which is no published size; say num_attention_heads in a "
            "config.json beside it"
        )
    levels, blocks = (
        sum(bool(re.fullmatch(rf"decoder\.conv_blocks\.{which}\.conv1\.weight", name)) for name in shapes)
        for which in (r"\d+\.res\.0", r"0\.res\.\d+")
    )
    named = re.search(r"_(\d{3,4})\.pt$", file.name)
    pixels = said.get("image_size") or (int(named[1]) if named else None)
    if not isinstance(pixels, int) or pixels % 2 ** (levels - 1):
        raise ConfigError(
            f"{KEY}: {file} does not say how large its images are; let its name end in the pixels, as c2i_B_256.pt "
            "does, or say image_size in a config.json beside it"
        )
    text, base = "cls_embedding.uncond_embedding" in shapes, shapes["decoder.conv_out.weight"][1]
    condition: dict[str, Any] = {"num_classes": 0, "text_encoder": said.get("text_encoder", TEXT_ENCODER)}
    if text:
        condition["prompt_tokens"], condition["caption_width"] = shapes["cls_embedding.uncond_embedding"]
    else:
        condition = {"num_classes": shapes["cls_embedding.embedding_table.weight"][0] - 1}
    return LlamaGenConfig(
        condition="text" if text else "class",
        **condition,
        hidden_size=width,
        intermediate_size=shapes["layers.0.feed_forward.w1.weight"][0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=(shapes["layers.0.attention.wqkv.weight"][0] * heads // width - heads) // 2,
        side=pixels // 2 ** (levels - 1),
        codes=codes,
        channel_multiplier=[
            shapes[f"decoder.conv_blocks.{level}.res.0.conv1.weight"][0] // base for level in reversed(range(levels))
        ],
        base_channels=base,
        res_blocks=blocks - 1,  # an encoder's; the decoder has one more
        latent_channels=shapes["post_quant_conv.weight"][0],
        code_width=shapes["quantize.embedding.weight"][1],
    )
