"""The learner: scored groups in, one update of the policy out, whatever recipe and family. No Ray in here.

``batch`` checks and stacks what arrives, ``learner`` makes the update, ``metrics`` describes it, ``state`` writes and
reads what a bit-exact resume needs, ``precision`` says when bfloat16 is worth it, and ``ranks`` shares an update among
processes.
"""

from stage_ray.learner.batch import LearnerError
from stage_ray.learner.learner import Learner
from stage_ray.learner.ranks import Ranks

__all__ = ["Learner", "LearnerError", "Ranks"]
