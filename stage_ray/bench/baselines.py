"""What the benches compare with: the same work as plain code does it, in the style of the published trainer.

Plain, not crippled: key-value cache, whole batches, no padding, the same dtype and autocast as ours, fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice

import torch
from torch import Tensor
from transformers import DynamicCache

from stage_ray.bench.inputs import equal_prompts, groups_of
from stage_ray.config import PolicyConfig, RunConfig
from stage_ray.learner.batch import make_batch
from stage_ray.learner.learner import Learner
from stage_ray.policies.backbone import Backbone
from stage_ray.policies.base import Policy
from stage_ray.policies.codec import Branch, PromptIds
from stage_ray.policies.devices import device_for
from stage_ray.policies.janus import JanusPolicy
from stage_ray.policies.logprobs import TokenLogprobs
from stage_ray.recipes.base import PolicyOutputs, ReferenceOutputs
from stage_ray.records import RolloutGroup, ScoredGroup
from stage_ray.rewards import build_rewards, score_groups


def plain_policy(path: str, *, device: torch.device, dtype: torch.dtype) -> JanusPolicy:
    """A policy for `plain_tokens` and `plain_logprobs`: nothing trains, and the head too is in ``dtype``."""
    policy = JanusPolicy.load(PolicyConfig.model_validate({"path": path}), device=device, dtype=dtype)
    policy.model.requires_grad_(False)
    policy.model.model.generation_head.to(dtype)
    return policy


def multinomial(probabilities: Tensor, step: int) -> Tensor:
    """Tokens int64 [B] of a step from probabilities [B, V], as plain code draws them."""
    return torch.multinomial(probabilities, num_samples=1).squeeze(-1)


@torch.no_grad()
def plain_tokens(
    policy: JanusPolicy, prompts: Sequence[PromptIds], guidance: float, draw: Callable[..., Tensor] = multinomial
) -> Tensor:
    """Guided sampling with transformers' cache: branches interleaved in one batch, softmax, draw, one step a token.

    B prompts, one an image -> int64 [B, T]. The published code gives every process one prompt, so it has no padding and
    needs no mask, and neither has this: prompts of several lengths are a ValueError.
    """
    if len({len(prompt.conditional) for prompt in prompts}) != 1:
        raise ValueError("the plain loop has no padding; give it prompts of one length")
    model, core = policy.model, policy.model.model
    rows = [ids for prompt in prompts for ids in (prompt.conditional, prompt.unconditional)]
    embeds = core.language_model.embed_tokens(torch.tensor(rows, device=model.device))
    cache = DynamicCache(config=core.language_model.config)
    tokens = torch.zeros(len(prompts), policy.image_tokens, dtype=torch.int64, device=model.device)
    for step in range(policy.image_tokens):
        output = core.language_model(inputs_embeds=embeds, use_cache=True, past_key_values=cache)
        logits = core.generation_head(output.last_hidden_state[:, -1])
        conditional, unconditional = logits[0::2], logits[1::2]
        tokens[:, step] = draw(torch.softmax(unconditional + guidance * (conditional - unconditional), dim=-1), step)
        both = tokens[:, step].repeat_interleave(2)  # one for each branch
        embeds = model.prepare_embeddings_for_image_generation(both).unsqueeze(1)
    return tokens


@torch.no_grad()
def plain_logprobs(policy: JanusPolicy, prompts: Sequence[PromptIds], tokens: Tensor) -> TokenLogprobs:
    """Log-probabilities and entropies of sampled tokens by a second, teacher-forced forward of the conditional rows."""
    states = plain_states(policy, [prompt.conditional for prompt in prompts], tokens)
    return full_logprobs(policy.model.model.generation_head(states).float(), tokens)


def plain_states(policy: Policy, prompts: Sequence[Branch], tokens: Tensor) -> Tensor:
    """States that predict image tokens [B, T], by transformers' own forward of whole sequences: [B, T, hidden]."""
    plain = Backbone(policy.backbone.language_model)
    return plain.predict(prompts, policy.embed_image_tokens(tokens[:, :-1]))


def full_logprobs(logits: Tensor, tokens: Tensor) -> TokenLogprobs:
    """Log-probabilities and entropies [B, T] from all logits at once, float32 [B, T, V]."""
    logp = torch.log_softmax(logits, dim=-1)
    return TokenLogprobs(logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(dim=-1))


class PlainLearner(Learner):
    """The learner with its update written down directly: one batch, all logits and their entropies, one backward."""

    policy: JanusPolicy

    def update(self, groups: Sequence[RolloutGroup], scored: Sequence[ScoredGroup]) -> dict[str, float]:
        """Train on whole groups once; the loss and its parts."""
        policy, base, run, device = self.policy, self._reference, self._run, self._device
        batch = make_batch(
            groups, scored, run=run, version=self.version, policy=policy, codebook=self._codebook, device=device
        )
        tokens, shape = batch.tokens.flatten(0, 1), batch.tokens.shape
        images = torch.arange(len(tokens), device=device)
        prompts = [ids.conditional for ids in batch.prompts_of(images)]
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16):
            found = full_logprobs(policy.head(plain_states(policy, prompts, tokens)), tokens)
            with torch.no_grad():
                fixed = full_logprobs(base.head(plain_states(base, prompts, tokens)), tokens)
        reference = ReferenceOutputs(fixed.logprobs.view(shape), fixed.entropy.view(shape))
        batch = replace(batch, entropy=found.entropy.detach().view(shape))
        credit = self._recipe.credit(batch, reference, self.version)
        outputs = PolicyOutputs(found.logprobs, found.logprobs.detach(), found.entropy)
        objective = self._recipe.objective(outputs, reference.take(images), credit.take(images))
        objective.loss.backward()
        loss = objective.loss.item()
        metrics = {"loss": loss} | self._step(loss, {})
        self.version += 1
        return metrics | {name: part.item() for name, part in objective.parts.items()}


class SingleProcessTrainer:
    """The whole training step in one process: sample from the model that is trained, decode, score, `PlainLearner`.

    As in the published code, no forward is run for log-probabilities alone. All prompts of a step are one batch; they
    are equally long, which makes this a little faster than any prompts would.
    """

    def __init__(self, run: RunConfig) -> None:
        self._rollout, self.learner, self._scorers = run.rollout, PlainLearner(run), build_rewards(run.rewards)
        # The learner itself has no image decoder.
        self._codec = JanusPolicy.load_codec(run.policy, device=device_for(run.learner.gpus))
        file, *_ = run.prompts.files.values()
        self.prompts = equal_prompts(self.learner.policy.codec.encode_prompt, file.path)
        self._next = cycle(self.prompts)

    def step(self) -> None:
        """One update."""
        groups = self.generate()
        self.learner.update(groups, score_groups(self._scorers, groups))

    def generate(self) -> list[RolloutGroup]:
        """The groups of one step."""
        policy, size = self.learner.policy, self._rollout.group_size
        prompts, ids = zip(*islice(self._next, self._rollout.groups_per_step), strict=True)
        tokens = plain_tokens(policy, [one for one in ids for _ in range(size)], self._rollout.guidance_scale)
        # [B, ...] to [N, G, ...].
        arrays = (tokens.int().cpu().numpy(), self._codec.decode(tokens).numpy())
        grouped = (array.reshape(len(prompts), size, *array.shape[1:]) for array in arrays)
        return groups_of(prompts, *grouped, codes=policy.codebook_size, version=self.learner.version)
