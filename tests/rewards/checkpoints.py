"""Small checkpoints of the classes that published scorers are: random weights, words enough for the tests' prompts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    GitConfig,
    GitForCausalLM,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.swin.configuration_swin import SwinConfig

from stage_ray.rewards.coco import OBJECTS
from tests.rewards.published import OpenClip, Vit

PARTS = ("weight", "bias")
CLIP_WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "photo", "of", "red", "ring"]
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?", "a", "car", "zebra", "cup", "yes", "no", "red", "stuffed"]
BERT_WORDS += ["teddy", "bear"]
COCO_NAMES = {"motorcycle": "motorbike", "computer mouse": "mouse", "tv": "tvmonitor"}  # GenEval's -> the checkpoint's
LABELS = {index: COCO_NAMES.get(name, name) for index, name in enumerate(OBJECTS)}


def save_clip(directory: Path) -> Path:
    """Of pictures of 32 pixels and texts of 8 words."""
    torch.manual_seed(0)
    text = {"vocab_size": len(CLIP_WORDS), "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"image_size": 32, "patch_size": 8}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text | small, vision_config=vision | small, projection_dim=8)
    CLIPModel(config).save_pretrained(directory)
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    _save_words(directory, CLIP_WORDS, ("<bos>", "<eos>"), special)
    _save_pixels(directory)
    return directory


def save_hps(directory: Path) -> tuple[Path, Path, OpenClip]:
    """HPS v2's file, the CLIP that says its architecture (`save_clip` without weights), and the model in the file."""
    directory.mkdir(exist_ok=True)
    architecture = save_clip(directory / "architecture")
    config = json.loads((architecture / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part] |= {"hidden_act": "gelu", "intermediate_size": 64}  # open_clip's
    (architecture / "config.json").write_text(json.dumps(config))
    (architecture / "model.safetensors").unlink()
    torch.manual_seed(1)
    model = OpenClip(len(CLIP_WORDS), 8).eval()
    path = directory / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "name": "HPS", "state_dict": model.state_dict()}, path)
    return path, architecture, model


def save_head(file: Path, width: int = 8, prefix: str = "") -> nn.Sequential:
    """The head of LAION's aesthetics and of ImageReward in a file of its own; the layers that do something."""
    torch.manual_seed(2)
    linear = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((width, 1024, 128, 64, 16, 1))))
    names = [f"{prefix}layers.{number}" for number in (0, 2, 4, 6, 7)]  # dropouts between them
    torch.save({f"{n}.{p}": getattr(one, p) for n, one in zip(names, linear, strict=True) for p in PARTS}, file)
    return linear


def save_image_reward(file: Path) -> tuple[Vit, BertModel, nn.Sequential]:
    """ImageReward's file over `CLIP_WORDS` and pictures of 32 pixels, and the three models in it."""
    head = save_head(file, width=128, prefix="mlp.")
    vision = Vit(width=128, layers=2, image=32, patch=8)
    text = BertModel(
        BertConfig(
            vocab_size=len(CLIP_WORDS), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=40, add_cross_attention=True, is_decoder=True,
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    for layer in text.encoder.layer:
        layer.attention.self.is_causal = False  # an encoder that looks at a picture is a decoder to transformers alone
    text.config.is_decoder = False
    with torch.no_grad():
        text.embeddings.token_type_embeddings.weight.zero_()  # BLIP has none
    state = torch.load(file, weights_only=True)
    state |= {f"blip.visual_encoder.{name}": value for name, value in vision.state_dict().items()}
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    torch.save(state | {"blip.vision_proj.weight": torch.zeros(2)}, file)
    return vision, text, head


def save_dino(directory: Path) -> Path:
    """DINOv2 of pictures of 32 pixels."""
    torch.manual_seed(5)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(config).save_pretrained(directory)
    _save_pixels(directory)
    return directory


def save_mask2former(directory: Path, labels: dict[int, str] = LABELS) -> Path:
    """Of seven queries; its own size of pictures is not GenEval's."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=_swin("stage1", "stage2", "stage3", "stage4"), feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=7, id2label=labels,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(directory)
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(directory)
    return directory


def save_grounding(directory: Path) -> Path:
    """GroundingDINO of nine queries."""
    torch.manual_seed(0)
    bert = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 16, "vocab_size": len(BERT_WORDS)}
    config = GroundingDinoConfig(
        backbone_config=_swin("stage2", "stage3", "stage4"), text_config=bert, num_queries=9, encoder_layers=1,
        encoder_ffn_dim=16, decoder_layers=2, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, d_model=32, max_text_len=64,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(directory)
    GroundingDinoImageProcessorPil().save_pretrained(directory)
    _save_bert_words(directory)
    return directory


def save_git(directory: Path) -> Path:
    """GIT of pictures of 32 pixels and 16 words."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vision = small | {"image_size": 32, "patch_size": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = GitConfig(vision_config=vision, vocab_size=len(BERT_WORDS), max_position_embeddings=16, **small, **ids)
    GitForCausalLM(config).save_pretrained(directory)
    _save_pixels(directory)
    _save_bert_words(directory)
    return directory


def _swin(*stages: str) -> SwinConfig:
    sizes = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4}
    return SwinConfig(image_size=64, embed_dim=8, out_features=list(stages), **sizes)


def _save_pixels(directory: Path) -> None:
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(directory)


def _save_bert_words(directory: Path) -> None:
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    _save_words(directory, BERT_WORDS, ("[CLS]", "[SEP]"), special, model_input_names=names)


def _save_words(
    directory: Path, words: list[str], ends: tuple[str, str], special: dict[str, str], **options: list[str]
) -> None:
    """A tokenizer that knows these words and puts every text between two of them."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    first, last = ends
    marks = [(word, words.index(word)) for word in ends]
    core.post_processor = processors.TemplateProcessing(f"{first} $A {last}", special_tokens=marks)
    PreTrainedTokenizerFast(tokenizer_object=core, **special, **options).save_pretrained(directory)
