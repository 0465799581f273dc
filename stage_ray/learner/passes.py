"""Forward and backward passes of policy and reference over a batch, cut into micro-batches and shared among ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stage_ray.algorithm.off_policy import guided_behavior
from stage_ray.config import RunConfig
from stage_ray.learner.batch import Batch
from stage_ray.learner.metrics import UpdateOutputs
from stage_ray.learner.ranks import Ranks
from stage_ray.policies.base import Policy
from stage_ray.policies.codec import PromptIds
from stage_ray.policies.drift import token_drift
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
        bfloat16: bool,
        reference_bfloat16: bool,
    ) -> None:
        """``models``: policy and reference, computed in bfloat16 or not."""
        self._recipe, self._ranks = recipe, ranks
        self._policy_model, self._reference_model = models
        self._bfloat16, self._reference_bfloat16 = bfloat16, reference_bfloat16
        self._device = next(iter(models[0].trained_parameters().values())).device
        self._sampling = SamplingParams.of(run.rollout)
        # Plain sampling draws from the conditional distribution itself: there is no second ratio.
        self._guided_ratio = run.algorithm.ratio_on == "guided" and not self._sampling.plain

    @torch.no_grad()
    def reference(self, batch: Batch, micro_batches: Sequence[Tensor]) -> ReferenceOutputs:
        """The reference model's log-probabilities and entropies of the whole batch."""
        run = partial(self._token_logprobs, batch, of_reference=True, guided=self._recipe.needs_guided)
        return ReferenceOutputs(**self._gather(batch, micro_batches, run, "logprobs", "entropy", "guided_logprobs"))

    @torch.no_grad()
    def drift(self, prompts: Sequence[PromptIds], tokens: Tensor, micro_batch: int) -> Tensor:
        """Means over tokens of `token_drift`, as the models are now: tokens int64 [B, T] -> float32 [B, 3 or 6].

        Ranks share the images; where they do not divide them, the first ones are done twice.
        """
        count = len(tokens)
        share = -(-count // self._ranks.count)
        own = (self._ranks.rank * share + torch.arange(share)) % count
        parts = []
        models, narrow = (self._policy_model, self._reference_model), (self._bfloat16, self._reference_bfloat16)
        for some in own.split(micro_batch):
            asked, drawn = [prompts[i] for i in some.tolist()], tokens[some].to(self._device)
            parts.append(token_drift(*models, asked, drawn, self._sampling, narrow).mean(dim=1))
        for model in models:
            self._ranks.reshard(model.fsdp_modules())
        return self._ranks.all_gather(torch.cat(parts))[:count].cpu()

    def policy(
        self, batch: Batch, micro_batches: Sequence[Tensor], reference: ReferenceOutputs, credit: Credit
    ) -> UpdateOutputs:
        """Forward and backward over micro-batches; their losses and gradients add up to those of the whole batch."""
        guided, sums = self._needs_guided(batch), dict[str, Tensor]()  # sums by name: of the loss and of its parts
        self._policy_model.model.zero_grad(set_to_none=True)

        def run(indices: Tensor) -> PolicyOutputs:
            outputs = self._outputs(batch, indices, guided=guided)
            objective = self._recipe.objective(outputs, reference.take(indices), credit.take(indices))
            objective.loss.backward()
            # Sums over tokens add up over micro-batches here, and over ranks below.
            for name, part in {"loss": objective.loss, **objective.parts}.items():
                sums[name] = sums.get(name, torch.zeros_like(part)) + part.detach()
            return outputs

        found = self._gather(batch, micro_batches, run, "logprobs", "behavior_logprobs")
        totals = {name: self._ranks.all_reduce(total).item() for name, total in sums.items()}
        return UpdateOutputs(found["logprobs"], found["behavior_logprobs"], totals)

    @torch.no_grad()
    def start(self, batch: Batch, micro_batches: Sequence[Tensor]) -> tuple[Batch, UpdateOutputs]:
        """The policy before the first of several updates: the batch with its ratios' behaviour, and its outputs."""
        run = partial(self._outputs, batch, guided=self._needs_guided(batch))
        names = ("logprobs", "behavior_logprobs", "guided_behavior_logprobs")
        found = self._gather(batch, micro_batches, run, *names)
        behavior, guided = found["behavior_logprobs"], found.get("guided_behavior_logprobs")
        fixed = replace(batch, behavior_logprobs=behavior, guided_behavior_logprobs=guided)
        return fixed, UpdateOutputs(found["logprobs"], behavior, {})

    def _gather(
        self, batch: Batch, micro_batches: Sequence[Tensor], run: Callable[[Tensor], object], *names: str
    ) -> dict[str, Tensor]:
        """Fields that are not None of what ``run`` gives for each micro-batch, of all ranks: float32 [N, G, T] each."""
        found: dict[str, Tensor] = {}
        for indices in micro_batches:
            outputs = run(indices)
            for name in names:
                if (values := getattr(outputs, name)) is not None:
                    found.setdefault(name, torch.empty(batch.tokens.flatten(0, 1).shape, device=self._device))
                    found[name][indices] = values.detach()
        own = self._ranks.rows(batch.tokens.shape[0] * batch.tokens.shape[1])  # images that this rank filled
        return {name: self._ranks.all_gather(values[own]).view(batch.tokens.shape) for name, values in found.items()}

    def _needs_guided(self, batch: Batch) -> bool:
        """One answer for the whole batch: ranks that run different forwards wait for each other's gathers for ever."""
        return self._recipe.needs_guided or (self._guided_ratio and bool(batch.off_policy.any()))

    def _outputs(self, batch: Batch, indices: Tensor, *, guided: bool) -> PolicyOutputs:
        """The policy on some images, with gradient, and what its ratios are taken against.

        A fresh group's ratio is taken against its own values: a mismatch of engine and learner must not weigh tokens.
        """
        found = self._token_logprobs(batch, indices, guided=guided)
        behavior, guided_behaviors = batch.behavior_logprobs, batch.guided_behavior_logprobs
        if behavior is not None:  # fixed before the first of several updates
            behavior = behavior.flatten(0, 1)[indices]
            guided_behaviors = None if guided_behaviors is None else guided_behaviors.flatten(0, 1)[indices]
        else:
            stale = batch.off_policy.repeat_interleave(batch.tokens.shape[1])[indices].unsqueeze(-1)  # [B, 1]
            recorded, current = batch.logprobs.flatten(0, 1)[indices], found.logprobs.detach()
            if found.guided_logprobs is not None:  # the recipe or the ratio needs them
                recorded_guided = batch.guided_logprobs.flatten(0, 1)[indices]
                current_guided = found.guided_logprobs.detach()
                guided_behaviors = torch.where(stale, recorded_guided, current_guided)
                if self._guided_ratio:
                    recorded = guided_behavior(current, current_guided, recorded_guided)
            behavior = torch.where(stale, recorded, current)
        return PolicyOutputs(
            found.logprobs, behavior, found.entropy, found.guided_logprobs, guided_behaviors, found.divergence
        )

    def _token_logprobs(
        self, batch: Batch, indices: Tensor, *, guided: bool, of_reference: bool = False
    ) -> TokenLogprobs:
        """The policy, or the reference, teacher-forced on some images."""
        policy, bfloat16 = self._policy_model, self._bfloat16
        if of_reference:
            policy, bfloat16 = self._reference_model, self._reference_bfloat16
        prompts, tokens = batch.prompts_of(indices), batch.tokens.flatten(0, 1)[indices]
        entropy_grad = self._recipe.needs_entropy_grad and not of_reference
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bfloat16):
            if guided:
                grads = {"entropy_grad": entropy_grad, "guided_grad": self._recipe.needs_guided_grad}
                with_guidance = batch.guided_of(indices)
                return policy.guided_token_logprobs(prompts, tokens, self._sampling, guided=with_guidance, **grads)
            conditional = [prompt.conditional for prompt in prompts]
            kind = None if of_reference else self._recipe.exact_divergence
            divergence = None if kind is None else (self._reference_model, kind)
            return policy.token_logprobs(conditional, tokens, entropy_grad=entropy_grad, divergence=divergence)
