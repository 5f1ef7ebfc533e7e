"""The few test statistics and quadratures that the exact tests need (SciPy is no dependency)."""

import math

import numpy as np
import torch
from torch import Tensor


def ks_statistic(sample: Tensor) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance to the uniform law; 1.95 is the 0.1 % point."""
    ordered = sample.sort().values
    n = len(ordered)
    grid = torch.arange(n, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(ordered - grid, grid + 1.0 / n - ordered).max())


def chi_square_p(observed: Tensor, expected: Tensor) -> float:
    """p-value of Pearson's statistic; the expected counts add up to the observed ones."""
    assert abs(float(observed.sum() - expected.sum())) < 1e-6 * float(expected.sum())
    statistic = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor((observed.numel() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.double() / 2))


def beta_cdf(x: Tensor, k: int, n: int) -> Tensor:
    """P(Beta(k, n - k + 1) <= x), a binomial tail for whole parameters."""
    return sum(math.comb(n, j) * x**j * (1.0 - x) ** (n - j) for j in range(k, n + 1))


def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((nodes + 1.0) / 2.0), torch.from_numpy(weights / 2.0)
