"""Scores and their error bars, held against enumeration, simulation and worked examples."""

import itertools
import math
from statistics import mean

import numpy as np
import pytest

from megatron_ft.evaluation.statistics import (
    bootstrap,
    holm,
    mcnemar_exact,
    mean_pass_at_k,
    paired_bootstrap,
    pass_at_k,
    smallest_detectable_difference,
)


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_fraction_of_all_subsets_with_a_pass(samples):
    for passed in range(samples + 1):
        outcomes = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            expected = mean(any(subset) for subset in itertools.combinations(outcomes, k))
            assert pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@10 of 1 passed among 5 samples"):
        pass_at_k(5, 1, 10)
    assert pass_at_k(1000, 1, 1) == pytest.approx(0.001)


def test_mean_is_over_problems_not_over_samples():
    assert mean_pass_at_k([(10, 10), (2, 0)], 1) == 0.5


def test_published_scores_are_multiples_of_one_sample():
    """0.31432926829268293 is 1,031 of 164 x 20 samples."""
    counts = [(20, 20)] * 51 + [(20, 11)] + [(20, 0)] * 112
    assert mean_pass_at_k(counts, 1) == pytest.approx(1031 / 3280, abs=1e-15)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_claims():
    generator = np.random.default_rng(1)
    rates = generator.choice([0.0, 1.0, 0.5], size=20_000, p=[0.6, 0.25, 0.15])
    truth = rates.mean()
    covered = 0
    for trial in range(300):
        sample = generator.choice(rates, size=164)
        interval = bootstrap(generator.binomial(20, sample) / 20, seed=trial, resamples=400)
        covered += interval.low <= truth <= interval.high
    assert 0.91 <= covered / 300 <= 0.985  # 95% less and more three standard errors


def test_bootstrap_is_reproducible_and_as_wide_as_the_normal_interval():
    values = [1.0] * 52 + [0.0] * 112
    interval = bootstrap(values, seed=3)
    assert interval == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3, resamples=50) != bootstrap(values, seed=4, resamples=50)
    error = 1.96 * math.sqrt(52 * 112) / 164 / math.sqrt(164)
    assert interval.low == pytest.approx(interval.estimate - error, abs=0.007)
    assert interval.high == pytest.approx(interval.estimate + error, abs=0.007)


def test_paired_bootstrap_sees_what_unpaired_intervals_cannot():
    a = [1.0] * 50 + [0.0] * 114
    b = [1.0] * 60 + [0.0] * 104
    found = paired_bootstrap(a, b, seed=1)
    assert found.difference.estimate == pytest.approx(10 / 164)
    assert found.difference.low > 0 and found.p_value < 0.01
    assert bootstrap(a).high > bootstrap(b).low


def test_paired_p_values_of_equal_models_are_uniform():
    generator = np.random.default_rng(5)
    p_values = []
    for trial in range(300):
        rates = generator.choice([0.0, 1.0, 0.5], size=100, p=[0.5, 0.2, 0.3])
        a, b = (generator.binomial(10, rates) / 10 for _ in range(2))
        p_values.append(paired_bootstrap(a, b, seed=trial, resamples=500).p_value)
    below = [np.mean(np.array(p_values) <= level) for level in (0.05, 0.25, 0.5)]
    assert below == pytest.approx([0.05, 0.25, 0.5], abs=0.09)
    assert below[0] <= 0.1


def test_paired_bootstrap_of_the_same_values_finds_nothing():
    found = paired_bootstrap([0.0, 1.0, 0.5], [0.0, 1.0, 0.5])
    assert (found.difference.estimate, found.p_value) == (0.0, 1.0)
    with pytest.raises(ValueError, match="2 and 3 problems"):
        paired_bootstrap([0.0, 1.0], [0.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [
        (10, 2, 158 / 4096),  # 2 (1 + 12 + 66) / 2^12
        (2, 10, 158 / 4096),
        (5, 5, 1.0),
        (0, 0, 1.0),
        (0, 6, 2 / 64),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b, expected):
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected)


def test_holm_follows_the_worked_example():
    """0.01 x 4; max(0.04, 0.02 x 3); max(0.06, 0.03 x 2); max(0.06, 0.04)."""
    assert holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_smallest_detectable_difference_is_found_with_its_power():
    generator = np.random.default_rng(2)
    spread, n = 0.3, 164
    smallest = smallest_detectable_difference(generator.normal(0, spread, n))
    assert smallest == pytest.approx(2.8 * spread / math.sqrt(n), rel=0.15)
    found = 0
    for trial in range(200):
        differences = generator.normal(2.8016 * spread / math.sqrt(n), spread, n)
        found += paired_bootstrap([0.0] * n, differences, seed=trial, resamples=500).p_value <= 0.05
    assert 0.71 <= found / 200 <= 0.89  # 80% less and more three standard errors
