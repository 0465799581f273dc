"""Fréchet distance of two sets of feature vectors, each taken for a Gaussian (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

import numpy as np


def frechet_distance(
    own: np.ndarray, theirs: np.ndarray, own_weights: np.ndarray | None = None, weights: np.ndarray | None = None
) -> float:
    """``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` of vectors [N, D] and [M, D], with unbiased covariances.

    Weights, float [N] and [M], say how often a vector counts; all once by default. 0 where the two are alike. The more
    vectors there are of each, the smaller it is: only sets of one size can be compared.

    Example:
        >>> round(frechet_distance(np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])), 6)  # 2^2 + (sqrt 2 - sqrt 8)^2
        6.0
    """
    mean, covariance = _moments(own, own_weights)
    other_mean, other = _moments(theirs, weights)
    # tr (C C')^(1/2) is that of the symmetric C^(1/2) C' C^(1/2), which has the same eigenvalues.
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other @ root), 0)).sum()
    apart = float(np.square(mean - other_mean).sum())
    return apart + float(np.trace(covariance) + np.trace(other) - 2 * shared)


def _moments(vectors: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    counts = np.ones(len(vectors)) if weights is None else weights.astype(np.float64)
    rows, total = vectors.astype(np.float64), counts.sum()
    mean = counts @ rows / total
    centred = rows - mean
    return mean, (centred * counts[:, None]).T @ centred / (total - 1)
