"""One generation batch inside of vLLM's worker, without a scheduler: all requests begin together and end together.

vLLM's scheduler decides in every step, request by request, what runs, allocates, stops and is answered. Here all of it
is known when a batch begins, so the worker takes the steps in one call. The first one computes each different prompt
once, all but its last token. The requests begin from there: they share the whole blocks of a prompt and have a copy of
the one that it ends in. Each of the T steps that follow gives every request one token. A forced id that ends a row of
the grid is read in one step with the token before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams as VllmSamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from stage_ray.engines.sampling import Sample
from stage_ray.engines.vllm.guidance import PairedGuidance, RowEnds, image_params
from stage_ray.samplers import SamplingParams


@dataclass(frozen=True, slots=True)
class BranchRequest:
    """One branch of an image: prompt ids of the image-first vocabulary, and what `PairedGuidance` needs to know."""

    image: int
    branch: int
    seed: int
    prompt: tuple[int, ...]
    guided: bool = True


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where a batch lies in the key-value cache, in numbers of blocks.

    Attributes:
        of_prompts: of every different prompt; those of the first request that has it.
        of_requests: of every request, for its whole length.
        copies: what to copy before the requests begin, for prompts that end within a block.
    """

    of_prompts: dict[tuple[int, ...], list[int]]
    of_requests: list[list[int]]
    copies: list[KVCacheBlockCopy]


def place_blocks(prompts: Sequence[tuple[int, ...]], tokens: int, size: int) -> Blocks:
    """Give each prompt, and the ``tokens`` that follow it, blocks of ``size`` tokens; all but a prompt's last token are
    shared. The blocks are no more than the requests would have without sharing."""
    placed, free = Blocks({}, [], []), 1  # vLLM keeps the first block, which padding points to
    for prompt in prompts:
        whole, rest = divmod(len(prompt) - 1, size)
        first = placed.of_prompts.get(prompt)
        shared = first[:whole] if first else []
        count = -(-(len(prompt) + tokens) // size) - len(shared)
        blocks = [*shared, *range(free, free + count)]
        free += count
        placed.of_requests.append(blocks)
        if first is None:
            placed.of_prompts[prompt] = blocks
        elif rest:
            placed.copies.append(KVCacheBlockCopy(first[whole], blocks[whole]))
    return placed


class BatchExtension:
    """Mixed into vLLM's worker, so that the engine can call `sample_batch` with ``collective_rpc``.

    Nothing else may be scheduled meanwhile: a batch takes the blocks of the key-value cache from the first on.
    """

    model_runner: Any
    vllm_config: Any
    cache_config: Any
    execute_model: Any
    sample_tokens: Any

    def set_prompt_features(self, rows: Tensor) -> None:
        """Write the rows of the next batch's prompts; see `VllmSpec`."""
        self.model_runner.get_model().prompt_features[: len(rows)].copy_(rows)

    def sample_batch(
        self, requests: Sequence[BranchRequest], params: SamplingParams, images: int, tokens: int
    ) -> Sample:
        """Sample T ``tokens`` for each image; what was recorded, [B, T] on the CPU.

        Raises:
            RuntimeError: vLLM fed other tokens back than were drawn.
        """
        ends = RowEnds.of(self.vllm_config)
        prompts_of = [request.prompt for request in requests]
        placed = place_blocks(prompts_of, ends.place(tokens - 1) + 1, self.cache_config.block_size)
        greedy = VllmSamplingParams(temperature=0.0)  # what a prompt's own request draws is not used
        prompts = [
            _new(f"prompt {number}", prompt, blocks, greedy, computed=0)
            for number, (prompt, blocks) in enumerate(placed.of_prompts.items())
            if len(prompt) > 1
        ]
        if prompts:
            self._step(prompts, [len(prompt.prompt_token_ids or ()) - 1 for prompt in prompts])
        computed = [len(request.prompt) - 1 for request in requests]
        new = [
            _new(
                f"image {request.image}, branch {request.branch}",
                request.prompt,
                blocks,
                image_params(tokens, request.image, request.branch, request.seed, params, request.guided),
                computed=len(request.prompt) - 1,
            )
            for request, blocks in zip(requests, placed.of_requests, strict=True)
        ]
        names = [request.req_id for request in new]
        ones = [1] * len(new)
        self._step(new, ones, finished={prompt.req_id for prompt in prompts}, copies=placed.copies)
        for drawn in range(1, tokens):
            forced = int(ends.before(drawn))
            if forced:
                self._append(names, ends.id)
            before_it = ends.place(drawn)  # tokens and forced ids
            going = CachedRequestData(
                req_ids=names,
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[None] * len(names),
                num_computed_tokens=[before + before_it - forced for before in computed],
                num_output_tokens=[before_it] * len(names),
            )
            self._step([], [1 + forced] * len(names), going=going)
        processors = self.model_runner.input_batch.logitsprocs.all
        recorded: Sample = next(p for p in processors if isinstance(p, PairedGuidance)).recorded(images)
        served = torch.tensor([self.model_runner.requests[name].output_token_ids for name in names])
        self._step([], [], finished=set(names))
        served = served[:, ends.place(torch.arange(tokens))]
        if not torch.equal(served, recorded.tokens[[request.image for request in requests]]):
            raise RuntimeError("vLLM served tokens that were not drawn; do not trust this batch")
        return recorded

    def _append(self, names: list[str], token: int) -> None:
        """Add a token to each request's output, as vLLM does with what it sampled."""
        batch = self.model_runner.input_batch
        for name in names:
            row = batch.req_id_to_index[name]
            end = batch.num_tokens_no_spec[row]
            batch.token_ids_cpu[row, end], batch.is_token_ids[row, end] = token, True
            batch.num_tokens_no_spec[row] += 1
            self.model_runner.requests[name].output_token_ids.append(token)

    def _step(
        self,
        new: list[NewRequestData],
        tokens: list[int],
        *,
        going: CachedRequestData | None = None,
        finished: set[str] | None = None,
        copies: list[KVCacheBlockCopy] | None = None,
    ) -> None:
        """One step of the worker: so many tokens of each request that is new or going on."""
        step = SchedulerOutput.make_empty()
        step.scheduled_new_reqs = new
        step.scheduled_cached_reqs = going or step.scheduled_cached_reqs
        names = [request.req_id for request in new] + step.scheduled_cached_reqs.req_ids
        step.num_scheduled_tokens = dict(zip(names, tokens, strict=True))
        step.total_num_scheduled_tokens = sum(tokens)
        step.finished_req_ids = finished or set()
        step.kv_cache_block_copies = copies
        self.execute_model(step)  # the logits stay in the worker
        if tokens:
            self.sample_tokens(None)


def _new(
    name: str, prompt: tuple[int, ...], blocks: list[int], params: VllmSamplingParams, *, computed: int
) -> NewRequestData:
    return NewRequestData(
        req_id=name,
        prompt_token_ids=list(prompt),
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=(list(blocks),),
        num_computed_tokens=computed,
        lora_request=None,
    )
