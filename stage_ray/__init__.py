"""stage_ray: STAGE post-training of autoregressive image models, on Ray, with rollouts served by vLLM.

Read it in the direction the data flows: ``config`` -> ``records`` -> ``policies`` -> ``engines`` -> ``rewards`` ->
``pipeline`` -> ``algorithm`` -> ``learner`` -> ``weights`` -> ``train``.
"""

__version__ = "0.2.0"
