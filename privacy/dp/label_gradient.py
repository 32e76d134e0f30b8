"""Label differential privacy of what split learning sends back: the gradient at the cut, made of noised labels.

Yang, Sun, Yao, Xie & Wang 2022, "Differentially private label protection in split learning" (arXiv:2203.02073), TPSL.
"""

from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from privacy.dp.releases import LaplaceRelease, Release
from splitlearn import Guard, Kind

__all__ = ["LaplaceLabels"]

GRID = 2.0**10  # steps of noise in a unit: labels and noise lie on one grid, so that low bits tell nothing of a label


@dataclass(frozen=True)
class LaplaceLabels(Guard):
    """Has the party that learns train on one-hot labels with Laplace noise, drawn anew at every step.

    The cross-entropy is linear in its label. With ỹ = y + Laplace(1/ε) for label 1, and 1 − ỹ for label 0, the gradient
    at the cut is thus g_0 + ỹ·(g_1 − g_0), g_c being what the label c would have sent: TPSL's noise along the line
    between the two labels' gradients, for a stage that learns nothing but ỹ either. For more classes each entry of the
    one-hot label gets Laplace(2/ε), and the mean of the noise is taken off, so that a label still sums to 1. Rows are
    unbiased: the mean over the noise is the gradient of the true label.

    - Adjacency: one label is replaced by any other; inputs are public, or in an account of their own. Local.
    - Sensitivity, in L1: 1 with two classes (one number is noised), 2 with more (one-hot labels).
    - Protects: the label of each sample, from whoever is sent gradients, losses or the stage itself, with ε-DP and
      δ = 0 for each step that it takes part in. All of them are made of ỹ (post-processing), the other rows included.
    - Does not protect: labels over many steps, whose ε add up: a sample is noised anew in each epoch, and 15 of them at
      ε = 1 are an ε of 15. At a high ε clustering reads labels. Nor does it hide what inputs give away, as
      ``RandomisedResponse`` does not.
    - The generator is torch's own, and no cryptographic one. Noise is rounded to a grid of 1/1024 before it is added,
      so that a label moves it by whole steps; what torch's float64 noise lacks is its far tail, beyond 36 scales.

    Use it on the party that learns, with labels that are whole numbers and ``cross_entropy``, which takes what it
    makes, or any loss on soft labels; it is at work where a protocol asks for the party's labels (``Learner.label``).
    In an account (``Accounted``) no trained parameter shapes what is released, ``shaped_by=()``: it is the label alone.
    A label may be negative or above 1, so that the loss has no lower bound: a model that can memorise one draw makes it
    ever smaller, which fresh noise at each step prevents.

    Deviations from the paper: the noise is on the label and not on the gradient, which comes to the same in the
    gradient, and covers the stage's own weights and the loss as well; more than two classes.
    """

    epsilon: float
    classes: int = 2
    release: LaplaceRelease = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (isfinite(self.epsilon) and self.epsilon > 0) or self.classes < 2:
            raise ValueError(
                f"expected a finite ε above 0 and at least 2 classes, got {self.epsilon} and {self.classes}; ε is that "
                "of one step"
            )
        object.__setattr__(self, "release", LaplaceRelease(1 / self.epsilon))

    @property
    def sensitivity(self) -> float:
        """The greatest L1 distance between what two labels are before the noise: 1 with two classes, else 2."""
        return 1.0 if self.classes == 2 else 2.0

    @property
    def scale(self) -> float:
        """The scale of the noise on each number: sensitivity / ε; its standard deviation is √2 times that."""
        return self.sensitivity / self.epsilon

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    @property
    def releases(self) -> dict[Kind, Release]:
        """What one step releases, by kind; gradient and loss are made of it."""
        return {Kind.LABEL: self.release}

    def label(self, y: Tensor) -> Tensor:
        """Return soft labels [n, classes] that sum to 1 for whole labels ``y`` [n], drawn anew."""
        if y.is_floating_point() or y.ndim != 1 or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.classes):
            raise ValueError(
                f"expected whole labels [n] from 0 to {self.classes - 1} to noise, got {y.dtype} {tuple(y.shape)}; "
                "LaplaceLabels(epsilon, classes) is told their number"
            )
        if self.classes == 2:
            noised = y + self._noise(y.shape, y.device)
            soft = torch.stack([1 - noised, noised], 1)
        else:
            soft = one_hot(y, self.classes) + self._noise((len(y), self.classes), y.device)
            soft = soft - (soft.sum(1, keepdim=True) - 1) / self.classes
        return soft.to(torch.get_default_dtype())

    def _noise(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return Laplace noise on the grid, in float64: the difference of two exponentials is Laplace."""
        up, down = (torch.empty(shape, dtype=torch.float64, device=device).exponential_() for _ in range(2))
        return (self.scale * (up - down) * GRID).round() / GRID
