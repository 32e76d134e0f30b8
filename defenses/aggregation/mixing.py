"""Mixers: before the rule, rows are replaced by means of some of them, which are closer to each other.

Nearest-neighbour mixing: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot & Stephan 2023, "Fixing by mixing: a recipe for
optimal Byzantine ML under heterogeneity" (arXiv:2302.01772). Bucketing: Karimireddy, He & Jaggi 2022,
"Byzantine-robust learning on heterogeneous datasets via bucketing" (arXiv:2006.09365).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from defenses.aggregation.points import Points, Rule, Verdict, least_rows

__all__ = ["NNM", "Bucketing", "Mixed", "Mixer"]


class Mixer(ABC):
    """Makes rows [m, d] of members' rows [n, d]."""

    @abstractmethod
    def matrix(self, points: Points) -> Tensor:
        """Return W [m, n] in float64, rows of sum 1: the mixed rows are W·X."""

    @abstractmethod
    def least_for(self, rows: int) -> int:
        """Return the fewest rows of which it makes at least so many."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the mixed rows [m, d], of the type of ``rows`` [n, d]."""
        points = Points(rows)
        return (self.matrix(points).to(points.rows.dtype) @ points.rows).to(rows)


@dataclass(frozen=True)
class NNM(Mixer):
    """Replaces each row by the mean of the n − f nearest to it, itself among them; n ≥ 2f + 1.

    Honest rows of unlike data come closer together, so that a rule after it tells bad rows from unlike ones. A bad row
    may be among an honest one's nearest, and goes into its mean. One n × n matrix by the rows' inner products: O(n²·d).
    """

    f: int

    def __post_init__(self) -> None:
        least_rows(self.f, per=2, more=1, rule="NNM")

    def least_for(self, rows: int) -> int:
        """Return ``rows``, or 2f + 1 where that is more."""
        return max(rows, least_rows(self.f, per=2, more=1, rule="NNM"))

    def matrix(self, points: Points) -> Tensor:
        """Return 1/(n − f) for the nearest of each row, [n, n]."""
        n = len(points)
        if n < self.least_for(1):
            raise ValueError(
                f"NNM: expected n ≥ 2f + 1 rows, at least {self.least_for(1)} with f = {self.f}, got {n}; "
                "lower f, or ask more members"
            )
        near = points.squared_distances.clone().fill_diagonal_(-1).argsort(dim=1, stable=True)[:, : n - self.f]
        return torch.zeros(n, n, dtype=torch.float64).scatter_(1, near, 1 / (n - self.f))


@dataclass(frozen=True, eq=False)
class Bucketing(Mixer):
    """Replaces rows by the means of random buckets of ``size``, drawn anew each time; the last may hold fewer.

    ⌈n / size⌉ rows are left, and as many of them may be bad as rows were: the rule after it must withstand f of n/size.
    Draws come from ``seed`` alone; a second call draws other buckets than the first.
    """

    size: int = 2
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False, default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Bucketing: expected buckets of at least one row, got {self.size}; 2 is a start")
        self.generator.manual_seed(self.seed)

    def least_for(self, rows: int) -> int:
        """Return size·(rows − 1) + 1."""
        return self.size * (rows - 1) + 1

    def matrix(self, points: Points) -> Tensor:
        """Return 1/size for each row of a bucket, [⌈n / size⌉, n]."""
        n = len(points)
        order = torch.randperm(n, generator=self.generator)
        mixing = torch.zeros(-(-n // self.size), n, dtype=torch.float64)
        for bucket, places in enumerate(order.split(self.size)):
            mixing[bucket, places] = 1 / len(places)
        return mixing


@dataclass(frozen=True)
class Mixed(Rule):
    """``rule`` on the rows that ``mixer`` makes: ``Mixed(NNM(f=4), Krum(f=4))``; mixed ones nest.

    Shares are those of members' own rows. A rule by distances never has the mixed rows made.
    """

    mixer: Mixer
    rule: Rule

    @property
    def least(self) -> int:
        """As many as the mixer needs to leave enough for the rule."""
        return self.mixer.least_for(self.rule.least)

    @property
    def remembers(self) -> bool:
        """As the rule does."""
        return self.rule.remembers

    def verdict(self, points: Points) -> Verdict:
        """Return the rule's row for the mixed rows, its shares spread over the rows that were mixed."""
        mixing = self.mixer.matrix(points)
        found = self.rule.verdict(points.mixed(mixing))
        return Verdict(found.delta, None if found.shares is None else found.shares @ mixing)
