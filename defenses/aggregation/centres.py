"""Centres of rows: the geometric median, and centred clipping.

Pillutla, Kakade & Harchaoui 2022, "Robust aggregation for federated learning" (RFA, arXiv:1912.13445); Karimireddy, He
& Jaggi 2021, "Learning from history for Byzantine robust optimization" (arXiv:2012.10333).

Both stay among sums of the rows, so that a step is one of n numbers by the rows' inner products, not of n rows.
"""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from defenses.aggregation.points import ByDistance, Points

__all__ = ["CentredClipping", "GeometricMedian"]


def _to(shares: Tensor, products: Tensor) -> Tensor:
    """Return the distance of each row to the rows' sum by ``shares`` (which sum to 1), [n]."""
    towards = products @ shares
    return (products.diagonal() - 2 * towards + shares @ towards).clamp(min=0).sqrt()


def _typical(points: Points) -> Tensor:
    """Return each row's median distance to all rows, itself among them, [n]: more than half are no farther."""
    return points.squared_distances.sort(dim=1).values[:, len(points) // 2].sqrt()


@dataclass(frozen=True)
class GeometricMedian(ByDistance):
    """The point with the least sum of distances to the rows, by Weiszfeld's steps (RFA).

    Withstands fewer than n/2 bad rows: the result stays within a multiple of the honest rows' spread of them, but every
    bad row pulls, however far. A row nearer than ``smoothing`` counts as that far; it is a share of the rows' least
    median distance, so that the result does not depend on the updates' scale. Ends where the mean unit vector towards
    the rows, 0 at the exact point, is shorter than ``tolerance``, or after ``steps``: each makes the sum of distances
    less, so that one that ends early is less exact and no less robust. O(n²·d), and O(n²) a step.

    Deviations: a smoothing relative to the scale; the start is the rows weighed by their median distance to the others,
    not the mean; members' sample counts do not weigh.
    """

    smoothing: float = 1e-6
    tolerance: float = 1e-6
    steps: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.smoothing < 1 and 0 < self.tolerance < 1 and self.steps > 0):
            raise ValueError(
                f"GeometricMedian: expected smoothing and tolerance between 0 and 1 and at least one step, got "
                f"{self.smoothing}, {self.tolerance} and {self.steps}; leave them out for the defaults"
            )

    def shares(self, points: Points) -> Tensor:
        """Return each row's part in the sum that is the geometric median."""
        typical = _typical(points)
        scale = typical.min()
        if not scale > 0:  # more than half coincide, and so does the median
            return torch.nn.functional.one_hot(typical.argmin(), len(points)).double()
        products = points.products
        shares = (scale / typical) / (scale / typical).sum()
        for _ in range(self.steps):
            pulls = 1 / _to(shares, products).clamp(min=self.smoothing * scale)
            after = pulls / pulls.sum()
            moved = after - shares
            shares = after
            if (moved @ products @ moved).clamp(min=0).sqrt() * pulls.mean() <= self.tolerance:
                break
        return shares


@dataclass(frozen=True)
class CentredClipping(ByDistance):
    """Goes from the most central row v by v += mean of (x − v)·min(1, τ / ‖x − v‖), ``steps`` times.

    τ is ``radius``; where None, the median of the distances ‖x − v‖, anew in each step. Withstands few bad rows: none
    moves a step by more than τ/n, but all pull. Fewer than n/2 bad rows leave the result within ``steps``·τ of an
    honest row's neighbourhood. O(n²·d).

    Deviations: without momentum, the start is not the last round's result but the row with the least sum of squared
    distances to its ⌊n/2⌋ nearest; the median distance for τ.
    """

    radius: float | None = None
    steps: int = 5

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.radius is not None and not (isfinite(self.radius) and self.radius > 0)):
            raise ValueError(
                f"CentredClipping: expected at least one step and a finite radius above 0, or None for the median "
                f"distance, got {self.steps} and {self.radius}"
            )

    def shares(self, points: Points) -> Tensor:
        """Return each row's part in the sum where the steps end."""
        n, products = len(points), points.products
        nearest = points.squared_distances.sort(dim=1).values[:, : n // 2 + 1]  # itself among them
        shares = torch.nn.functional.one_hot(nearest.sum(1).argmin(), n).double()
        for _ in range(self.steps):
            away = _to(shares, products)
            radius = away.median() if self.radius is None else torch.tensor(self.radius, dtype=torch.float64)
            parts = torch.where(away > radius, radius / away.clamp(min=torch.finfo(away.dtype).tiny), 1.0) / n
            shares = shares * (1 - parts.sum()) + parts
        return shares
