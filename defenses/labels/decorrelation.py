"""Decorrelation from labels: the owner trains the client's bottom so that activations depend less on the labels.

Sun, Yang, Yao & Wang 2022, "Label leakage and protection from forward embedding in vertical federated learning"
(arXiv:2203.01451).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from defenses.labels.observed import Observing
from splitlearn.metrics import distance_correlation_squared

__all__ = ["LabelDecorrelation"]

SMALLEST_BATCH = 4  # of the bias-corrected estimator


@dataclass(frozen=True, eq=False)
class LabelDecorrelation(Observing):
    """Adds ``weight`` · dCor²(z, one-hot y) to the owner's loss; z is the activation that enters its stage.

    The gradient that goes back then pulls the client's bottom towards activations that tell less of labels, and
    the owner's own stage has more to do. It protects labels from who has the client's activations, and clusters
    them or completes the model. It does not protect them from who reads gradients: these tell labels as before, and the
    penalty's own part tells them, too. It bounds nothing: what the owner's stage can still learn from z, an attacker
    with some labels learns as well (model completion); a client that lies about z, or trains on without the
    penalty, undoes it.

    Deviations from the paper: the estimator is bias-corrected, unrooted, and no logarithm is taken of it, as in
    ``NoPeek``: near 0 at independence, and maybe below. A batch of fewer than 4 samples is an error; one of a single
    label adds nothing.
    """

    weight: float
    task: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight >= 0):
            raise ValueError(
                f"expected a finite weight of 0 or more, got {self.weight}; for example LabelDecorrelation(1.0)"
            )

    def parts(self, stage: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return an entrance that shows the loss what enters, and the stage."""
        return _Shown(), stage

    def mean_loss(self, output: Tensor, y: Tensor, seen: Any) -> Tensor:
        """Return the task's loss plus the penalty on the activation ``seen``."""
        if len(y) < SMALLEST_BATCH:
            raise ValueError(
                f"expected at least {SMALLEST_BATCH} samples in a batch for LabelDecorrelation, got {len(y)}; use "
                "larger batches, or leave out a short last one by drop_last=True"
            )
        labels = y if y.is_floating_point() else one_hot(y).to(torch.float32)
        return self.task(output, y) + self.weight * distance_correlation_squared(seen, labels.to(seen.dtype))


class _Shown(nn.Module):
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, z
