"""Precision and recall of generated pictures by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991)."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

NEIGHBOURS = 3  # as published


def inside(vectors: np.ndarray, manifold: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Which vectors [N, D] lie in the manifold that vectors [M, D] span: bool [N].

    It is made of balls around these, each as large as the distance to the k-th nearest of the others. Precision is the
    share of generated pictures in the real ones' manifold, recall that of real ones in the generated ones'.

    Example:
        >>> inside(np.array([[0.5], [4.5]]), np.array([[0.0], [1.0], [2.0]]), neighbours=1).tolist()
        [True, False]
    """
    own = cdist(manifold, manifold)
    radii = np.partition(own, min(neighbours, len(manifold) - 1), axis=1)[:, min(neighbours, len(manifold) - 1)]
    return (cdist(vectors, manifold) <= radii).any(axis=1)
