"""Scorers: images and prompts in, scores out. One file per scorer; `build` makes them, `scoring` runs them."""

from stage_ray.rewards.build import REWARDS, build_rewards, check_rewards
from stage_ray.rewards.scoring import merge_scores, score_groups

__all__ = ["REWARDS", "build_rewards", "check_rewards", "merge_scores", "score_groups"]
