"""95 % intervals of the figures that the benches report: paired differences by bootstrap, proportions by Wilson."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from personalize.evaluation.report import mean_interval

_Z = 1.959964  # 97.5 % quantile of the normal distribution


def paired_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the paired differences `values` − `others` and its bootstrap interval: (difference, low, high)."""
    differences = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    return float(differences.mean()), *mean_interval(differences.tolist())


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The Wilson score interval (low, high) of a proportion p = `successes` / `n`; (0, 1) for n = 0.

    centre = (p + z²/2n) / (1 + z²/n),   half width = z √(p(1−p)/n + z²/4n²) / (1 + z²/n)
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z**2
    centre, half = p + z2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
