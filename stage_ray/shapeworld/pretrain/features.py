"""Trains the network whose features no reward uses: a small ConvNeXt V2 that says what a picture shows.

It counts objects by shape and by colour, says which pairs of both are there, names the paper, and tells how much of a
picture is damaged: without the last, smears would look to it like the nearest clean picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvNextImageProcessorPil, ConvNextV2Config, ConvNextV2Model, JanusVQVAE

from stage_ray.shapeworld.pretrain.loop import Budget, TrainingRun, autocast, device, read_checkpoint
from stage_ray.shapeworld.pretrain.tokenizer import decode, encode, load_exported, to_pixels
from stage_ray.shapeworld.scene import BACKGROUNDS, COLORS, IMAGE_SIZE, SHAPES, Scene, random_scene, render

CHECKPOINT = "work/training/features.safetensors"
BATCH = 64
MOST = 4  # objects of one kind
WIDTH = 64  # dimensions of the features
DAMAGED = 0.4  # share of reconstructions of which some tokens are in others' places
PAIRS = [(shape, color) for shape in SHAPES for color in COLORS]


class PictureReader(nn.Module):
    """The network with its heads; `network` alone ships."""

    def __init__(self) -> None:
        super().__init__()
        config = ConvNextV2Config(num_stages=3, hidden_sizes=[16, 32, WIDTH], depths=[1, 2, 2], image_size=IMAGE_SIZE)
        self.network = ConvNextV2Model(config)  # 0.1 M parameters
        self.counts = nn.Linear(WIDTH, (len(SHAPES) + len(COLORS)) * (MOST + 1))
        self.pairs, self.paper = nn.Linear(WIDTH, len(PAIRS)), nn.Linear(WIDTH, len(BACKGROUNDS))
        self.damage = nn.Linear(WIDTH, 1)

    def loss(self, pixels: Tensor, answers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of pictures [B, 3, 64, 64] and what they show; and the share of undamaged ones with all counts right."""
        with autocast():
            features = self.network(pixels).pooler_output
        features, whole = features.float(), answers["damage"] == 0
        damage = F.mse_loss(self.damage(features).squeeze(-1), answers["damage"])
        counts = self.counts(features).unflatten(-1, (-1, MOST + 1))[whole]
        wanted = answers["counts"][whole]
        pairs = F.binary_cross_entropy_with_logits(self.pairs(features)[whole], answers["pairs"][whole])
        paper = F.cross_entropy(self.paper(features)[whole], answers["paper"][whole])
        count = F.cross_entropy(counts.flatten(0, 1), wanted.flatten())
        right = (counts.detach().argmax(-1) == wanted).all(-1).float().mean()
        return count + 2 * pairs + 0.2 * paper + 4 * damage, right


def train_features(out: Path, budget: Budget, pictures: int, seed: int) -> None:
    """Train (or resume) the network; writes `out/features`: bfloat16 weights and an image processor.

    On as many renders as ``pictures`` and a third as many reconstructions by the tokenizer in `out/janus`, both as
    often, and mirrored ones, which show the same: there is no left and right in what is asked of them.
    """
    torch.manual_seed(seed)
    noise, tokenizer = np.random.default_rng([seed, 5]), load_exported(out / "janus")
    sets = dataset(noise, None, pictures), dataset(noise, tokenizer, pictures // 3)
    model = PictureReader().to(device()).train()
    run = TrainingRun(out / CHECKPOINT, model, 4e-3, budget, weight_decay=0.05)
    for step, _ in run:
        generator = torch.Generator().manual_seed(2**20 * seed + step)
        chosen = [torch.randint(len(images), (BATCH // 2,), generator=generator) for images, _ in sets]
        pixels = torch.cat([to_pixels(images[some.numpy()]) for some, (images, _) in zip(chosen, sets, strict=True)])
        asked = {
            name: torch.cat([of[name][some] for some, (_, of) in zip(chosen, sets, strict=True)]) for name in sets[0][1]
        }
        run.descend(model.loss(pixels.flip(-1) if step % 2 else pixels, asked)[0])
    side, middle = {"shortest_edge": IMAGE_SIZE}, [0.5, 0.5, 0.5]
    processor = ConvNextImageProcessorPil(size=side, do_resize=False, image_mean=middle, image_std=middle)
    for part in (model.network.to("cpu", torch.bfloat16), processor):
        part.save_pretrained(out / "features")


def write_features_card(out: Path, count: int) -> None:
    """Write the network's README.md, with how well it reads ``count`` pictures of each kind."""
    saved, right = read_checkpoint(out / CHECKPOINT), share_of_right_counts(out, count)
    template = (Path(__file__).parent / "cards/features.md").read_text(encoding="utf-8")
    card = template.format(
        size=(out / "features/model.safetensors").stat().st_size / 1e3,
        width=WIDTH,
        steps=saved["step"],
        minutes=saved["elapsed_s"] / 60,
        count=count,
        **right,
    )
    (out / "features/README.md").write_text(card, encoding="utf-8")


@torch.no_grad()
def share_of_right_counts(out: Path, count: int, seed: int = 11) -> dict[str, float]:
    """How often all counts by shape and by colour are right, of fresh renders and of reconstructions."""
    model = PictureReader()
    model.load_state_dict(read_checkpoint(out / CHECKPOINT)["module"])
    model.eval().to(device())
    found = {}
    for name, tokenizer in (("rendered", None), ("reconstructed", load_exported(out / "janus"))):
        images, answers = dataset(np.random.default_rng(seed), tokenizer, count, damaged=0.0)
        found[name] = float(model.loss(to_pixels(images), answers)[1])
    return found


def dataset(
    rng: np.random.Generator, tokenizer: JanusVQVAE | None, pictures: int, damaged: float = DAMAGED
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Random scenes as pictures, uint8 [n, 64, 64, 3], rendered or as a tokenizer makes them again, and what they show.

    Of a share ``damaged`` of the latter some tokens, up to half, are in each other's places.
    """
    scenes = [random_scene(rng) for _ in range(pictures)]
    images, damage = np.stack([render(scene) for scene in scenes]), np.zeros(pictures, np.float32)
    if tokenizer is not None:
        with autocast():
            tokens = encode(tokenizer, images).cpu().clone()
            damage = np.where(rng.random(pictures) < damaged, rng.uniform(0.05, 0.5, pictures), 0.0).astype(np.float32)
            for row, part in zip(tokens.numpy(), damage, strict=True):  # in place
                places = rng.permutation(len(row))[: round(part * len(row))]
                row[places] = row[rng.permutation(places)]
            images = decode(tokenizer, tokens)
    return images, _answers(scenes) | {"damage": torch.from_numpy(damage).to(device())}


def _answers(scenes: list[Scene]) -> dict[str, Tensor]:
    """Counts int64 [n, 13] by shape, then by colour; pairs float32 [n, 40]; paper int64 [n]."""
    counts = [
        [sum(one.kind == kind for one in scene.shapes) for kind in SHAPES]
        + [sum(one.color == color for one in scene.shapes) for color in COLORS]
        for scene in scenes
    ]
    pairs = [[float(pair in {(one.kind, one.color) for one in scene.shapes}) for pair in PAIRS] for scene in scenes]
    paper = [list(BACKGROUNDS).index(scene.background) for scene in scenes]
    found = {"counts": torch.tensor(counts), "pairs": torch.tensor(pairs), "paper": torch.tensor(paper)}
    return {name: value.to(device()) for name, value in found.items()}
