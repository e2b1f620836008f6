"""How sure a score is: pass@k, intervals over problems, and comparisons of two models.

Problems are the unit of chance: samples of one problem are far more alike than problems are, so
intervals resample problems, and two models are compared problem by problem.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 1 << 22  # resampled values in memory at a time

Values = Sequence[float] | np.ndarray  # one per problem


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of `k` samples passes, estimated without bias from `samples` of which
    `passed` passed: 1 - C(samples - passed, k) / C(samples, k).

    Source: Codex (arXiv 2107.03374). Raises ValueError if there are fewer than `k` samples.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {passed} passed among {samples} samples")
    if samples - passed < k:
        return 1.0
    counts = np.arange(samples - passed + 1, samples + 1)
    return float(1.0 - np.prod(1.0 - k / counts))


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Mean of pass@k over problems, each given as (samples, passed)."""
    return float(np.mean([pass_at_k(samples, passed, k) for samples, passed in counts]))


def bootstrap(values: Values, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """The mean of one value per problem, with its percentile bootstrap interval over problems."""
    means = _resampled_means(np.asarray(values, float), seed, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(values)), float(low), float(high))


@dataclass(frozen=True)
class PairedDifference:
    """The mean of b - a over problems, its interval, and the two-sided p-value of no difference."""

    difference: Interval
    p_value: float


def paired_bootstrap(
    a: Values, b: Values, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> PairedDifference:
    """Compare two models by one value per problem each, in the same order.

    The p-value is that of the resampled differences after they are shifted to mean 0 (the null
    hypothesis), counted with the one observed so that it is never 0.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} problems; a paired comparison needs the same ones")
    differences = np.asarray(b, float) - np.asarray(a, float)
    interval = bootstrap(differences, seed, resamples, level)
    shifted = _resampled_means(differences - differences.mean(), seed + 1, resamples)
    as_large = np.count_nonzero(np.abs(shifted) >= abs(interval.estimate) - 1e-12)
    return PairedDifference(interval, float((as_large + 1) / (resamples + 1)))


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """float64 [resamples]: means of `values` drawn with replacement, as many as there are."""
    if not len(values):
        raise ValueError("no problems")
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(values))
    blocks = [
        values[generator.integers(len(values), size=(min(rows, resamples - done), len(values)))].mean(axis=1)
        for done in range(0, resamples, rows)
    ]
    return np.concatenate(blocks)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that two models with one answer per problem are equally good.

    `only_a` problems are solved by the first only, `only_b` by the second only: under the null
    hypothesis a fair coin decides each (McNemar 1947; the exact binomial form).

    >>> mcnemar_exact(1, 6)
    0.125
    """
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, in the same order: each may be compared with the level
    that holds for all of them together. Source: Holm (1979).

    >>> holm([0.25, 0.0625])
    [0.25, 0.125]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = largest
    return adjusted


def smallest_detectable_difference(differences: Values, power: float = 0.8, level: float = LEVEL) -> float:
    """The mean difference that a paired comparison of as many problems with differences as spread
    as these finds with probability `power`: (z_level + z_power) * standard error."""
    if len(differences) < 2:
        raise ValueError("a standard deviation needs two problems or more")
    normal = NormalDist()
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) * error
