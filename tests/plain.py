"""A model family in one file, plain torch and nothing else, for tests of all that is around a model.

Its processes start in half the time of a Janus': the import of transformers' models is what takes most of a tiny run's
processor time. Configs name the family by its dotted path, as a user names one of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.backbone import Backbone
from stage_ray.policies.base import Policy
from stage_ray.policies.codec import Branch, ImageCodec, PromptIds, VllmSpec
from stage_ray.pretrained import local_checkpoint, read_tensors

FAMILY = "tests.plain.PlainPolicy"
BOI, PAD, VOCABULARY = 0, 1, 64  # text ids: the token that begins an image, padding, then hashed words
CODES, SIDE, PATCH, HIDDEN, HEADS, LAYERS, POSITIONS = 48, 4, 8, 64, 2, 2, 64
IMAGE_TOKENS = SIDE**2


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False), nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """[B, L, hidden] -> the same shape, causal."""
        heads = self.qkv(F.rms_norm(states, (HIDDEN,))).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        return states + self.down(F.silu(self.up(F.rms_norm(states, (HIDDEN,)))))


class Transformer(nn.Module):
    """Embeddings to states, called as transformers' decoders are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(POSITIONS, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """[B, L, hidden] -> ``last_hidden_state`` of the same shape."""
        states = inputs_embeds + self.embed_positions.weight[: inputs_embeds.shape[1]]
        for layer in self.layers:
            states = layer(states)
        return SimpleNamespace(last_hidden_state=F.rms_norm(states, (HIDDEN,)))


class PlainModel(nn.Module):
    """Transformer, image embeddings, head, and a codebook of colours."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = Transformer()
        self.embed_codes = nn.Embedding(CODES, HIDDEN)
        self.head = nn.Linear(HIDDEN, CODES, bias=False)
        self.colors = nn.Parameter(torch.rand(CODES, 3))


class PlainCodec(ImageCodec):
    """A token is a patch of one colour."""

    grid, codebook_size = (SIDE, SIDE), CODES

    def __init__(self, location: Path, colors: Tensor | None = None) -> None:
        self.location, self.colors = location, colors

    def encode_prompt(self, text: str) -> PromptIds:
        """A word's id is made from its letters."""
        words = [2 + sum(word.encode()) % (VOCABULARY - 2) for word in text.split()]
        return PromptIds((*words, BOI), (*[PAD] * len(words), BOI))

    def codebook(self) -> Tensor:
        """Colours, float32 [V, 3]."""
        assert self.colors is not None, "this codec was loaded without its decoder"
        return self.colors.detach().float()

    def decode(self, tokens: Tensor) -> Tensor:
        """Each token's colour as a square."""
        pixels = (self.codebook().cpu()[tokens.cpu()] * 255).to(torch.uint8).unflatten(1, self.grid)
        return pixels.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)

    def encode(self, images: Tensor) -> Tensor:
        """The nearest colour of each square's middle."""
        seen = images[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].flatten(1, 2) / 255  # [B, T, 3]
        return torch.cdist(seen, self.codebook().cpu().expand(len(seen), -1, -1)).argmin(dim=-1)

    def vllm_spec(self) -> VllmSpec:
        """None."""
        raise ConfigError("the plain family has no model class for vLLM; set rollout.engine to torch")


class PlainDecoder:
    """Reads everything again at each step: 16 tokens need no cache."""

    def __init__(self, backbone: Transformer, sequences: int, length: int) -> None:
        self._backbone = backbone
        dtype = backbone.embed_tokens.weight.dtype
        self._embeds, self._rows = torch.zeros(sequences, length, HIDDEN, dtype=dtype), torch.arange(sequences)

    def prefill(self, prompts: Sequence[Branch]) -> Tensor:
        """Prompts stand at the left, so that positions count from each one's first token."""
        self._lengths = torch.tensor([len(prompt) for prompt in prompts])
        for row, prompt in enumerate(prompts):
            self._embeds[row, : len(prompt)] = self._backbone.embed_tokens(torch.tensor(prompt))
        return self._states()

    def step(self, embeds: Tensor) -> Tensor:
        """One more token for each."""
        self._embeds[self._rows, self._lengths] = embeds
        self._lengths += 1
        return self._states()

    def _states(self) -> Tensor:
        states = self._backbone(inputs_embeds=self._embeds[:, : int(self._lengths.max())]).last_hidden_state
        return states[self._rows, self._lengths - 1]


class PlainPolicy(Policy):
    """`PlainModel`, its transformer trained."""

    model_type, trained_prefix = "plain", "language_model."
    model: PlainModel

    @classmethod
    def load(
        cls, config: PolicyConfig, *, device: torch.device, dtype: torch.dtype = torch.float32, trainable: bool = True
    ) -> PlainPolicy:
        """Load a checkpoint that `plain_checkpoint` or `save` wrote."""
        location = local_checkpoint(config.path, cls.model_type)
        model = PlainModel()
        model.load_state_dict(load_file(location / "model.safetensors"))
        model = model.to(device, dtype)
        return cls(model, Backbone(model.language_model), PlainCodec(location, model.colors), trainable=trainable)

    @classmethod
    def load_codec(cls, config: PolicyConfig, *, device: torch.device | None) -> PlainCodec:
        """The codec alone; ``device`` None leaves its colours out."""
        location = local_checkpoint(config.path, cls.model_type)
        return PlainCodec(location, None if device is None else read_tensors(location, ("colors",))["colors"])

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """A table of its own."""
        return self.model.embed_codes(tokens)

    def head(self, states: Tensor) -> Tensor:
        """One matrix, in float32."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.model.head.weight.float())

    def decoder(self, sequences: int, length: int) -> PlainDecoder:
        """Without a cache."""
        return PlainDecoder(self.model.language_model, sequences, length)


def plain_checkpoint(directory: Path, seed: int = 0) -> Path:
    """Write a random `PlainModel`, of unit gain so that no distribution is flat, and return its directory."""
    generator = torch.Generator().manual_seed(seed)
    model = PlainModel()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "colors":
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
            else:
                gain = 1.0 if "embed" in name else (3.0 if name == "head.weight" else 1.0) / parameter.shape[1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain)
    _write(directory, model.state_dict())
    return directory


def _write(directory: Path, state: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": PlainPolicy.model_type}))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
