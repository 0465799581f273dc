"""A policy version on its way from the learner to the rollout workers, whole or not at all."""
