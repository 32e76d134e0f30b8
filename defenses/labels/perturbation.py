"""Noise on each row of the gradient that goes back, sized by the batch's greatest row: heuristics without an ε.

Li, Sun, Yang, Gao, Zhang, Xie, Smith & Wang 2022, "Label leakage and protection in two-party split learning"
(arXiv:2102.08504): max_norm, and the isotropic Gaussian that it is held against.
"""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from splitlearn import Guard

__all__ = ["Isotropic", "MaxNorm"]


@dataclass(frozen=True)
class MaxNorm(Guard):
    """Sends g·(1 + ε·√(M²/‖g‖² − 1)) for each row g of the gradient, ε from N(0, 1); M is the batch's greatest norm.

    The expected squared norm of every row is then M². No setting. It protects labels of any number of classes from who
    is sent the gradient and goes by norms. It does not hide directions: each row stays on its line, so that the cosine
    to one known positive tells most labels (its sign is turned where ε < −1 / √(M²/‖g‖² − 1)), and clustering too.
    A row of zeros has no direction, and is sent as it is.
    """

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        """Return ``g`` [n, …] with each row stretched."""
        norms = g.unsqueeze(-1).flatten(1).norm(dim=1)
        greatest = norms.max()
        spread = torch.where(norms > 0, (greatest / norms).square() - 1, torch.zeros_like(norms)).clamp(min=0).sqrt()
        stretch = 1 + torch.randn_like(norms) * spread
        return g * stretch.reshape(-1, *[1] * (g.ndim - 1))


@dataclass(frozen=True)
class Isotropic(Guard):
    """Sends g + N(0, σ²) on every entry, σ = ``ratio``·M/√d; M is the batch's greatest norm of a row of d entries.

    ``ratio`` is thus the norm of the noise over that of the greatest row; 0 sends g as it is. It protects labels of any
    number of classes from who is sent the gradient. It does not protect them well: the noise lies all around, and what
    tells the classes apart along one direction, so that the cosine to one known positive, or clustering, reads through
    noise of many times a row's norm (at a ratio of 1 it is right nearly always); norms leak with it.
    """

    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.ratio) and self.ratio >= 0):
            raise ValueError(f"expected a finite ratio of 0 or more, got {self.ratio}; 1 is noise of a row's own norm")

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        """Return ``g`` [n, …] with noise on every entry."""
        if not self.ratio:
            return g
        rows = g.unsqueeze(-1).flatten(1)
        return g + self.ratio * rows.norm(dim=1).max() / rows.shape[1] ** 0.5 * torch.randn_like(g)
