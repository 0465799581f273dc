"""The vLLM engine, in this process: a generation batch is one batch of paired requests that start and end together."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stage_ray.config import PolicyConfig, RolloutConfig
from stage_ray.engines.base import ImageEngine, ImageSequence
from stage_ray.engines.memory import CPU_CACHE_BLOCK
from stage_ray.engines.sampling import Sample
from stage_ray.engines.vllm.environment import require_fitting_build, vllm_environment
from stage_ray.engines.vllm.plugin import architecture, register_family
from stage_ray.engines.vllm.ranks import TensorRanks
from stage_ray.errors import ConfigError
from stage_ray.policies import policy_class
from stage_ray.policies.adapter_files import read_adapter
from stage_ray.policies.codec import Branch, PromptIds
from stage_ray.policies.devices import compute_dtype, device_for
from stage_ray.pretrained import link_weights, read_tensors, tensor_shapes
from stage_ray.samplers import SamplingParams


class VllmEngine(ImageEngine):
    """Guided sampling with vLLM's paged attention; under tensor parallelism every rank is one (`TensorRanks`).

    At start it is made sure that a whole generation batch fits vLLM's batch and key-value cache, so that the two
    requests of an image are always in the same step.
    """

    def __init__(
        self, policy: PolicyConfig, rollout: RolloutConfig, *, worker: str, rank: int = 0, address: str = ""
    ) -> None:
        require_fitting_build(rollout)
        for name, value in vllm_environment(rollout).items():  # an actor has them already
            os.environ.setdefault(name, value)
        super().__init__(worker, rollout)
        family = policy_class(policy)
        if not family.vllm_model:
            raise ConfigError(f"policy.family = {policy.family!r} has no model for vLLM; set rollout.engine=torch")
        self._ranks = TensorRanks(rank, rollout.tensor_parallel, address)
        self._device = device_for(rollout.gpus, "rollout.gpus")
        self.codec = family.load_codec(policy, device=self._device if rank == 0 else None)
        spec = self.codec.vllm_spec()
        self._ranks.check_heads(spec.config["num_attention_heads"], spec.config["num_key_value_heads"])
        self._prompt_shift = spec.prompt_shift
        self._shapes = tensor_shapes(self.codec.location, (family.trained_prefix,))
        self._frozen = read_tensors(self.codec.location, spec.frozen)
        if (adapter := read_adapter(policy.path)) is not None:
            adapter.check_fits(self._shapes)
        room = spec.config["max_position_embeddings"] - self.codec.image_positions
        self._longest_prompt = min(rollout.max_prompt_tokens, room)
        self._directory = tempfile.TemporaryDirectory(prefix="stage-ray-vllm-")
        directory = Path(self._directory.name)
        config = spec.config | {
            "architectures": [architecture(family)],
            "image_tokens": self.codec.image_tokens,
            "row_end": None if spec.row_end is None else [self.codec.grid[1], spec.row_end],  # see `RowEnds`
        }
        self._features = spec.prompt_features
        if self._features:  # a row for each token of a batch's prompts
            config["vocab_size"] += 2 * rollout.images_per_batch * self._longest_prompt
        (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        link_weights(self.codec.location, directory)
        register_family(family)
        self._ranks.init_process_group(self._device, rollout.timeout_s, self._directory.name)
        self._start(rollout)
        self._ranks.unlink_shared_memory()
        self._check_cache(rollout)
        if adapter is not None:  # vLLM has read the base
            self.install(adapter.merged(read_tensors(self.codec.location, (family.trained_prefix,))))
        self._unfinished = False  # True while a batch is sampled, and after one that failed

    def _start(self, rollout: RolloutConfig) -> None:
        from vllm import LLM  # late: it takes seconds, and its environment is set only now

        import stage_ray.engines.vllm.attention  # noqa: F401  registers itself
        from stage_ray.engines.vllm.batch import BatchExtension
        from stage_ray.engines.vllm.guidance import PairedGuidance

        on_cpu = self._device.type == "cpu"
        requests = 2 * rollout.images_per_batch  # conditional and unconditional
        self.dtype = compute_dtype(rollout.dtype, self._device)
        try:
            self._llm = LLM(
                self._directory.name,
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=str(self.dtype).removeprefix("torch."),
                max_model_len=self._longest_prompt + self.codec.image_positions,
                max_num_seqs=requests,
                max_num_batched_tokens=requests * self._longest_prompt,
                block_size=self._cpu_block() if on_cpu else None,
                enable_prefix_caching=False,
                async_scheduling=False,
                enforce_eager=on_cpu,
                enable_sleep_mode=rollout.colocated and not on_cpu,
                **self._ranks.llm_arguments(),
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                kv_cache_memory_bytes=self._cache_bytes(rollout) if on_cpu else None,
                logits_processors=[PairedGuidance],
                worker_extension_cls=f"{BatchExtension.__module__}.{BatchExtension.__qualname__}",
            )
        except ValueError as error:  # too little memory, for the most part
            self._directory.cleanup()
            if isinstance(error, ConfigError):  # of a model that found its weights wanting
                raise
            memory = {key: getattr(rollout, key) for key in ("kv_cache_gib", "gpu_memory_utilization")}
            raise ConfigError(f"vLLM does not start with rollout memory {memory}: {error}") from error

    def _cache_bytes(self, rollout: RolloutConfig) -> int:
        """Bytes of a CPU's key-value cache: what the config says, or what a whole generation batch needs."""
        if rollout.kv_cache_gib is not None:
            return int(rollout.kv_cache_gib * 2**30)
        config = self.codec.vllm_spec().config
        heads = config["num_key_value_heads"] // self._ranks.count or 1
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        token = 2 * config["num_hidden_layers"] * heads * width * self.dtype.itemsize  # keys and values
        block = self._cpu_block()
        return (self._blocks(rollout, block) + 2) * block * token  # vLLM keeps one for itself

    def _cpu_block(self) -> int:
        """Tokens of a block on a CPU: 32 for vLLM's kernel that takes bfloat16 to AMX's tiles."""
        tiles = self.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        return 2 * CPU_CACHE_BLOCK if tiles else CPU_CACHE_BLOCK

    def _blocks(self, rollout: RolloutConfig, tokens: int) -> int:
        """Blocks of so many tokens that the sequences of a whole generation batch fill, each rounded up."""
        return 2 * rollout.images_per_batch * -(-(self._longest_prompt + self.codec.image_positions) // tokens)

    def _check_cache(self, rollout: RolloutConfig) -> None:
        """Raise a `ConfigError` unless the key-value cache holds a whole generation batch."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        needed = self._blocks(rollout, cache.block_size)
        if cache.num_gpu_blocks <= needed:  # vLLM keeps one block for itself
            self.close()
            key = "kv_cache_gib" if self._device.type == "cpu" else "gpu_memory_utilization"
            raise ConfigError(
                f"rollout.images_per_batch = {rollout.images_per_batch} needs {needed + 1} blocks of key-value cache; "
                f"rollout.{key} = {getattr(rollout, key)} gives {cache.num_gpu_blocks}; raise it or lower the batch"
            )

    def encode_prompt(self, text: str) -> PromptIds:
        """Both branches of a prompt; a ValueError where it is longer than memory was reserved for."""
        return self.codec.check_prompt(text, self._longest_prompt)

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the trained tensors in the checkpoint."""
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

    def sample(self, sequences: Sequence[ImageSequence], params: SamplingParams) -> Sample:
        """Sample one generation batch; a RuntimeError where vLLM or another rank has other tokens than were drawn."""
        if self._unfinished:
            raise RuntimeError("vLLM still holds requests of a batch that failed; start this worker again")
        from stage_ray.engines.vllm.batch import BranchRequest
        from stage_ray.engines.vllm.guidance import CONDITIONAL, UNCONDITIONAL

        requests, numbers = [], self._numbered(sequences)
        for image, sequence in enumerate(sequences):
            branches = [(CONDITIONAL, sequence.prompt.conditional)]
            if params.guided and sequence.guided:
                branches.append((UNCONDITIONAL, sequence.prompt.unconditional))
            for branch, ids in branches:
                shifted = tuple(token + self._prompt_shift for token in numbers.get(ids, ids))
                requests.append(BranchRequest(image, branch, sequence.seed, shifted, sequence.guided))
        self._unfinished = True
        # One answer for each worker of this process, which has one.
        arguments = (requests, params, len(sequences), self.codec.image_tokens)
        drawn: Sample = self._llm.collective_rpc("sample_batch", args=arguments)[0]
        self._unfinished = False
        self._ranks.check_agreement(drawn.tokens)
        return drawn

    def _numbered(self, sequences: Sequence[ImageSequence]) -> dict[Branch, Sequence[int]]:
        """Where prompts are features: give the model a row for each entry of the batch's prompts, and number them."""
        if not self._features:
            return {}
        branches = dict.fromkeys(one for s in sequences for one in (s.prompt.conditional, s.prompt.unconditional))
        numbers, used = dict[Branch, Sequence[int]](), 0
        for branch in branches:
            numbers[branch], used = range(used, used + len(branch)), used + len(branch)
        rows = torch.zeros(used, self._features)
        if self._ranks.rank == 0:
            torch.cat([self.codec.prompt_features(branch).float().cpu() for branch in branches], out=rows)
        self._llm.collective_rpc("set_prompt_features", args=(self._ranks.from_first(rows),))
        return numbers

    def close(self) -> None:
        """Stop vLLM and remove the exported config."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()
        self._directory.cleanup()
