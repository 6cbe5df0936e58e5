"""Intervals over files."""

import math

import numpy as np
import pytest

from bgpt import intervals


def test_intervals_are_the_known_ones():
    assert intervals.wilson_interval(3 / 4, 4) == pytest.approx((0.75, 0.3006, 0.9544), abs=1e-4)
    assert intervals.wilson_interval(0.8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=5e-5)  # by the formula of Wilson (1927)
    assert intervals.wilson_interval(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    # with equal denominators the ratio is a mean, and its interval Student's: 2.7764 is the quantile for 5 values
    values = np.array([1.0, 2, 3, 4, 10])
    margin = 2.7764 * values.std(ddof=1) / math.sqrt(5)
    assert intervals.ratio_interval(values, np.ones(5), lowest=-9) == pytest.approx((4, 4 - margin, 4 + margin), abs=0.02)
    assert intervals.ratio_interval([3], [2]) == (1.5, None, None) and intervals.ratio_interval([3], [0])[0] is None


def test_an_interval_holds_the_true_ratio_as_often_as_it_says():
    random, true = np.random.default_rng(0), 0
    for _ in range(1000):
        sizes = random.integers(10, 200, 30)
        bits = sizes * random.normal(2, 0.5, 30)
        _, low, high = intervals.ratio_interval(bits, sizes)
        true += low <= 2 <= high
    assert 920 <= true <= 980


def interval_of(right, total):
    """Returns the ends of the interval of a share of bytes, from each file's right bytes and all of its bytes, float64 (n,)."""
    sums = right.sum(), total.sum(), right @ right, right @ total, total @ total
    return intervals.wilson_interval(sums[0] / sums[1], intervals.independent_draws(*sums, len(right)))[1:]


def test_files_count_as_fewer_draws_the_more_their_bytes_agree():
    def rounded(right, total):
        return tuple(round(end, 4) for end in interval_of(np.array(right, float), np.array(total, float)))

    # files that are right or wrong as a whole say no more the longer they are; the spread of 10 is known but roughly, so that
    # they count as 9 / (1 + 1.21 / 9)² = 6.99 draws
    assert rounded([500] * 8 + [0] * 2, [500] * 10) == rounded([1] * 8 + [0] * 2, [1] * 10) == (0.4328, 0.9545)
    assert rounded([500] * 10, [500] * 10) == rounded([1] * 10, [1] * 10) == (0.7225, 1)
    # one file, or several of one share, show no spread, whatever the rounding
    for right in range(1, 80):
        assert rounded([right], [80])[1] - rounded([right], [80])[0] > 0.7
        assert rounded([right] * 5, [80] * 5)[1] - rounded([right] * 5, [80] * 5)[0] > 0.4
    # single bytes that are wrong here and there are as good as drawn one by one
    rng = np.random.default_rng(0)
    low, high = rounded(rng.binomial(100, 0.9, 400), [100] * 400)
    assert 0.0055 < high - low < 0.0063  # 2 * 1.96 * sqrt(0.9 * 0.1 / 40000) = 0.0059


def test_the_interval_of_draws_that_hang_together_holds_the_truth_19_times_of_20():
    """Files of 1 to 255 steps in which a mistake, once made, is carried along: their shares of right bytes vary widely."""
    rng = np.random.default_rng(1)

    def draw(files):
        steps = rng.integers(1, 256, files)
        return 16 * np.minimum(rng.geometric(0.01, files), steps).astype(float), 16.0 * steps

    right, total = draw(1_000_000)
    truth, held = right.sum() / total.sum(), 0
    for _ in range(500):
        right, total = draw(200)
        low, high = interval_of(right, total)
        held += low < truth < high
    assert 460 <= held <= 490  # of 500; 475 are meant
