"""Classifier-free guidance over paired requests, as a batch-level logits processor of vLLM.

Every image is two requests, conditional and unconditional. The processor finds the two rows, draws one token for both
(`stage_ray.engines.sampling.sample`), records what was drawn, and leaves only that token possible in both rows, so
vLLM's own sampler has nothing left to decide. An image without guidance is one request, and the rest is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams as VllmSamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from stage_ray.engines.sampling import Sample, sample
from stage_ray.records import RECORDED
from stage_ray.samplers import SamplingParams

CONDITIONAL, UNCONDITIONAL = 0, 1


@dataclass(frozen=True, slots=True)
class RowEnds:
    """An ``id`` that is read after every ``columns`` tokens of an image and never drawn; 0 columns: there is none.

    What vLLM takes for an image's output are its tokens with these ids among them.
    """

    columns: int = 0
    id: int = 0

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> RowEnds:
        """What the engine wrote into the config that vLLM reads."""
        return cls(*(vllm_config.model_config.hf_config.row_end or ()))

    def before(self, token: int) -> bool:
        """Whether the id stands right before token number ``token``."""
        return token > 0 and self.columns > 0 and token % self.columns == 0

    def place(self, tokens: Tensor | int) -> Any:
        """Places among the output of tokens by their numbers."""
        return tokens + tokens // self.columns if self.columns else tokens

    def token(self, places: Tensor) -> Tensor:
        """Numbers of tokens by their places among the output."""
        return places - places // (self.columns + 1) if self.columns else places


def image_params(
    tokens: int, image: int, branch: int, seed: int, params: SamplingParams, guided: bool = True
) -> VllmSamplingParams:
    """Sampling parameters of one request: T tokens, greedy over the one token that the processor leaves."""
    # Plain values: vLLM copies them for every request, and may send them to another process.
    arguments = {"image": image, "branch": branch, "seed": seed, "guided": guided, "params": params.dump()}
    return VllmSamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        extra_args=arguments,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """One running request: which image and branch it is, and its list of tokens so far, which vLLM appends to.

    ``guided`` is False for an image that has no unconditional request.
    """

    image: int
    branch: int
    seed: int
    params: SamplingParams
    output: list[int]
    guided: bool = True


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the images of the running batch lie: rows of logits by branch, images and seeds in the same order.

    Of an image without guidance the conditional row stands for the unconditional one; ``guided`` says which have it,
    None if all.
    vLLM appends to ``first``, the tokens of the first image. ``ahead``, int64, says how many more each image has: as
    all of them get one a step, that stays so until rows are added, moved or removed.
    """

    conditional: Tensor
    unconditional: Tensor | None
    guided: Tensor | None
    images: Tensor
    seeds: Tensor
    params: SamplingParams
    first: list[int]
    ahead: Tensor


class PairedGuidance(LogitsProcessor):
    """Draws one token for each image of the batch and records it.

    Invariant: whenever logits are processed, an image's rows are all there and equally far. `apply` raises otherwise.
    While the rows stay, a step costs the host the same however many there are, and never waits for the device.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        tokens = vllm_config.model_config.hf_config.image_tokens
        images = vllm_config.scheduler_config.max_num_seqs
        self._device, self._row_ends = device, RowEnds.of(vllm_config)
        self._rows: dict[int, _Row] = {}
        self._layout: _Layout | None = None
        self._tokens = torch.zeros((images, tokens), dtype=torch.int64, device=device)
        self._records = torch.zeros((len(RECORDED), images, tokens), dtype=torch.float32, device=device)

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as vLLM adds, moves and removes them."""
        if process_dict_updates(self._rows, batch_update, _row):  # true where a row was added, moved or removed
            self._layout = None

    def apply(self, logits: Tensor) -> Tensor:
        """Draw, record, and leave one token finite in each row of logits [R, V]."""
        if not self._rows:
            return logits
        if self._layout is None:
            self._layout = _lay_out(self._rows, self._device)
        layout = self._layout
        positions = self._row_ends.token(layout.ahead + len(layout.first))
        unconditional = None if layout.unconditional is None else logits[layout.unconditional]
        sequences = self._tokens[layout.images]  # a copy of int64 [images, T], small beside the logits
        branches, images = (logits[layout.conditional], unconditional), (layout.seeds, positions)
        drawn = sample(*branches, *images, layout.params, sequences, layout.guided)
        self._tokens[layout.images, positions] = drawn.tokens
        self._records[:, layout.images, positions] = torch.stack([getattr(drawn, name) for name in RECORDED])
        logits.fill_(-torch.inf)  # what is left to vLLM's greedy sampler is one token a row
        logits[layout.conditional, drawn.tokens] = 0.0
        if layout.unconditional is not None:
            logits[layout.unconditional, drawn.tokens] = 0.0
        return logits

    def recorded(self, images: int) -> Sample:
        """What the finished batch's first ``images`` images recorded, on the CPU."""
        return Sample(self._tokens[:images].cpu().clone(), *self._records[:, :images].cpu().clone())


def _row(params: VllmSamplingParams, prompt_ids: list[int] | None, output: list[int]) -> _Row | None:
    arguments = params.extra_args or {}
    if "image" not in arguments:  # a request that is not ours
        return None
    params_of_image = SamplingParams.load(arguments["params"])
    guided = arguments["guided"]
    return _Row(arguments["image"], arguments["branch"], arguments["seed"], params_of_image, output, guided)


def _lay_out(rows: dict[int, _Row], device: torch.device) -> _Layout:
    """Pair the rows of the batch.

    Raises:
        RuntimeError: a row's partner is not in the batch (vLLM scheduled or preempted one without the other).
    """
    branches: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for index, row in rows.items():
        branches[row.branch][row.image] = index  # image -> row of logits
    conditional, unconditional = branches
    paired = [rows[index] for index in conditional.values()]
    params = next(iter(rows.values())).params  # one batch, one way to sample: any request's
    first = paired[0].output if paired else []
    guided = [params.guided and row.guided for row in paired]
    # Images of which only one branch is in the batch, and not by intent.
    alone = {image for image, has in zip(conditional, guided, strict=True) if has} ^ unconditional.keys()
    if alone:
        raise RuntimeError(
            f"{len(alone)} images run without the other half of their guidance pair, the first is image {min(alone)}: "
            "vLLM could not hold a whole batch; lower rollout.images_per_batch or raise rollout.kv_cache_gib"
        )

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return _Layout(
        conditional=column(list(conditional.values())),
        unconditional=column([unconditional.get(*pair) for pair in conditional.items()]) if params.guided else None,
        guided=torch.tensor(guided, device=device) if params.guided and not all(guided) else None,
        images=column(list(conditional)),
        seeds=column([row.seed for row in paired]),
        params=params,
        first=first,
        ahead=column([len(row.output) - len(first) for row in paired]),
    )
