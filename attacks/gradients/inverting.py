"""Inputs by the direction of the gradient, under a prior on images: for ReLU networks, too.

Geiping et al. 2020, "Inverting gradients" (arXiv:2003.14053): min over x of 1 − cos(∇J(x, y), g) + α·TV(x), by Adam
on the sign of the gradient, within the images' range; the step falls to a tenth after 3/8, 5/8 and 7/8 of the
iterations. Deviations:

- labels are not given: one sample's is read off the update (iDLG), those of several are free variables, as in DLG;
- TV is the mean a pixel, and α smaller than there: 8×8 digits are no smooth photographs (MSE .1 at α = .1);
- fewer iterations (4,800 there).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from attacks.gradients.labels import label_of
from attacks.gradients.matching import Attempt, Matched, rebuilt, signed_adam
from attacks.gradients.updates import Seen, Update
from attacks.inversion.priors import total_variation
from attacks.inversion.reconstruction import Bounds, Reconstruction
from splitlearn import View

__all__ = ["InvertingGradients"]


@dataclass(frozen=True)
class InvertingGradients:
    """Server that sees whole updates. Rebuilds the images behind each; of several samples in any order.

    ``model`` is the architecture, in the mode in which members train; ``seen`` reads the updates off the view.
    ``restarts`` attempts start from noise drawn anew, and the one of the least objective is kept.
    """

    model: nn.Module
    seen: Seen
    input_shape: tuple[int, ...]
    iterations: int = 300
    restarts: int = 2
    lr: float = 0.1
    tv_weight: float = 1e-3
    bounds: Bounds | None = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.restarts < 1 or not self.lr > 0 or not self.tv_weight >= 0:
            raise ValueError(
                f"expected at least one iteration and attempt, lr > 0 and a weight of 0 or more, got "
                f"{self.iterations}, {self.restarts}, {self.lr} and {self.tv_weight}; leave them out for the defaults"
            )

    def __call__(self, view: View) -> Reconstruction:
        """Return the images behind each update; ``evidence`` holds the labels, and the objective at both ends."""
        return rebuilt(
            self.seen(view), self.model, self._begun, restarts=self.restarts, enough=0.0, bounds=self.bounds,
            seed=self.seed,
        )  # fmt: skip

    def _begun(self, matched: Matched, update: Update) -> Callable[[], Attempt]:
        labels = label_of(self.model, update) if update.count == 1 else None
        return partial(self._attempt, matched, labels)

    def _attempt(self, matched: Matched, labels: Tensor | None) -> Attempt:
        x = matched.noise(self.input_shape)
        y = torch.randn_like(matched.output(x)).requires_grad_()

        def objective() -> Tensor:
            gradient = matched.of(x, y.softmax(1) if labels is None else labels)
            return matched.cosine_distance(gradient) + self.tv_weight * total_variation(x).sum() / x.numel()

        others = [y] if labels is None else []
        trace, rested = signed_adam(
            objective, x, others, iterations=self.iterations, lr=self.lr, other_lr=self.lr, bounds=self.bounds
        )
        labels = y.detach().argmax(1) if labels is None else labels
        return Attempt(x.detach(), labels, trace[0], trace[-1], rested)
