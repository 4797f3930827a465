"""The figures by which the generated data sets are compared with the published ones."""

from __future__ import annotations

import numpy as np
from scipy import linalg


def total_variance(rows: np.ndarray) -> float:
    """The sum over pixels of the variance of `rows` [n, D]."""
    return float(rows.var(axis=0, dtype=np.float64).sum())


def pca_test_error(train: np.ndarray, test: np.ndarray, components: int) -> float:
    """Mean squared error per row of `test` [m, D] under a PCA of `train` [n, D]."""
    mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
    centered = train - mean
    covariance = (centered.T @ centered).astype(np.float64)
    size = len(covariance)
    _, basis = linalg.eigh(covariance, subset_by_index=[size - components, size - 1])
    residual = (test - mean).astype(np.float64)
    residual -= (residual @ basis) @ basis.T
    return float(np.square(residual).sum(axis=1).mean())
