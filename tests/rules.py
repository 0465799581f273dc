"""Samplers of every kind as a user writes them: named in test configs by dotted path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stage_ray.records import JudgedGroup, Prompt, RolloutRequest
from stage_ray.samplers import Context, ImageSearch, Judge, PromptTransform, SamplingParams, TokenRule


class NoRepeats(TokenRule):
    """Guided sampling where the last ``window`` tokens become less likely: it reads the tokens so far."""

    window: int = Field(2, ge=1)
    penalty: float = 4.0

    def logits(
        self, conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context
    ) -> Tensor:
        logits = params.guide(conditional, unconditional, context) / params.temperature
        places = context.positions.unsqueeze(-1) - torch.arange(1, self.window + 1, device=logits.device)
        last = context.tokens.gather(-1, places.clamp(min=0))  # -1 where there is none
        weights = (places >= 0) * -self.penalty
        return params.truncate(logits.scatter_add(-1, last.clamp(min=0), weights))


class Wide(TokenRule):
    """One logit too many."""

    def logits(
        self, conditional: Tensor, unconditional: Tensor | None, params: SamplingParams, context: Context
    ) -> Tensor:
        return torch.nn.functional.pad(conditional, (0, 1))


class Adjective(PromptTransform):
    """One of several words before the prompt, by the seed; a prompt that says "secret" is left out."""

    words: tuple[str, ...] = Field(("bright", "dark", "old"), min_length=1)

    def rewrite(self, prompt: Prompt, seed: int) -> str:
        return "" if "secret" in prompt.text else f"{self.words[seed % len(self.words)]} {prompt.text}"


class Middle(ImageSearch):
    """The candidate with the median score: it asks for one candidate of all images after another."""

    candidates: int = 3

    async def search(self, requests: Sequence[RolloutRequest], judge: Judge) -> list[JudgedGroup]:
        rounds = [
            await judge(
                [replace(one, seeds=tuple(self.candidate_seeds(seed)[k] for seed in one.seeds)) for one in requests]
            )
            for k in range(self.candidates)
        ]
        kept = []
        for request, groups in zip(requests, zip(*rounds, strict=True), strict=True):
            scores = np.stack([group.scored.scores for group in groups])  # [candidates, G, R]
            middle = np.argsort(scores[:, :, 0], axis=0)[self.candidates // 2]
            rows = range(len(request.seeds))
            scored = replace(groups[0].scored, scores=scores[middle, rows])
            kept.append(replace(groups[0], request=request, scored=scored, images=None))
        return kept
