"""Divide and conquer: rows that stand out along the direction in which all vary most are left out.

Shejwalkar & Houmansadr 2021, "Manipulating the Byzantine: optimizing model poisoning attacks and defenses for federated
learning" (NDSS).
"""

from dataclasses import dataclass, field
from math import ceil

import torch

from defenses.aggregation.points import Points, Rule, Verdict, inner_products, least_rows

__all__ = ["DnC"]


@dataclass(frozen=True, eq=False)
class DnC(Rule):
    """The mean of the rows that all ``rounds`` keep: each leaves out the ⌈``drop``·f⌉ with the largest projections.

    A round takes ``coordinates`` of the numbers at random, all where there are fewer, subtracts the mean of the rows,
    and squares their projections on the top right singular vector. n ≥ rounds·⌈drop·f⌉ + 1, so that a row is left, and
    n ≥ 2f + 1. Withstands up to ``f`` bad rows that shift one direction together; a single far row may take the
    direction for itself and shield others, and what spreads over many directions is not seen. Coordinates come from
    ``seed`` alone; a second call draws other ones. O(rounds·n²·coordinates).

    Deviation: the projections are read off the rows' inner products, which is the same.
    """

    f: int
    rounds: int = 1
    drop: float = 1.0
    coordinates: int = 10_000
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False, default_factory=torch.Generator)

    def __post_init__(self) -> None:
        least_rows(self.f, per=1, more=1, rule="DnC")
        if self.rounds < 1 or self.coordinates < 1 or not 0 < self.drop < float("inf"):
            raise ValueError(
                f"DnC: expected at least one round and one coordinate and a finite drop above 0, got {self.rounds}, "
                f"{self.coordinates} and {self.drop}; leave them out for the defaults"
            )
        self.generator.manual_seed(self.seed)

    @property
    def least(self) -> int:
        """rounds·⌈drop·f⌉ + 1, and 2f + 1."""
        return max(self.rounds * ceil(self.drop * self.f), 2 * self.f) + 1

    def verdict(self, points: Points) -> Verdict:
        """Return the mean of the rows kept, each with an equal share."""
        n, d = points.rows.shape
        if n < self.least:
            raise ValueError(
                f"DnC: expected n ≥ 2f + 1 and n ≥ rounds·⌈drop·f⌉ + 1 rows, at least {self.least} with f = {self.f}, "
                f"rounds = {self.rounds} and drop = {self.drop:g}, got {n}; lower these, or ask more members"
            )
        kept = torch.ones(n, dtype=torch.bool)
        for _ in range(self.rounds):
            some = points.rows
            if self.coordinates < d:
                some = some[:, torch.randperm(d, generator=self.generator)[: self.coordinates].sort().values]
            some = some.double()
            # X = U·S·Vᵀ: projections X·v are s·u, and u is the top eigenvector of X·Xᵀ.
            along = torch.linalg.eigh(inner_products(some, some.mean(0))).eigenvectors[:, -1]
            kept[along.square().argsort(descending=True)[: ceil(self.drop * self.f)]] = False
        shares = kept.double() / kept.sum()
        return Verdict(points.combined(shares), shares)
