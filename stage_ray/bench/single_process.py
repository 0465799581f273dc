"""The baseline of the end-to-end bench: the whole training step in one process, one thing after another."""

from __future__ import annotations

import time
from itertools import cycle, islice

import numpy as np
import torch

from stage_ray.bench.baselines import PlainLearner, plain_tokens
from stage_ray.bench.limits import Work, synchronize
from stage_ray.bench.prompts import equal_prompts
from stage_ray.config import RunConfig
from stage_ray.pipeline.prompts import load_prompts
from stage_ray.policies.base import device_for
from stage_ray.records import RolloutGroup
from stage_ray.rewards import build_rewards, score_groups


class SingleProcessTrainer:
    """Sample with `plain_tokens` from the model that is trained, decode, score, then one `PlainLearner` update.

    Log-probabilities and entropies come from the update's own teacher-forced forward, as in the published code, so no
    forward is run for them alone. All prompts of a step are sampled in one batch; to need no padding they are equally
    long, which makes this a little faster than any prompts would.

    Example:
        trainer = SingleProcessTrainer(run)
        seconds = trainer.step()
    """

    def __init__(self, run: RunConfig) -> None:
        torch.manual_seed(run.seed)
        self._run = run
        self._device = device_for(run.learner.gpus)
        self._learner = PlainLearner(run)
        self._scorers = build_rewards(run.rewards)
        prompts = load_prompts(run.prompts.train)
        pairs = equal_prompts(self._learner.policy.encode_prompt, len(prompts), prompts)
        self._prompts = cycle(pairs)
        self.prompt = len(pairs[0][1].conditional)  # tokens of a prompt
        self.tokens = self._learner.policy.image_tokens  # tokens of an image
        self.work = Work.of(self._learner.policy.model)

    def step(self) -> float:
        """One update; its seconds."""
        start = time.perf_counter()
        groups = self._generate()
        self._learner.update(groups, score_groups(self._scorers, groups))
        synchronize(self._device)
        return time.perf_counter() - start

    def _generate(self) -> list[RolloutGroup]:
        rollout, policy = self._run.rollout, self._learner.policy
        pairs = list(islice(self._prompts, rollout.groups_per_step))
        ids = [ids for _, ids in pairs for _ in range(rollout.group_size)]
        tokens = plain_tokens(policy, ids, rollout.guidance_scale)
        images = policy.decode(tokens).numpy()
        drawn = tokens.int().cpu().numpy()
        unknown = np.zeros(drawn.shape, np.float32)  # the update finds log-probabilities and entropies itself
        return [
            RolloutGroup(
                group_id=number,
                prompt=prompt,
                seeds=tuple(range(rollout.group_size)),
                tokens=drawn[rows],
                logprobs=unknown[rows],
                guided_logprobs=unknown[rows],
                entropy=unknown[rows],
                images=images[rows],
                policy_version=self._learner.version,
                worker="bench",
                generate_s=0.0,
            )
            for number, (prompt, _) in enumerate(pairs)
            for rows in [slice(number * rollout.group_size, (number + 1) * rollout.group_size)]
        ]
