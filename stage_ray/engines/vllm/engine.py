"""The vLLM engine, in this process: one wave is one batch of paired requests that starts and ends together."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines.batching import BatchEngine, ImageSequence, Rollouts
from stage_ray.engines.sampling import SamplingParams
from stage_ray.engines.vllm.environment import require_fitting_build, set_environment
from stage_ray.engines.vllm.plugin import register
from stage_ray.engines.vllm.ranks import TensorRanks
from stage_ray.errors import ConfigError
from stage_ray.policies.base import PromptIds, compute_dtype, device_for
from stage_ray.policies.checkpoint_files import read_tensors, tensor_shapes
from stage_ray.policies.janus import files as janus_parts
from stage_ray.policies.janus.files import JanusFiles, JanusPrompts
from stage_ray.policies.janus.vllm_export import export_for_vllm

LONGEST_PROMPT = 256  # tokens; the memory of a wave is reserved for prompts of this length
TRAINED, FROZEN = "model.language_model.", "model.generation_"


class VllmEngine(BatchEngine):
    """Guided sampling with vLLM's paged attention.

    At start it is made sure that a whole wave fits vLLM's batch and key-value cache, so that the two requests of an
    image are always in the same step.

    With tensor parallelism every rank is such an engine (`TensorRanks`); only rank 0 decodes pictures.
    """

    def __init__(
        self, policy: PolicyConfig, rollout: RolloutConfig, *, worker: str, rank: int = 0, address: str = ""
    ) -> None:
        require_fitting_build(rollout)
        super().__init__(worker, rollout.images_per_batch, SamplingParams.of(rollout))
        self._ranks = TensorRanks(rank, rollout.tensor_parallel, address)
        self._files = JanusFiles.load(policy)
        self._prompts = JanusPrompts(self._files, policy.template)
        self._device = device_for(rollout.gpus, "rollout.gpus")
        text = self._files.config.text_config
        self._ranks.check_heads(text.num_attention_heads, text.num_key_value_heads)
        self._vqmodel = janus_parts.load_vqmodel(self._files, self._device) if rank == 0 else None
        location = self._files.location
        self._shapes = {TRAINED + name: shape for name, shape in tensor_shapes(location, TRAINED).items()}
        self._frozen = {FROZEN + name: tensor for name, tensor in read_tensors(location, FROZEN).items()}
        limit = self._files.config.text_config.max_position_embeddings
        self._longest_prompt = min(LONGEST_PROMPT, limit - self._files.image_tokens)
        self._directory = tempfile.TemporaryDirectory(prefix="stage-ray-vllm-")
        export_for_vllm(location, self._files.config, Path(self._directory.name))
        set_environment(rollout)
        self._ranks.init_process_group(self._device, rollout.timeout_s, self._directory.name)
        self._start(rollout)
        self._ranks.unlink_shared_memory()
        self._check_cache(rollout)

    def _start(self, rollout: RolloutConfig) -> None:
        from vllm import LLM  # late: it takes seconds, and its environment is set only now

        from stage_ray.engines.vllm.guidance import PairedGuidance, RecordsExtension

        register()
        on_cpu = self._device.type == "cpu"
        rows = 2 * rollout.images_per_batch
        try:
            self._llm = LLM(
                self._directory.name,
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=str(compute_dtype(rollout.dtype, self._device)).removeprefix("torch."),
                max_model_len=self._longest_prompt + self._files.image_tokens,
                max_num_seqs=rows,
                max_num_batched_tokens=rows * self._longest_prompt,
                enable_prefix_caching=False,
                async_scheduling=False,
                enforce_eager=on_cpu,
                enable_sleep_mode=rollout.colocated and not on_cpu,
                **self._ranks.llm_arguments(),
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                kv_cache_memory_bytes=int(rollout.kv_cache_gib * 2**30) if on_cpu else None,
                logits_processors=[PairedGuidance],
                worker_extension_cls=f"{RecordsExtension.__module__}.{RecordsExtension.__qualname__}",
            )
        except ValueError as error:  # too little memory, for the most part
            self._directory.cleanup()
            memory = {key: getattr(rollout, key) for key in ("kv_cache_gib", "gpu_memory_utilization")}
            raise ConfigError(f"vLLM does not start with rollout memory {memory}: {error}") from error

    def _check_cache(self, rollout: RolloutConfig) -> None:
        """Raise a `ConfigError` unless the key-value cache holds a whole wave."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        longest = self._longest_prompt + self._files.image_tokens
        needed = 2 * rollout.images_per_batch * -(-longest // cache.block_size)
        if cache.num_gpu_blocks <= needed:  # vLLM keeps one block for itself
            self.close()
            key = "kv_cache_gib" if self._device.type == "cpu" else "gpu_memory_utilization"
            raise ConfigError(
                f"rollout.images_per_batch = {rollout.images_per_batch} needs {needed + 1} blocks of key-value cache; "
                f"rollout.{key} = {getattr(rollout, key)} gives {cache.num_gpu_blocks}; raise it or make waves smaller"
            )

    @property
    def codebook_size(self) -> int:
        """V: every token it draws is one of 0..V-1."""
        return self._files.codebook_size

    def encode_prompt(self, text: str) -> PromptIds:
        """Prompt to token ids of both branches.

        Raises:
            ValueError: the prompt is longer than memory was reserved for.
        """
        ids = self._prompts.encode(text)
        if len(ids.conditional) > self._longest_prompt:
            raise ValueError(
                f"prompt of {len(ids.conditional)} tokens, at most {self._longest_prompt} fit: {text[:80]!r}"
            )
        return ids

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3], on rank 0; [B, 0, 0, 3] on others."""
        if self._vqmodel is None:
            return torch.zeros((len(tokens), 0, 0, 3), dtype=torch.uint8)
        return janus_parts.decode(self._vqmodel, tokens)

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the language model's tensors in the checkpoint."""
        return self._shapes

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Hand vLLM a whole model, the frozen image modules included: it re-runs its own processing of weights."""
        whole = {**tensors, **self._frozen}
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(whole.items())})

    def offload(self) -> None:
        """Offload the weights and forget the key-value cache, on a GPU; vLLM cannot on a CPU."""
        if self._device.type == "cuda":
            self._llm.sleep(level=1)

    def onload(self) -> None:
        """Undo `offload`."""
        if self._device.type == "cuda":
            self._llm.wake_up()

    def sample(self, rows: Sequence[ImageSequence], rule: SamplingParams) -> Rollouts:
        """Sample one wave.

        Raises:
            RuntimeError: vLLM returned other tokens than were drawn, split a pair, or still holds a wave that failed;
                or another rank drew other tokens.
        """
        if self._llm.llm_engine.has_unfinished_requests():
            raise RuntimeError("vLLM still holds requests of a wave that failed; start this worker again")
        from stage_ray.engines.vllm.guidance import CONDITIONAL, UNCONDITIONAL, image_params

        shift, length = self._files.codebook_size, self._files.image_tokens
        prompts, params = [], []
        for image, row in enumerate(rows):
            branches = [(CONDITIONAL, row.prompt.conditional)]
            if rule.guided:
                branches.append((UNCONDITIONAL, row.prompt.unconditional))
            for branch, ids in branches:
                prompts.append({"prompt_token_ids": [token + shift for token in ids]})
                params.append(image_params(length, image, branch, row.seed, rule))
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        wave: Rollouts = self._llm.collective_rpc("recorded_batch", args=(len(rows),))[0]
        served = torch.tensor([output.outputs[0].token_ids for output in outputs])
        if not torch.equal(served, wave.tokens.repeat_interleave(len(prompts) // len(rows), dim=0)):
            raise RuntimeError("vLLM served tokens that were not drawn; do not trust this wave")
        self._ranks.check_agreement(wave.tokens)
        return wave

    def close(self) -> None:
        """Stop vLLM and remove the exported config."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()
        self._directory.cleanup()
