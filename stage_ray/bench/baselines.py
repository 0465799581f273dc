"""What the benches compare with: the same work as plain code does it, in the style of the published trainer.

Plain, not crippled: key-value cache, whole batches, no padding, the same dtype and autocast as ours, fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor
from transformers import DynamicCache

from stage_ray.algorithm import stage_loss
from stage_ray.algorithm.credit import stage_credit
from stage_ray.algorithm.losses import StageLoss
from stage_ray.bench.prompts import equal_prompts, groups_of
from stage_ray.config import PolicyConfig, RunConfig
from stage_ray.learner.batch import Batch, make_batch
from stage_ray.learner.learner import learning_rate
from stage_ray.learner.precision import autocast, uses_bfloat16
from stage_ray.pipeline.prompts import load_prompts
from stage_ray.policies.base import PromptIds
from stage_ray.policies.devices import device_for
from stage_ray.policies.janus import JanusPolicy
from stage_ray.policies.logprobs import TokenLogprobs
from stage_ray.recipes import load_recipe
from stage_ray.records import RolloutGroup, ScoredGroup
from stage_ray.rewards import build_rewards, score_groups

Pick = Callable[[Tensor, int], Tensor]


def multinomial(probabilities: Tensor, step: int) -> Tensor:
    """Tokens int64 [B] from probabilities [B, V], as plain code draws them."""
    return torch.multinomial(probabilities, num_samples=1).squeeze(-1)


def plain_policy(path: str, *, device: torch.device, dtype: torch.dtype) -> JanusPolicy:
    """A policy for `plain_tokens` and `plain_statistics`: nothing trains, and the head too is in ``dtype``."""
    policy = JanusPolicy.load(PolicyConfig.model_validate({"path": path}), device=device, dtype=dtype)
    policy.model.requires_grad_(False)
    policy.model.model.generation_head.to(dtype)
    return policy


@torch.no_grad()
def plain_tokens(
    policy: JanusPolicy, prompts: Sequence[PromptIds], guidance: float, pick: Pick = multinomial
) -> Tensor:
    """Guided sampling with transformers' cache: branches interleaved in one batch, softmax, draw, one step a token.

    Args:
        prompts: one an image, B in all, of equal length: the published code gives every process one prompt, so it has
            no padding and needs no mask, and neither has this.
        guidance: w in ``u + w (c - u)``.
        pick: (probabilities [B, V], step) -> tokens [B].

    Returns:
        int64 [B, T].

    Raises:
        ValueError: prompts of several lengths.
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
        probabilities = torch.softmax(unconditional + guidance * (conditional - unconditional), dim=-1)
        tokens[:, step] = pick(probabilities, step)
        both = torch.stack((tokens[:, step], tokens[:, step]), dim=1).view(-1)
        embeds = model.prepare_embeddings_for_image_generation(both).unsqueeze(1)
    return tokens


@torch.no_grad()
def plain_statistics(policy: JanusPolicy, prompts: Sequence[PromptIds], tokens: Tensor) -> TokenLogprobs:
    """Log-probabilities and entropies of sampled tokens by a second, teacher-forced forward of the conditional rows."""
    states = policy.hidden_states([prompt.conditional for prompt in prompts], tokens)
    return full_statistics(policy.model.model.generation_head(states).float(), tokens)


def full_statistics(logits: Tensor, tokens: Tensor) -> TokenLogprobs:
    """Log-probabilities and entropies [B, T] from all logits at once, float32 [B, T, V]."""
    logp = torch.log_softmax(logits, dim=-1)
    chosen = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return TokenLogprobs(chosen, -(logp.exp() * logp).sum(dim=-1))


class PlainLearner:
    """The same update as `stage_ray.learner.Learner` makes, written down directly: one batch, all logits, one backward.

    Entropies of the policy come from its own forward, not from the engine.
    """

    def __init__(self, run: RunConfig) -> None:
        self.version = 0
        self._run = run
        self._device = device_for(run.learner.gpus)
        self._bfloat16 = uses_bfloat16(run.learner.autocast, self._device)
        self.policy = JanusPolicy.load(run.policy, device=self._device)
        self._reference = JanusPolicy.load(run.policy, device=self._device)
        self._reference.model.requires_grad_(False)
        self.parameters = self.policy.trained_parameters()
        learner = run.learner
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learner.lr, betas=learner.betas, weight_decay=learner.weight_decay, fused=True
        )
        self._codebook = self.policy.codec.codebook()

    def update(self, groups: Sequence[RolloutGroup], scored: Sequence[ScoredGroup]) -> StageLoss:
        """Train on whole groups once; the loss. Gradients stay until the next call."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._batch(groups, scored))
        loss.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._run.learner.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.version, self._run.steps, self._run.learner)
        self._optimizer.step()
        self.version += 1
        return loss

    def _batch(self, groups: Sequence[RolloutGroup], scored: Sequence[ScoredGroup]) -> Batch:
        return make_batch(
            groups,
            scored,
            run=self._run,
            version=self.version,
            policy=self.policy,
            codebook=self._codebook,
            device=self._device,
        )

    def _loss(self, batch: Batch) -> StageLoss:
        algorithm, options, shape = self._run.algorithm, load_recipe(self._run).options, batch.tokens.shape
        prompts = [ids.conditional for ids in batch.prompts_of(torch.arange(shape[0] * shape[1]))]
        tokens = batch.tokens.flatten(0, 1)
        with autocast(self._bfloat16, self._device):
            policy = full_statistics(self.policy.image_logits(prompts, tokens), tokens)
            with torch.no_grad():
                reference = full_statistics(self._reference.image_logits(prompts, tokens), tokens)
        signals = stage_credit(
            batch.scores,
            policy.entropy.detach().view(shape).mean(dim=-1),
            reference.entropy.view(shape).mean(dim=-1),
            batch.tokens,
            self._codebook,
            weights=batch.scorer_weights,
            drop_constant=algorithm.drop_constant,
            entropy_weight=options.entropy_reward,
            entropy_best_only=options.entropy_best_only,
            eps=algorithm.advantage_eps,
        )
        return stage_loss(
            policy.logprobs.view(shape),
            reference.logprobs.view(shape),
            None,
            signals.advantages,
            signals.similarity,
            beta=options.beta,
            reweight_advantage=options.reweight_advantage,
            reweight_kl=options.reweight_kl,
            clip=algorithm.clip,
        )


class SingleProcessTrainer:
    """The whole training step in one process: sample from the model that is trained, decode, score, `PlainLearner`.

    Log-probabilities and entropies come from the update's own teacher-forced forward, as in the published code, so no
    forward is run for them alone. All prompts of a step are sampled in one batch; to need no padding they are equally
    long, which makes this a little faster than any prompts would.
    """

    def __init__(self, run: RunConfig) -> None:
        torch.manual_seed(run.seed)
        self._run = run
        self.learner = PlainLearner(run)
        self._scorers = build_rewards(run.rewards)
        prompts = load_prompts(run.prompts.train)
        self.prompts = equal_prompts(self.learner.policy.codec.encode_prompt, len(prompts), prompts)
        self._next = cycle(self.prompts)

    def step(self) -> None:
        """One update."""
        groups = self.generate()
        self.learner.update(groups, score_groups(self._scorers, groups))

    def generate(self) -> list[RolloutGroup]:
        """The groups of one step."""
        rollout, policy = self._run.rollout, self.learner.policy
        prompts, ids = zip(*islice(self._next, rollout.groups_per_step), strict=True)
        tokens = plain_tokens(policy, [one for one in ids for _ in range(rollout.group_size)], rollout.guidance_scale)
        arrays = (tokens.int().cpu().numpy(), policy.codec.decode(tokens).numpy())
        shaped = (array.reshape(len(prompts), rollout.group_size, *array.shape[1:]) for array in arrays)
        return groups_of(prompts, *shaped, codes=policy.codebook_size, version=self.learner.version)
