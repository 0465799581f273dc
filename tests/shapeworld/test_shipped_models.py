"""The checkpoints that ship: plain transformers loads them, draws with them and scores with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, JanusForConditionalGeneration, JanusProcessor

from stage_ray.config import PolicyConfig
from stage_ray.config.paths import resolve_path
from stage_ray.policies.janus.codec import JanusCodec
from stage_ray.shapeworld import grammar
from stage_ray.shapeworld.grammar import item, make_record, sample_scene
from stage_ray.shapeworld.scene import coverage, random_scene, render

JANUS, CLIP = "package:stage_ray/shapeworld/assets/janus", "package:stage_ray/shapeworld/assets/clip"


@pytest.fixture(scope="module")
def model() -> JanusForConditionalGeneration:
    return JanusForConditionalGeneration.from_pretrained(resolve_path(JANUS), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> JanusProcessor:
    return JanusProcessor.from_pretrained(resolve_path(JANUS))


@pytest.fixture(scope="module")
def codec() -> JanusCodec:
    return JanusCodec.load(PolicyConfig(path=JANUS))


def test_the_tokenizer_keeps_objects_recognisable(model: JanusForConditionalGeneration):
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(16)]
    images = np.stack([render(scene) for scene in scenes])
    objects = np.stack([np.max([coverage(shape) for shape in scene.shapes], axis=0) for scene in scenes]) > 0.9
    with torch.inference_mode():
        vq = model.model.vqmodel
        tokens = vq.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).image_tokens.view(16, 64)
        pixels = ((vq.decode(tokens).permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).numpy()
    assert tokens.min() >= 0 and tokens.max() < 512
    assert np.abs(pixels - images)[objects].mean() < 20


def test_plain_transformers_draws_pictures_in_colors_that_were_asked(
    model: JanusForConditionalGeneration, processor: JanusProcessor
):
    torch.manual_seed(0)
    prompts = ["a photo of a red square"] * 4 + ["a photo of a blue triangle"] * 4
    chats = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats],
        generation_mode="image",
        padding=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale=3)
    assert tokens.shape == (8, 64)
    pixels = model.decode_image_tokens(tokens)  # [8, 64, 64, 3]
    # transformers' PIL image processor unnormalises channels-first pictures only.
    pictures = processor.postprocess(list(pixels.permute(0, 3, 1, 2).float()), return_tensors="PIL.Image.Image")
    arrays = np.stack([np.asarray(picture, np.float32) for picture in pictures["pixel_values"]])
    assert arrays.shape == (8, 64, 64, 3)
    redness = (arrays[..., 0] - arrays[..., 2]).mean(axis=(1, 2))
    assert redness[:4].mean() > redness[4:].mean() + 10


def test_the_unconditional_branch_is_the_prompt_with_pads_between_its_first_and_last_token(
    processor: JanusProcessor, codec: JanusCodec
):
    encoded = codec.encode_prompt("a photo of a red ring")
    ids = encoded.conditional
    pad = processor.tokenizer.pad_token_id
    assert encoded.unconditional == (ids[0], *[pad] * (len(ids) - 2), ids[-1])
    assert processor.tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == [
        "<｜begin▁of▁sentence｜>",
        "<begin_of_image>",
    ]


def test_every_word_of_every_prompt_is_known(processor: JanusProcessor, codec: JanusCodec):
    unknown = processor.tokenizer.unk_token_id
    for record in grammar.prompts("train") + grammar.prompts("heldout"):
        assert unknown not in codec.encode_prompt(record["prompt"]).conditional


def test_plain_clip_prefers_the_caption_that_is_true():
    location = resolve_path(CLIP)
    model = CLIPModel.from_pretrained(location, dtype=torch.float32).eval()
    items = [item("cross", 1, "red"), item("ring", 1, "blue"), item("square", 3, "green"), item("circle", 1, "pink")]
    records = [make_record("colors" if one["count"] == 1 else "counting", [one]) for one in items]
    texts = [record["prompt"] for record in records]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(render(sample_scene(record, rng))) for record in records]
    inputs = AutoTokenizer.from_pretrained(location)(texts, padding=True, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(location, backend="pil")(pictures, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=pixels
        ).logits_per_image
    assert (logits.argmax(dim=1) == torch.arange(len(texts))).all()
