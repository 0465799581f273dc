"""Trains the image tokenizer: a `JanusVQVAE` that turns 64x64 pictures into 8x8 tokens of a 512-entry codebook.

It trains on random scenes of *all* compositions, each rendered once. Encoder outputs and codes have unit length
(`JanusVQVAE.decode` normalises codes, so training must), and unused codes are restarted. The loss counts objects, and
most of all their edges, several times as much as background: shape, colour and number must survive.

Two requirements make its tokens easy to predict. It reads pictures with grain and draws them without, so that no code
is spent on noise. And codes are *local*: pictures come in twins that differ in some objects, and where twins look alike
their latents must agree. Without this, every object is written into every patch of empty paper.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration, JanusVQVAE

from stage_ray.policies.janus.builder import JanusSizes, build_vq_config
from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun, autocast, device, read_checkpoint
from stage_ray.shapeworld.scene import IMAGE_SIZE, Scene, coverage, random_scene, render

SIZES = JanusSizes(
    hidden=192, layers=6, heads=6, intermediate=512, codes=512, side=8, vocabulary=96, channel_multiplier=(1, 1, 1, 2)
)  # of the policy
CHECKPOINT = "work/training/tokenizer.safetensors"
BATCH = 16  # pictures, so half as many twins
LOCALITY = 0.25  # weight of the twins' disagreement
MARGIN = 4  # pixels around a patch that must look alike too
THRIFT = 0.015  # cosine given up for a code e times as frequent
SHARE_ROUNDS = 8  # until the shares of codes no longer move
COMMITMENT = 0.25
PATCH = 8  # pixels, a token's side
BATCH_IMAGES = 64  # encoded or decoded at once
WARMUP = 0.04  # fraction of the training before codes come in: quantising untrained outputs collapses them onto one
RESTART_EVERY, RESTART_UNTIL = 50, 0.6  # steps; fraction of the training
OBJECT_WEIGHT, EDGE_WEIGHT = 2.0, 2.0  # on top of 1 for every pixel
COLOR_WEIGHT = 2.0  # of the error of a patch's mean colour: without it mint paper turns grey


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, 64, 64, 3] to float32 [B, 3, 64, 64] in -1..1, on `device()`."""
    return torch.as_tensor(images, device=device()).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def _batch(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh pictures: row i and row i + B/2 are twins, the second with other grain and without some of the objects.

    With grain and without, float32 [B, 3, 64, 64] in -1..1; weights of mean 1, [B, 1, 64, 64]; patches alike in both
    twins, bool [B/2, 8, 8].
    """
    scenes = [random_scene(rng) for _ in range(BATCH // 2)]
    for scene in scenes[:]:
        kept = rng.permutation(len(scene.shapes))[: rng.integers(len(scene.shapes))]
        shapes = tuple(scene.shapes[index] for index in sorted(kept))
        scenes.append(Scene(shapes, scene.background, seed=int(rng.integers(2**31))))
    pixels, clean = (to_pixels(np.stack([render(scene, plain=plain) for scene in scenes])) for plain in (False, True))
    empty = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    masks = [np.max([empty, *map(coverage, scene.shapes)], axis=0) for scene in scenes]  # where any object is
    objects = torch.from_numpy(np.stack(masks))[:, None].to(clean.device)  # [B, 1, 64, 64]
    wide = F.max_pool2d(objects, 5, stride=1, padding=2)
    edges = F.max_pool2d(objects, 3, stride=1, padding=1) + F.max_pool2d(-objects, 3, stride=1, padding=1)
    weights = 1 + OBJECT_WEIGHT * wide + EDGE_WEIGHT * edges
    first, second = clean.chunk(2)
    apart = (first - second).abs().amax(dim=1, keepdim=True)
    apart = F.max_pool2d(apart, PATCH + 2 * MARGIN, stride=PATCH, padding=MARGIN)[:, 0]
    return pixels, clean, weights / weights.mean(), apart == 0


def lighten(model: JanusVQVAE) -> list[tuple[nn.ModuleList, int]]:
    """Zero the residual blocks that it can do without, so that they give back what they get.

    Nothing is left at the picture's own resolution, where a block costs most, and one block at each below. The blocks
    stay in the file, whose layout is transformers'; `PictureDecoder` does not compute them. Returns where they are.
    """
    *levels, last = model.decoder.up  # from 8 x 8 up
    spare = [(level.block, 1) for level in levels] + [(last.block, index) for index in range(len(last.block))]
    spare.append((model.encoder.down[0].block, 0))
    for blocks, index in spare:
        nn.init.zeros_(blocks[index].conv2.weight)
        nn.init.zeros_(blocks[index].conv2.bias)
    return spare


def _latents(model: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Encoder outputs of unit length: [B, 3, 64, 64] to float32 [B, 8, 8, 8], dimensions second."""
    with autocast():
        latent = model.quant_conv(model.encoder(pixels))
    return F.normalize(latent.float(), dim=1)


def train_tokenizer(out: Path, budget: Budget, seed: int) -> None:
    """Train (or resume) the tokenizer; writes the checkpoint alone."""
    torch.manual_seed(seed)
    model = JanusVQVAE(build_vq_config(SIZES)).to(device()).train()
    for blocks, index in lighten(model):
        blocks[index] = nn.Identity()  # not even trained
    codebook = model.quantize.embedding.weight
    codebook.data.copy_(F.normalize(torch.randn_like(codebook), dim=1))
    # The untrained encoder's outputs get mean 0 and variance 1 in every dimension. Otherwise all point nearly the same
    # way, and unit length leaves the decoder next to nothing to read.
    with torch.no_grad():
        outputs = model.quant_conv(model.encoder(_batch(np.random.default_rng([seed, 2**31]))[0]))  # [B, 8, 8, 8]
        mean, std = outputs.mean(dim=(0, 2, 3)), outputs.std(dim=(0, 2, 3))
        model.quant_conv.weight.div_(std[:, None, None, None])
        model.quant_conv.bias.sub_(mean).div_(std)
    run = TrainingRun(out / CHECKPOINT, model, 1e-3, budget)
    generator = torch.Generator().manual_seed(seed)
    used = torch.zeros(len(codebook), dtype=torch.bool, device=codebook.device)
    for step, progress in run:
        pixels, clean, weights, alike = _batch(np.random.default_rng([seed, step]))
        latents = _latents(model, pixels)
        outputs = latents.movedim(1, -1).flatten(0, 2)  # [B * 64, 8]
        codes = F.normalize(codebook, dim=1)
        ids = (outputs.detach() @ codes.detach().T).argmax(dim=1)
        chosen = codes[ids].view_as(latents.movedim(1, -1)).movedim(-1, 1)  # [B, 8, 8, 8], as the latents
        quantiser_loss = (chosen - latents.detach()).square().mean()
        shown = latents  # without codes the decoder sees the encoder's outputs themselves
        if progress >= WARMUP:
            quantiser_loss = quantiser_loss + COMMITMENT * (chosen.detach() - latents).square().mean()
            # Forwards the codes, backwards the identity: gradients pass straight through to the encoder.
            shown = latents + (chosen - latents).detach()
        with autocast():
            decoded = model.decoder(model.post_quant_conv(shown))
        error = decoded.float() - clean
        reconstruction = (weights * (error.abs() + error.square())).mean()
        reconstruction = reconstruction + COLOR_WEIGHT * F.avg_pool2d(error, PATCH).abs().mean()
        first, second = outputs.view(2, -1, outputs.shape[-1])  # the twins'
        disagreement = 1 - (first * second).sum(dim=-1)[alike.flatten()].mean()
        run.descend(reconstruction + quantiser_loss + LOCALITY * disagreement, report=reconstruction)
        outputs = outputs.detach()
        used[ids] = True
        if progress < WARMUP:  # every code onto a random encoder output
            picks = torch.randint(len(outputs), (len(codebook),), generator=generator)
            codebook.data.copy_(outputs[picks.to(outputs.device)])
            used.fill_(False)
        elif step % RESTART_EVERY == RESTART_EVERY - 1:
            if progress < RESTART_UNTIL:
                _restart_codes(codebook.data, ~used, outputs, generator)
            used.fill_(False)


def _restart_codes(codebook: Tensor, unused: Tensor, outputs: Tensor, generator: torch.Generator) -> None:
    """Move the unused codes (bool [512]) of a codebook [512, 8] onto encoder outputs [B * 64, 8].

    Outputs far from their nearest code are drawn more often: empty paper does not get all codes.
    """
    cosine = (outputs @ F.normalize(codebook, dim=1).T).amax(dim=1)
    misfit = (1 - cosine).clamp_min(1e-6).cpu()
    count = int(unused.sum())
    picks = torch.multinomial(misfit, max(1, count), replacement=True, generator=generator)[:count]
    codebook[unused] = outputs[picks.to(outputs.device)]


def load_tokenizer(out: Path) -> JanusVQVAE:
    """What `train_tokenizer` wrote, float32, on `device()`.

    Codes have unit length, so that the nearest, which plain `JanusVQVAE.encode` picks, is that of largest cosine.
    """
    model = JanusVQVAE(build_vq_config(SIZES))
    lighten(model)
    model.load_state_dict(read_checkpoint(out / CHECKPOINT)["module"], strict=False)  # of what was trained
    codes = model.quantize.embedding.weight.data
    codes.copy_(F.normalize(codes, dim=1))
    return model.to(device()).eval()


@torch.no_grad()
def cosines(model: JanusVQVAE, images: np.ndarray) -> Tensor:
    """How well each code fits each place: images uint8 [B, 64, 64, 3] -> cosines float32 [B, 64, 512]."""
    codes = F.normalize(model.quantize.embedding.weight, dim=1)
    batches = torch.from_numpy(images).split(BATCH_IMAGES)
    return torch.cat([(_latents(model, to_pixels(b)).permute(0, 2, 3, 1) @ codes.T).flatten(1, 2) for b in batches])


def thrifty_bonus(fits: Tensor) -> Tensor:
    """What to add to each code's cosine [512], so that of codes that fit nearly alike the frequent one is taken.

    Entropy-constrained vector quantisation (Chou, Lookabaugh and Gray, 1989): ``THRIFT * log(share of the code)``, the
    shares being those of the ids that it leads to, for `cosines` of a few hundred pictures. Empty paper then has a few
    codes and not dozens; what a picture shows stays the same.
    """
    bonus = torch.zeros(fits.shape[-1], device=fits.device)
    for _ in range(SHARE_ROUNDS):
        counts = torch.bincount((fits + bonus).argmax(-1).flatten(), minlength=len(bonus)) + 0.5
        bonus = THRIFT * (counts / counts.sum()).log()
    return bonus


def load_exported(janus: Path) -> JanusVQVAE:
    """The tokenizer of a policy's directory, float32, on `device()`."""
    model = JanusForConditionalGeneration.from_pretrained(janus, local_files_only=True, dtype=torch.float32)
    return model.model.vqmodel.to(device()).eval()


@torch.inference_mode()
def encode(model: JanusVQVAE, images: np.ndarray) -> Tensor:
    """Images uint8 [B, 64, 64, 3] -> tokens int64 [B, 64], as transformers encodes them."""
    batches = torch.from_numpy(images).split(BATCH_IMAGES)
    return torch.cat([model.encode(to_pixels(batch)).image_tokens.view(len(batch), -1) for batch in batches])


@torch.inference_mode()
def decode(model: JanusVQVAE, tokens: Tensor) -> np.ndarray:
    """Tokens int64 [B, 64] -> images uint8 [B, 64, 64, 3]."""
    pixels = torch.cat([model.decode(batch) for batch in tokens.to(device()).split(BATCH_IMAGES)])
    return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5 + 0.5).clamp(0, 255).to("cpu", torch.uint8).numpy()


def reconstruct(model: JanusVQVAE, images: np.ndarray) -> np.ndarray:
    """Images uint8 [B, 64, 64, 3] -> what is left of them after encoding and decoding."""
    return decode(model, encode(model, images))


def random_images(model: JanusVQVAE, count: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures uint8 [count, 64, 64, 3] decoded from tokens drawn uniformly and independently: they mean nothing."""
    return decode(model, torch.from_numpy(rng.integers(SIZES.codes, size=(count, SIZES.side**2))))
