"""95 % intervals of shares and ratios over files: what is drawn at random are files, not their bytes. No torch here."""

import math

import numpy as np

_Z = 1.959964  # the 97.5 % quantile of the normal distribution
_T = (math.nan, 12.7062, 4.3027, 3.1824)  # that of Student's t, by its degrees of freedom; see `_quantile` for more


def _quantile(freedom):
    """Returns the 97.5 % quantile of Student's t with 1 degree of freedom or more, to within 0.3 %."""
    if freedom < len(_T):
        return _T[freedom]
    z = _Z  # the expansion of Cornish and Fisher
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def ratio_interval(numerators, denominators, lowest=0.0, highest=math.inf):
    """Returns (ratio of the sums, lower end, upper end of its 95 % interval) over files, which are what is drawn at random.

    The files' bytes are not drawn one by one, so a mean over bytes would look far more certain than it is. The variance is
    that of the jackknife (how much the ratio changes as each file in turn is left out), which is large where one file holds
    most of the bytes; the interval is Student's t.

    Args:
        numerators, denominators: (n,), such as each file's bits and bytes.
        lowest, highest: what the ratio can be at all.

    Returns:
        floats; the ends are None where one file has all there is, and all three where the denominators add up to 0.
    """
    numerators, denominators = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    count, total = len(numerators), denominators.sum()
    if total == 0:
        return None, None, None
    ratio = numerators.sum() / total
    rest = total - denominators  # (n,), of the others, as each is left out
    if rest.min() <= 0:
        return float(ratio), None, None
    without = (numerators.sum() - numerators) / rest  # (n,), the ratio then
    error = math.sqrt((count - 1) / count * ((without - ratio) ** 2).sum())
    margin = _quantile(count - 1) * error
    return float(ratio), float(max(ratio - margin, lowest)), float(min(ratio + margin, highest))


def wilson_interval(share, count):
    """Returns (share, lower end, upper end of its 95 % interval) of `count` independent draws, right or wrong (Wilson, 1927).

    Unlike the normal approximation it stays within 0 and 1, and is of use for few draws, and for none or all right.

    Args:
        share: of those that are right.
        count: above 0; no whole number where draws are not independent, see `independent_draws`.
    """
    spread = _Z**2 / count
    middle, margin = share + spread / 2, _Z * math.sqrt(share * (1 - share) / count + spread / count / 4)
    low, high = (middle - margin) / (1 + spread), (middle + margin) / (1 + spread)
    return float(share), float(max(low, 0.0)), float(min(high, 1.0))


def independent_draws(x, n, xx, xn, nn, files):
    """Returns how many independent draws, each right or wrong, tell as much about a share as files do.

    The bytes of a file are right or wrong together; only the files are independent. So the draws are as many as would give the
    share the variance that the files' own shares show (the variance of a ratio, from clusters). Where every byte is right,
    or every one wrong, the variance cannot be estimated, and each file counts as one draw.

    Args:
        x, n: the right bytes, and all bytes, summed over the files.
        xx, xn, nn: sums of their squares and products over the files.
        files: how many there are.
    """
    p = x / n
    squares = xx - 2 * p * xn + p * p * nn  # sum of (x - p·n)²
    if x in (0, n) or files == 1 or squares < 1e-9 * nn:
        return files
    student = 1 + 1.21 / (files - 1)  # about Student's quantile divided by the normal one; 1.21 = (1.96² + 1) / 4
    return min(p * (1 - p) * n**2 / (squares * files / (files - 1) * student**2), n)
