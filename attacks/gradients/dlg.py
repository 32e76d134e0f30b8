"""Inputs by matching gradients with L-BFGS: DLG, and iDLG, which reads the label first.

Zhu, Liu & Han 2019, "Deep leakage from gradients" (arXiv:1906.08935); Zhao, Mopuri & Bilen 2020, "iDLG"
(arXiv:2001.02610). min over x (and a soft label y) of ‖∇J(x, y) − g‖². For smooth activations: with ReLU the second
derivative that L-BFGS goes by is 0 almost everywhere. Deviations, each of which makes them stronger:

- they restart, from noise drawn anew, until the gradient is matched, and keep the best match;
- a strong Wolfe line search, and float64 whatever the update's type;
- DLG's soft label only ever tends to one class: after the descent it is set to it and the input refined.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from attacks.gradients.labels import label_of
from attacks.gradients.matching import Attempt, Matched, best_of, check_attempts, descended, reconstruction
from attacks.gradients.updates import Seen
from attacks.inversion.reconstruction import Bounds, Reconstruction, seeded
from splitlearn import View

__all__ = ["DLG", "IDLG"]


@dataclass(frozen=True)
class DLG:
    """Server that sees whole updates. Rebuilds inputs and labels of each; of several samples in any order (two of one
    class are found more slowly).

    ``model`` is the architecture, in the mode in which members train; ``seen`` reads the updates off the view. An
    attempt takes up to ``iterations``, twice; there are up to ``restarts`` of them, no more once the misfit, in units
    of the gradient's square, is at most ``enough`` (rounding of float32 weights alone can make 1e-9).
    """

    model: nn.Module
    seen: Seen
    input_shape: tuple[int, ...]
    iterations: int = 500
    restarts: int = 4
    enough: float = 1e-8
    bounds: Bounds | None = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_attempts(self.iterations, self.restarts)

    def __call__(self, view: View) -> Reconstruction:
        """Return the inputs behind each update; ``evidence`` holds the labels, and the misfit at both ends."""
        found = []
        for update in self.seen(view):
            matched = Matched(self.model, update, torch.float64)
            with seeded(self.seed, matched.device):
                found.append(best_of(partial(self._attempt, matched), self.restarts, self.enough))
        return reconstruction(found, self.bounds)

    def _attempt(self, matched: Matched) -> Attempt:
        x = matched.noise(self.input_shape)
        y = torch.randn_like(matched.output(x)).requires_grad_()
        first = matched.misfit(matched.of(x, y.softmax(1))).item()
        last, rested = descended(lambda: matched.misfit(matched.of(x, y.softmax(1))), [x, y], self.iterations)
        labels, refined = y.argmax(1), x.detach().clone().requires_grad_()
        hard, done = descended(lambda: matched.misfit(matched.of(refined, labels)), [refined], self.iterations)
        if hard <= last:
            return Attempt(refined.detach().to(matched.sent), labels, first, hard, done)
        return Attempt(x.detach().to(matched.sent), labels, first, last, rested)


@dataclass(frozen=True)
class IDLG:
    """Server that sees whole updates of one sample each. Reads the label off each, and rebuilds the input.

    The settings are those of ``DLG``.
    """

    model: nn.Module
    seen: Seen
    input_shape: tuple[int, ...]
    iterations: int = 500
    restarts: int = 4
    enough: float = 1e-8
    bounds: Bounds | None = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_attempts(self.iterations, self.restarts)

    def __call__(self, view: View) -> Reconstruction:
        """Return the input behind each update; ``evidence`` holds the labels, and the misfit at both ends."""
        found = []
        for update in self.seen(view):
            matched, labels = Matched(self.model, update, torch.float64), label_of(self.model, update)
            with seeded(self.seed, matched.device):
                found.append(best_of(partial(self._attempt, matched, labels), self.restarts, self.enough))
        return reconstruction(found, self.bounds)

    def _attempt(self, matched: Matched, labels: Tensor) -> Attempt:
        x = matched.noise(self.input_shape)
        first = matched.misfit(matched.of(x, labels)).item()
        last, rested = descended(lambda: matched.misfit(matched.of(x, labels)), [x], self.iterations)
        return Attempt(x.detach().to(matched.sent), labels, first, last, rested)
