"""Trains the image tokenizer: a `JanusVQVAE` that turns 64x64 pictures into 8x8 tokens of a 512-entry codebook.

It is a tokenizer, not a policy: it trains on random scenes of *all* compositions, each rendered once. Encoder outputs
and codes have unit length (`JanusVQVAE.decode` normalises codes, so training must), gradients pass straight through,
and unused codes are restarted from the encoder outputs that the codebook serves worst. A short warm-up without codes
gives them something to start from. The loss counts objects, and most of all their edges, several times
as much as background: shape, colour and number must survive, the tint of the paper need not.

Two requirements make its tokens easy to predict. It reads pictures with grain and draws them without, so that no code
is spent on noise. And codes are *local*: pictures come in twins that differ in some objects, and where twins look alike
their latents must agree. Without this, normalisation over the whole picture writes every object into every patch of
empty paper, and a language model learns next to nothing of its captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import JanusVQVAE

from stage_ray.policies.janus.builder import build_vq_config
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun, autocast, device, load_weights
from stage_ray.shapeworld.pretrain.text import SIZES
from stage_ray.shapeworld.render import render, render_with_masks
from stage_ray.shapeworld.scene import IMAGE_SIZE, Scene, random_scene

CHECKPOINT = "training/tokenizer.safetensors"
BATCH = 16  # pictures, so half as many twins
LOCALITY = 0.25  # weight of the twins' disagreement
MARGIN = 4  # pixels around a patch that must look alike too
THRIFT = 0.015  # cosine given up for a code e times as frequent
SHARE_ROUNDS = 8  # until the shares of codes no longer move
PEAK_LR = 1e-3
COMMITMENT = 0.25
PATCH = 8  # pixels, a token's side
WARMUP = 0.04  # fraction of the training before codes come in: quantising untrained outputs collapses them onto one
RESTART_EVERY, RESTART_UNTIL = 50, 0.6  # steps; fraction of the training
OBJECT_WEIGHT, EDGE_WEIGHT = 2.0, 2.0  # on top of 1 for every pixel


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, 64, 64, 3] to float32 [B, 3, 64, 64] in -1..1, on `device()`."""
    return torch.from_numpy(images).to(device()).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


@dataclass(frozen=True, slots=True)
class Twins:
    """Fresh pictures: row i and row i + B/2 show the same paper, the second without some of the first's objects.

    `pixels`: float32 [B, 3, 64, 64] in -1..1, with grain; `clean`: the same without; `weights`: float32
    [B, 1, 64, 64], loss weights of mean 1; `alike`: bool [B/2, 8, 8], patches that look the same in both twins.
    """

    pixels: torch.Tensor
    clean: torch.Tensor
    weights: torch.Tensor
    alike: torch.Tensor


def _twin(scene: Scene, rng: np.random.Generator) -> Scene:
    kept = rng.permutation(len(scene.shapes))[: rng.integers(len(scene.shapes))]
    shapes = tuple(scene.shapes[index] for index in sorted(kept))
    return Scene(shapes, scene.background, seed=int(rng.integers(2**31)))


def _batch(rng: np.random.Generator) -> Twins:
    scenes = [random_scene(rng) for _ in range(BATCH // 2)]
    scenes += [_twin(scene, rng) for scene in scenes]
    rendered = [render_with_masks(scene) for scene in scenes]
    clean = to_pixels(np.stack([render(scene, plain=True) for scene in scenes]))
    empty = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    objects = torch.from_numpy(np.stack([np.concatenate([masks, empty]).max(axis=0) for _, masks in rendered]))
    objects = objects[:, None].to(clean.device)
    wide = F.max_pool2d(objects, 5, stride=1, padding=2)
    edges = F.max_pool2d(objects, 3, stride=1, padding=1) + F.max_pool2d(-objects, 3, stride=1, padding=1)
    weights = 1 + OBJECT_WEIGHT * wide + EDGE_WEIGHT * edges
    first, second = clean.chunk(2)
    apart = (first - second).abs().amax(dim=1, keepdim=True)
    apart = F.max_pool2d(apart, PATCH + 2 * MARGIN, stride=PATCH, padding=MARGIN)[:, 0]
    pixels = to_pixels(np.stack([image for image, _ in rendered]))
    return Twins(pixels, clean, weights / weights.mean(), apart == 0)


def disagreement(outputs: torch.Tensor, alike: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the twins' latents where they look alike, mean: scalar, from unit-length outputs [B * 64, 8]."""
    first, second = outputs.view(2, -1, outputs.shape[-1])
    return 1 - (first * second).sum(dim=-1)[alike.flatten()].mean()


def quantised_pass(
    model: JanusVQVAE, pixels: torch.Tensor, quantise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A forward pass with the unit-length quantiser that `JanusVQVAE` was designed for.

    Pictures [B, 3, 64, 64] to reconstructions, the quantiser's loss, code ids [B * 64] and unit-length encoder outputs
    [B * 64, 8]. Without `quantise` the decoder sees the encoder's outputs themselves.
    """
    with autocast():
        latent = model.quant_conv(model.encoder(pixels))
    grid = F.normalize(latent.float(), dim=1)  # [B, 8, 8, 8]
    outputs = grid.permute(0, 2, 3, 1).reshape(-1, grid.shape[1])
    codes = F.normalize(model.quantize.embedding.weight, dim=1)
    ids = (outputs.detach() @ codes.detach().T).argmax(dim=1)
    chosen = codes[ids].view(grid.shape[0], *grid.shape[2:], -1).permute(0, 3, 1, 2)
    quantiser_loss = (chosen - grid.detach()).square().mean()
    if quantise:
        quantiser_loss = quantiser_loss + COMMITMENT * (chosen.detach() - grid).square().mean()
    # Forwards the codes, backwards the identity: gradients pass straight through to the encoder.
    straight_through = grid + (chosen - grid).detach() if quantise else grid
    with autocast():
        decoded = model.decoder(model.post_quant_conv(straight_through))
    return decoded.float(), quantiser_loss, ids, outputs


@torch.no_grad()
def restart_codes(
    codebook: torch.Tensor, unused: torch.Tensor, outputs: torch.Tensor, generator: torch.Generator
) -> int:
    """Move the unused codes (bool [512]) of a codebook [512, 8] onto encoder outputs [B * 64, 8]; how many moved.

    Outputs are drawn in proportion to their squared distance from their nearest code: rare shapes and colours get
    codes, empty paper does not get them all.
    """
    cosine = (outputs @ F.normalize(codebook, dim=1).T).amax(dim=1)
    misfit = (1 - cosine).clamp_min(1e-6).cpu()
    count = int(unused.sum())
    picks = torch.multinomial(misfit, max(1, count), replacement=True, generator=generator)[:count]
    codebook[unused] = outputs[picks.to(outputs.device)]
    return count


def train_tokenizer(work: Path, budget: Budget, seed: int = 0) -> None:
    """Trains (or resumes) the tokenizer; writes `work/training/tokenizer.safetensors`."""
    torch.manual_seed(seed)
    model = JanusVQVAE(build_vq_config(SIZES)).to(device()).train()
    codebook = model.quantize.embedding.weight
    with torch.no_grad():
        codebook.copy_(F.normalize(torch.randn_like(codebook), dim=1))
    _spread_latents(model, _batch(np.random.default_rng([seed, 2**31])).pixels)
    run = TrainingRun(work / CHECKPOINT, model, PEAK_LR, budget)
    generator = torch.Generator().manual_seed(seed)
    used = torch.zeros(len(codebook), dtype=torch.bool, device=codebook.device)
    restarted = 0
    for step, progress in run:
        twins = _batch(np.random.default_rng([seed, step]))
        quantise = progress >= WARMUP
        decoded, quantiser_loss, ids, outputs = quantised_pass(model, twins.pixels, quantise)
        error = decoded - twins.clean
        reconstruction = (twins.weights * (error.abs() + error.square())).mean()
        run.descend(reconstruction + quantiser_loss + LOCALITY * disagreement(outputs, twins.alike))
        outputs = outputs.detach()
        used[ids] = True
        if not quantise:  # every code onto a random encoder output
            picks = torch.randint(len(outputs), (len(codebook),), generator=generator)
            codebook.data.copy_(outputs[picks.to(outputs.device)])
            used.fill_(False)
        elif step % RESTART_EVERY == RESTART_EVERY - 1:
            restarted = restart_codes(codebook, ~used, outputs, generator) if progress < RESTART_UNTIL else 0
            used.fill_(False)
        first, second = ids.view(2, -1)
        run.report(
            loss=reconstruction.item(),
            l1=error.abs().mean().item(),
            quantiser=quantiser_loss.item(),
            same_codes=(first == second)[twins.alike.flatten()].float().mean().item(),
            dead=restarted,
        )


@torch.no_grad()
def _spread_latents(model: JanusVQVAE, pixels: torch.Tensor) -> None:
    """Shifts and scales the untrained `quant_conv` so that its outputs have mean 0 and variance 1 in every dimension.

    Without this all latents point nearly the same way: unit length then leaves the decoder next to nothing to read.
    """
    outputs = model.quant_conv(model.encoder(pixels))  # [B, 8, 8, 8]
    mean, std = outputs.mean(dim=(0, 2, 3)), outputs.std(dim=(0, 2, 3))
    model.quant_conv.weight.div_(std[:, None, None, None])
    model.quant_conv.bias.sub_(mean).div_(std)


def load_tokenizer(work: Path) -> JanusVQVAE:
    """What `train_tokenizer` wrote, float32, in evaluation mode, on `device()`.

    Codes are scaled to unit length, so that plain `JanusVQVAE.encode` picks the codes that training picked: its nearest
    code is then the one of largest cosine, whatever the length of the encoder's output.
    """
    model = JanusVQVAE(build_vq_config(SIZES))
    load_weights(work / CHECKPOINT, model)
    codes = model.quantize.embedding.weight.data
    codes.copy_(F.normalize(codes, dim=1))
    return model.to(device()).eval()


@torch.no_grad()
def cosines(model: JanusVQVAE, images: np.ndarray, batch: int = 64) -> torch.Tensor:
    """How well each code fits each place: uint8 [B, 64, 64, 3] to float32 [B, 64, 512], cosines, row by row."""
    codes = F.normalize(model.quantize.embedding.weight, dim=1)
    fits = []
    for start in range(0, len(images), batch):
        with autocast():
            latent = model.quant_conv(model.encoder(to_pixels(images[start : start + batch])))
        outputs = F.normalize(latent.float(), dim=1).permute(0, 2, 3, 1)  # [B, 8, 8, 8]
        fits.append((outputs @ codes.T).flatten(1, 2))
    return torch.cat(fits)


class ThriftyCodes:
    """Image ids that cost a language model little: of codes that fit nearly alike, the frequent one.

    Entropy-constrained vector quantisation (Chou, Lookabaugh and Gray, 1989): the code of a place is the one with the
    greatest ``cosine + THRIFT * log(share of the code)``, the shares being those of the ids it gives. Empty paper then
    has a few codes and not dozens; what a picture shows stays the same.
    """

    def __init__(self, model: JanusVQVAE, sample: np.ndarray) -> None:
        """Find the shares on a sample, uint8 [B, 64, 64, 3], a few hundred pictures or more."""
        self._model = model
        fits = cosines(model, sample)
        self._bonus = torch.zeros(fits.shape[-1], device=fits.device)
        for _ in range(SHARE_ROUNDS):
            ids = (fits + self._bonus).argmax(-1)
            counts = torch.bincount(ids.flatten(), minlength=fits.shape[-1]) + 0.5
            self._bonus = THRIFT * (counts / counts.sum()).log()

    def encode(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [B, 64, 64, 3] to image ids int16 [B, 64], on the CPU."""
        return (cosines(self._model, images) + self._bonus).argmax(-1).to("cpu", torch.int16)
