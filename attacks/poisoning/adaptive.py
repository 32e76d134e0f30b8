"""Adaptive: colluders who know the fed server's rule, try a family of updates on it, and send what moves it most.

In the manner of Fang, Cao, Jia and Gong 2020, "Local model poisoning attacks to Byzantine-robust federated learning"
(USENIX Security, arXiv:1911.11815), and of the tailored attacks of Shejwalkar and Houmansadr 2021 (NDSS): there one
optimisation for each rule, here one search for any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import torch
from torch import Tensor

from attacks.poisoning.extremal import Direction, along
from attacks.poisoning.updates import checked

__all__ = ["Adaptive", "Candidate", "Rule"]

Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A row [d] that all colluders may send, by which direction and scale it was made, and what it does to the rule."""

    row: Tensor
    direction: Direction
    scale: float
    damage: float


@dataclass(frozen=True)
class Adaptive:
    """Omniscient colluders who know the ``rule`` [n, d] -> [d]. All send μ + s·r·p̂, the worst that they find for it.

    p̂ is each of the ``directions`` at length 1, r the root mean square length of the honest updates, s each of the
    ``scales``; then the best one's scale is refined, ``refinements`` times, by steps each half of the last one's in its
    logarithm. The rule is called on the honest rows with the colluders' below them, len(directions) · len(scales) +
    2 · refinements times. ``aim`` "away" counts ‖rule − μ‖, "against" how far the rule moved against μ, ⟨μ − rule, μ⟩ /
    ‖μ‖: the first finds some detours that do no harm. The honest mean itself is in the family (s = 0), so that what
    is sent is never worse than no attack. A rule that draws by chance is met as it drew here.

    What it is not: an optimum. Colluders who send different rows, or who plan over rounds, may do better.
    """

    rule: Rule
    directions: tuple[Direction, ...] = ("std", "unit", "sign")
    scales: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    refinements: int = 3
    aim: Literal["away", "against"] = "against"

    def __post_init__(self) -> None:
        if not self.directions or not set(self.directions) <= set(get_args(Direction)):
            raise ValueError(f"expected directions among {', '.join(get_args(Direction))}, got {self.directions}")
        if not self.scales or not all(isfinite(scale) and scale >= 0 for scale in self.scales) or self.refinements < 0:
            raise ValueError(
                f"expected finite scales and a number of refinements of 0 or more, got {self.scales} and "
                f"{self.refinements}; leave them out for the defaults"
            )
        if self.aim not in ("away", "against"):
            raise ValueError(f"expected the aim 'away' or 'against', got {self.aim!r}")

    def __call__(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return the worst row found, once a colluder."""
        honest, own = checked(honest, own)
        return self.search(honest, len(own)).row.repeat(len(own), 1) if len(own) else own

    def search(self, honest: Tensor, bad: int) -> Candidate:
        """Return what ``bad`` colluders would send to these honest rows [h, d], with its damage."""
        mean, length = honest.mean(0), honest.square().sum(1).mean().sqrt()

        def tried(direction: Direction, scale: float) -> Candidate:
            p = along(direction, honest)
            row = mean + scale * length * p / (p.norm() if p.any() else 1.0)
            return Candidate(row, direction, scale, self._damage(honest, row, bad))

        best = tried(self.directions[0], 0.0)
        for direction in self.directions:
            for scale in self.scales:
                best = max(best, tried(direction, scale), key=_damage)
        step = 2.0**0.5
        for _ in range(self.refinements):
            sides = [tried(best.direction, scale) for scale in (best.scale * step, best.scale / step)]
            best, step = max([best, *sides], key=_damage), step**0.5
        return best

    def _damage(self, honest: Tensor, row: Tensor, bad: int) -> float:
        out, mean = self.rule(torch.cat([honest, row.repeat(bad, 1)])), honest.mean(0)
        if out.shape != mean.shape or not out.isfinite().all():
            raise ValueError(
                f"expected a rule that makes a finite [{len(mean)}] of finite [n, {len(mean)}], got shape "
                f"{tuple(out.shape)}, or nan or inf; pass the rule by itself, not an Aggregator"
            )
        moved = mean - out.to(mean)
        if self.aim == "away" or not mean.any():
            return float(moved.norm())
        return float(moved @ mean / mean.norm())


def _damage(candidate: Candidate) -> float:
    return candidate.damage
