"""GIT as a reward: does the picture show each noun of the prompt? As T2I-R1 (arXiv 2505.00703) and STAGE ask it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GitForCausalLM

from stage_ray.records import Prompt
from stage_ray.rewards.base import RewardOutput
from stage_ray.rewards.clip import BatchSize
from stage_ray.rewards.models import Dtype, check_model, load_image_processor, load_model, load_tokenizer

PUBLISHED = "microsoft/git-large-vqav2"
LEFT_OUT = ("spatial", "numeracy")  # tasks that it says nothing about


class GitVqaReward:
    """The mean over nouns of ``p(yes) / (p(yes) + p(no))`` after "NOUN?": 0..1.

    The nouns are the record's ``attr_nouns``, else its ``nouns``. A prompt without nouns scores 1 and one of a
    ``task_type`` spatial or numeracy 0, as published: the same for all images of a group, so neither trains anything.
    Details of an image: each noun with its share of yes.
    """

    def __init__(
        self,
        path: str = PUBLISHED,
        batch_size: BatchSize = 16,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load the checkpoint (MIT); path, batch_size, dtype, device: as of `ClipReward`."""
        self._model, location = load_model(GitForCausalLM, path=path, dtype=dtype, device=device)
        self._tokenizer, self._processor = load_tokenizer(location), load_image_processor(location)
        self._batch_size = batch_size
        words = [self._tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no")]
        self._answers = torch.tensor(words, device=self._model.device)

    @classmethod
    def check(cls, prompts: Sequence[Prompt], path: str = PUBLISHED, **options: Any) -> Iterator[tuple[Prompt, str]]:
        """Check a local checkpoint, and whether nouns are lists; see `Reward`."""
        if (location := check_model(GitForCausalLM, path=path, tensors=False)) is not None:
            load_tokenizer(location)
            load_image_processor(location)
        for prompt in prompts:
            try:
                questions(prompt)
            except ValueError as error:
                yield prompt, str(error)

    def score(self, images: np.ndarray, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score images, uint8 [B, H, W, 3], each against its prompt's record."""
        asked = [(row, noun) for row, prompt in enumerate(prompts) for noun in questions(prompt)]
        shares: list[float] = []
        for start in range(0, len(asked), self._batch_size):
            batch = asked[start : start + self._batch_size]
            shares += self._yes(images[[row for row, _ in batch]], [noun for _, noun in batch]).tolist()
        details: list[dict[str, Any]] = [{} for _ in prompts]
        for (row, noun), share in zip(asked, shares, strict=True):
            details[row][noun] = share
        silent = [0.0 if prompt.record.get("task_type") in LEFT_OUT else 1.0 for prompt in prompts]
        pairs = zip(details, silent, strict=True)
        scores = np.asarray([np.mean([*said.values()]) if said else constant for said, constant in pairs], np.float32)
        return RewardOutput(scores, np.isfinite(scores), tuple(details))

    @torch.inference_mode()
    def _yes(self, images: np.ndarray, nouns: Sequence[str]) -> Tensor:
        """The share of yes, float32 [B], of one question about each image."""
        pictures = [Image.fromarray(image) for image in images]
        pixels = self._processor(pictures, return_tensors="pt")["pixel_values"]
        start = self._tokenizer.cls_token_id
        rows = [[start, *self._tokenizer(f"{noun}?", add_special_tokens=False)["input_ids"]] for noun in nouns]
        # Padded behind: what comes after the question's last token is never looked at.
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)
        device = self._model.device
        logits = self._model(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            pixel_values=pixels.to(device, self._model.dtype),
        ).logits  # [B, picture's tokens + text's, V]
        last = logits.shape[1] - tokens.shape[1] + torch.tensor([len(row) - 1 for row in rows])
        return logits[torch.arange(len(rows)), last][:, self._answers].float().softmax(-1)[:, 0].cpu()


def questions(prompt: Prompt) -> list[str]:
    """The nouns to be asked about.

    Raises:
        ValueError: they are no list of texts.
    """
    if prompt.record.get("task_type") in LEFT_OUT:
        return []
    key = "attr_nouns" if prompt.record.get("attr_nouns") is not None else "nouns"
    nouns = prompt.record.get(key)
    if nouns is None:
        return []
    if isinstance(nouns, str) or not isinstance(nouns, Sequence) or not all(isinstance(noun, str) for noun in nouns):
        raise ValueError(f'has "{key}": {nouns!r:.60}, which is no list of texts, as in ["car", "zebra"]')
    return list(dict.fromkeys(nouns))
