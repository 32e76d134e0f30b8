"""Regularised maximum likelihood: the likely input whose activation is nearest to the one that was seen.

He, Zhang & Lee 2019, "Model inversion attacks against collaborative inference" (ACSAC), the white-box attack rMLE:
min ‖f(x) − z‖² + λ·TV(x). Deviations, each of which makes it stronger:

- f is the victim's whole path, guard and codec included (straight-through); a guard's noise is drawn anew at
  every iteration, so that the expected misfit is minimised. That suits noise of mean 0. Of a guard that zeroes
  entries at random (dropout) the expected misfit counts each zero that was seen as a value, and the estimate shrinks:
  which entries were dropped is not inferred, and a ``Decoder`` does better there;
- inputs stay in their bounds, and the learning rate decays;
- with auxiliary samples λ is not guessed: the attack is rehearsed on activations of some of these, and the prior
  and weight that rebuild them best are taken. A Gaussian in the samples' mean and covariance then stands beside
  TV: with it the attack is a maximum a posteriori estimate, which goes to the mean image as noise grows.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from attacks.inversion.judging import fall, tail
from attacks.inversion.priors import GaussianPrior, total_variation
from attacks.inversion.reconstruction import Bounds, Reconstruction, auxiliary_inputs, bounded, check_bounds, seeded
from splitlearn import Encoder, View

__all__ = ["MaximumLikelihood", "descend", "misfit", "settled"]

Term = tuple[Callable[[Tensor], Tensor], Tensor | float]  # a prior, and its weight in each problem or in all

REHEARSED = 16  # auxiliary samples on which prior and weight are chosen


@dataclass(frozen=True)
class MaximumLikelihood:
    """White box. Rebuilds each input by gradient descent (Adam, cosine decay) through the victim's path.

    With auxiliary samples it starts from their mean and chooses among ``tv_weights`` and ``gaussian_weights``.
    Without any it starts from the middle of ``bounds``, weighs TV by ``tv_weight``, and must be told the
    ``input_shape`` of one sample. Weights are in units of the mean square of the activations seen; a Gaussian
    weight is then the share of it that is taken for noise. ``lr`` is in the inputs' own unit; ``bounds`` None leaves
    these unbounded.
    """

    iterations: int = 300
    lr: float = 0.1
    bounds: Bounds | None = (0.0, 1.0)
    input_shape: tuple[int, ...] | None = None
    tv_weight: float = 0.03
    tv_weights: tuple[float, ...] = (1e-2, 1e-1)
    gaussian_weights: tuple[float, ...] = (1e-6, 1e-3, 1e-2, 0.05, 0.1, 0.3, 0.6, 0.9, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        weights = (*self.tv_weights, *self.gaussian_weights)
        if self.iterations < 1 or not self.lr > 0 or not weights or min(*weights, self.tv_weight) < 0:
            raise ValueError(
                f"expected at least one iteration, lr > 0 and weights of 0 or more to choose from, got "
                f"{self.iterations}, {self.lr} and {weights}; leave them out for the defaults"
            )

    def __call__(self, view: View) -> Reconstruction:
        """Return the estimates; ``evidence`` holds the mean objective a sample at the start and at the end."""
        z = view.activations()
        encoder = copy.deepcopy(view.encoder).to(z.device)
        unit = z.square().mean().item()
        with seeded(self.seed, z.device):
            if view.threat.auxiliary:
                auxiliary = auxiliary_inputs(view, at_least=8, like=z, bounds=self.bounds, shape=self.input_shape)
                start, name, prior, weight = self._rehearsed(encoder, auxiliary, unit)
            else:
                start, name, prior, weight = self._middle(z), "total variation", total_variation, self.tv_weight
            x_hat, evidence = self._descend(encoder, z, start, [(prior, unit * weight)])
        return Reconstruction(x_hat, {"prior": name, "weight": weight, **evidence})

    def _rehearsed(
        self, encoder: Encoder, auxiliary: Tensor, unit: float
    ) -> tuple[Tensor, str, Callable[[Tensor], Tensor], float]:
        """Return where to start, and the prior, with its name and weight, that rebuild auxiliary samples best."""
        held_out = min(REHEARSED, len(auxiliary) // 4)
        x, rest = auxiliary[torch.randperm(len(auxiliary), device=auxiliary.device)].tensor_split([held_out])
        gaussian = GaussianPrior(rest)
        pairs = [(weight, 0.0) for weight in self.tv_weights] + [(0.0, weight) for weight in self.gaussian_weights]
        by_problem = x.new_tensor(pairs).repeat_interleave(len(x), dim=0) * unit
        x = x.repeat(len(pairs), *[1] * (x.ndim - 1))
        with torch.no_grad():
            z = encoder(x)
        terms: list[Term] = [(total_variation, by_problem[:, 0]), (gaussian, by_problem[:, 1])]
        x_hat, _ = self._descend(encoder, z, gaussian.mean, terms)
        errors = (x_hat - x).square().flatten(1).mean(1).reshape(len(pairs), -1).mean(1)
        best = int(errors.argmin())
        if best < len(self.tv_weights):
            return gaussian.mean, "total variation", total_variation, self.tv_weights[best]
        return gaussian.mean, "gaussian", gaussian, self.gaussian_weights[best - len(self.tv_weights)]

    def _descend(
        self, encoder: Encoder, z: Tensor, start: Tensor, terms: Sequence[Term]
    ) -> tuple[Tensor, dict[str, float]]:
        starts = start.expand(len(z), *start.shape)
        return descend(encoder, z, starts, terms, iterations=self.iterations, lr=self.lr, bounds=self.bounds)

    def _middle(self, z: Tensor) -> Tensor:
        if self.input_shape is None:
            raise ValueError(
                "expected the shape of an input, which a view without auxiliary samples does not tell; "
                "pass input_shape=(channels, height, width), or grant Threat(auxiliary=True)"
            )
        middle = 0.0 if self.bounds is None else sum(self.bounds) / 2
        return z.new_full(self.input_shape, middle)


def descend(
    path: Callable[[Tensor], Tensor],
    z: Tensor,
    start: Tensor,
    terms: Sequence[Term],
    *,
    iterations: int,
    lr: float,
    bounds: Bounds | None,
) -> tuple[Tensor, dict[str, float]]:
    """Minimise ‖path(x) − z‖² plus the weighted priors from ``start``, one problem a row; Adam, cosine decay."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    trace = []
    for _ in range(iterations):
        objective = misfit(path(x), z)
        for prior, weight in terms:
            objective = objective + weight * prior(x)
        optimizer.zero_grad()
        objective.sum().backward()  # the rows are independent: each entry's gradient is its own problem's
        optimizer.step()
        decay.step()
        with torch.no_grad():
            x.copy_(bounded(x, bounds))
        trace.append(objective.mean().item())
    return x.detach(), settled(trace)


def misfit(f: Tensor, z: Tensor) -> Tensor:
    """Return ‖f − z‖² of each row; ``ValueError`` where the shapes differ."""
    if f.shape != z.shape:
        raise ValueError(
            f"expected inputs whose activations have the shape {tuple(z.shape)} of those seen, got {tuple(f.shape)}; "
            "pass the input_shape of the victim's inputs"
        )
    return (f - z).square().flatten(1).sum(1)


def settled(trace: Sequence[float]) -> dict[str, float]:
    """Return the mean objective at both ends; converged where the last tail lowered it by under 1 % of the first."""
    last = mean(trace[-tail(trace) :])
    still = fall(trace) < 0.01 * trace[0]
    return {"objective_first": trace[0], "objective_last": last, "converged": float(still)}
