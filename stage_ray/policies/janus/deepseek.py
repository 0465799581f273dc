"""Janus in the layout of DeepSeek's own code (``MultiModalityCausalLM``), which STAGE, GCPO and T2I-R1 train too.

Names and sizes are those of github.com/deepseek-ai/Janus, ``janus/models``. transformers' classes are imported late.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from torch import Tensor

from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from stage_ray.policies import image_tokenizer
from stage_ray.policies.conversion import KEY, Layout, source_files
from stage_ray.policies.janus.codec import PAPER_ROLES
from stage_ray.pretrained import DEEPSEEK, read_object

if TYPE_CHECKING:
    from transformers import JanusConfig, JanusProcessor, PreTrainedTokenizerFast

TOWERS = {  # ``SigLIP_MODEL_CONFIG`` in siglip_vit.py
    "siglip_large_patch16_384": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
        "mlp_ratio": 4.0,
    }
}
IMAGE_TOKENIZERS = {  # ``VQ_models`` in vq_model.py
    "VQ-16": {"base_channels": 128, "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "latent_channels": 256}
}
CHAT_TEMPLATE = "package:stage_ray/shapeworld/assets/janus/chat_template.jinja"  # Janus-Pro's own
GUIDANCE_SCALE = 5.0  # ``cfg_weight`` in generation_inference.py
TOKENS = {  # special token -> its key in processor_config.json, and the default of ``VLChatProcessor``
    "image_token": ("image_tag", "<image_placeholder>"),
    "boi_token": ("image_start_tag", "<begin_of_image>"),
    "eoi_token": ("image_end_tag", "<end_of_image>"),
    "pad_token": ("pad_tag", "<｜▁pad▁｜>"),
}
ENDS = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
TEXT_KEYS = (  # of ``language_config``: what describes the model; trainers save sampling and file settings too
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
)

VQ = "gen_vision_model."
UNUSED = re.compile(r"vision_model\.vision_tower\.attn_pool\.|gen_vision_model\.quantize\.codebook_used$|.*\.inv_freq$")
RENAMED = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^gen_embed\.", "model.generation_embeddings."),
        (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
        (r"^gen_head\.", "model.generation_head."),
        (r"^gen_aligner\.", "model.generation_aligner."),
        (r"^aligner\.", "model.aligner."),
        (r"^vision_model\.vision_tower\.pos_embed$", "model.vision_model.embeddings.position_embedding.weight"),
        (r"^vision_model\.vision_tower\.patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
        (r"^vision_model\.vision_tower\.norm\.", "model.vision_model.post_layernorm."),
        (r"^vision_model\.vision_tower\.blocks\.(\d+)\.norm", r"model.vision_model.encoder.layers.\1.layer_norm"),
        (
            r"^vision_model\.vision_tower\.blocks\.(\d+)\.attn\.proj\.",
            r"model.vision_model.encoder.layers.\1.self_attn.projection_layer.",
        ),
        (r"^vision_model\.vision_tower\.blocks\.(\d+)\.attn\.", r"model.vision_model.encoder.layers.\1.self_attn."),
        (r"^vision_model\.vision_tower\.blocks\.", "model.vision_model.encoder.layers."),
    )
]
"""The first pattern that a name matches gives its new beginning; `_layer` numbers the aligners' layers."""


class DeepSeekLayout(Layout):
    """``MultiModalityCausalLM``: Janus, Janus-Pro, and what is trained from them with DeepSeek's code."""

    title = "DeepSeek's Janus layout"

    @staticmethod
    def matches(source: Path, config: Mapping[str, Any]) -> bool:
        """By ``model_type``, which JanusFlow has too; that is refused where its parts are missing."""
        return config.get("model_type") == DEEPSEEK

    def __init__(self, source: Path, config: Mapping[str, Any], template: str, files: Sequence[str] = ()) -> None:
        self.files = [source / name for name in files] or source_files(source)
        self.tokenizer = _tokenizer(source)
        try:
            self.config = _config(source, config, self.tokenizer)
        except (StrictDataclassError, TypeError, AttributeError) as error:
            raise ConfigError(f"{KEY}: {source / 'config.json'} describes no Janus model: {error}") from error
        chat_template = resolve_path(CHAT_TEMPLATE).read_text(encoding="utf-8")
        for official, paper in PAPER_ROLES.items() if template == "paper" else ():
            chat_template = chat_template.replace(official, paper)
        self.processor = _processor(source, self.config, self.tokenizer, chat_template)

    def expected(self) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Of ``JanusForConditionalGeneration`` on the meta device."""
        from transformers import JanusForConditionalGeneration

        with torch.device("meta"):
            model = JanusForConditionalGeneration(self.config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return shapes, set(model.all_tied_weights_keys)

    def convert(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Rename; the vision tower's fused attention becomes three, its positions lose their batch dimension."""
        if UNUSED.match(name):
            return {}
        if name.startswith(VQ):
            return {f"model.vqmodel.{image_tokenizer.renamed(name.removeprefix(VQ))}": tensor}
        for pattern, new in RENAMED:
            renamed, count = pattern.subn(new, name)
            if count:
                break
        renamed = re.sub(r"^(model\.(?:generation_)?aligner)\.layers\.(\d+)\.", _layer, renamed)
        if ".qkv." in renamed and len(tensor) % 3 == 0:
            return {renamed.replace(".qkv.", f".{p}_proj."): t for p, t in zip("qkv", tensor.chunk(3), strict=True)}
        return {renamed: tensor.squeeze(0) if name.endswith(".pos_embed") else tensor}

    def write_files(self, directory: Path, dtype: torch.dtype) -> None:
        """config.json, generation_config.json, and the processor's files."""
        from stage_ray.policies.janus.builder import generation_config

        self.config.dtype = dtype
        self.config.architectures = ["JanusForConditionalGeneration"]
        self.config.save_pretrained(directory)
        generation_config(self.tokenizer, GUIDANCE_SCALE).save_pretrained(directory)
        self.processor.save_pretrained(directory)


def _layer(match: re.Match[str]) -> str:
    """Layers of an ``MlpProjector`` are 0, 2, 4, ..., with activations between them."""
    number = int(match[2])
    if number % 2:
        return match[0]  # no layer has weights there: refused as unexpected
    return f"{match[1]}.fc1." if number == 0 else f"{match[1]}.hidden_layers.{number // 2 - 1}."


def _config(source: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    """transformers' config of what DeepSeek's describes.

    Raises:
        ConfigError: a part is missing or of a kind that transformers' Janus has not.
    """
    from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    file = source / "config.json"

    def part(name: str, *keys: str) -> dict[str, Any]:
        params = (config.get(f"{name}_config") or {}).get("params") or {}
        if lacking := [key for key in keys if key not in params]:
            raise ConfigError(f"{KEY}: {file} has no {name}_config.params.{lacking[0]}; it is no Janus or Janus-Pro")
        return dict(params)

    vision, vq = part("vision", "model_name", "image_size"), part("gen_vision", "n_embed", "image_token_size")
    aligners = {name: part(name, "n_embed", "projector_type") for name in ("aligner", "gen_aligner")}
    head = part("gen_head", "n_embed", "image_token_embed")
    for name, aligner in aligners.items():
        if aligner["projector_type"] != "mlp_gelu":
            key = f"{name}_config.params.projector_type"
            raise ConfigError(f"{KEY}: {file}: {key} = {aligner['projector_type']!r}; only 'mlp_gelu' is converted")
    tower = _known(TOWERS, vision["model_name"], f"{file}: vision_config.params.model_name")
    vq_class = config["gen_vision_config"].get("cls")
    image_tokenizer = _known(IMAGE_TOKENIZERS, vq_class, f"{file}: gen_vision_config.cls")
    select = vision.get("select_layer", -1)  # as ``create_siglip_vit`` counts it
    count = int(tower["num_hidden_layers"])
    layers = min(count, count + select + 1 if select <= 0 else select)
    text = dict(config.get("language_config") or {})
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return JanusConfig(
        text_config=LlamaConfig(**{key: text[key] for key in TEXT_KEYS if text.get(key) is not None} | special),
        vision_config=JanusVisionConfig(
            **(tower | {"num_hidden_layers": layers}),
            image_size=vision["image_size"],
            projection_dim=aligners["aligner"]["n_embed"],
            depth=aligners["aligner"].get("depth", 1),
            num_image_tokens=(vision["image_size"] // int(tower["patch_size"])) ** 2,
        ),
        vq_config=JanusVQVAEConfig(
            **image_tokenizer,
            embed_dim=vq["n_embed"],
            num_embeddings=vq["image_token_size"],
            projection_dim=aligners["gen_aligner"]["n_embed"],
            num_hidden_layers=aligners["gen_aligner"].get("depth", 1),
            image_token_embed_dim=head["n_embed"],
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        tie_word_embeddings=bool(text.get("tie_word_embeddings")),  # Llama's default; transformers' Janus ties
    )


def _known(table: Mapping[str, Any], name: Any, key: str) -> dict[str, Any]:
    if name not in table:
        raise ConfigError(f"{KEY}: {key} = {name!r}; known here: {', '.join(table)}")
    return dict(table[name])


def _tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as DeepSeek's code reads it (``LlamaTokenizerFast``), with the names of transformers' Janus.

    ``tokenizer.json`` is taken as it is, and a beginning-of-sentence token put before each text (``add_bos_token``).

    Raises:
        ConfigError: there is none, it is damaged, or a special token is not in its vocabulary.
    """
    from transformers import PreTrainedTokenizerFast

    file = source / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{KEY}: {source} has no tokenizer.json; copy it from the model that this was trained from")
    settings = _optional(source / "tokenizer_config.json")
    given = settings | _optional(source / "special_tokens_map.json")
    tags = _optional(source / "processor_config.json")
    special = {name: _content(given.get(name)) or default for name, default in ENDS.items()}
    special |= {token: tags.get(tag, default) for token, (tag, default) in TOKENS.items()}
    try:
        core = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no other type
        raise ConfigError(f"{KEY}: {file} does not load as a tokenizer ({error}); download it again") from error
    if lacking := [token for token in special.values() if core.token_to_id(token) is None]:
        raise ConfigError(f"{KEY}: {file} has no token {lacking[0]!r}; it is not the tokenizer of a Janus model")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{name: special.pop(name) for name in ("bos_token", "eos_token", "pad_token")},
        extra_special_tokens=special,
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        model_max_length=settings.get("model_max_length", 16384),
        padding_side="left",
    )


def _processor(
    source: Path, config: JanusConfig, tokenizer: PreTrainedTokenizerFast, chat_template: str
) -> JanusProcessor:
    """Of the source's own files, and of Janus-Pro's values for what they leave out."""
    from transformers import JanusImageProcessorPil, JanusProcessor

    given = _optional(source / "preprocessor_config.json")
    side = given.get("image_size", config.vision_config.image_size)
    images = JanusImageProcessorPil(
        size={"height": side, "width": side},
        min_size=given.get("min_size", 14),
        image_mean=given.get("image_mean", [0.5] * 3),
        image_std=given.get("image_std", [0.5] * 3),
        rescale_factor=given.get("rescale_factor", 1 / 255),
        do_normalize=given.get("do_normalize", True),
    )
    count = config.vision_config.num_image_tokens
    return JanusProcessor(
        images, tokenizer, chat_template=chat_template, num_image_tokens=count, use_default_system_prompt=True
    )


def _optional(file: Path) -> dict[str, Any]:
    return read_object(file, KEY) if file.is_file() else {}


def _content(token: Any) -> str | None:
    """A special token's text, which some files wrap in a description."""
    return token.get("content") if isinstance(token, dict) else token
