"""NoPeek: training that makes activations depend less on the inputs (Vepakomma et al. 2020, arXiv:2008.09161)."""

from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from splitlearn import Guard
from splitlearn.metrics import distance_correlation_squared

__all__ = ["NoPeek"]

SMALLEST_BATCH = 4  # of the bias-corrected estimator


@dataclass(frozen=True)
class NoPeek(Guard):
    """Adds ``weight`` · dCor²(x, z) to the loss of the party that sends the activation z of its input x.

    What is sent stays as it is; only training changes. It is a heuristic: it bounds nothing and claims no ε.
    The penalty is over the batch, so that it ties samples together in training, never in what is sent.

    Deviations from the paper: the estimator is bias-corrected and thus near 0 at independence, where the paper's
    reads close to 1 in many dimensions; it can be slightly below 0; and no logarithm is taken of it. A batch of
    fewer than 4 samples has no such estimator, and is an error.
    """

    weight: float

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"expected a finite weight of 0 or more, got {self.weight}; for example NoPeek(1.0)")

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Return the penalty, a scalar; fewer than 4 samples and tokens raise ``ValueError``."""
        if len(x) < SMALLEST_BATCH:
            raise ValueError(
                f"expected at least {SMALLEST_BATCH} samples in a batch for NoPeek, got {len(x)}; use larger batches, "
                "or leave out a short last one by drop_last=True"
            )
        return self.weight * distance_correlation_squared(x, z)
