"""Inputs from the bottom's gradient alone, where the gradient at the cut is not known either.

What SplitFed's fed server is left with: g_bottom = (∂z/∂w)ᵀ g, of which it sees the left and knows w. Gradient
matching (Zhu, Liu & Han 2019, arXiv:1906.08935) with g a free variable beside x, in the place of the label; no iDLG,
since the last layer is not in sight. First the direction is matched, as in Geiping et al. 2020 (arXiv:2003.14053), by
Adam on the sign of the gradient in x; then the gradient itself, by L-BFGS.

What it reaches: behind a first convolution alone, which has fewer weights than x and g have entries, many inputs
match, and it is no better than the mean image. Behind two smooth convolutions it is all but exact; with ReLU, whose
dead units tell nothing, it takes three. A fully connected first layer is ``AnalyticInversion``'s.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from attacks.gradients.matching import Attempt, Matched, check_attempts, descended, rebuilt, signed_adam
from attacks.gradients.updates import Seen
from attacks.inversion.priors import total_variation
from attacks.inversion.reconstruction import Bounds, Reconstruction, bounded
from splitlearn import View

__all__ = ["BottomGradientMatching"]


@dataclass(frozen=True)
class BottomGradientMatching:
    """Server that sees updates of the bottom and nothing else. Rebuilds inputs; of several samples in any order.

    ``model`` is the bottom's architecture, in the mode in which members train; ``seen`` reads the updates off the view.
    An attempt takes ``iterations`` of Adam (``lr`` for the input, ``cut_lr`` for the gradient at the cut; TV
    weighs ``tv_weight``) and up to as many of L-BFGS. There are up to
    ``restarts``, no more once the misfit, in units of the gradient's square, is at most ``enough``.
    """

    model: nn.Module
    seen: Seen
    input_shape: tuple[int, ...]
    iterations: int = 300
    restarts: int = 4
    lr: float = 0.1
    cut_lr: float = 0.3
    tv_weight: float = 1e-3
    enough: float = 1e-8
    bounds: Bounds | None = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_attempts(self.iterations, self.restarts)
        if not (self.lr > 0 and self.cut_lr > 0 and self.tv_weight >= 0):
            raise ValueError(
                f"expected learning rates above 0 and a weight of 0 or more, got {self.lr}, {self.cut_lr} and "
                f"{self.tv_weight}; leave them out for the defaults"
            )

    def __call__(self, view: View) -> Reconstruction:
        """Return the inputs behind each update; ``evidence`` holds the misfit at both ends, and no labels."""
        return rebuilt(
            self.seen(view), self.model, lambda matched, _: partial(self._attempt, matched), restarts=self.restarts,
            enough=self.enough, bounds=self.bounds, seed=self.seed, dtype=torch.float64,
        )  # fmt: skip

    def _attempt(self, matched: Matched) -> Attempt:
        x = bounded(matched.noise(self.input_shape).detach(), self.bounds).requires_grad_()
        g = torch.randn_like(matched.output(x)).requires_grad_()

        def made() -> list[Tensor]:
            return matched.gradient(matched.output(x), g)

        def unlike() -> Tensor:
            return matched.cosine_distance(made()) + self.tv_weight * total_variation(x).sum() / x.numel()

        first = matched.misfit(made()).item()
        signed_adam(unlike, x, [g], iterations=self.iterations, lr=self.lr, other_lr=self.cut_lr, bounds=self.bounds)
        length = sum(one.square().sum().item() for one in made()) ** 0.5
        if length > 0:  # the direction is matched, the length follows
            with torch.no_grad():
                g.mul_(matched.square**0.5 / length)
        unit = g.detach().square().mean().sqrt().clamp(min=torch.finfo(g.dtype).tiny)
        scaled = (g.detach() / unit).requires_grad_()

        def misfit() -> Tensor:
            return matched.misfit(matched.gradient(matched.output(x), unit * scaled))

        last, rested = descended(misfit, [x, scaled], self.iterations)
        return Attempt(x.detach().to(matched.sent), None, first, last, rested)
