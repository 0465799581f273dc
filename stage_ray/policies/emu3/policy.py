"""Emu3 (transformers' ``Emu3ForConditionalGeneration``) as a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.base import Policy
from stage_ray.policies.codec import ImageCodec
from stage_ray.policies.emu3.codec import MODEL_TYPE, TRAINED_PREFIX, Emu3Codec
from stage_ray.pretrained import check_loaded, check_tensors

if TYPE_CHECKING:
    from transformers import Emu3ForConditionalGeneration

    from stage_ray.config.model_sizes import ModelSizes
    from stage_ray.policies.emu3.backbone import Emu3Backbone, Emu3Parts, RowEndDecoder


class Emu3Policy(Policy):
    """An Emu3 model: its language model is trained, embeddings included; the head and the image tokenizer are not.

    Of the head only the rows of image tokens are kept; `save` writes all of it.
    """

    model_type = MODEL_TYPE
    trained_prefix = TRAINED_PREFIX
    vllm_model = "stage_ray.policies.emu3.vllm_model:Emu3ForImageGeneration"
    model: Emu3Parts
    codec: Emu3Codec
    backbone: Emu3Backbone

    def __init__(self, model: Emu3ForConditionalGeneration, codec: Emu3Codec, *, trainable: bool = True) -> None:
        # Late: see `stage_ray.policies.janus.codec`.
        from stage_ray.policies.emu3.backbone import Emu3Backbone, Emu3Parts, image_head

        model.lm_head = image_head(model.lm_head, codec.first, codec.codebook_size)
        if not trainable:
            model.model.vqmodel.float().eval()  # pictures do not come from rounded weights
        codec.vqmodel = model.model.vqmodel  # one tokenizer for both
        backbone = Emu3Backbone(model.model.text_model, codec.grid, codec.row_end)
        super().__init__(Emu3Parts(model), backbone, codec, trainable=trainable)

    @classmethod
    def check(cls, config: PolicyConfig) -> ImageCodec | None:
        """As `Policy.check`, down to the names and shapes of tensors."""
        codec = super().check(config)
        if isinstance(codec, Emu3Codec):
            from transformers import Emu3ForConditionalGeneration

            from stage_ray.policies.emu3.backbone import Emu3Parts

            with torch.device("meta"):  # shapes alone, no memory
                model = Emu3ForConditionalGeneration(codec.config)
            parts = Emu3Parts(model).state_dict()
            check_tensors(codec.location, {name: tensor.shape for name, tensor in parts.items()})
        return codec

    @classmethod
    def sizes(cls, directory: Path, path: str) -> ModelSizes:
        """See `Policy.sizes`."""
        from stage_ray.policies.emu3.sizes import checkpoint_sizes

        return checkpoint_sizes(directory, path)

    @classmethod
    def load(
        cls, config: PolicyConfig, *, device: torch.device, dtype: torch.dtype = torch.float32, trainable: bool = True
    ) -> Emu3Policy:
        """Load a checkpoint with plain transformers; see `Policy.load`."""
        from transformers import Emu3ForConditionalGeneration

        codec = Emu3Codec.load(config)
        location = codec.location
        try:
            model, report = Emu3ForConditionalGeneration.from_pretrained(
                location, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"policy.path: {location} does not load as an Emu3 model: {error}") from error
        check_loaded(model, report["missing_keys"], location)
        return cls(model.to(device).eval(), codec, trainable=trainable)

    @classmethod
    def load_codec(cls, config: PolicyConfig, *, device: torch.device | None) -> Emu3Codec:
        """Load prompts and image tokenizer; see `Policy.load_codec`."""
        return Emu3Codec.load(config, device)

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """Image tokens int64 [...] -> float [..., hidden], by the one table of all tokens, which is trained."""
        return self.model.text_model["model"].embed_tokens(self.codec.first + tokens)  # type: ignore[operator]

    def head(self, states: Tensor) -> Tensor:
        """States [..., hidden] -> logits float32 [..., V], in float32 even where the rest runs in bfloat16."""
        with torch.autocast(states.device.type, enabled=False):
            return self.model.text_model["lm_head"](states.float())

    def decoder(self, sequences: int, length: int) -> RowEndDecoder:
        """A Llama's, which reads what closes a row by itself: ``length`` counts prompt and image tokens alone."""
        from stage_ray.policies.emu3.backbone import RowEndDecoder

        text, codec = self.model.text_model["model"], self.codec
        return RowEndDecoder(text, self.backbone, sequences, length + codec.forced, codec.grid[1])

    def drop_image_decoder(self) -> None:
        """The image tokenizer; see `Policy.drop_image_decoder`."""
        self.model.vqmodel = None
        self.codec.vqmodel = None

    def enable_gradient_checkpointing(self) -> None:
        """transformers' own, layer by layer; see `Policy.enable_gradient_checkpointing`."""
        self.backbone.checkpoint_layers()
