"""Intervals over files."""

import math

import numpy as np
import pytest

from bgpt.intervals import bootstrap_interval, wilson_interval


def test_wilson_intervals_are_the_known_ones():
    assert wilson_interval(3, 4) == pytest.approx((0.75, 0.3006, 0.9544), abs=1e-4)
    assert wilson_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=5e-5)  # by the formula of Wilson (1927)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)


def test_few_files_have_no_interval():
    assert bootstrap_interval([3], [2]) == bootstrap_interval([3, 0], [2, 0]) == (1.5, None, None)
    assert bootstrap_interval([3], [0]) == (None, None, None)


@pytest.mark.parametrize("count", [200, 5000])  # the latter in groups
def test_the_bootstrap_of_a_mean_is_as_wide_as_the_normal_interval(count):
    values = np.random.default_rng(0).normal(3, 1, count)
    mean, low, high = bootstrap_interval(values, np.ones(count))
    margin = 1.96 * values.std(ddof=1) / math.sqrt(count)
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx((mean - margin, mean + margin), abs=0.1 * margin)
    assert bootstrap_interval(values, np.ones(count)) == (mean, low, high)
    # longer files that are wholly right or wrong give no more information
    assert bootstrap_interval(values * 500, np.full(count, 500)) == pytest.approx((mean, low, high))


def test_an_interval_holds_the_true_ratio_as_often_as_it_says():
    random, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        sizes = random.integers(10, 200, 40)
        _, low, high = bootstrap_interval(sizes * random.normal(2, 0.5, 40), sizes)
        hits += low <= 2 <= high
    assert 0.92 <= hits / 1000 <= 0.97
