"""Janus and Janus-Pro (transformers' ``JanusForConditionalGeneration``) as a policy."""

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
from stage_ray.policies.janus.codec import MODEL_TYPE, TRAINED_PREFIX, JanusCodec
from stage_ray.policies.static_decoder import StaticDecoder
from stage_ray.pretrained import check_loaded, check_tensors

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

    from stage_ray.config.model_sizes import ModelSizes
    from stage_ray.policies.llama import LlamaBackbone


class JanusPolicy(Policy):
    """A Janus model: its language model is trained, and nothing else.

    Of the checkpoint's modules only those are kept that make images; `save` writes all of them.
    """

    model_type = MODEL_TYPE
    trained_prefix = TRAINED_PREFIX
    vllm_model = "stage_ray.policies.janus.vllm_model:JanusForImageGeneration"
    model: JanusForConditionalGeneration
    codec: JanusCodec
    backbone: LlamaBackbone

    def __init__(self, model: JanusForConditionalGeneration, codec: JanusCodec, *, trainable: bool = True) -> None:
        from stage_ray.policies.llama import LlamaBackbone  # late: see `stage_ray.policies.janus.codec`

        model.model.generation_head.float()  # see `head`
        if not trainable:
            for_sampling(model.model.vqmodel)
        codec.vqmodel = model.model.vqmodel  # one tokenizer for both
        super().__init__(model, LlamaBackbone(model.model.language_model), codec, trainable=trainable)
        # Text and image understanding never run. Dropped only now: the base class looks for weights that are tied.
        del model.lm_head, model.model.vision_model, model.model.aligner

    @classmethod
    def check(cls, config: PolicyConfig) -> ImageCodec | None:
        """As `Policy.check`, down to the names and shapes of tensors."""
        codec = super().check(config)
        if isinstance(codec, JanusCodec):
            from transformers import JanusForConditionalGeneration

            with torch.device("meta"):  # shapes alone, no memory
                model = JanusForConditionalGeneration(codec.config)
            tied = model.all_tied_weights_keys
            check_tensors(codec.location, {k: v.shape for k, v in model.state_dict().items() if k not in tied})
        return codec

    @classmethod
    def sizes(cls, directory: Path, path: str) -> ModelSizes:
        """See `Policy.sizes`."""
        from stage_ray.policies.janus.builder import checkpoint_sizes

        return checkpoint_sizes(path)

    @classmethod
    def load(
        cls, config: PolicyConfig, *, device: torch.device, dtype: torch.dtype = torch.float32, trainable: bool = True
    ) -> JanusPolicy:
        """Load a checkpoint with plain transformers; see `Policy.load`."""
        from transformers import JanusForConditionalGeneration  # late: see `stage_ray.policies.janus.codec`

        codec = JanusCodec.load(config)
        location = codec.location
        try:
            model, report = JanusForConditionalGeneration.from_pretrained(
                location, dtype=dtype, output_loading_info=True, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"policy.path: {location} does not load as a Janus model: {error}") from error
        check_loaded(model, report["missing_keys"], location)
        return cls(model.to(device).eval(), codec, trainable=trainable)

    @classmethod
    def load_codec(cls, config: PolicyConfig, *, device: torch.device | None) -> JanusCodec:
        """Load prompts and image tokenizer; see `Policy.load_codec`."""
        return JanusCodec.load(config, device)

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """Image tokens int64 [...] -> float [..., hidden], through codebook and generation aligner."""
        return self.model.prepare_embeddings_for_image_generation(tokens)

    def head(self, states: Tensor) -> Tensor:
        """States [..., hidden] -> logits float32 [..., V], in float32 even where the rest runs in bfloat16.

        A logit of 10 in bfloat16 is off by up to 0.03, which is what engine and learner would then differ by.
        """
        with torch.autocast(states.device.type, enabled=False):
            return self.model.model.generation_head(states.float())

    def decoder(self, sequences: int, length: int) -> StaticDecoder:
        """Janus' language model is a plain Llama."""
        return StaticDecoder(self.model.model.language_model, sequences, length)

    def drop_image_decoder(self) -> None:
        """The image tokenizer; see `Policy.drop_image_decoder`."""
        del self.model.model.vqmodel
        self.codec.vqmodel = None

    def enable_gradient_checkpointing(self) -> None:
        """transformers' own, layer by layer; see `Policy.enable_gradient_checkpointing`."""
        self.backbone.checkpoint_layers()
