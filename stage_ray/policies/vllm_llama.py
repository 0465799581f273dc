"""What the families' vLLM classes share: vLLM's Llama behind an embedding of their own, and how weights come in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from stage_ray.pretrained import only_finite


class LlamaImageModel(nn.Module):
    """Prompt and image ids in, logits over the V image tokens out; a family adds its parts and `compute_logits`.

    Attributes:
        llama: name of the attribute that holds vLLM's ``LlamaModel``.
        mapper: from a checkpoint's names of tensors to those of the parts.
    """

    llama: ClassVar[str]
    mapper: ClassVar[WeightsMapper]

    def __init__(self) -> None:
        super().__init__()
        self._loaded = False

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Ids [N] -> embeddings [N, hidden]."""
        return getattr(self, self.llama).embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids and positions [N] of all running requests -> states [N, hidden]."""
        return getattr(self, self.llama)(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their names in a checkpoint; what images do not need is skipped."""
        # Updates are checked before they come here.
        checked = weights if self._loaded else only_finite(weights, "its weights")
        self._loaded = True
        taken = ((name, self.take(name, tensor)) for name, tensor in checked)
        return AutoWeightsLoader(self).load_weights(taken, mapper=self.mapper)

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """What is loaded of a checkpoint's tensor: by default all of it."""
        return tensor
