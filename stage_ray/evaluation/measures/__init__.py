"""What an evaluation says of a model beside its benchmark, a file each: pictures, and how far the policy has moved."""

# ruff: noqa: F401  they are here for other rooms and for a user's own measures
from stage_ray.evaluation.measures.base import Measure, find_measure, select
