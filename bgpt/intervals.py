"""95 % intervals over files. The random draws are files, not their bytes."""

import functools
import math

import numpy as np

ROUNDS = 1000  # resamples of a bootstrap
GROUPS = 500  # more files are resampled in so many groups of nearly equal size, which costs less and changes little


def wilson_interval(right, count):
    """Returns (share, low, high) of `right` of `count` > 0 draws, by Wilson's score (1927)."""
    z = 1.959964  # 97.5 % quantile of the normal distribution
    share, spread = right / count, z**2 / count
    middle, margin = share + spread / 2, z * math.sqrt(share * (1 - share) / count + spread / count / 4)
    return share, max((middle - margin) / (1 + spread), 0.0), min((middle + margin) / (1 + spread), 1.0)


def bootstrap_interval(numerators, denominators):
    """Returns (ratio of sums, low, high) by a percentile bootstrap with a fixed seed.

    Both are (n,), for example each file's bits and bytes, with denominators of 0 or more. low and high are None for a single
    file. All three are None if the denominators add up to 0.
    """
    sums = np.stack((numerators, denominators)).astype(np.float64)  # (2, n)
    if sums[1].sum() == 0:
        return None, None, None
    ratio = float(sums[0].sum() / sums[1].sum())
    sums = sums[:, sums[1] > 0]
    if sums.shape[1] < 2:
        return ratio, None, None
    if sums.shape[1] > GROUPS:
        order = np.random.default_rng(0).permutation(sums.shape[1])
        sums = np.add.reduceat(sums[:, order], np.linspace(0, len(order), GROUPS, endpoint=False).astype(int), axis=1)
    resampled = _draws(sums.shape[1]) @ sums.T  # (ROUNDS, 2)
    low, high = np.percentile(resampled[:, 0] / resampled[:, 1], [2.5, 97.5])
    return ratio, float(low), float(high)


@functools.lru_cache(maxsize=4)  # the figures of one group of files share their draws
def _draws(count):
    """Returns how often each resample draws each of `count` files, float64 (ROUNDS, count)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=ROUNDS).astype(np.float64)
