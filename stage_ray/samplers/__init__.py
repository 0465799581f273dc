"""How images are drawn: token rules, prompt transforms and searches over images, one file each (``README.md``).

``rollout.sampler``, ``prompt_transform`` and ``search`` name the file, or the dotted path of a class from elsewhere.
"""

# ruff: noqa: F401  they are here for other rooms
from stage_ray.samplers.base import (
    ChoosingSearch,
    Context,
    EmbeddingTransform,
    ImageSearch,
    Judge,
    PromptTransform,
    TokenRule,
)
from stage_ray.samplers.load import (
    SAMPLERS,
    SEARCHES,
    TRANSFORMS,
    load_rule,
    load_search,
    load_transform,
    resolve_samplers,
    training_search,
)
from stage_ray.samplers.params import SamplingParams, keep_top_k, keep_top_p, process_logits
