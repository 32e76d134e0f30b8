"""Krum, Multi-Krum and Bulyan: rows whose neighbours are near.

Blanchard, El Mhamdi, Guerraoui & Stainer 2017, "Machine learning with adversaries: Byzantine tolerant gradient descent"
(NeurIPS, arXiv:1703.02757); El Mhamdi, Guerraoui & Rouault 2018, "The hidden vulnerability of distributed learning in
Byzantium" (arXiv:1802.07927).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from defenses.aggregation.coordinates import by_coordinate, middle
from defenses.aggregation.points import ByDistance, Points, Rule, Verdict, enough, least_rows

__all__ = ["Bulyan", "Krum", "MultiKrum", "krum_order"]


def krum_order(distances: Tensor, f: int) -> Tensor:
    """Return the rows' places, the best score first, [n], given all squared distances, [n, n].

    A score is the sum of the n − f − 2 least distances to others, of one at least. Of equal scores (two rows that are
    each other's nearest have them where one distance counts), the lesser sum of all distances is first.
    """
    n = len(distances)
    nearest = distances.clone().fill_diagonal_(-1).sort(dim=1).values[:, 1:]  # itself first, whatever its duplicates
    scores = nearest[:, : max(1, n - f - 2)].sum(1)
    return torch.from_numpy(np.lexsort((nearest.sum(1).numpy(), scores.numpy())))


@dataclass(frozen=True)
class Krum(ByDistance):
    """The row with the least sum of squared distances to its n − f − 2 nearest; n ≥ 2f + 3.

    Withstands ``f`` bad rows that are far. One member's row is the result: noisy, and unfair to members whose data is
    unlike the others'. A bad row closer to the honest than they are to each other is chosen. O(n²·d).
    """

    f: int

    def __post_init__(self) -> None:
        least_rows(self.f, per=2, more=3, rule="Krum")

    @property
    def least(self) -> int:
        """2f + 3."""
        return least_rows(self.f, per=2, more=3, rule="Krum")

    def shares(self, points: Points) -> Tensor:
        """Return 1 for the chosen row."""
        enough(self, len(points), self.f, "n ≥ 2f + 3")
        return _even(krum_order(points.squared_distances, self.f)[:1], len(points))


@dataclass(frozen=True)
class MultiKrum(ByDistance):
    """The mean of the ``keep`` rows with the best Krum scores, n − f where None; n ≥ 2f + 3.

    Withstands ``f`` bad rows that are far, with less noise than Krum. Scores are taken once, not anew after each row.
    """

    f: int
    keep: int | None = None

    def __post_init__(self) -> None:
        least_rows(self.f, per=2, more=3, rule="MultiKrum")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"MultiKrum: expected at least one row to keep, got {self.keep}; None keeps n - f")

    @property
    def least(self) -> int:
        """2f + 3, or keep + f where that is more."""
        return max(least_rows(self.f, per=2, more=3, rule="MultiKrum"), self.f + (self.keep or 0))

    def shares(self, points: Points) -> Tensor:
        """Return an equal share for each row that is kept."""
        n = len(points)
        enough(self, n, self.f, "n ≥ 2f + 3 and n ≥ keep + f")
        best = krum_order(points.squared_distances, self.f)
        return _even(best[: self.keep or n - self.f], n)


@dataclass(frozen=True)
class Bulyan(Rule):
    """Takes n − 2f rows by Krum, one after the other, and of each coordinate the mean of the n − 4f nearest its median.

    n ≥ 4f + 3. Withstands ``f`` bad rows; in each coordinate too, where Krum lets one be far off. Shares say which rows
    Krum took, not how much of them is in the result. O(n²·d).

    Deviations: the last rounds of Krum, among so few rows that n − f − 2 leaves none, look at one neighbour; equal
    scores as ``krum_order`` says. Both from the paper's description, which leaves them open.
    """

    f: int

    def __post_init__(self) -> None:
        least_rows(self.f, per=4, more=3, rule="Bulyan")

    @property
    def least(self) -> int:
        """4f + 3."""
        return least_rows(self.f, per=4, more=3, rule="Bulyan")

    def verdict(self, points: Points) -> Verdict:
        """Return the mean around the median of the rows taken; each of these has an equal share."""
        n, f = len(points), self.f
        enough(self, n, f, "n ≥ 4f + 3")
        left, taken = list(range(n)), []
        for _ in range(n - 2 * f):
            taken.append(left.pop(int(krum_order(points.squared_distances[left][:, left], f)[0])))
        # The same order whatever the order of the rounds: sums of floats depend on it.
        chosen = torch.tensor(sorted(taken))
        return Verdict(by_coordinate(points.rows[chosen], lambda block: _around(block, 2 * f)), _even(chosen, n))


def _around(block: NDArray[np.floating], drop: int) -> NDArray[np.floating]:
    """Return the mean of each sorted row [block, θ] without the ``drop`` numbers farthest from its median, [block].

    Of two that are as far, the larger one goes.
    """
    theta = block.shape[1]
    centre, keep = middle(block), theta - drop
    first, every = np.zeros(len(block), dtype=np.int64), np.arange(len(block))
    for size in range(theta, keep, -1):  # of what is left in a sorted row, the farthest is at one of the ends
        first += centre - block[every, first] > block[every, first + size - 1] - centre
    return np.take_along_axis(block, first[:, None] + np.arange(keep), axis=1).mean(axis=1)


def _even(chosen: Tensor, n: int) -> Tensor:
    """Return equal shares, [n] in float64, of the rows at the places ``chosen``."""
    shares = torch.zeros(n, dtype=torch.float64)
    shares[chosen] = 1 / len(chosen)
    return shares
