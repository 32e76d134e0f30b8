"""The Gaussian mechanism exactly: ε, δ and noise in closed form (Balle & Wang 2018, arXiv:1805.06530, theorem 8).

``mu`` is sensitivity over standard deviation. k releases of noise multiplier m are one of mu = √k / m.
"""

from math import exp, inf

from scipy.optimize import brentq
from scipy.special import log_ndtr

__all__ = ["delta_of", "epsilon_of", "mu_of"]


def delta_of(epsilon: float, mu: float) -> float:
    """Return the least δ for which the mechanism is (ε, δ)-DP: Φ(μ/2 − ε/μ) − e^ε · Φ(−μ/2 − ε/μ)."""
    if mu == 0 or epsilon == inf:
        return 0.0
    above = exp(log_ndtr(mu / 2 - epsilon / mu))
    below = exp(min(0.0, epsilon + log_ndtr(-mu / 2 - epsilon / mu)))
    return max(0.0, above - below)


def epsilon_of(delta: float, mu: float) -> float:
    """Return the least ε ≥ 0 for which the mechanism is (ε, δ)-DP; infinite for δ = 0 or mu = ∞."""
    if mu == inf or (delta <= 0 < mu):
        return inf
    if delta_of(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while delta_of(high, mu) > delta:
        high *= 2
    return float(brentq(lambda epsilon: delta_of(epsilon, mu) - delta, 0.0, high, xtol=1e-12, rtol=1e-14))


def mu_of(epsilon: float, delta: float) -> float:
    """Return the greatest mu that is (ε, δ)-DP, for ε ≥ 0 and 0 < δ < 1; noise multiplier √k / mu meets it k times."""
    high = 1.0
    while delta_of(epsilon, high) < delta:
        high *= 2
    mu = float(brentq(lambda mu: delta_of(epsilon, mu) - delta, 0.0, high, xtol=1e-14, rtol=1e-14))
    return mu * (1 - 1e-12)  # on the safe side of the root
