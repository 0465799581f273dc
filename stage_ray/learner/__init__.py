"""The learner: scored groups in, one STAGE update of the policy out. No Ray in here.

``batch`` checks and stacks what arrives, ``learner`` makes the update, ``state`` writes and reads what a bit-exact
resume needs, ``precision`` says when bfloat16 is worth it, ``ranks`` shares an update among processes, and ``shards``
writes what each of them holds.
"""

from stage_ray.learner.batch import LearnerError
from stage_ray.learner.learner import Learner
from stage_ray.learner.ranks import Ranks

__all__ = ["Learner", "LearnerError", "Ranks"]
