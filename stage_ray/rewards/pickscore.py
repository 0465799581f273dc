"""PickScore (Kirstain et al., arXiv 2305.01569): what people preferred, from a CLIP tuned on their choices."""

from __future__ import annotations

from stage_ray.rewards.clip import BatchSize, ClipReward
from stage_ray.rewards.models import Dtype


class PickScoreReward(ClipReward):
    """Cosine times the checkpoint's own logit scale, as published: about 15..26. Compares pictures of one prompt.

    Details and features are those of `ClipReward`.
    """

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        divide_by: float = 1.0,
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ) -> None:
        """Load the checkpoint (MIT).

        Args:
            path, batch_size, dtype, device: as of `ClipReward`.
            processor: where tokenizer and image processor are; null: beside the weights.
            divide_by: Flow-GRPO (arXiv 2505.05470) divides by 26, which brings most scores below 1.
        """
        super().__init__(path, processor, 1.0, batch_size, dtype, device)
        self._scale = self._towers.logit_scale / divide_by
