"""Gradients Scrutinizer: an honest server's gradients are alike for like labels; a hijacker's are not.

Fu et al. 2023 ("Focusing on Pinocchio's nose: a Gradients Scrutinizer to thwart split-learning hijacking attacks using
intrinsic attributes", NDSS).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from math import e, exp, log
from typing import Any

import numpy as np
from torch import Tensor

from defenses.detectors.detector import Detector
from defenses.detectors.policies import Average, Policy
from splitlearn import Learner

__all__ = ["Alikeness", "GradientsScrutinizer", "alikeness", "gap", "scrutinizer_score"]

GAP_POWER, ERROR_WEIGHT, ERROR_OFFSET = 0.6, 7.0, e**-2
OVERLAP_WEIGHT, OVERLAP_OFFSET = 1.0, 1 / e
SHIFT, STEEPNESS = 0.7, 5.0
FITTED_DEGREE = 2


@dataclass(frozen=True)
class Alikeness:
    """Means and deviations of the cosines of a batch's gradients at the cut, over pairs of one label and of two."""

    same: float
    different: float
    same_std: float
    different_std: float


def alikeness(g: Tensor, y: Tensor) -> Alikeness | None:
    """Return how alike the samples' gradients ``g`` (batch, …) are by their labels; None without pairs of both kinds.

    A gradient that vanishes has no direction; its cosines count as 0.
    """
    flat = g.detach().flatten(1).double()
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)
    cosines = flat @ flat.T
    alike = y[:, None] == y[None, :]
    above = alike.new_ones(alike.shape).triu(1)  # every pair once, and no sample with itself
    same, different = cosines[alike & above], cosines[~alike & above]
    if not (len(same) and len(different)):
        return None
    return Alikeness(
        same.mean().item(),
        different.mean().item(),
        same.std(correction=0).item(),
        different.std(correction=0).item(),
    )


def gap(seen: Sequence[Alikeness]) -> float:
    """Return by how much gradients of one label are more alike in the last batch: mean cosine less mean cosine."""
    return seen[-1].same - seen[-1].different


def scrutinizer_score(seen: Sequence[Alikeness]) -> float:
    """Return the detection score of the paper, in [0, 1], at the last of the batches ``seen``; above ½ is honest.

    σ(5·(G·E·V − 0.7)) with cosines c read as (1 + c)/2: G = sign(γ)·|γ|^0.4 of the gap γ = (s − d)/(s + d);
    E = −ln(7·ε + e⁻²) of the error ε with which parabolas fit s and d over all batches so far, as root mean square;
    V = −ln(v + e⁻¹) of the overlap v of the intervals of one deviation around s and d, over their union.
    """
    same, different, same_std, different_std = (np.array([astuple(one) for one in seen]) / 2).T
    same, different = same + 0.5, different + 0.5
    gap = (same[-1] - different[-1]) / (same[-1] + different[-1])
    low, high = same[-1] - same_std[-1], same[-1] + same_std[-1]
    other_low, other_high = different[-1] - different_std[-1], different[-1] + different_std[-1]
    union = max(high, other_high) - min(low, other_low)
    overlap = max(0.0, min(high, other_high) - max(low, other_low)) / union if union > 0 else 1.0
    error = (_misfit(same) + _misfit(different)) / 2
    product = (
        np.sign(gap)
        * abs(gap) ** (1 - GAP_POWER)
        * -log(ERROR_WEIGHT * error + ERROR_OFFSET)
        * -log(OVERLAP_WEIGHT * overlap + OVERLAP_OFFSET)
    )
    return 1 / (1 + exp(-STEEPNESS * (float(product) - SHIFT)))


class GradientsScrutinizer(Detector):
    """Compares cosines of the samples' gradients at the cut, over pairs of one label and of two; changes nothing.

    One score for each batch in which there are pairs of both kinds: ``score`` of all such batches so far, by default
    the ``gap``; below ``threshold`` is suspicious, in the mean of ten where no other policy is given. The labels are
    those that were sent: an honest server's gradients follow these. Servers whose critic knows the classes evade it
    (URVFL, Yao et al. 2024).

    Deviation: the paper's own score is ``GradientsScrutinizer(learner, score=scrutinizer_score, threshold=0.5)``.
    Its constants fit larger batches and longer trainings; on small ones it suspects honest servers, which the gap
    does not.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        score: Callable[[Sequence[Alikeness]], float] = gap,
        threshold: float = 0.1,
        policy: Policy = Average(10),
        stop: bool = False,
    ):
        super().__init__(learner, threshold=threshold, policy=policy, stop=stop)
        self.score = score
        self._seen: list[Alikeness] = []

    def _taken(self, g: Tensor) -> tuple[Tensor | None, float | None]:
        assert self._labels is not None
        back = self.learner.backward(g)
        one = alikeness(g, self._labels.to(g.device))
        if one is None:
            return back, None
        self._seen.append(one)
        return back, self.score(self._seen)

    def _evidence(self) -> dict[str, Any]:
        return {"seen": [list(astuple(one)) for one in self._seen]}

    def _load_evidence(self, evidence: Mapping[str, Any]) -> None:
        self._seen = [Alikeness(*one) for one in evidence["seen"]]


def _misfit(values: np.ndarray) -> float:
    """Return the root mean square by which a parabola misses ``values``; 0 where it passes through all."""
    if len(values) <= FITTED_DEGREE + 1:
        return 0.0
    place = np.linspace(-1, 1, len(values))
    missed = values - np.polyval(np.polyfit(place, values, FITTED_DEGREE), place)
    return float(np.sqrt(np.mean(missed**2)))
