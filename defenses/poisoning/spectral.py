"""Spectral signatures: poison shows along the first singular direction of its class.

Tran, Li and Mądry 2018 (arXiv:1811.00636).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.poisoning.suspects import Suspects, check_samples

__all__ = ["SpectralSignatures"]


@dataclass(frozen=True)
class SpectralSignatures:
    """Flags the 1.5·``share`` of each class that stands out most along its first singular direction.

    ``suspects = SpectralSignatures(0.1)(z, y)`` of activations [N, …] with labels [N], best of the penultimate layer.
    ``share`` is the largest part of a class that may be poisoned. A sample's score is its squared projection, from the
    class's mean, on the first right singular vector of the class.

    It protects from a minority of label-changing poison in a class that shifts the class's covariance, whoever brought
    it. It does not protect from poison that stays inside the class's spread or is more than ``share`` of it. It cannot
    tell a clean class: of those it flags 1.5·``share``, too.

    Deviations: the number flagged is ⌊1.5·share·n⌋ of each class's n; the paper trains anew on the rest, which is left
    to the caller.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 2 / 3:
            raise ValueError(
                f"expected a share in (0, 2/3), got {self.share}; the part of a class that may be poisoned"
            )

    def __call__(self, z: Tensor, y: Tensor) -> Suspects:
        """Return every sample's score and whether it is flagged."""
        rows = check_samples(z, y)
        scores, flagged = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.bool)
        for label in y.unique().tolist():
            at = (y.cpu() == label).nonzero()[:, 0]
            centred = rows[at] - rows[at].mean(0)
            direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
            scores[at] = (centred @ direction).square()
            most = scores[at].argsort(descending=True, stable=True)[: int(1.5 * self.share * len(at) + 1e-9)]
            flagged[at[most]] = True
        return Suspects(scores, flagged)
