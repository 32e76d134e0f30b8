"""Rules that take every coordinate for itself: mean, median, trimmed mean.

Median and trimmed mean: Yin, Chen, Ramchandran & Bartlett 2018, "Byzantine-robust distributed learning: towards optimal
statistical rates" (arXiv:1803.01498).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from defenses.aggregation.points import ByDistance, Points, Rule, Verdict, checked_norms, enough, least_rows

__all__ = ["Mean", "Median", "TrimmedMean", "by_coordinate"]

LARGEST_ENTRY = 1e150  # as ``Points`` has it
BLOCK = 512  # coordinates at a time: sorted while they are in the cache


def by_coordinate(rows: Tensor, reduce: Callable[[NDArray[np.floating]], NDArray[np.floating]]) -> Tensor:
    """Return [d] of rows [n, d], where ``reduce`` makes [block] of sorted coordinates [block, n]; it may write in them.

    numpy sorts contiguous numbers several at a time, which torch does not on a CPU. ``ValueError`` where a number is
    not finite: the ends of what is sorted say so, without another look at all of them.
    """
    array = rows.numpy()
    result = np.empty(array.shape[1], array.dtype)
    for start in range(0, array.shape[1], BLOCK):
        block = np.array(array[:, start : start + BLOCK].T, order="C")
        block.sort(axis=1)  # nan last
        if not (float(block[:, 0].min()) >= -LARGEST_ENTRY and float(block[:, -1].max()) <= LARGEST_ENTRY):
            checked_norms(rows)  # which says who it is
        result[start : start + BLOCK] = reduce(block)
    return torch.from_numpy(result)


def middle(block: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the median of each sorted row, [block]: of an even number, the mean of the two in the middle."""
    n = block.shape[1]
    low, high = block[:, (n - 1) // 2], block[:, n // 2]
    return low + (high - low) / 2


@dataclass(frozen=True)
class Mean(ByDistance):
    """The mean: withstands no bad row at all. It is what the others are compared with."""

    def shares(self, points: Points) -> Tensor:
        """Return 1/n for each row."""
        return torch.full((len(points),), 1 / len(points), dtype=torch.float64)


@dataclass(frozen=True)
class Median(Rule):
    """The median of each coordinate; of an even number, the mean of the two in the middle.

    Withstands fewer than n/2 bad rows: each coordinate stays between honest ones. The row as a whole may be one that no
    honest member would send, and what few members have learnt is lost. O(n·log n·d).
    """

    def verdict(self, points: Points) -> Verdict:
        """Return the median; a coordinate at a time, no row has a share."""
        return Verdict(by_coordinate(points.unchecked, middle))


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """The mean of each coordinate without its ``f`` smallest and ``f`` largest numbers; n ≥ 2f + 1.

    Withstands ``f`` bad rows: each coordinate stays between honest ones. Mean and median are its ends. O(n·log n·d).
    """

    f: int

    def __post_init__(self) -> None:
        least_rows(self.f, per=2, more=1, rule="TrimmedMean")

    @property
    def least(self) -> int:
        """2f + 1."""
        return least_rows(self.f, per=2, more=1, rule="TrimmedMean")

    def verdict(self, points: Points) -> Verdict:
        """Return the trimmed mean; a coordinate at a time, no row has a share."""
        n, f = len(points), self.f
        enough(self, n, f, "n ≥ 2f + 1")
        weights = np.full(n - 2 * f, 1 / (n - 2 * f), points.unchecked.numpy().dtype)
        return Verdict(by_coordinate(points.unchecked, lambda block: block[:, f : n - f] @ weights))
