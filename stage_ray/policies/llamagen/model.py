"""LlamaGen as modules of transformers (Sun et al. 2024, arXiv 2406.06525): a Llama between a prompt and image tokens.

Three things are its own. Rotary positions are rows and columns of the image, and at the prompt they are zero, not one:
its queries and keys vanish, so that every position weighs it alike. A prompt is one class, or the features of a caption
by a T5 encoder. Embeddings of image tokens and the head are not shared. The image tokenizer is ``JanusVQVAE``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import JanusVQVAE, JanusVQVAEConfig, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel

from stage_ray.policies.llamagen.rotary import angles

MODEL_TYPE = "llamagen"


class LlamaGenConfig(PreTrainedConfig):
    """Sizes of a model; the defaults are those of class-conditional LlamaGen-B at 256 pixels.

    Attributes:
        condition: "class", or "text".
        side: rows and columns of image tokens.
        codes: V, entries of the image codebook.
        num_classes: besides them there is one for no class, the last.
        class_names: of the classes, synonyms separated by ", "; None are ImageNet's where there are 1,000 of them.
        prompt_tokens: of a text at most; shorter ones end where the longest would.
        caption_width: of a token's features.
        text_encoder: a T5 for ``condition: text``: a directory, or a hub id.
        channel_multiplier: width of each level of the image tokenizer; every level but one halves the resolution.
    """

    model_type = MODEL_TYPE

    condition: str = "class"
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    side: int = 16
    codes: int = 16384
    num_classes: int = 1000
    class_names: list[str] | None = None
    prompt_tokens: int = 1
    caption_width: int = 2048
    text_encoder: str | None = None
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    base_channels: int = 128
    res_blocks: int = 2
    latent_channels: int = 256
    code_width: int = 8
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """D of each head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def pixels(self) -> int:
        """Of one side of an image."""
        return self.side * 2 ** (len(self.channel_multiplier) - 1)

    def llama(self) -> LlamaConfig:
        """The transformer's own config."""
        return LlamaConfig(
            vocab_size=1,  # its embedding is replaced
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            rms_norm_eps=self.rms_norm_eps,
            max_position_embeddings=self.prompt_tokens + self.side**2,
            bos_token_id=None,
            eos_token_id=None,
        )

    def vq(self) -> JanusVQVAEConfig:
        """The image tokenizer's config."""
        return JanusVQVAEConfig(
            embed_dim=self.code_width,
            num_embeddings=self.codes,
            latent_channels=self.latent_channels,
            base_channels=self.base_channels,
            channel_multiplier=list(self.channel_multiplier),
            num_res_blocks=self.res_blocks,
            num_patches=self.side,
        )


class GridRotary(nn.Module):
    """Cosines and sines of positions, in the place of a Llama's: see `angles`."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self._grid = config.prompt_tokens, config.side, config.head_dim, config.rope_theta

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions int64 [...] -> cosines and sines [..., D] in the dtype of ``states``, both halves alike."""
        found = (torch.cat((half, half), dim=-1).to(states.dtype) for half in angles(position_ids, *self._grid))
        cos, sin = found
        return cos, sin


class CaptionProjection(nn.Module):
    """Features of a caption's tokens to the transformer's inputs."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[N, width] -> [N, hidden]."""
        return self.down(nn.functional.gelu(self.up(features.to(self.up.weight.dtype)), approximate="tanh"))


class LlamaGenModel(PreTrainedModel):
    """What is trained under ``gpt``, the image tokenizer under ``vq``, and rows in the place of an absent caption."""

    config_class = LlamaGenConfig
    config: LlamaGenConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        transformer = LlamaModel(config.llama())
        transformer.rotary_emb = GridRotary(config)
        if config.condition == "class":
            transformer.embed_tokens = nn.Embedding(config.num_classes + 1, config.hidden_size)
        else:
            transformer.embed_tokens = CaptionProjection(config.caption_width, config.hidden_size)
            self.unconditional = nn.Parameter(torch.zeros(config.prompt_tokens, config.caption_width))
        self.gpt = nn.ModuleDict(
            {
                "transformer": transformer,
                "image_embedding": nn.Embedding(config.codes, config.hidden_size),
                "head": nn.Linear(config.hidden_size, config.codes, bias=False),
            }
        )
        self.vq = JanusVQVAE(config.vq())
        self.post_init()

    @property
    def transformer(self) -> Any:
        """The layers, the prompt's embedding before them and the last norm behind them."""
        return self.gpt["transformer"]
