"""STAGE (arXiv 2509.25027) as pure functions on tensors: one file per idea, no models, no files, no config.

Read in the order of the update: ``advantages`` -> ``similarity`` -> ``credit``, which puts them together with the
entropy reward -> ``off_policy`` -> ``losses``. ``N`` groups, ``G`` images a group, ``T`` tokens an image, ``R``
scorers, ``V`` codebook entries of dimension ``D``. A group is one prompt; nothing here ever mixes two groups.
"""

from stage_ray.algorithm.advantages import combine_rewards, group_advantages
from stage_ray.algorithm.credit import entropy_reward
from stage_ray.algorithm.losses import StageLoss, k3_kl, policy_loss, stage_loss
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
