"""A tiny Emu3 of transformers' own classes, files and special tokens, and how its authors draw with transformers.

24 x 32 pixels as 3 rows of 4 tokens, each row closed by one more; a codebook of 48 entries; two layers of width 64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    PreTrainedTokenizerFast,
)

ROWS, COLUMNS, CODES = 3, 4, 48
TEXTS = ("a photo of a red circle", "two rings", "a photo of two green squares and a blue ring")
NAMES = {
    "bos_token": "<|extra_203|>",
    "eos_token": "<|extra_204|>",
    "pad_token": "<|endoftext|>",
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
ROW_END, UNK = "<|extra_200|>", "<unk>"
WORDS = "a photo of two red green blue circle squares ring rings and left bad lowres , . * 1 2 3 4"
SPECIAL = [*NAMES.values(), ROW_END, UNK]
VISUAL = [f"<|visual token {code:06d}|>" for code in range(CODES)]
VOCABULARY = {token: index for index, token in enumerate([*WORDS.split(), *SPECIAL, *VISUAL])}


def tiny_config(**changes: Any) -> Emu3Config:
    text = Emu3TextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        **{f"{name}_token_id": VOCABULARY[NAMES[f"{name}_token"]] for name in ("bos", "eos", "pad")},
    )
    vq = Emu3VQVAEConfig(
        codebook_size=CODES, base_channels=32, channel_multiplier=[1, 1, 1, 1], num_res_blocks=1, hidden_size=32
    )
    size = {"image_area": ROWS * COLUMNS * 64, "ratio": f"{COLUMNS}:{ROWS}", "negative_prompt": "lowres, bad"}
    return Emu3Config(text_config=text, vq_config=vq, **{"vocabulary_map": VOCABULARY, **size, **changes})


@torch.no_grad()
def tiny_emu3(directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint with random weights, spread so that logits are far from flat; the directory."""
    generator = torch.Generator().manual_seed(seed)
    model = Emu3ForConditionalGeneration(tiny_config()).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            fan_in = 1 if "embed" in name else parameter[0].numel()
            gain = 3.0 if name == "lm_head.weight" else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
    model.save_pretrained(directory)
    Emu3Processor(Emu3ImageProcessor(), _tokenizer()).save_pretrained(directory)
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    core.add_special_tokens(SPECIAL)
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    own, plain = ("bos_token", "eos_token", "pad_token"), NAMES
    extra = {name: token for name, token in NAMES.items() if name not in own}
    named = {name: plain[name] for name in own}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=UNK, extra_special_tokens=extra, **named)


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class Original:
    """transformers' model and processor, used as the model card does."""

    def __init__(self, directory: Path) -> None:
        self.model = Emu3ForConditionalGeneration.from_pretrained(directory).eval()
        self.processor = Emu3Processor.from_pretrained(directory)

    def prompt(self, text: str) -> Tensor:
        """Ids [1, L]."""
        size = {"ratio": f"{COLUMNS}:{ROWS}", "image_area": ROWS * COLUMNS * 64}
        inputs = self.processor(text=[text], return_for_image_generation=True, return_tensors="pt", **size)
        assert inputs["image_sizes"][0] == [ROWS, COLUMNS]
        return inputs["input_ids"]

    @torch.no_grad()
    def logits(self, text: str, tokens: Tensor) -> Tensor:
        """Of image tokens [T] after a prompt: [T, V], from one forward over all ids, row ends among them."""
        prompt, mapping = self.prompt(text), self.model.vocabulary_mapping
        image = mapping.convert_img2bpe(tokens.view(ROWS, COLUMNS)).view(1, -1)
        logits = self.model(input_ids=torch.cat([prompt, image], dim=1)).logits[0]
        image_logits = logits[prompt.shape[1] - 1 : -1, mapping.image_tokens].view(ROWS, COLUMNS + 1, CODES)
        return image_logits[:, :-1].flatten(0, 1)

    @torch.no_grad()
    def generate(self, text: str, negative: str, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy: image tokens [T], their guided log-probs [T, V], and the picture [3, H, W]."""
        prompt, ids = self.prompt(text), self.processor.tokenizer.convert_tokens_to_ids
        visual = self.model.vocabulary_mapping.image_tokens
        ends = [(ids(NAMES[name]),) for name in ("eof_token", "eoi_token", "eos_token")]

        def allowed(_: int, so_far: Tensor) -> Any:
            place = int(len(so_far) - torch.nonzero(so_far == ids(NAMES["image_wrapper_token"]))[0, 0])
            if place > ROWS * (COLUMNS + 1):
                return ends[place - ROWS * (COLUMNS + 1) - 1]
            return visual if place % (COLUMNS + 1) else (ids(ROW_END),)

        found = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            negative_prompt_ids=self.prompt(negative),
            guidance_scale=guidance,
            prefix_allowed_tokens_fn=allowed,
            do_sample=False,
            max_new_tokens=ROWS * (COLUMNS + 1) + 3,
            output_scores=True,
            return_dict_in_generate=True,
        )
        written = found.sequences[:, prompt.shape[1] :]
        drawn = [step for step in range(ROWS * (COLUMNS + 1)) if (step + 1) % (COLUMNS + 1)]
        logprobs = torch.stack([found.scores[step][0, visual].log_softmax(-1) for step in drawn])
        picture = self.model.decode_image_tokens(image_tokens=written, height=ROWS, width=COLUMNS)[0]
        return written[0, drawn] - visual[0], logprobs, picture
