"""One-run auditing: many canaries, each in or out by the toss of a coin, guessed after a single training.

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run" (arXiv:2305.08846), theorem 5.2 and its
algorithm for (ε, δ): far cheaper than paired worlds, and a weaker bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy
from scipy.stats import binom
from torch import Tensor

__all__ = ["OneRun", "one_run_bound", "p_value"]

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the canaries that are guessed, the surest first


@dataclass(frozen=True)
class OneRun:
    """``lower``: with probability ``confidence`` at least, ε is above it; ``correct`` of ``guesses`` were right."""

    lower: float
    confidence: float
    canaries: int
    guesses: int
    correct: int


def one_run_bound(
    scores: Tensor, included: Tensor, *, delta: float, confidence: float = 0.95, shares: Sequence[float] = SHARES
) -> OneRun:
    """Return a lower bound on ε from one run.

    ``scores`` [m] say how much each canary seems to have been in the run; ``included`` [m], boolean, whether it was, by
    an independent fair coin. The highest scores are guessed in and the lowest out, as many of each, for each share of
    all canaries in ``shares``; the best of these bounds counts, each held at (1 − confidence) / len(shares).
    """
    if scores.shape != included.shape or scores.ndim != 1 or len(scores) < 2:
        raise ValueError(f"expected a score and a coin a canary, two or more, got {scores.shape} and {included.shape}")
    if not scores.isfinite().all():
        raise ValueError("expected finite scores, got nan or inf; the run that they were read from did not train")
    if not all(0 < share <= 1 for share in shares) or not 0 <= delta < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"expected shares above 0 and of at most 1 (no canary is guessed twice), δ from 0 to below 1 and a "
            f"confidence between 0 and 1, got {tuple(shares)}, {delta} and {confidence}"
        )
    m, order = len(scores), scores.argsort(descending=True)
    best = OneRun(0.0, confidence, m, 0, 0)
    for share in shares:
        each = max(1, int(share * m / 2))
        right = int(included[order[:each]].sum()) + int((~included[order[-each:]].bool()).sum())
        lower = _largest_refuted(m, 2 * each, right, delta, (1 - confidence) / len(shares))
        best = max(best, OneRun(lower, confidence, m, 2 * each, right), key=_better)
    return best


def p_value(m: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the greatest probability with which an (ε, δ)-DP run lets ``correct`` or more guesses of m canaries hit.

    P[Binomial(r, q) ≥ v] + 2·m·δ·max_i P[v > Binomial(r, q) ≥ v − i] / i, with q = e^ε / (1 + e^ε).
    """
    hit = 1 / (1 + exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, hit))
    steps = numpy.arange(1, correct + 1)
    alpha = (numpy.cumsum(binom.pmf(correct - steps, guesses, hit)) / steps).max(initial=0.0)
    return min(1.0, tail + 2 * m * delta * float(alpha))


def _better(one: OneRun) -> tuple[float, int]:
    """Order by the bound; of those that show nothing the one with the most guesses is told."""
    return one.lower, one.guesses


def _largest_refuted(m: int, guesses: int, correct: int, delta: float, level: float) -> float:
    """Return the greatest ε that this outcome refutes at ``level``; 0 where it refutes none."""
    if p_value(m, guesses, correct, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(m, guesses, correct, high, delta) < level and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(m, guesses, correct, middle, delta) < level else (low, middle)
    return low
