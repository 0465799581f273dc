"""One generation batch inside of vLLM's worker, without a scheduler: all requests begin together and end together.

vLLM's scheduler decides in every step, request by request, what runs, allocates, stops and is answered. Here all of it
is known when a batch begins: each request holds the blocks of its whole length, gets its prompt in the first step and
one token in each later one, and ends after T. So its worker takes the steps in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from stage_ray.engines.sampling import Sample
from stage_ray.engines.vllm.guidance import PairedGuidance, image_params
from stage_ray.samplers import SamplingParams


@dataclass(frozen=True, slots=True)
class BranchRequest:
    """One branch of an image: prompt ids of the image-first vocabulary, and what `PairedGuidance` needs to know."""

    image: int
    branch: int
    seed: int
    prompt: list[int]

    @property
    def name(self) -> str:
        """By which the worker knows it."""
        return f"{self.image}-{self.branch}"


class BatchExtension:
    """Mixed into vLLM's worker, so that the engine can call `sample_batch` with ``collective_rpc``.

    Nothing else may be scheduled meanwhile: a batch takes the blocks of the key-value cache from the first on.
    """

    model_runner: Any
    cache_config: Any
    execute_model: Any
    sample_tokens: Any

    def sample_batch(
        self, requests: Sequence[BranchRequest], params: SamplingParams, images: int, tokens: int
    ) -> Sample:
        """Sample T ``tokens`` for each image; what was recorded, [B, T] on the CPU.

        Raises:
            RuntimeError: vLLM fed other tokens back than were drawn.
        """
        names = [request.name for request in requests]
        first = SchedulerOutput.make_empty()
        first.scheduled_new_reqs = self._new(requests, params, tokens)
        self._step(first, [len(request.prompt) for request in requests], names)
        for drawn in range(1, tokens):
            later = SchedulerOutput.make_empty()
            later.scheduled_cached_reqs = CachedRequestData(
                req_ids=names,
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[None] * len(names),
                num_computed_tokens=[len(request.prompt) + drawn - 1 for request in requests],
                num_output_tokens=[drawn] * len(names),
            )
            self._step(later, [1] * len(names), names)
        processors = self.model_runner.input_batch.logitsprocs.all
        recorded: Sample = next(p for p in processors if isinstance(p, PairedGuidance)).recorded(images)
        served = torch.tensor([self.model_runner.requests[name].output_token_ids for name in names])
        last = SchedulerOutput.make_empty()
        last.finished_req_ids = set(names)
        self.execute_model(last)
        if not torch.equal(served, recorded.tokens[[request.image for request in requests]]):
            raise RuntimeError("vLLM served tokens that were not drawn; do not trust this batch")
        return recorded

    def _new(self, requests: Sequence[BranchRequest], params: SamplingParams, tokens: int) -> list[NewRequestData]:
        block = 1  # vLLM keeps the first one, which padding points to
        new = []
        for request in requests:
            blocks = -(-(len(request.prompt) + tokens) // self.cache_config.block_size)
            new.append(
                NewRequestData(
                    req_id=request.name,
                    prompt_token_ids=request.prompt,
                    mm_features=[],
                    sampling_params=image_params(tokens, request.image, request.branch, request.seed, params),
                    pooling_params=None,
                    block_ids=(list(range(block, block + blocks)),),
                    num_computed_tokens=0,
                    lora_request=None,
                )
            )
            block += blocks
        return new

    def _step(self, step: SchedulerOutput, tokens: list[int], names: list[str]) -> None:
        step.num_scheduled_tokens = dict(zip(names, tokens, strict=True))
        step.total_num_scheduled_tokens = sum(tokens)
        self.execute_model(step)  # returns None: the logits stay in the worker
        self.sample_tokens(None)
