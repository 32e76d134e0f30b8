"""Dropout at the cut: entries of the activation that are not sent (He, Zhang & Lee 2020, on split inference).

"Attacking and protecting data privacy in edge-cloud collaborative inference systems" (IEEE Internet of Things Journal).
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import dropout

from splitlearn import Guard

__all__ = ["Dropout"]


@dataclass(frozen=True)
class Dropout(Guard):
    """Sends each entry with probability 1 − ``rate``, over 1 − ``rate``, and 0 otherwise; drawn anew at each release.

    Unlike a dropout layer it also drops what is sent at a prediction, unless ``predictions`` is False: it then trains a
    model that is robust to missing entries, and hides nothing of a prediction.

    It bounds nothing: what is sent is exact up to a constant, and after a ReLU the rest of the samples says what a zero
    hides. Who knows it trains a decoder on what is left, or averages releases, of which 1 / (1 − rate) show each entry
    about once.
    """

    rate: float
    predictions: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"expected a rate of at least 0 and below 1, got {self.rate}; for example Dropout(0.5)")

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` with entries dropped, the others scaled up, so that the mean stays."""
        return dropout(z, self.rate) if self.rate else z

    def prediction(self, z: Tensor) -> Tensor:
        """Return what is sent of a prediction: as in training, or ``z`` itself without ``predictions``."""
        return self.activation(z) if self.predictions else z
