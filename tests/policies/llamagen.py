"""LlamaGen in plain torch, tiny: the names, the arithmetic and the files of its published code.

`publish` writes it as LlamaGen is published: two pickles without a config. `text_encoder` is a T5 of any size.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tests.policies.deepseek import CODES, PIXELS, SIDE, VQModel

HIDDEN, HEADS, LAYERS, INNER, CLASSES, PROMPT, WIDTH = 64, 2, 2, 96, 1000, 12, 24
TEXTS = {
    "class": ("goldfish", "207", "a photo of a hen", "999"),
    "text": ("a red circle", "circle", "a photo of two blue rings", "two squares and a circle"),
}
WORDS = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "red", "blue", "circle", "square", "two", "rings", "and"]
MODEL = {"class": f"c2i_tiny_{PIXELS:03}.pt", "text": f"t2i_tiny_{PIXELS:03}.pt"}
TOKENIZER = "vq_ds8_tiny.pt"


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor) -> Tensor:
        """``turns``: complex [L, D / 2], what each pair of neighbours is multiplied with, as one complex number."""
        query, key, value = self.wqkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)  # [B, L, heads, D]
        pairs = (torch.view_as_complex(each.unflatten(-1, (-1, 2)).contiguous()) for each in (query, key))
        query, key = (torch.view_as_real(each * turns[:, None]).flatten(-2) for each in pairs)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~mask[:, None], -torch.inf)
        return self.wo((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.w2 = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = Norm(), Norm()

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(CLASSES + 1, HIDDEN)


class Captions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cap_proj = nn.Module()
        self.cap_proj.fc1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.cap_proj.fc2 = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.register_buffer("uncond_embedding", torch.randn(PROMPT, WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj.fc2(F.gelu(self.cap_proj.fc1(features), approximate="tanh"))


class Transformer(nn.Module):
    """Random weights, norms included, so that no two tensors may be exchanged unnoticed."""

    def __init__(self, condition: str, seed: int = 0) -> None:
        super().__init__()
        self.condition, self.prompt = condition, 1 if condition == "class" else PROMPT
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.cls_embedding = Labels() if condition == "class" else Captions()
            self.tok_embeddings = nn.Embedding(CODES, HIDDEN)
            self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm, self.output = Norm(), nn.Linear(HIDDEN, CODES, bias=False)
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if parameter.dim() < 2:
                        parameter.add_(0.1 * torch.randn_like(parameter))
                    elif "embedding" not in name or "cap_proj" in name:
                        gain = 3.0 if name.startswith("output") else 1.0
                        parameter.copy_(torch.randn_like(parameter) * gain / parameter.shape[1] ** 0.5)
        half = HIDDEN // HEADS // 2
        frequencies = 10000.0 ** -(torch.arange(0, half, 2) / half)
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        turns = torch.cat([where.reshape(-1, 1) * frequencies for where in (rows, columns)], dim=1)
        # Nothing turns the prompt, and nothing is left of its queries and keys.
        self.turns = torch.cat([torch.zeros(self.prompt, half), torch.polar(torch.ones_like(turns), turns)])
        self.eval()

    @torch.no_grad()
    def image_logits(self, prompts: Tensor, seen: Tensor, tokens: Tensor) -> Tensor:
        """Inputs of prompts [B, P, hidden], which are ``seen`` bool [B, P], tokens [B, T] -> logits [B, T, V]."""
        x = torch.cat([prompts, self.tok_embeddings(tokens[:, :-1])], dim=1)
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(x), 1, 1)
        mask[:, :, : self.prompt] &= seen[:, None]
        mask |= torch.eye(length, dtype=torch.bool)
        for block in self.layers:
            x = block(x, self.turns[:length], mask)
        return self.output(self.norm(x))[:, self.prompt - 1 :]

    def of_classes(self, numbers: Sequence[int], tokens: Tensor) -> Tensor:
        """Logits of images of these classes; the last is none."""
        seen = torch.ones(len(numbers), 1, dtype=torch.bool)
        return self.image_logits(self.cls_embedding.embedding_table(torch.tensor(numbers))[:, None], seen, tokens)

    def of_captions(self, features: Sequence[Tensor], tokens: Tensor, *, conditional: bool = True) -> Tensor:
        """Logits of images of captions, padded on the left; or of none that are as long."""
        padded, seen = torch.zeros(len(features), PROMPT, WIDTH), torch.zeros(len(features), PROMPT, dtype=torch.bool)
        for row, own in enumerate(features):
            padded[row, -len(own) :], seen[row, -len(own) :] = own, True
        given = padded if conditional else self.cls_embedding.uncond_embedding.expand_as(padded)
        return self.image_logits(self.cls_embedding(given), seen, tokens)


def publish(directory: Path, condition: str, seed: int = 0, key: str | None = "model") -> tuple[Transformer, VQModel]:
    """Write both files, as trainers do: weights under a ``key``, with what else they save."""
    directory.mkdir(parents=True, exist_ok=True)
    model, tokenizer = Transformer(condition, seed), VQModel()
    beside = {"optimizer": {"state": {0: {"step": 3}}}, "steps": 3, "args": Namespace(lr=1e-4, ema=True)}
    weights = model.state_dict()
    torch.save({key: weights, **beside} if key else weights, directory / MODEL[condition])
    unused = {"quantize.codebook_used": torch.zeros(8)}
    torch.save({"model": tokenizer.state_dict() | unused}, directory / TOKENIZER)
    said = {"num_attention_heads": HEADS}
    if condition == "text":
        said |= {"text_encoder": str(text_encoder(directory.parent / "t5"))}
    (directory / "config.json").write_text(json.dumps(said))
    return model, tokenizer


def text_encoder(directory: Path) -> Path:
    """Write a tiny T5 encoder with its tokenizer."""
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
        T5EncoderModel(config).save_pretrained(directory)
    return directory
