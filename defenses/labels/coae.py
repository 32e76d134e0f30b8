"""CoAE: an autoencoder of labels, trained to make them as confused as can be; what is trained on is its code.

Zou, Liu, Kang, Liu, He, Yi, Yang & Zhang 2022, "Defending batch-level label inference and replacement attacks in
vertical federated learning" (arXiv:2112.05409).
"""

from dataclasses import dataclass
from math import isfinite
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from splitlearn.randomness import Randomness

__all__ = ["CoAE"]


@dataclass(frozen=True, eq=False)
class CoAE:
    """Soft labels in place of labels: ``labels(y)`` to train on, ``decode(logits)`` to read what was learnt.

    Made by ``CoAE.fitted``. The owner's loss on soft labels [n, classes] is ``cross_entropy``, which takes them as they
    are. It protects labels from who takes gradients for those of the labels themselves: sign, gradient matching over
    one-hot labels, replaced labels. It bounds nothing: each label has one code, the same for all its samples, so that
    what tells codes apart tells labels apart: clusters are as they were, and model completion, with some true labels,
    learns the decoder as well.
    """

    encoder: nn.Module
    decoder: nn.Module
    classes: int
    weight: float

    def __repr__(self) -> str:
        return f"CoAE({self.classes} classes, weight={self.weight})"

    @classmethod
    def fitted(cls, classes: int, weight: float = 1.0, seed: int = 0, *, steps: int = 2000, lr: float = 5e-3) -> Self:
        """Return the autoencoder of least CE(decoded, y) − ``weight``·H(code), both in nats and averaged over labels.

        Encoder and decoder are two linear layers with a ReLU between, (6·classes + 2)² hidden units in the paper and 64
        here; Adam takes ``steps`` steps on all labels at once. A ``weight`` of 0 leaves codes free; that of 1 makes
        them close to uniform, and at 1000 the decoder loses labels. Random numbers come from ``seed``, and torch's
        generators stay where they were.
        Deviations: the hidden width; trained on one-hot labels alone, as nothing else is ever encoded.
        """
        if classes < 2 or not (isfinite(weight) and weight >= 0) or steps < 1 or not lr > 0:
            raise ValueError(
                f"expected at least 2 classes, a finite weight of 0 or more, one step or more and lr above 0, got "
                f"{classes}, {weight}, {steps} and {lr}; weight=1 is a start"
            )
        with Randomness(seed, "coae").own(torch.device("cpu")):
            encoder = nn.Sequential(nn.Linear(classes, 64), nn.ReLU(), nn.Linear(64, classes))
            decoder = nn.Sequential(nn.Linear(classes, 64), nn.ReLU(), nn.Linear(64, classes))
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr)
        y = torch.arange(classes)
        truth = one_hot(y, classes).float()
        with torch.enable_grad():
            for _ in range(steps):
                code = encoder(truth).log_softmax(1)
                entropy = -(code.exp() * code).sum(1).mean()
                optimizer.zero_grad()
                (cross_entropy(decoder(code.exp()), y) - weight * entropy).backward()
                optimizer.step()
        return cls(encoder.eval().requires_grad_(False), decoder.eval().requires_grad_(False), classes, weight)

    def labels(self, y: Tensor) -> Tensor:
        """Return the code of each label of ``y`` [n]: float [n, classes], each row summing to 1."""
        if y.is_floating_point() or y.ndim != 1 or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.classes):
            raise ValueError(
                f"expected whole labels [n] from 0 to {self.classes - 1}, got {y.dtype} {tuple(y.shape)}; fit the "
                "autoencoder for as many classes as there are"
            )
        codes = self.encoder(torch.eye(self.classes)).softmax(1)
        return codes.to(y.device)[y]

    def decode(self, logits: Tensor) -> Tensor:
        """Return logits [n, classes] of the true labels from those of the code, which the owner's stage puts out."""
        decoder = self.decoder.to(logits.device)
        found: Tensor = decoder(logits.softmax(1).to(next(decoder.parameters()).dtype))
        return found.to(logits.dtype)
