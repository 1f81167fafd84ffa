"""Student's t distribution, for few examples or few seeds."""

from __future__ import annotations

import math
from statistics import NormalDist

import mpmath


def t_probability(t: float, degrees: float) -> float:
    """Return P(T ≤ t) of Student's t.

    >>> round(t_probability(2.776445, 4), 6)
    0.975
    """
    tail = float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True)) / 2
    return 1 - tail if t > 0 else tail


def t_quantile(probability: float, degrees: float) -> float:
    """Return t with P(T ≤ t) = probability, above one half.

    By Newton's method from the normal quantile, which lies below: the distribution is concave there, so that no step
    goes too far.

    >>> round(t_quantile(0.975, 2), 4), round(t_quantile(0.975, 1e6), 4)
    (4.3027, 1.96)
    """
    t = NormalDist().inv_cdf(probability)
    constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi * degrees) / 2
    while True:
        density = math.exp(constant - (degrees + 1) / 2 * math.log1p(t * t / degrees))
        step = (probability - t_probability(t, degrees)) / density
        t += step
        if step <= 1e-9 * t:
            return t
