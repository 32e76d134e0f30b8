"""Policies: when a detector's scores so far are enough to tell that the training is hijacked.

Fast, Avg-k and Voting-k of Erdoğan, Küpçü and Çiçek 2022 (arXiv:2108.09052).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median_high, median_low
from typing import Protocol

__all__ = ["Average", "Fast", "Policy", "Voting", "batches_until"]


class Policy(Protocol):
    """What of the scores so far is held against the threshold."""

    def __call__(self, scores: Sequence[float], *, above: bool) -> float | None:
        """Return the number that crosses the threshold once a server is caught, or None while scores are too few.

        ``above`` says that scores above the threshold are the suspicious ones.
        """


@dataclass(frozen=True)
class Fast:
    """The last score alone: the earliest verdict, and the one most easily wrong."""

    def __call__(self, scores: Sequence[float], *, above: bool) -> float | None:
        """Return the last score."""
        return scores[-1] if scores else None


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"expected a policy over at least one score, got {count}; take 1 or more, or Fast()")


@dataclass(frozen=True)
class Average:
    """The mean of the last ``count`` scores (Avg-k)."""

    count: int = 10

    def __post_init__(self) -> None:
        _check_count(self.count)

    def __call__(self, scores: Sequence[float], *, above: bool) -> float | None:
        """Return the mean of the last scores, None while there are fewer than ``count``."""
        return fmean(scores[-self.count :]) if len(scores) >= self.count else None


@dataclass(frozen=True)
class Voting:
    """Groups of ``count`` scores in a row vote with their means; more than half of them decide (Voting-k)."""

    count: int = 5

    def __post_init__(self) -> None:
        _check_count(self.count)

    def __call__(self, scores: Sequence[float], *, above: bool) -> float | None:
        """Return the median of the means of all full groups, of two middle ones that which more than half pass."""
        starts = range(0, len(scores) - self.count + 1, self.count)
        means = [fmean(scores[start : start + self.count]) for start in starts]
        if not means:
            return None
        return median_low(means) if above else median_high(means)


def batches_until(
    scores: Sequence[float], threshold: float, *, policy: Policy | None = None, above: bool = False
) -> int | None:
    """Return how many ``scores`` it takes until the policy (``Fast()``) catches the server; None if it never does.

    A score below ``threshold`` is suspicious, or one ``above`` it.
    """
    policy = policy if policy is not None else Fast()
    for count in range(1, len(scores) + 1):
        if crosses(policy(scores[:count], above=above), threshold, above=above):
            return count
    return None


def crosses(value: float | None, threshold: float, *, above: bool) -> bool:
    """Return whether ``value`` lies on the suspicious side of the threshold; None lies on no side."""
    return value is not None and (value > threshold if above else value < threshold)
