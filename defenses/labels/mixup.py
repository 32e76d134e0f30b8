"""Mixup at the owner: it trains on mixtures of two samples' activations, so that no gradient is of one label alone.

Zhang, Cissé, Dauphin & Lopez-Paz 2018 (arXiv:1710.09412); on hidden activations Verma et al. 2019, "Manifold mixup"
(arXiv:1806.05236).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.labels.observed import Observing

__all__ = ["Mixup"]


@dataclass(frozen=True, eq=False)
class Mixup(Observing):
    """Trains the owner's stage on λ·z + (1 − λ)·z[π] with loss λ·ℓ(y) + (1 − λ)·ℓ(y[π]).

    λ is drawn from Beta(``alpha``, ``alpha``) and the permutation π of the batch's rows uniformly, anew at each batch,
    from the owner's own randomness: give its ``Learner`` a secret seed. Row i of the gradient that goes back is then
    λ times that of the mixture where it comes first, and 1 − λ times that where it comes second; both are of mixed
    labels. Nothing is mixed at a prediction.

    It protects labels from who takes a row of the gradient for its own label's. It bounds nothing: with a small
    ``alpha`` λ is close to 0 or 1 nearly always, the label's own part is there at every λ, and epochs average the
    others' out. What activations tell is as before: model completion and clustering of them read it.
    """

    alpha: float = 1.0
    task: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    def __post_init__(self) -> None:
        if not (isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"expected a finite alpha above 0, got {self.alpha}; 1 draws λ uniformly")

    def parts(self, stage: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return an entrance that mixes rows, and the stage."""
        return _Mixed(self.alpha), stage

    def mean_loss(self, output: Tensor, y: Tensor, seen: Any) -> Tensor:
        """Return the loss mixed as the rows were: ``seen`` is λ and the permutation."""
        share, order = seen
        return share * self.task(output, y) + (1 - share) * self.task(output, y[order])


class _Mixed(nn.Module):
    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[float, Tensor] | None]:
        if not self.training:
            return z, None
        share = torch.distributions.Beta(self.alpha, self.alpha).sample().item()
        order = torch.randperm(len(z)).to(z.device)
        return share * z + (1 - share) * z[order], (share, order)
