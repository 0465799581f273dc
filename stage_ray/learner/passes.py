"""Forward and backward passes of policy and reference over a batch, cut into micro-batches and shared among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stage_ray.algorithm.off_policy import guided_behavior
from stage_ray.config import RunConfig
from stage_ray.learner.batch import Batch
from stage_ray.learner.metrics import UpdateOutputs
from stage_ray.learner.precision import autocast
from stage_ray.learner.ranks import Ranks
from stage_ray.policies.base import Policy
from stage_ray.policies.logprobs import TokenLogprobs
from stage_ray.recipes.base import Credit, PolicyOutputs, Recipe, ReferenceOutputs
from stage_ray.samplers import SamplingParams


class Passes:
    """What an update computes with its two models; it changes no weight.

    Micro-batches are this rank's: image indices int64, of `Batch.micro_batches`. What is returned is of all ranks.
    """

    def __init__(
        self,
        run: RunConfig,
        recipe: Recipe,
        models: tuple[Policy, Policy],
        ranks: Ranks,
        *,
        bfloat16: tuple[bool, bool],
    ) -> None:
        """``models``: policy and reference; ``bfloat16``: whether each computes in it."""
        self._recipe, self._ranks = recipe, ranks
        self._policy_model, self._reference_model = models
        self._bfloat16, self._reference_bfloat16 = bfloat16
        self._device = next(iter(models[0].trained_parameters().values())).device
        self._sampling = SamplingParams.of(run.rollout)
        # Plain sampling draws from the conditional distribution itself: there is no second ratio.
        self._guided_ratio = run.algorithm.ratio_on == "guided" and not self._sampling.plain

    @torch.no_grad()
    def reference(self, batch: Batch, micro_batches: Sequence[Tensor]) -> ReferenceOutputs:
        """The reference model's log-probabilities and entropies of the whole batch."""
        logprobs = torch.empty(batch.tokens.flatten(0, 1).shape, device=self._device)
        entropy = torch.empty_like(logprobs)
        guided = torch.empty_like(logprobs) if self._recipe.needs_guided else None
        for indices in micro_batches:
            found = self._token_logprobs(
                self._reference_model, batch, indices, bfloat16=self._reference_bfloat16, guided=guided is not None
            )
            logprobs[indices], entropy[indices] = found.logprobs, found.entropy
            if guided is not None and found.guided_logprobs is not None:
                guided[indices] = found.guided_logprobs
        logprobs, entropy = self._all_gather(logprobs, batch), self._all_gather(entropy, batch)
        return ReferenceOutputs(logprobs, entropy, None if guided is None else self._all_gather(guided, batch))

    def policy(
        self, batch: Batch, micro_batches: Sequence[Tensor], reference: ReferenceOutputs, credit: Credit
    ) -> UpdateOutputs:
        """Forward and backward over micro-batches; their losses and gradients add up to those of the whole batch."""
        logprobs = torch.empty(batch.tokens.flatten(0, 1).shape, device=self._device)
        behavior, sums = torch.empty_like(logprobs), dict[str, Tensor]()  # sums by name: of the loss and of its parts
        guided = self._needs_guided(batch)
        self._policy_model.model.zero_grad(set_to_none=True)
        for indices in micro_batches:
            outputs = self._outputs(batch, indices, guided=guided)
            objective = self._recipe.objective(outputs, reference.take(indices), credit.take(indices))
            objective.loss.backward()
            logprobs[indices], behavior[indices] = outputs.logprobs.detach(), outputs.behavior_logprobs
            # Sums over tokens add up over micro-batches here, and over ranks below.
            for name, part in {"loss": objective.loss, **objective.parts}.items():
                sums[name] = sums.get(name, torch.zeros_like(part)) + part.detach()
        return UpdateOutputs(
            self._all_gather(logprobs, batch),
            self._all_gather(behavior, batch),
            {name: self._ranks.all_reduce(total).item() for name, total in sums.items()},
        )

    def start(self, batch: Batch, micro_batches: Sequence[Tensor]) -> tuple[Batch, UpdateOutputs]:
        """The policy before the first of several updates: the batch with its ratios' behaviour, and its outputs."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for indices in micro_batches:
                outputs = self._outputs(batch, indices, guided=self._needs_guided(batch))
                for name in ("logprobs", "behavior_logprobs", "guided_behavior_logprobs"):
                    if (values := getattr(outputs, name)) is not None:
                        found.setdefault(name, torch.empty(batch.tokens.flatten(0, 1).shape, device=self._device))
                        found[name][indices] = values
        whole = {name: self._all_gather(values, batch) for name, values in found.items()}
        behavior, guided = whole["behavior_logprobs"], whole.get("guided_behavior_logprobs")
        fixed = replace(batch, behavior_logprobs=behavior, guided_behavior_logprobs=guided)
        return fixed, UpdateOutputs(whole["logprobs"], behavior, {})

    def _needs_guided(self, batch: Batch) -> bool:
        """One answer for the whole batch: ranks that run different forwards wait for each other's gathers for ever."""
        return self._recipe.needs_guided or (self._guided_ratio and bool((batch.staleness > 0).any()))

    def _outputs(self, batch: Batch, indices: Tensor, *, guided: bool) -> PolicyOutputs:
        """The policy on some images, with gradient, and what its ratios are taken against.

        A fresh group's ratio is taken against its own values: a mismatch of engine and learner must not weigh tokens.
        """
        entropy_grad = self._recipe.needs_entropy_grad
        found = self._token_logprobs(
            self._policy_model, batch, indices, bfloat16=self._bfloat16, guided=guided, entropy_grad=entropy_grad
        )
        if batch.behavior_logprobs is not None:  # fixed before the first of several updates
            fixed, guided_fixed = batch.behavior_logprobs, batch.guided_behavior_logprobs
            return PolicyOutputs(
                found.logprobs,
                fixed.flatten(0, 1)[indices],
                found.entropy,
                found.guided_logprobs,
                None if guided_fixed is None else guided_fixed.flatten(0, 1)[indices],
                found.divergence,
            )
        stale = (batch.staleness > 0).repeat_interleave(batch.tokens.shape[1])[indices].unsqueeze(-1)  # [B, 1]
        recorded, current = batch.logprobs.flatten(0, 1)[indices], found.logprobs.detach()
        if found.guided_logprobs is None:  # neither the recipe nor the ratio needs them
            behavior = torch.where(stale, recorded, current)
            return PolicyOutputs(found.logprobs, behavior, found.entropy, divergence=found.divergence)
        recorded_guided, current_guided = batch.guided_logprobs.flatten(0, 1)[indices], found.guided_logprobs.detach()
        if self._guided_ratio:
            recorded = guided_behavior(current, current_guided, recorded_guided)
        return PolicyOutputs(
            found.logprobs,
            torch.where(stale, recorded, current),
            found.entropy,
            found.guided_logprobs,
            torch.where(stale, recorded_guided, current_guided),
            found.divergence,
        )

    def _token_logprobs(
        self,
        policy: Policy,
        batch: Batch,
        indices: Tensor,
        *,
        bfloat16: bool,
        guided: bool,
        entropy_grad: bool = False,
    ) -> TokenLogprobs:
        prompts, tokens = batch.prompts_of(indices), batch.tokens.flatten(0, 1)[indices]
        with autocast(bfloat16, self._device):
            if guided:
                grads = {"entropy_grad": entropy_grad, "guided_grad": self._recipe.needs_guided_grad}
                return policy.guided_token_logprobs(prompts, tokens, self._sampling, **grads)
            conditional = [prompt.conditional for prompt in prompts]
            kind = self._recipe.exact_divergence if policy is self._policy_model else None
            divergence = None if kind is None else (self._reference_model, kind)
            return policy.token_logprobs(conditional, tokens, entropy_grad=entropy_grad, divergence=divergence)

    def _all_gather(self, images: Tensor, batch: Batch) -> Tensor:
        """[N * G, T], of which this rank filled its own groups' images, filled by all: [N, G, T]."""
        return self._ranks.all_gather(images[self._ranks.rows(images.shape[0])]).view(batch.tokens.shape)
