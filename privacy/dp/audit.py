"""An audit of a claimed ε: paired worlds are told apart, and how well bounds ε from below, with confidence.

Jagielski, Ullman and Oprea 2020, "Auditing differentially private machine learning" (arXiv:2006.07709); Nasr et al.
2021 (arXiv:2101.04535). Two neighbours, many draws of what the mechanism releases of each; a score orders the draws, a
threshold on it is chosen on some of them, and its error rates are bounded on fresh ones (Clopper and Pearson 1934).
(ε, δ)-DP allows no more than TPR ≤ e^ε · FPR + δ, so that ε ≥ log((TPR − δ) / FPR).

A bound above the claim convicts the mechanism (or the claim). One below acquits nobody: the worlds or the score may be
poor ones, and n draws cannot show more than about log(n / 3.7).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import numpy
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from torch import Tensor

from privacy.dp.clipping import clipped
from privacy.dp.gaussian import ClippedGaussian
from privacy.dp.labels import RandomisedResponse
from privacy.dp.laplace import ClippedLaplace

__all__ = ["Bound", "FittedRatio", "audit", "audit_guard", "log_ratio", "lower_bound"]

Scores = NDArray[numpy.float64]
Score = Callable[[Tensor], Tensor]
CANDIDATES = 400  # thresholds tried, at equally many draws from one to the next in the rarer tail


@dataclass(frozen=True)
class Bound:
    """``lower``: with probability ``confidence`` at least, the mechanism's ε (at the δ asked for) is above it.

    It comes from ``hits`` of ``draws`` in one world against ``misses`` in the other, at ``threshold`` or beyond.
    """

    lower: float
    confidence: float
    draws: int
    threshold: float
    hits: int
    misses: int

    def convicts(self, epsilon: float) -> bool:
        """Whether a claim of this ε is refuted, at this confidence."""
        return self.lower > epsilon


def audit(
    worlds: Callable[[int, int], Tensor],
    score: Score | None = None,
    *,
    delta: float,
    draws: int = 100_000,
    confidence: float = 0.95,
    fitting: int = 20_000,
) -> Bound:
    """Return a lower bound on the ε of the mechanism behind ``worlds``.

    ``worlds(which, n)`` returns n independent draws [n, …] of all that an observer sees in world 0 or 1: everything
    that the run releases of two neighbours, other samples' rows included. ``score`` maps them to numbers [n], greater
    where world 1 is likelier; None fits one on ``fitting`` draws of each world (``FittedRatio``). ``draws`` of each
    choose the threshold, as many fresh ones are judged by it.
    """
    _check(delta, confidence)
    if draws < 100 or (score is None and fitting < 2):
        raise ValueError(f"expected at least 100 draws, and 2 to fit on, got {draws} and {fitting}")
    judge = score if score is not None else FittedRatio.of(worlds(0, fitting), worlds(1, fitting))
    found = [judge(worlds(which, draws)).double().cpu().numpy() for which in (0, 1, 0, 1)]
    return lower_bound(*found, delta=delta, confidence=confidence)


def lower_bound(
    chosen_0: Scores, chosen_1: Scores, fresh_0: Scores, fresh_1: Scores, *, delta: float, confidence: float = 0.95
) -> Bound:
    """Return the bound from scores [n] in each world; the threshold is chosen on the first two, judged on the others.

    Either world may be the likelier one beyond the threshold: world 1 in the upper tail, or world 0 in the lower one.
    (Scores that are greater where world 0 is likelier bound nothing: turn their sign.)
    """
    _check(delta, confidence)
    if not all(numpy.isfinite(scores).all() and len(scores) for scores in (chosen_0, chosen_1, fresh_0, fresh_1)):
        raise ValueError("expected finite scores of every world, at least one each, got nan, inf or none")
    alpha = (1 - confidence) / 2  # two rates are bounded, each on one side
    best = (-numpy.inf, 1, 0.0)
    for sign in (1, -1):  # world 1 in the upper tail, or world 0 in the lower one
        likely, rare = (chosen_1, chosen_0) if sign == 1 else (-chosen_0, -chosen_1)
        thresholds = _thresholds(likely)
        bounds = _bounds(_beyond(likely, thresholds), len(likely), _beyond(rare, thresholds), len(rare), delta, alpha)
        place = int(bounds.argmax())
        best = max(best, (float(bounds[place]), sign, float(thresholds[place])))
    _, sign, threshold = best
    likely, rare = (fresh_1, fresh_0) if sign == 1 else (-fresh_0, -fresh_1)
    hits, misses = int((likely >= threshold).sum()), int((rare >= threshold).sum())
    (bound,) = _bounds(numpy.array([hits]), len(likely), numpy.array([misses]), len(rare), delta, alpha)
    return Bound(max(0.0, float(bound)), confidence, len(fresh_0), sign * threshold, hits, misses)


@dataclass(frozen=True)
class FittedRatio:
    """The log-likelihood ratio of two Gaussians fitted to draws of both worlds: what an attacker learns by trying.

    It finds shifts (too little noise), changed spreads (noise that depends on the data) and correlations (noise shared
    by several samples), all in first and second moments. Keep an observation to some tens of numbers.
    """

    means: tuple[Tensor, Tensor]
    factors: tuple[Tensor, Tensor]  # lower triangular, of the covariances

    @classmethod
    def of(cls, world_0: Tensor, world_1: Tensor) -> "FittedRatio":
        """Return the ratio fitted to draws [n, …] of each world; n well above the size of an observation."""
        means, factors = [], []
        both = _rows(torch.cat([world_0, world_1]))
        # A ridge far below any noise, for each number in its own unit: noise that several samples share leaves
        # directions without any, and what is sent as it is has none at all. The rest is rounding.
        ridge = 1e-9 * both.var(0) + 1e-20 * both.square().mean(0) + 1e-100
        for draws in (world_0, world_1):
            rows = _rows(draws)
            means.append(rows.mean(0))
            factors.append(torch.linalg.cholesky(torch.atleast_2d(rows.T.cov()) + ridge.diag()))
        return cls((means[0], means[1]), (factors[0], factors[1]))

    def __call__(self, draws: Tensor) -> Tensor:
        """Return log p₁ − log p₀ for draws [n, …], as [n]."""
        rows = _rows(draws)
        logs = []
        for mean, factor in zip(self.means, self.factors, strict=True):
            white = torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False)
            logs.append(-0.5 * white.square().sum(0) - factor.diagonal().log().sum())
        return logs[1] - logs[0]


def audit_guard(
    guard: ClippedGaussian | ClippedLaplace | RandomisedResponse,
    world_0: Tensor,
    world_1: Tensor,
    *,
    delta: float,
    releases: int = 1,
    draws: int = 100_000,
    confidence: float = 0.95,
) -> Bound:
    """Return a lower bound on the ε of ``releases`` of one sample by a guard, the sample being one of two.

    ``world_0`` and ``world_1`` are the two neighbours' activations (without a batch), or labels. The attacker knows
    both, and the mechanism: it scores by the exact likelihood ratio (``log_ratio``), summed over the releases.
    """
    if not isinstance(guard, RandomisedResponse) and not guard.noise_multiplier:
        raise ValueError(f"expected a mechanism with noise, got {guard!r}: nothing bounds its ε, and no audit need")

    def worlds(which: int, count: int) -> Tensor:
        true = (world_0, world_1)[which]
        total = torch.zeros(count, dtype=torch.float64)
        chunk = max(1, 4_000_000 // max(1, true.numel()))  # rows at once, so that memory stays small
        for begin in range(0, count, chunk):
            rows = true.expand(min(chunk, count - begin), *true.shape)
            for _ in range(releases):
                sent = guard.label(rows) if isinstance(guard, RandomisedResponse) else guard.activation(rows)
                total[begin : begin + len(rows)] += log_ratio(guard, sent, world_0, world_1)
        return total

    return audit(worlds, lambda scores: scores, delta=delta, draws=draws, confidence=confidence)


def log_ratio(guard: object, sent: Tensor, world_0: Tensor, world_1: Tensor) -> Tensor:
    """Return log p₁ − log p₀ [n] of what was sent [n, …], given the sample's activation, or label, in each world."""
    match guard:
        case ClippedGaussian(clip):
            centre = [clipped(world[None], clip, 2)[0].double() for world in (world_0, world_1)]
            shift = centre[1] - centre[0]
            return ((sent.double() - (centre[0] + centre[1]) / 2) * shift).flatten(1).sum(1) / guard.std**2
        case ClippedLaplace(clip):
            centre = [clipped(world[None], clip, 1)[0].double() for world in (world_0, world_1)]
            away = [(sent.double() - one).abs().unsqueeze(-1).flatten(1).sum(1) for one in centre]
            return (away[0] - away[1]) / guard.scale
        case RandomisedResponse():
            return guard.epsilon * ((sent == world_1).double() - (sent == world_0).double())
    raise ValueError(f"expected a mechanism whose density is known, got {guard!r}; audit(worlds) fits one")


def _rows(draws: Tensor) -> Tensor:
    return draws.reshape(len(draws), -1).double()


def _check(delta: float, confidence: float) -> None:
    if not 0 <= delta < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected δ from 0 to below 1 and a confidence between 0 and 1, got {delta} and {confidence}")


def _thresholds(scores: Scores) -> Scores:
    """Return candidate thresholds: quantiles of the world that is to lie beyond them, finer in the far tail."""
    shares = numpy.unique(
        numpy.concatenate([numpy.linspace(0, 1, CANDIDATES), 1 - numpy.geomspace(1e-5, 1, CANDIDATES)])
    )
    return numpy.unique(numpy.quantile(scores, shares, method="lower"))


def _beyond(scores: Scores, thresholds: Scores) -> NDArray[numpy.int64]:
    return len(scores) - numpy.searchsorted(numpy.sort(scores), thresholds, side="left")


def _bounds(
    hits: NDArray[numpy.int64], of: int, misses: NDArray[numpy.int64], of_rare: int, delta: float, alpha: float
) -> Scores:
    """Return log((TPR − δ) / FPR), each rate on the side of doubt; −∞ where there is nothing to divide."""
    low = numpy.where(hits > 0, beta.ppf(alpha, numpy.maximum(hits, 1), of - hits + 1), 0.0)
    high = numpy.where(misses < of_rare, beta.ppf(1 - alpha, misses + 1, numpy.maximum(of_rare - misses, 1)), 1.0)
    above = low - delta
    return numpy.where(above > 0, numpy.log(numpy.maximum(above, 1e-300)) - numpy.log(high), -log(1e300))
