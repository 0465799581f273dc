"""How large published models are, without loading anything.

Janus-Pro: from arXiv 2501.17811, table 1, and ``config.json`` of deepseek-ai/Janus-Pro-1B and -7B. Both draw 24 x 24
tokens of 16384 codes in 8 dimensions, 384 x 384 pixels. LlamaGen: from ``autoregressive/models/gpt.py`` of its code.
Emu3-Gen: transformers' defaults, which are its ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass

VQ_MODEL = 71_883_403  # parameters of the image tokenizer of all of them, counted in transformers' own classes
FLAN_T5_XL = 1_223_527_424  # of its encoder, which LlamaGen's captions pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What the formulas of `stage_ray.engines.memory` and `stage_ray.learner.memory` need of a model."""

    name: str
    path: str  # what ``policy.path`` of a config takes
    family: str = "janus"  # and ``policy.family``
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    codes: int = 16_384
    image_tokens: int = 576
    forced: int = 0  # positions of an image beside its tokens, such as ends of rows
    prompt_tokens: int | None = None  # of a prompt at most; None: as many as a config lets it have
    side_pixels: int = 384
    base_channels: int = 128  # of the image decoder's feature maps at full size, ``side_pixels`` squared
    decoded_at_once: int | None = None  # images; None: as many as `stage_ray.policies.image_tokenizer` takes
    layer: int  # from here on parameters: of one decoder layer
    embedding: int  # of text, and what else is trained outside of the layers
    head: int  # of images
    image_embedding: int  # codebook and aligner of the image tokens
    vqmodel: int  # image tokenizer
    frozen: int  # all that are not trained, of which images need the three above
    text_encoder: int = 0  # in other files, beside the engine and beside the learner, in bfloat16
    text_features: int = 0  # of a token, which the engine keeps for a batch's prompts

    @property
    def image_positions(self) -> int:
        """Positions of one image, forced ones among them."""
        return self.image_tokens + self.forced

    @property
    def trained(self) -> int:
        """Parameters that are trained and published: layers, text embeddings, last norm."""
        return self.layers * self.layer + self.embedding + self.hidden

    @property
    def matrices(self) -> int:
        """Parameters of a layer that multiply: without its two norms."""
        return self.layer - 2 * self.hidden

    @property
    def total(self) -> int:
        """Every parameter, a tied one once."""
        return self.trained + self.frozen


def _published(name: str, hub: str, hidden: int, intermediate: int, layers: int, heads: int) -> ModelSizes:
    aligner = (hidden + 1) * hidden
    head, image_embedding = aligner + (hidden + 1) * 16_384, 16_384 * 8 + 9 * hidden + aligner
    vision = 303_688_704 + 1025 * hidden + aligner  # counted in transformers' own classes
    return ModelSizes(
        name=name,
        path=hub,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        layer=4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden,  # attention, MLP, two norms
        embedding=102_400 * hidden,
        head=head,
        image_embedding=image_embedding,
        vqmodel=VQ_MODEL,
        frozen=head + image_embedding + vision + VQ_MODEL,
    )


def _llamagen(name: str, hidden: int, layers: int, pixels: int, *, text: bool = False) -> ModelSizes:
    """Class-conditional, or for captions of up to 120 tokens; heads of 64 dimensions, 16 pixels a token."""
    intermediate = -(-(8 * hidden // 3) // 256) * 256
    prompt = (2048 + hidden) * hidden if text else 1001 * hidden
    return ModelSizes(
        name=name,
        path=f"models/{name}",
        family="llamagen",
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=hidden // 64,
        kv_heads=hidden // 64,
        head_dim=64,
        image_tokens=(pixels // 16) ** 2,
        prompt_tokens=120 if text else 1,
        side_pixels=pixels,
        layer=4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden,
        embedding=prompt + 2 * 16_384 * hidden,  # of prompts and image tokens, and the head
        head=0,
        image_embedding=0,
        vqmodel=VQ_MODEL,
        frozen=VQ_MODEL + 120 * 2048 * text,
        text_encoder=FLAN_T5_XL if text else 0,
        text_features=2048 if text else 0,
    )


EMU3_GEN = ModelSizes(
    name="emu3-gen",
    path="BAAI/Emu3-Gen-hf",
    family="emu3",
    hidden=4096,
    intermediate=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    codes=32_768,
    image_tokens=90**2,
    forced=89,
    side_pixels=720,
    base_channels=4 * 256,  # of four frames
    decoded_at_once=1,
    layer=4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336 + 2),  # attention, MLP, two norms
    embedding=184_622 * 4096,
    head=32_768 * 4096,  # the rows of image tokens
    image_embedding=0,
    vqmodel=270_740_287,  # counted in transformers' own classes
    frozen=270_740_287 + 184_622 * 4096,
)
KNOWN = {
    "janus-pro-1b": _published("janus-pro-1b", "deepseek-community/Janus-Pro-1B", 2048, 5632, 24, 16),
    "janus-pro-7b": _published("janus-pro-7b", "deepseek-community/Janus-Pro-7B", 4096, 11_008, 30, 32),
    "llamagen-b-256": _llamagen("llamagen-b-256", 768, 12, 256),
    "llamagen-l-256": _llamagen("llamagen-l-256", 1024, 24, 256),
    "llamagen-l-384": _llamagen("llamagen-l-384", 1024, 24, 384),
    "llamagen-xl-384": _llamagen("llamagen-xl-384", 1280, 36, 384),
    "llamagen-t2i-256": _llamagen("llamagen-t2i-256", 1280, 36, 256, text=True),
    "llamagen-t2i-512": _llamagen("llamagen-t2i-512", 1280, 36, 512, text=True),
    "emu3-gen": EMU3_GEN,
}
FLOAT32, BFLOAT16 = 4, 2
WIDTH = {"float32": FLOAT32, "bfloat16": BFLOAT16}  # bytes of a number
