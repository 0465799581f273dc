"""Decoded pictures against transformers' own decode: the same numbers up to rounding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from stage_ray.config import PolicyConfig
from stage_ray.engines.base import GREY, ImageEngine
from stage_ray.policies import load_policy
from stage_ray.policies.image_tokenizer import CPU_DECODE_CHUNK, PictureDecoder, upsampling_kernel
from stage_ray.policies.janus.codec import JanusCodec
from tests.tiny import tiny_janus

SHIPPED = "package:stage_ray/shapeworld/assets/janus"


@pytest.fixture(scope="module", params=["shipped", "tiny"])
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> JanusCodec:
    """Trained weights with two channels a norm's group, and random ones with one."""
    path: str | Path = SHIPPED if request.param == "shipped" else tiny_janus(tmp_path_factory.mktemp("tiny") / "janus")
    policy = PolicyConfig.model_validate({"path": str(path)})
    codec = load_policy(policy, device=torch.device("cpu"), trainable=False).codec
    assert isinstance(codec, JanusCodec)
    return codec


@torch.no_grad()
def test_pictures_are_those_of_transformers_up_to_one_grey_level(codec: JanusCodec) -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(codec.codebook_size, (CPU_DECODE_CHUNK + 3, codec.image_tokens), generator=generator)
    assert codec.vqmodel is not None
    expected = codec.vqmodel.decode(tokens)
    found = PictureDecoder(codec.vqmodel)(tokens, codec.grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)  # a grey level is 8e-3
    grey = ((expected + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    difference = (codec.decode(tokens).int() - grey.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 1e-3  # only where rounding crosses a level's edge


@torch.no_grad()
def test_tokens_of_pictures_are_those_of_the_published_quantiser(codec: JanusCodec) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(codec.codebook_size, (CPU_DECODE_CHUNK + 1, codec.image_tokens), generator=generator)
    images, vqmodel = codec.decode(tokens), codec.vqmodel
    assert vqmodel is not None
    vqmodel.quantize.embedding.weight *= 1 + torch.rand(codec.codebook_size, 1, generator=generator)  # of any length
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    # As in LlamaGen's VectorQuantizer: latents and codes of unit length, then |z|^2 + |e|^2 - 2 z e.
    z = F.normalize(vqmodel.quant_conv(vqmodel.encoder(pixels)).permute(0, 2, 3, 1).flatten(0, 2), p=2, dim=-1)
    e = F.normalize(vqmodel.quantize.embedding.weight, p=2, dim=-1)
    distances = z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.T
    found = codec.encode(images)
    assert found.shape == tokens.shape and torch.equal(found.flatten(), distances.argmin(dim=1))
    plainly = vqmodel.encode(pixels).image_tokens.view(found.shape)
    assert not torch.equal(found, plainly), "transformers compares latents of any length with codes of any length"


def test_of_an_image_under_way_the_rows_below_do_not_show(codec: JanusCodec) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(codec.codebook_size, (2, codec.image_tokens), generator=generator)
    half = codec.image_tokens // 2
    tokens[1, :half] = tokens[0, :half]
    images = ImageEngine.decode(SimpleNamespace(codec=codec), tokens, 0.5)  # type: ignore[arg-type]
    middle = images.shape[1] // 2
    assert torch.equal(images[0], images[1]) and bool((images[:, middle:] == GREY).all())
    whole = ImageEngine.decode(SimpleNamespace(codec=codec), tokens)  # type: ignore[arg-type]
    assert not torch.equal(whole[0], whole[1]) and images.shape == whole.shape
    assert bool((images[:, :middle] != GREY).any())


def test_one_transposed_convolution_doubles_a_map_and_convolves_it() -> None:
    generator = torch.Generator().manual_seed(3)
    maps, weight = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(6, 3, 3, 3, generator=generator)
    expected = F.conv2d(F.interpolate(maps, scale_factor=2.0, mode="nearest"), weight, padding=1)
    found = F.conv_transpose2d(maps, upsampling_kernel(weight), stride=2, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_block_that_adds_nothing_is_not_computed(tmp_path: Path) -> None:
    policy = PolicyConfig.model_validate({"path": str(tiny_janus(tmp_path / "janus"))})
    codec = load_policy(policy, device=torch.device("cpu"), trainable=False).codec
    assert isinstance(codec, JanusCodec) and codec.vqmodel is not None
    idle = codec.vqmodel.decoder.up[-1].block[-1]
    idle.conv2.weight.zero_()
    idle.conv2.bias.zero_()
    tokens = torch.randint(codec.codebook_size, (2, codec.image_tokens), generator=torch.Generator().manual_seed(4))
    expected = codec.vqmodel.decode(tokens)
    calls: list[int] = []
    idle.conv1.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(PictureDecoder(codec.vqmodel)(tokens, codec.grid), expected, rtol=0, atol=2e-4)
    assert not calls
