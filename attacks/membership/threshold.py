"""Membership by a threshold on the loss: what was trained on has less of it.

Yeom, Giacomelli, Fredrikson and Jha 2018, "Privacy risk in machine learning: analyzing the connection to overfitting"
(arXiv:1709.01604), the adversary with one threshold for all samples. Deviation: the threshold is left to the score,
which tries every one, where the paper takes the mean loss on the training set, to be known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attacks.membership.points import predictions
from splitlearn import View

__all__ = ["LossThreshold"]


@dataclass(frozen=True, eq=False)
class LossThreshold:
    """Whoever asks for predictions of samples with labels ``y`` [N]. Returns minus each one's loss, [N].

    Higher for members. It knows no other model, and so takes a hard sample for one that was not trained on.
    """

    y: Tensor

    def __call__(self, view: View) -> Tensor:
        """Return minus the cross-entropy of each prediction that crossed, in the order of the labels."""
        logits = predictions(view, self.y).double()
        with torch.no_grad():
            return -cross_entropy(logits, self.y.to(logits.device), reduction="none").cpu()
