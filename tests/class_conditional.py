"""A model family from outside of the package that is little like Janus: an image is asked for by its class.

After LlamaGen (Sun et al. 2024, arXiv 2406.06525): the prompt is one learned embedding, that of a class or, without
guidance, of no class; rotary positions are rows and columns of the image; embeddings of image tokens and the head are
trained with all else. Plain torch, with names of its own. `tests.class_conditional_vllm` is the same model for vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stage_ray.config import PolicyConfig
from stage_ray.errors import suggest
from stage_ray.policies.backbone import Backbone
from stage_ray.policies.base import Policy
from stage_ray.policies.codec import Branch, ImageCodec, PromptIds, VllmSpec
from stage_ray.pretrained import check_tensors, local_checkpoint, read_object, read_tensors

FAMILY = "tests.class_conditional.ClassPolicy"
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, heads, L, D]


@dataclass(frozen=True)
class Sizes:
    """What ``config.json`` says. ``classes``: their names, in order; ``grid``: rows and columns of image tokens."""

    classes: tuple[str, ...] = ("goldfish", "tench", "great white shark", "hen", "ostrich", "bald eagle")
    grid: tuple[int, int] = (3, 5)
    codes: int = 40
    code_width: int = 8
    hidden: int = 64
    heads: int = 2
    layers: int = 2
    intermediate: int = 128

    @classmethod
    def read(cls, directory: Path) -> Sizes:
        """Of a checkpoint's directory."""
        said = read_object(directory / "config.json")
        return cls(tuple(said["classes"]), tuple(said["grid"]), *(said[name] for name in list(cls.__annotations__)[2:]))


def rotary_2d(positions: Tensor, columns: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [..., D / 2], of positions int64 [...]: 0 is the class, 1 the first image token.

    Of the D / 2 pairs of a head, half turn with the row and half with the column, from 1; the class is not turned.
    """
    place, in_image = (positions - 1).clamp(min=0), positions > 0
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4, device=positions.device)
    row_column = torch.stack((place // columns + 1, place % columns + 1), dim=-1) * in_image.unsqueeze(-1)
    turns = (row_column.unsqueeze(-1) * frequencies).flatten(-2)
    return turns.cos(), turns.sin()


def rotate(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + D / 2) of states [..., D]."""
    (first, second), (cos, sin) = states.chunk(2, dim=-1), angles
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(states.dtype)


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, hidden = sizes.heads, sizes.hidden
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, sizes.intermediate, bias=False)
        self.down = nn.Linear(sizes.intermediate, hidden, bias=False)

    def forward(self, states: Tensor, angles: tuple[Tensor, Tensor], past: Cache) -> Tensor:
        """[B, L, hidden] -> the same shape, causal after what is ``past``, to which keys and values are added."""
        query, keys, values = self.qkv(self.norm1(states)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, keys = rotate(query, angles), rotate(keys, angles)
        if past:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(past.pop(), (keys, values), strict=True))
        past.append((keys, values))
        mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=query.shape[2] > 1)
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        return states + self.down(F.silu(self.up(self.norm2(states))))


class Transformer(nn.Module):
    """Class embedding, layers and last norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.columns, self.width = sizes.grid[1], sizes.hidden // sizes.heads
        self.class_embedding = nn.Embedding(len(sizes.classes) + 1, sizes.hidden)  # the last is no class
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, eps=1e-5)

    def forward(self, embeds: Tensor, start: int = 0, caches: Sequence[Cache] | None = None) -> Tensor:
        """Embeddings [B, L, hidden] of positions from ``start`` -> states of the same shape."""
        positions = torch.arange(start, start + embeds.shape[1], device=embeds.device)
        angles, states = rotary_2d(positions, self.columns, self.width), embeds
        for number, block in enumerate(self.blocks):
            states = block(states, angles, caches[number] if caches else [])
        return self.norm(states)


class ImageTokenizer(nn.Module):
    """A codebook, and a convolutional decoder that makes 4 x 4 pixels of each token."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.grid = sizes.grid
        self.codebook = nn.Embedding(sizes.codes, sizes.code_width)
        self.layers = nn.Sequential(
            nn.Conv2d(sizes.code_width, 16, 3, padding=1),
            nn.Upsample(scale_factor=2),
            nn.SiLU(),
            nn.Conv2d(16, 3, 3, padding=1),
            nn.Upsample(scale_factor=2),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] -> pixels 0..1, [B, 3, H, W]."""
        codes = self.codebook(tokens).unflatten(1, self.grid).permute(0, 3, 1, 2)
        return self.layers(codes).sigmoid()


class ClassModel(nn.Module):
    """What is trained under ``gpt``, the image tokenizer under ``vq``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.gpt = nn.ModuleDict(
            {
                "transformer": Transformer(sizes),
                "token_embedding": nn.Embedding(sizes.codes, sizes.hidden),
                "head": nn.Linear(sizes.hidden, sizes.codes, bias=False),
            }
        )
        self.vq = ImageTokenizer(sizes)

    @classmethod
    def from_pretrained(cls, directory: Path) -> ClassModel:
        """Read what `save_pretrained` wrote."""
        model = cls(Sizes.read(directory))
        check_tensors(directory, {name: tensor.shape for name, tensor in model.state_dict().items()})
        model.load_state_dict(load_file(directory / "model.safetensors"))
        return model

    def save_pretrained(self, directory: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        directory.mkdir(parents=True, exist_ok=True)
        said = {"model_type": ClassPolicy.model_type, **asdict(self.sizes)}
        (directory / "config.json").write_text(json.dumps(said))
        save_file(self.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


class ClassBackbone(Backbone):
    """Calls `Transformer` in its own way, and with its own names."""

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.language_model.blocks)

    def forward(self, ids: Tensor, image_embeds: Tensor, positions: Tensor) -> Tensor:
        """Every prompt is one class, so image tokens begin at position 1 in every row."""
        first = self.language_model.class_embedding(ids[:, :1])
        return self.language_model(torch.cat((first, image_embeds.to(first.dtype)), dim=1))


class ClassDecoder:
    """`Transformer` with a key-value cache."""

    def __init__(self, transformer: Transformer) -> None:
        self._transformer, self._read = transformer, 0
        self._caches: list[Cache] = [[] for _ in transformer.blocks]

    def prefill(self, prompts: Sequence[Branch]) -> Tensor:
        """One class each."""
        embedding = self._transformer.class_embedding
        return self.step(embedding(torch.tensor([number for (number,) in prompts], device=embedding.weight.device)))

    def step(self, embeds: Tensor) -> Tensor:
        """One more token for each."""
        states = self._transformer(embeds[:, None], self._read, self._caches)
        self._read += 1
        return states[:, 0]


class ClassCodec(ImageCodec):
    """Names of classes to numbers, tokens to pictures."""

    def __init__(self, location: Path, sizes: Sizes, vq: ImageTokenizer | None) -> None:
        self.location, self.sizes_read, self.vq = location, sizes, vq
        self.grid, self.codebook_size = sizes.grid, sizes.codes
        self.positions = 1 + self.image_tokens

    def encode_prompt(self, text: str) -> PromptIds:
        """A class by its name or number."""
        classes, asked = self.sizes_read.classes, text.strip()
        names = {name: number for number, name in enumerate(classes)} | {str(n): n for n in range(len(classes))}
        if asked not in names:
            raise ValueError(f"{asked[:80]!r} is no class of {self.location.name}; {suggest(asked, classes)}")
        return PromptIds((names[asked],), (len(classes),))

    def prompt_encoding(self) -> object:
        """The names, in order."""
        return self.sizes_read.classes

    def codebook(self) -> Tensor:
        """Float32 [V, D]."""
        assert self.vq is not None, "this codec was loaded without its decoder"
        return self.vq.codebook.weight.detach().float()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images uint8 [B, H, W, 3]."""
        assert self.vq is not None, "this codec was loaded without its decoder"
        pixels = self.vq(tokens.to(self.vq.codebook.weight.device))
        return (pixels * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    def vllm_spec(self) -> VllmSpec:
        """Ids below V are image tokens, the others classes."""
        sizes = self.sizes_read
        config: dict[str, Any] = {
            "model_type": "llama",
            "vocab_size": sizes.codes + len(sizes.classes) + 1,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.heads,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": False,
            "sizes": asdict(sizes),
        }
        return VllmSpec(config, prompt_shift=sizes.codes, frozen=())


class ClassPolicy(Policy):
    """`ClassModel`, all but its image tokenizer trained."""

    model_type, trained_prefix = "class_conditional", "gpt."
    vllm_model = "tests.class_conditional_vllm:ClassForImageGeneration"
    model: ClassModel
    codec: ClassCodec

    @classmethod
    def load(
        cls, config: PolicyConfig, *, device: torch.device, dtype: torch.dtype = torch.float32, trainable: bool = True
    ) -> ClassPolicy:
        """Read a checkpoint of `ClassModel`."""
        location = local_checkpoint(config.path, cls.model_type)
        model = ClassModel.from_pretrained(location).to(device)
        model.gpt.to(dtype)
        codec = ClassCodec(location, model.sizes, model.vq)
        return cls(model, ClassBackbone(model.gpt["transformer"]), codec, trainable=trainable)

    @classmethod
    def load_codec(cls, config: PolicyConfig, *, device: torch.device | None) -> ClassCodec:
        """Names of classes and, on a device, the image tokenizer."""
        location = local_checkpoint(config.path, cls.model_type)
        sizes = Sizes.read(location)
        if device is None:
            return ClassCodec(location, sizes, None)
        vq = ImageTokenizer(sizes)
        vq.load_state_dict({k.removeprefix("vq."): v for k, v in read_tensors(location, ("vq.",)).items()})
        return ClassCodec(location, sizes, vq.to(device).requires_grad_(False))

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """A table, which is trained."""
        return self.model.gpt["token_embedding"](tokens)

    def head(self, states: Tensor) -> Tensor:
        """One matrix, which is trained, in float32 where the weights are."""
        head = self.model.gpt["head"]
        with torch.autocast(states.device.type, enabled=False):
            return head(states.to(head.weight.dtype)).float()

    def decoder(self, sequences: int, length: int) -> ClassDecoder:
        """With a cache that grows."""
        return ClassDecoder(self.model.gpt["transformer"])


def class_checkpoint(directory: Path, seed: int = 0, sizes: Sizes | None = None) -> Path:
    """Write a random `ClassModel`, of unit gain so that no distribution is flat, and return its directory."""
    generator, model = torch.Generator().manual_seed(seed), ClassModel(sizes or Sizes())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = 1 if "embedding" in name or "codebook" in name else parameter[0].numel()
                gain = 3.0 if "head" in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
    model.save_pretrained(directory)
    return directory
