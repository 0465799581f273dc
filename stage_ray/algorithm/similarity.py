"""How alike the tokens of an image and of its oppositely rewarded peers are, and what weights follow from it.

Two images of one prompt that agree at a place and have opposite advantages carry no evidence about that place, so STAGE
weighs such tokens down (arXiv 2509.25027, similarity-aware advantage and KL reweighting).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def opposite_sign_similarity(tokens: Tensor, codebook: Tensor, advantages: Tensor) -> Tensor:
    """Mean cosine of each token's codebook vector to the same place in the peers with ``A_i * A_j <= 0``.

    ``s_it = sum_j M_ij c_ijt / max(sum_j M_ij, 1)`` with ``M_ij = [A_i A_j <= 0]`` and ``c_iit = 0``. An image with
    advantage 0 is opposite to all images, itself included: its own place counts in the denominator with cosine 0, as in
    the published code. An image without any opposite peer gets 0.

    Args:
        tokens: int64 [N, G, T], ids 0..V-1.
        codebook: float [V, D], the vectors as the image decoder gets them; a zero vector has cosine 0 to all.
        advantages: float [N, G].

    Returns:
        float [N, G, T] in -1..1, without gradient.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> book = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> opposite_sign_similarity(torch.tensor([[[0], [1]]]), book, torch.tensor([[1.0, -1.0]])).squeeze().tolist()
        [0.6000000238418579, 0.6000000238418579]
    """
    if tokens.dim() != 3 or advantages.shape != tokens.shape[:2] or codebook.dim() != 2:
        shapes = [list(t.shape) for t in (tokens, codebook, advantages)]
        raise ValueError(f"tokens, codebook and advantages must be [N, G, T], [V, D] and [N, G], not {shapes}")
    with torch.no_grad():
        vectors = F.normalize(codebook.to(advantages.dtype), dim=-1)[tokens]  # [N, G, T, D]
        signs = advantages.sign()  # the product of two tiny advantages would underflow to 0
        opposite = (signs.unsqueeze(2) * signs.unsqueeze(1) <= 0).to(vectors.dtype)  # [N, G, G]
        peers = opposite - torch.diag_embed(opposite.diagonal(dim1=1, dim2=2))
        # summing the peers' vectors first needs G times less memory than all pairs of cosines
        cosines = (vectors * torch.einsum("ngh,nhtd->ngtd", peers, vectors)).sum(dim=-1)  # [N, G, T], summed over peers
        count = opposite.sum(dim=2).clamp(min=1.0)  # [N, G], itself included where A = 0
        return (cosines / count.unsqueeze(-1)).clamp(-1.0, 1.0)  # rounding may pass 1


def advantage_weight(similarity: Tensor) -> Tensor:
    """Weight of a token in the policy term, ``clip((1 - s) / 2, 0, 1)``: alike and yet opposite counts for nothing.

    Example:
        >>> advantage_weight(torch.tensor([1.0, 0.0, -1.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    return ((1.0 - similarity) / 2.0).clamp(0.0, 1.0)


def kl_weight(similarity: Tensor, *, floor: float = 0.5, slope: float = 0.5) -> Tensor:
    """Weight of a token in the KL, ``floor + slope * clip(1 + s, 0, 1)``: tokens that should move are held less.

    ``floor`` and ``slope`` are the paper's a and b.

    Example:
        >>> kl_weight(torch.tensor([1.0, 0.0, -1.0])).tolist()
        [1.0, 1.0, 0.5]
    """
    return floor + slope * (1.0 + similarity).clamp(0.0, 1.0)
