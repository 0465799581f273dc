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
CHUNK = 256  # scenes drawn at once
MOST = 4  # objects of one kind
WIDTH = 64  # dimensions of the features
DAMAGED = 0.25  # share of pictures of which some tokens are others
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

    Half of the ``pictures`` are renders, the others what the tokenizer in `out/janus` makes of these.
    """
    torch.manual_seed(seed)
    images, answers = dataset(np.random.default_rng([seed, 5]), load_exported(out / "janus"), pictures)
    model = PictureReader().to(device()).train()
    run = TrainingRun(out / CHECKPOINT, model, 4e-3, budget, weight_decay=0.05)
    for step, _ in run:
        chosen = torch.randint(len(images), (BATCH,), generator=torch.Generator().manual_seed(2**20 * seed + step))
        loss, _ = model.loss(to_pixels(images[chosen.numpy()]), {name: it[chosen] for name, it in answers.items()})
        run.descend(loss)
    side, middle = {"shortest_edge": IMAGE_SIZE}, [0.5, 0.5, 0.5]
    processor = ConvNextImageProcessorPil(size=side, do_resize=False, image_mean=middle, image_std=middle)
    for part in (model.network.to("cpu", torch.bfloat16), processor):
        part.save_pretrained(out / "features")


@torch.no_grad()
def share_of_right_counts(out: Path, count: int, seed: int = 11) -> dict[str, float]:
    """How often all counts by shape and by colour are right, of fresh renders and of their reconstructions."""
    model, codes = PictureReader(), load_exported(out / "janus")
    model.load_state_dict(read_module(out))
    images, answers = dataset(np.random.default_rng(seed), codes, 2 * count, damaged=0.0)
    found = {}
    for name, part in (("rendered", slice(0, None, 2)), ("reconstructed", slice(1, None, 2))):
        told = {key: value[part] for key, value in answers.items()}
        found[name] = float(model.eval().to(device()).loss(to_pixels(images[part]), told)[1])
    return found


def read_module(out: Path) -> dict[str, Tensor]:
    """Weights of the trained `PictureReader`."""
    found: dict[str, Tensor] = read_checkpoint(out / CHECKPOINT)["module"]
    return found


def dataset(
    rng: np.random.Generator, tokenizer: JanusVQVAE, pictures: int, damaged: float = DAMAGED
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Pictures uint8 [n, 64, 64, 3], a render and its reconstruction in turn, and what they show.

    Of a share ``damaged`` of the reconstructions some tokens, up to half, are in each other's places.
    """
    images, scenes, damage = list[np.ndarray](), list[Scene](), list[float]()
    for start in range(0, pictures // 2, CHUNK):
        some = [random_scene(rng) for _ in range(min(CHUNK, pictures // 2 - start))]
        drawn = np.stack([render(scene) for scene in some])
        tokens = encode(tokenizer, drawn).cpu()
        share = np.where(rng.random(len(some)) < 2 * damaged, rng.uniform(0.05, 0.5, len(some)), 0.0)
        for row, part in zip(tokens.numpy(), share, strict=True):  # in place
            places = rng.permutation(len(row))[: round(part * len(row))]
            row[places] = row[rng.permutation(places)]
        made = decode(tokenizer, tokens)
        images += [np.stack([drawn, made], axis=1).reshape(-1, *drawn.shape[1:])]
        scenes += [scene for scene in some for _ in range(2)]
        damage += [value for part in share.tolist() for value in (0.0, part)]
    return np.concatenate(images), _answers(scenes) | {"damage": torch.tensor(damage, device=device())}


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
