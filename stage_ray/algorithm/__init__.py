"""STAGE (arXiv 2509.25027) as pure functions on tensors: one file per idea, no models, no files, no config.

Read in the order of the update: ``advantages`` -> ``entropy`` -> ``similarity`` -> ``kl`` -> ``off_policy`` ->
``losses``; ``credit`` puts the first three together. ``N`` groups, ``G`` images a group, ``T`` tokens an image, ``R``
scorers, ``V`` codebook entries of dimension ``D``. A group is one prompt; nothing here ever mixes two groups.
"""

from stage_ray.algorithm.advantages import combine_rewards, group_advantages
from stage_ray.algorithm.entropy import entropy_reward
from stage_ray.algorithm.kl import k3_kl
from stage_ray.algorithm.losses import StageLoss, policy_loss, stage_loss
from stage_ray.algorithm.off_policy import Correction, effective_sample_size
from stage_ray.algorithm.similarity import advantage_weight, kl_weight, opposite_sign_similarity

__all__ = [
    "Correction",
    "StageLoss",
    "advantage_weight",
    "combine_rewards",
    "effective_sample_size",
    "entropy_reward",
    "group_advantages",
    "k3_kl",
    "kl_weight",
    "opposite_sign_similarity",
    "policy_loss",
    "stage_loss",
]
