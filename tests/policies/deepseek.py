"""DeepSeek's ``MultiModalityCausalLM`` in plain torch, tiny: the names and the arithmetic of its published code.

`publish` writes it as Janus-Pro is published: config, tokenizer without its beginning-of-sentence token, weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stage_ray.policies.janus import deepseek
from tests.pages import ROOT

SHIPPED = ROOT / "stage_ray" / "shapeworld" / "assets" / "janus"  # its tokenizer has DeepSeek's special tokens
CODES, HIDDEN, SIDE, PIXELS, VISION, VOCABULARY = 48, 64, 4, 32, 24, 64
TOWER = {"hidden_size": VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "mlp_ratio": 1.5}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1, 2, 2], "num_res_blocks": 1, "latent_channels": 40}
MLP = {"depth": 2, "n_embed": HIDDEN, "projector_type": "mlp_gelu"}
CONFIG: dict[str, Any] = {
    "model_type": "multi_modality",
    "architectures": ["MultiModalityCausalLM"],
    "aligner_config": {"cls": "MlpProjector", "params": {**MLP, "input_dim": VISION}},
    "gen_aligner_config": {"cls": "MlpProjector", "params": {**MLP, "input_dim": 8}},
    "gen_head_config": {
        "cls": "vision_head",
        "params": {"image_token_embed": HIDDEN, "image_token_size": CODES, "n_embed": HIDDEN},
    },
    "gen_vision_config": {"cls": "VQ-tiny", "params": {"image_token_size": CODES, "n_embed": 8}},
    "language_config": {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "cls": "CLIPVisionTower",
        "params": {"image_size": PIXELS, "model_name": "siglip_tiny", "select_feature": "same", "select_layer": -1},
    },
}


def register_tiny(patch: pytest.MonkeyPatch) -> None:
    """DeepSeek's config names a vision tower and an image tokenizer; these are small ones."""
    patch.setitem(deepseek.TOWERS, "siglip_tiny", TOWER)
    patch.setitem(deepseek.IMAGE_TOKENIZERS, "VQ-tiny", VQ)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Group(nn.GroupNorm):
    """32 groups, as everywhere in the image tokenizer."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Group(inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = Group(outer), nn.Conv2d(outer, outer, 3, padding=1)
        if inner != outer:
            self.nin_shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Group(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))  # [B, C, HW]
        weights = F.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Resample(nn.Module):
    def __init__(self, width: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, padding=1) if up else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Half(nn.Module):
    """Encoder or decoder of the image tokenizer."""

    def __init__(self, *, decoder: bool) -> None:
        super().__init__()
        widths = [VQ["base_channels"] * m for m in VQ["channel_multiplier"]]
        last, width = len(widths) - 1, widths[-1] if decoder else widths[0]
        self.conv_in = nn.Conv2d(VQ["latent_channels"] if decoder else 3, width, 3, padding=1)
        self.conv_blocks, self.decoder = nn.ModuleList(), decoder
        for level in reversed(range(last + 1)) if decoder else range(last + 1):
            block = nn.Module()
            block.res, block.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(VQ["num_res_blocks"] + decoder):
                block.res.append(ResnetBlock(width, widths[level]))
                width = widths[level]
                if level == last:
                    block.attn.append(AttnBlock(width))
            if level != (0 if decoder else last):
                setattr(block, "upsample" if decoder else "downsample", Resample(width, up=decoder))
            self.conv_blocks.append(block)
        middle = widths[-1]
        self.mid = nn.ModuleList([ResnetBlock(middle, middle), AttnBlock(middle), ResnetBlock(middle, middle)])
        self.norm_out = Group(width)
        self.conv_out = nn.Conv2d(width, 3 if decoder else VQ["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        if self.decoder:
            h = nn.Sequential(*self.mid)(h)
        for block in self.conv_blocks:
            for index, res in enumerate(block.res):
                h = res(h)
                h = block.attn[index](h) if len(block.attn) else h
            for name in ("upsample", "downsample"):
                h = getattr(block, name)(h) if hasattr(block, name) else h
        if not self.decoder:
            h = nn.Sequential(*self.mid)(h)
        return self.conv_out(swish(self.norm_out(h)))


class VQModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Half(decoder=False), Half(decoder=True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(CODES, 8)
        self.quantize.register_buffer("codebook_used", torch.zeros(100))
        self.quant_conv = nn.Conv2d(VQ["latent_channels"], 8, 1)
        self.post_quant_conv = nn.Conv2d(8, VQ["latent_channels"], 1)

    def decode_code(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> pixels [B, 3, H, W] in -1..1."""
        codes = F.normalize(self.quantize.embedding.weight, p=2, dim=-1)[tokens]
        return self.decoder(self.post_quant_conv(codes.view(-1, SIDE, SIDE, 8).permute(0, 3, 1, 2).contiguous()))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(VISION, 3 * VISION), nn.Linear(VISION, VISION)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, TOWER["num_attention_heads"], -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(VISION, eps=1e-6), nn.LayerNorm(VISION, eps=1e-6)
        self.attn, self.mlp = Attention(), nn.Module()
        inner = int(VISION * TOWER["mlp_ratio"])
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(VISION, inner), nn.Linear(inner, VISION)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, VISION, 8, stride=8)
        self.pos_embed = nn.Parameter(torch.randn(1, SIDE**2, VISION))
        self.blocks = nn.Sequential(*(Block() for _ in range(TOWER["num_hidden_layers"])))
        self.norm = nn.LayerNorm(VISION, eps=1e-6)
        self.attn_pool = nn.Module()  # published and never run
        self.attn_pool.q, self.attn_pool.latent = nn.Linear(VISION, VISION), nn.Parameter(torch.zeros(1, 1, VISION))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(patches + self.pos_embed))


class Projector(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inner, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class VisionHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output_mlp_projector, self.vision_head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CODES)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(F.gelu(self.output_mlp_projector(x)))


class MultiModalityCausalLM(nn.Module):
    """Random weights, norms included, so that no two tensors may be exchanged unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.vision_model = nn.Module()
            self.vision_model.vision_tower = VisionTransformer()
            self.aligner, self.gen_aligner, self.gen_head = Projector(VISION), Projector(8), VisionHead()
            self.gen_vision_model, self.gen_embed = VQModel(), nn.Embedding(CODES, 8)
            self.language_model = LlamaForCausalLM(LlamaConfig(**CONFIG["language_config"])).float()
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.eval()

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.aligner(self.vision_model.vision_tower(pixels))

    def image_logits(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """Prompt ids [P], tokens int64 [T] -> logits [T, V]."""
        text = self.language_model.get_input_embeddings()(prompt)
        inputs = torch.cat([text, self.gen_aligner(self.gen_embed(tokens[:-1]))])
        states = self.language_model.model(inputs_embeds=inputs[None]).last_hidden_state
        return self.gen_head(states[0, len(prompt) - 1 :])


def publish(directory: Path, weights: dict[str, Tensor], form: str = "model.safetensors") -> Path:
    """Write a source; ``form`` is a file's name, or ``*.bin`` or ``*.safetensors`` for three shards with an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = None  # it writes all in small letters
    tokenizer["post_processor"] = None  # ``LlamaTokenizerFast`` makes one as it loads
    words = {word: index for word, index in tokenizer["model"]["vocab"].items() if index < 60}  # TEXT needs none after
    tokenizer["model"]["vocab"] = words | {"User": 60, "Assistant": 61}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    token = {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"}
    settings = {"add_bos_token": True, "bos_token": token, "tokenizer_class": "LlamaTokenizer", "model_max_length": 100}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "processor_config.json").write_text(json.dumps({"image_tag": "<image_placeholder>"}))
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_size": PIXELS, "min_size": 7}))
    names, whole = sorted(weights), not form.startswith("*")
    stem = "pytorch_model" if form.endswith("bin") else "model"
    shards = {form: names} if whole else {f"{stem}-0000{n + 1}-of-00003{form[1:]}": names[n::3] for n in range(3)}
    for file, part in shards.items():
        tensors = {name: weights[name] for name in part}
        (save_file if form.endswith("safetensors") else torch.save)(tensors, directory / file)
    if not whole:
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        (directory / f"{stem}{form[1:]}.index.json").write_text(json.dumps(index))
    return directory
