"""stage_ray: STAGE post-training of autoregressive image models, on Ray, with rollouts served by vLLM.

Walk the house in the direction the data flows: ``config`` -> ``records`` -> ``policies`` -> ``engines`` -> ``rewards``
-> ``buffer`` -> ``algorithm`` -> ``learner`` -> ``weights`` -> ``train``.
"""

__version__ = "0.2.0"
