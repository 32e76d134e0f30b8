"""Membership by likelihood ratio: is what the sample leaves likelier of models that saw it, or of those that did not?

Carlini, Chien, Nasr, Song, Terzis and Tramèr 2022, "Membership inference attacks from first principles"
(arXiv:2112.03570), the online attack: shadow models are trained with each candidate and without it. Deviations:

- beside the logits, statistics of the activation or of the gradient at the cut, each set of them one Gaussian;
- few shadows share one covariance for all samples on each side (the paper's global variance, for several statistics);
- one query a sample, where the paper adds up those of its augmentations.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.membership.points import Point
from splitlearn import View

__all__ = ["LiRA", "halves", "likelihood_ratio"]

Variance = Literal["auto", "shared", "own"]
ENOUGH = 64  # shadows from which each sample has a variance of its own (the paper's figure 9)
FEWEST = 2  # shadows with a sample, and without it, of which there is a spread
RIDGE = 1e-6  # on the diagonal of correlations, so that they can be solved for
FLAT = 1e-9  # the least standard deviation: that of a statistic that is the same in every shadow


@dataclass(frozen=True, eq=False)
class LiRA:
    """Whoever asks about samples of its own, and has shadows of the model. Returns log likelihood ratios, [N].

    It knows the candidates and their labels ``y`` [N], not which of them were trained on; the architecture, and how and
    from what distribution the model was trained. ``shadows`` [S, N, F] is what ``point.of`` made of each candidate in
    each shadow model, trained on the candidates that ``inside`` [S, N] says. Higher for members.
    """

    point: Point
    y: Tensor
    shadows: Tensor
    inside: Tensor
    variance: Variance = "auto"

    def __call__(self, view: View) -> Tensor:
        """Return the log likelihood ratio of each candidate, of what crossed at the point for it."""
        return likelihood_ratio(self.point.seen(view, self.y), self.shadows, self.inside, variance=self.variance)


def likelihood_ratio(target: Tensor, shadows: Tensor, inside: Tensor, *, variance: Variance = "auto") -> Tensor:
    """Return log N(t; μ_in, Σ_in) − log N(t; μ_out, Σ_out) of each sample, [N], float64; higher for members.

    ``target`` [N, F] are the statistics of the model that is asked about, ``shadows`` [S, N, F] those of models trained
    with (``inside`` [S, N]) and without each sample. Means are each sample's own. The variance is ``shared`` (one
    covariance of all samples about their means, for each side), each sample's ``own`` (diagonal), or, with ``auto``,
    its own from 64 shadows on. Raises ``ValueError`` where a sample is in, or out of, too few shadows to tell.
    """
    own = variance == "own" or (variance == "auto" and len(shadows) >= ENOUGH)
    _check(target, shadows, inside)
    target, shadows = target.double(), shadows.double()
    return _log_density(target, shadows, inside, own) - _log_density(target, shadows, ~inside, own)


def halves(shadows: int, samples: int, *, seed: int = 0) -> Tensor:
    """Return which samples each shadow is trained on, [shadows, samples]: each sample in half of them, at random."""
    if shadows < 2 * FEWEST or shadows % 2:
        raise ValueError(
            f"expected an even number of shadows, {2 * FEWEST} or more, got {shadows}; each sample is in half of them"
        )
    return torch.rand(shadows, samples, generator=torch.Generator().manual_seed(seed)).argsort(0) < shadows // 2


def _log_density(target: Tensor, shadows: Tensor, chosen: Tensor, own: bool) -> Tensor:
    """Return the log density of each target [N, F] under the chosen shadows' Gaussian, less a constant."""
    weights = chosen.double()[..., None]
    counts = weights.sum(0)
    mean = (shadows * weights).sum(0) / counts
    spread = (shadows - mean) * weights
    if own:
        variances = spread.square().sum(0) / (counts - 1) + FLAT**2
        return -0.5 * ((target - mean).square() / variances + variances.log()).sum(1)
    covariance = torch.einsum("snf,sng->fg", spread, spread) / (chosen.sum() - len(target))
    scale = covariance.diagonal().sqrt() + FLAT  # statistics have no unit in common
    correlation = covariance / scale[:, None] / scale + RIDGE * torch.eye(len(scale), dtype=torch.float64)
    root = torch.linalg.cholesky(correlation)
    away = torch.linalg.solve_triangular(root, ((target - mean) / scale).T, upper=False)
    return -0.5 * away.square().sum(0) - root.diagonal().log().sum() - scale.log().sum()


def _check(target: Tensor, shadows: Tensor, inside: Tensor) -> None:
    if target.ndim != 2 or shadows.shape[1:] != target.shape or inside.shape != shadows.shape[:2]:
        raise ValueError(
            "expected statistics [N, F] of the target, [S, N, F] of the shadows and a mask [S, N], got "
            f"{tuple(target.shape)}, {tuple(shadows.shape)} and {tuple(inside.shape)}"
        )
    if inside.dtype is not torch.bool:
        raise ValueError(f"expected a mask of bools, got {inside.dtype}; use inside == 1")
    fewest = min(int(inside.sum(0).min()), int((~inside).sum(0).min())) if inside.numel() else 0
    if fewest < FEWEST:
        raise ValueError(
            f"expected each sample in {FEWEST} shadows or more, and out of as many, got one with {fewest}; train more, "
            "or draw them with halves(…)"
        )
    if not (torch.isfinite(target).all() and torch.isfinite(shadows).all()):
        raise ValueError("expected finite statistics, got nan or inf; a model has diverged: lower its learning rate")
