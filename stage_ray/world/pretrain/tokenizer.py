"""Trains the image tokenizer: a `JanusVQVAE` that turns 64x64 pictures into 8x8 tokens of a 512-entry codebook.

It is a tokenizer, not a policy: it trains on random scenes of *all* compositions, each rendered once. Encoder outputs
and codes have unit length (`JanusVQVAE.decode` normalises codes, so training must), gradients pass straight through,
and unused codes are restarted from the encoder outputs that the codebook serves worst. A short warm-up without codes
gives them something to start from. The loss counts objects, and most of all their edges, several times
as much as background: shape, colour and number must survive, the tint of the paper need not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import JanusVQVAE, JanusVQVAEConfig

from stage_ray.world.pretrain.loop import Budget, TrainingRun, device, save_atomically
from stage_ray.world.render import render_with_masks
from stage_ray.world.scene import random_scene

BATCH = 16
PEAK_LR = 1e-3
COMMITMENT = 0.25
WARMUP = 0.04  # fraction of the training before codes come in: quantising untrained outputs collapses them onto one
RESTART_EVERY, RESTART_UNTIL = 50, 0.6  # steps; fraction of the training
OBJECT_WEIGHT, EDGE_WEIGHT = 2.0, 2.0  # on top of 1 for every pixel


def vq_config(width: int) -> JanusVQVAEConfig:
    """The tokenizer's shape; `width` is the language model's hidden size (for the generation aligner and head)."""
    return JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=512,
        latent_channels=64,
        base_channels=32,
        channel_multiplier=[1, 1, 2, 2],
        num_res_blocks=1,
        num_patches=8,
        projection_dim=width,
        image_token_embed_dim=width,
    )


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, 64, 64, 3] to float32 [B, 3, 64, 64] in -1..1, on `device()`."""
    return torch.from_numpy(images).to(device()).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def _batch(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh pictures [B, 3, 64, 64] in -1..1 and loss weights [B, 1, 64, 64] of mean 1."""
    rendered = [render_with_masks(random_scene(rng)) for _ in range(BATCH)]
    pixels = to_pixels(np.stack([image for image, _ in rendered]))
    objects = torch.from_numpy(np.stack([masks.max(axis=0) for _, masks in rendered]))[:, None].to(pixels.device)
    wide = F.max_pool2d(objects, 5, stride=1, padding=2)
    edges = F.max_pool2d(objects, 3, stride=1, padding=1) + F.max_pool2d(-objects, 3, stride=1, padding=1)
    weights = 1 + OBJECT_WEIGHT * wide + EDGE_WEIGHT * edges
    return pixels, weights / weights.mean()


class Quantized(nn.Module):
    """`JanusVQVAE` with the unit-length quantiser it was designed for."""

    def __init__(self, model: JanusVQVAE) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, pixels: torch.Tensor, quantise: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures [B, 3, 64, 64] to reconstructions, the quantiser's loss, code ids [B * 64] and unit-length encoder
        outputs [B * 64, 8]. Without `quantise` the decoder sees the encoder's outputs themselves."""
        with torch.autocast(pixels.device.type, torch.bfloat16):
            latent = self.model.quant_conv(self.model.encoder(pixels))
        with torch.autocast(pixels.device.type, enabled=False):
            grid = F.normalize(latent.float(), dim=1)  # [B, 8, 8, 8]
            outputs = grid.permute(0, 2, 3, 1).reshape(-1, grid.shape[1])
            codes = F.normalize(self.model.quantize.embedding.weight, dim=1)
            ids = (outputs.detach() @ codes.detach().T).argmax(dim=1)
            chosen = codes[ids].view(grid.shape[0], *grid.shape[2:], -1).permute(0, 3, 1, 2)
            code_loss = (chosen - grid.detach()).square().mean()
            commitment = (chosen.detach() - grid).square().mean()
            straight_through = grid + (chosen - grid).detach() if quantise else grid
        with torch.autocast(pixels.device.type, torch.bfloat16):
            decoded = self.model.decoder(self.model.post_quant_conv(straight_through))
        quantiser_loss = code_loss + COMMITMENT * commitment if quantise else code_loss
        return decoded.float(), quantiser_loss, ids, outputs.detach()


class CodeUsage:
    """Counts which codes are used and moves the unused ones onto fresh encoder outputs."""

    def __init__(self, codebook: torch.Tensor) -> None:
        self.codebook = codebook  # [512, 8], the parameter itself
        self.counts = torch.zeros(len(codebook), device=codebook.device)

    def observe(self, ids: torch.Tensor) -> None:
        self.counts += torch.bincount(ids, minlength=len(self.counts))

    @torch.no_grad()
    def restart_all(self, outputs: torch.Tensor, generator: torch.Generator) -> None:
        """Puts every code on a random encoder output of `outputs` [B * 64, 8]."""
        picks = torch.randint(len(outputs), (len(self.codebook),), generator=generator)
        self.codebook.copy_(outputs[picks.to(outputs.device)])
        self.counts.zero_()

    @torch.no_grad()
    def restart_unused(self, outputs: torch.Tensor, generator: torch.Generator) -> int:
        """Outputs [B * 64, 8] are drawn in proportion to their squared distance from their nearest code: rare shapes
        and colours get codes, empty paper does not get them all. Returns how many codes moved."""
        unused = (self.counts == 0).nonzero().flatten()
        cosine = (outputs @ F.normalize(self.codebook, dim=1).T).amax(dim=1)
        misfit = (1 - cosine).clamp_min(1e-6).cpu()
        picks = torch.multinomial(misfit, max(1, len(unused)), replacement=True, generator=generator)[: len(unused)]
        self.codebook[unused] = outputs[picks.to(outputs.device)]
        self.counts.zero_()
        return len(unused)


def train_tokenizer(work: Path, budget: Budget, seed: int = 0) -> JanusVQVAE:
    """Trains (or resumes) the tokenizer and returns it; writes `work/tokenizer.safetensors` (float32, unit codes)."""
    torch.manual_seed(seed)
    model = JanusVQVAE(vq_config(width=192)).to(device()).train()
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(F.normalize(torch.randn_like(model.quantize.embedding.weight), dim=1))
    _spread_latents(model, _batch(np.random.default_rng([seed, 2**31]))[0])
    quantized = Quantized(model)
    run = TrainingRun(work / "tokenizer-training.safetensors", quantized, PEAK_LR, budget)
    run.on_checkpoint = lambda: save_atomically(exported_weights(model), work / "tokenizer.safetensors")
    usage, generator = CodeUsage(model.quantize.embedding.weight), torch.Generator().manual_seed(seed)
    restarted = 0
    for step, progress in run:
        pixels, weights = _batch(np.random.default_rng([seed, step]))
        quantise = progress >= WARMUP
        decoded, quantiser_loss, ids, outputs = quantized(pixels, quantise)
        error = decoded - pixels
        reconstruction = (weights * (error.abs() + error.square())).mean()
        run.descend(reconstruction + quantiser_loss)
        usage.observe(ids)
        if not quantise:
            usage.restart_all(outputs, generator)
        elif step % RESTART_EVERY == RESTART_EVERY - 1:
            restarted = usage.restart_unused(outputs, generator) if progress < RESTART_UNTIL else 0
        run.report(
            loss=reconstruction.item(), l1=error.abs().mean().item(), quantiser=quantiser_loss.item(), dead=restarted
        )
    return model.eval()


@torch.no_grad()
def _spread_latents(model: JanusVQVAE, pixels: torch.Tensor) -> None:
    """Shifts and scales the untrained `quant_conv` so that its outputs have mean 0 and variance 1 in every dimension.

    Without this all latents point nearly the same way: unit length then leaves the decoder next to nothing to read.
    """
    outputs = model.quant_conv(model.encoder(pixels))  # [B, 8, 8, 8]
    mean, std = outputs.mean(dim=(0, 2, 3)), outputs.std(dim=(0, 2, 3))
    model.quant_conv.weight.div_(std[:, None, None, None])
    model.quant_conv.bias.sub_(mean).div_(std)


def exported_weights(model: JanusVQVAE) -> dict[str, torch.Tensor]:
    """The model's weights with unit-length codes, so that plain `JanusVQVAE.encode` picks the codes training picked
    (its nearest code is then the one of largest cosine, whatever the length of the encoder's output)."""
    weights = dict(model.state_dict())
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=1)
    return weights


def load_tokenizer(work: Path) -> JanusVQVAE:
    """The tokenizer that `train_tokenizer` wrote, float32, in evaluation mode, on `device()`."""
    model = JanusVQVAE(vq_config(width=192))
    model.load_state_dict(load_file(work / "tokenizer.safetensors"))
    return model.to(device()).eval()


@torch.no_grad()
def encode_images(model: JanusVQVAE, images: np.ndarray, batch: int = 64) -> torch.Tensor:
    """uint8 [B, 64, 64, 3] to image ids int16 [B, 64] (0..511, row by row), on the CPU."""
    ids = []
    for start in range(0, len(images), batch):
        with torch.autocast(device().type, torch.bfloat16):
            latent = model.quant_conv(model.encoder(to_pixels(images[start : start + batch])))
        outputs = latent.float().permute(0, 2, 3, 1)  # [B, 8, 8, 8]
        scores = outputs @ F.normalize(model.quantize.embedding.weight, dim=1).T
        ids.append(scores.argmax(-1).flatten(1).to("cpu", torch.int16))
    return torch.cat(ids)


@torch.no_grad()
def decode_images(model: JanusVQVAE, ids: torch.Tensor, batch: int = 64) -> np.ndarray:
    """Image ids [B, 64] to uint8 [B, 64, 64, 3]."""
    images = []
    for start in range(0, len(ids), batch):
        pixels = model.decode(ids[start : start + batch].to(device()).long())
        images.append(((pixels.clamp(-1, 1) + 1) * 127.5 + 0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(images)
