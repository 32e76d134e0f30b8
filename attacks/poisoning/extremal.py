"""Min-Max and Min-Sum: the honest mean, moved as far as no honest update would look more of an outlier.

Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine: optimizing model poisoning attacks and defenses for
federated learning" (NDSS). Colluders send μ + γp, all the same, for the largest γ that keeps the row as near to the
honest ones as they are to each other. Both are the attacks that do not know the rule ("AGR-agnostic").

Deviation: the paper halves its way to γ; ‖μ + γp − x_i‖² is a parabola in γ, so that the largest one is had in closed
form, of [h, h] products and two passes over the rows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from attacks.poisoning.updates import checked
from splitlearn.deltas import gram, squared_distances

__all__ = ["Direction", "MinMax", "MinSum", "along"]

Direction = Literal["std", "unit", "sign"]


@dataclass(frozen=True)
class Extremal(ABC):
    """Every colluder sends μ + γp for the largest γ that a constraint on distances to honest rows leaves room for."""

    direction: Direction = "std"

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(f"expected a direction among {', '.join(get_args(Direction))}, got {self.direction!r}")

    def __call__(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return μ + γp, a row a colluder."""
        honest, own = checked(honest, own)
        mean, p = honest.mean(0), along(self.direction, honest)
        return (mean + self.gamma(honest, p) * p).repeat(len(own), 1)

    @abstractmethod
    def gamma(self, honest: Tensor, p: Tensor) -> float:
        """Return the largest γ along ``p`` [d]; 0 where p is."""


@dataclass(frozen=True)
class MinMax(Extremal):
    """Largest γ with max_i ‖μ + γp − x_i‖ ≤ max_ij ‖x_i − x_j‖ over honest x: no further from any than any two are.

    ``direction`` p: "std" −σ entry by entry, "unit" −μ/‖μ‖, "sign" −sign(μ). One honest update alone, or all alike,
    leave no room: γ is 0.
    """

    def gamma(self, honest: Tensor, p: Tensor) -> float:
        """Return the largest γ along ``p`` [d]; 0 where p is."""
        away = honest.mean(0) - honest
        near, slope, square = away.square().sum(1), away @ p, p.square().sum()
        if square == 0:
            return 0.0
        room = (squared_distances(gram(honest)).max() - near).clamp(min=0)
        root = (slope.square() + square * room).sqrt()
        # The greater root of γ²‖p‖² + 2γ·slope − room, by whichever form subtracts nothing of near size.
        found = torch.where(slope > 0, room / (root + slope.clamp(min=0) + (root == 0)), (root - slope) / square)
        return float(found.min())


@dataclass(frozen=True)
class MinSum(Extremal):
    """Largest γ with Σ_i ‖μ + γp − x_i‖² ≤ max_i Σ_j ‖x_i − x_j‖² over honest x; ``direction`` as in ``MinMax``.

    Stricter than ``MinMax``: the row is nearer, by the sum of squares, than the outermost honest one.
    """

    def gamma(self, honest: Tensor, p: Tensor) -> float:
        """Return the largest γ along ``p`` [d]; 0 where p is."""
        products, square = gram(honest), p.square().sum()
        if square == 0:
            return 0.0
        # Σ_i ‖μ + γp − x_i‖² = Σ_i ‖μ − x_i‖² + hγ²‖p‖²: what is linear in γ adds up to 0 around the mean.
        room = squared_distances(products).sum(1).max() - products.diagonal().sum()
        return float((room.clamp(min=0) / (len(honest) * square)).sqrt())


def along(direction: Direction, honest: Tensor) -> Tensor:
    """Return the direction p [d] against the honest updates [h, d]: −σ, −μ/‖μ‖ (0 where μ is) or −sign(μ)."""
    mean = honest.mean(0)
    if direction == "std":
        return -honest.std(0, correction=0)
    if direction == "sign":
        return -mean.sign()
    return -mean / (mean.norm() if mean.any() else 1.0)
