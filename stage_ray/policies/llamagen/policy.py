"""LlamaGen, class- and text-conditional, as a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.base import Policy
from stage_ray.policies.codec import ImageCodec
from stage_ray.policies.image_tokenizer import for_sampling
from stage_ray.policies.llamagen.codec import MODEL_TYPE, TRAINED_PREFIX, LlamaGenCodec
from stage_ray.policies.static_decoder import StaticDecoder
from stage_ray.pretrained import check_loaded, check_tensors, located

if TYPE_CHECKING:
    from stage_ray.config.model_sizes import ModelSizes
    from stage_ray.policies.llamagen.backbone import LlamaGenBackbone
    from stage_ray.policies.llamagen.model import LlamaGenModel


class LlamaGenPolicy(Policy):
    """A LlamaGen model: all is trained but the image tokenizer, the text encoder and what stands for no caption."""

    model_type = MODEL_TYPE
    trained_prefix = TRAINED_PREFIX
    vllm_model = "stage_ray.policies.llamagen.vllm_model:LlamaGenForImageGeneration"
    model: LlamaGenModel
    codec: LlamaGenCodec
    backbone: LlamaGenBackbone

    def __init__(self, model: LlamaGenModel, codec: LlamaGenCodec, *, trainable: bool = True) -> None:
        from stage_ray.policies.llamagen.backbone import LlamaGenBackbone  # late: see `stage_ray.policies.janus.codec`

        model.gpt["head"].float()  # see `head`
        if not trainable:
            for_sampling(model.vq)
        codec.vqmodel = model.vq  # one tokenizer for both
        super().__init__(model, LlamaGenBackbone(model, codec), codec, trainable=trainable)

    @classmethod
    def check(cls, config: PolicyConfig) -> ImageCodec | None:
        """As `Policy.check`, down to the names and shapes of tensors; None also while the text encoder is in a hub."""
        codec = super().check(config)
        if isinstance(codec, LlamaGenCodec):
            from stage_ray.policies.llamagen.model import LlamaGenModel

            with torch.device("meta"):  # shapes alone, no memory
                model = LlamaGenModel(codec.config)
            check_tensors(codec.location, {name: tensor.shape for name, tensor in model.state_dict().items()})
            encoder = codec.config.text_encoder
            if encoder and located(encoder) is None:
                return None
        return codec

    @classmethod
    def sizes(cls, directory: Path, path: str) -> ModelSizes:
        """See `Policy.sizes`."""
        from stage_ray.policies.llamagen.model import LlamaGenConfig
        from stage_ray.policies.llamagen.sizes import config_sizes

        return config_sizes(LlamaGenConfig.from_pretrained(directory), directory.name, path)

    @classmethod
    def load(
        cls, config: PolicyConfig, *, device: torch.device, dtype: torch.dtype = torch.float32, trainable: bool = True
    ) -> LlamaGenPolicy:
        """Load a checkpoint; see `Policy.load`."""
        from stage_ray.policies.llamagen.model import LlamaGenModel

        codec = LlamaGenCodec.load(config, device, tokenizer=False)
        location = codec.location
        try:
            model, report = LlamaGenModel.from_pretrained(location, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"policy.path: {location} does not load as a LlamaGen model: {error}") from error
        check_loaded(model, report["missing_keys"], location)
        return cls(model.to(device).eval(), codec, trainable=trainable)

    @classmethod
    def load_codec(cls, config: PolicyConfig, *, device: torch.device | None) -> LlamaGenCodec:
        """Load prompts and image tokenizer; see `Policy.load_codec`."""
        return LlamaGenCodec.load(config, device)

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """Image tokens int64 [...] -> float [..., hidden], a table that is trained."""
        return self.model.gpt["image_embedding"](tokens)

    def head(self, states: Tensor) -> Tensor:
        """States [..., hidden] -> logits float32 [..., V], in float32 even where the rest runs in bfloat16."""
        with torch.autocast(states.device.type, enabled=False):
            return self.model.gpt["head"](states.float())

    def decoder(self, sequences: int, length: int) -> StaticDecoder:
        """A Llama's, with prompts and positions of its own."""
        own = self.backbone
        return StaticDecoder(self.model.transformer, sequences, length, own.embed_prompts, own.prompt_end)

    def drop_image_decoder(self) -> None:
        """The image tokenizer; see `Policy.drop_image_decoder`."""
        del self.model.vq
        self.codec.vqmodel = None

    def enable_gradient_checkpointing(self) -> None:
        """transformers' own, layer by layer; see `Policy.enable_gradient_checkpointing`."""
        self.backbone.checkpoint_layers()
