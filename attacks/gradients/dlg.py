"""Inputs by matching gradients with L-BFGS: DLG, and iDLG, which reads the label first.

Zhu, Liu & Han 2019, "Deep leakage from gradients" (arXiv:1906.08935); Zhao, Mopuri & Bilen 2020, "iDLG"
(arXiv:2001.02610). min over x (and a soft label y) of ‖∇J(x, y) − g‖². For smooth activations: with ReLU the second
derivative that L-BFGS goes by is 0 almost everywhere. Deviations, each of which makes them stronger:

- they restart, from noise drawn anew, until the gradient is matched, and keep the best match;
- a strong Wolfe line search, and float64 whatever the update's type;
- DLG's soft label only ever tends to one class: after the descent it is set to it and the input refined.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from attacks.gradients.labels import label_of
from attacks.gradients.matching import Attempt, Matched, check_attempts, descended, rebuilt
from attacks.gradients.updates import Seen, Update
from attacks.inversion.reconstruction import Bounds, Reconstruction
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
        return rebuilt(
            self.seen(view), self.model, self._begun, restarts=self.restarts, enough=self.enough, bounds=self.bounds,
            seed=self.seed, dtype=torch.float64,
        )  # fmt: skip

    def _begun(self, matched: Matched, update: Update) -> Callable[[], Attempt]:
        return partial(self._attempt, matched)

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
class IDLG(DLG):
    """Server that sees whole updates of one sample each. Reads the label off each, and rebuilds the input.

    The settings are those of ``DLG``.
    """

    def _begun(self, matched: Matched, update: Update) -> Callable[[], Attempt]:
        return partial(self._labelled, matched, label_of(self.model, update))

    def _labelled(self, matched: Matched, labels: Tensor) -> Attempt:
        x = matched.noise(self.input_shape)
        first = matched.misfit(matched.of(x, labels)).item()
        last, rested = descended(lambda: matched.misfit(matched.of(x, labels)), [x], self.iterations)
        return Attempt(x.detach().to(matched.sent), labels, first, last, rested)
