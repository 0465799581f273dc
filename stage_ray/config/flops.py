"""Floating-point operations of a model's work, and of a device's second: model FLOPs utilisation (MFU).

After PaLM (arXiv 2204.02311, appendix B): a forward pass costs two operations a parameter and token, and 4 a pair of
positions, layer and unit of width (scores and values); a backward pass twice that, but for a frozen image head, and
frozen matrices of layers beside adapters, where it makes the gradient of the input alone. The adapters' own operations
do not count, nor does what is recomputed to save memory.
"""

from __future__ import annotations

from stage_ray.config.model_sizes import ModelSizes

BFLOAT16_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}
"""GPU, as torch names it -> dense bfloat16 operations a second by NVIDIA's data sheets (no sparsity)."""


def forward_flops(model: ModelSizes, prompt: int) -> int:
    """One image read at once, after a prompt of so many tokens."""
    positions = _positions(model, prompt)
    return _layers(model, positions, positions**2) + _head(model)


def training_flops(model: ModelSizes, prompt: int, *, adapters: bool = False) -> int:
    """The forward and backward pass of one image, which trains all weights or adapters alone."""
    positions = _positions(model, prompt)
    unmade = _layers(model, positions, 0) if adapters else 0  # gradients of matrices
    return 3 * _layers(model, positions, positions**2) - unmade + 2 * _head(model)


def sampling_flops(model: ModelSizes, prompt: int) -> int:
    """One sequence drawn token after token, with a cache: the prompt at once, each token with all before it."""
    positions = _positions(model, prompt)
    return _layers(model, positions, prompt**2 + sum(range(prompt + 1, positions + 1))) + _head(model)


def _positions(model: ModelSizes, prompt: int) -> int:
    return prompt + model.image_positions - 1  # nothing reads the last token


def _layers(model: ModelSizes, positions: int, pairs: int) -> int:
    return model.layers * (2 * model.matrices * positions + 4 * model.heads * model.head_dim * pairs)


def _head(model: ModelSizes) -> int:
    return 2 * model.head * model.image_tokens
