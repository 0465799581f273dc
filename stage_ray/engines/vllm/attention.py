"""vLLM's attention for CPUs, registered as vLLM lets a backend be replaced: with blocks of 16 tokens.

Its kernels for such blocks are the faster ones where every row has one query, but its own backend refuses the size.
"""

from __future__ import annotations

from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


@register_backend(AttentionBackendEnum.CPU_ATTN)
class SmallBlockAttention(CPUAttentionBackend):
    """`CPUAttentionBackend` with its kernels for blocks that are no multiple of 32."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        """Sizes of a block in tokens."""
        return [MultipleOf(16)]
