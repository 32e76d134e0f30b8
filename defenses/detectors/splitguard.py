"""SplitGuard: false labels now and then, which an honest server's gradients betray.

Erdoğan, Küpçü and Çiçek 2022 ("SplitGuard: detecting and mitigating training-hijacking attacks in split learning",
WPES, arXiv:2108.09052).
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import acos, exp
from typing import Any

import torch
from torch import Tensor

from defenses.detectors.detector import Detector, first_gradient
from defenses.detectors.policies import Average, Policy
from splitlearn import Learner
from splitlearn.randomness import Randomness

__all__ = ["Pile", "SplitGuard", "splitguard_score"]

TINY = 1e-12  # keeps the quotient a number where no magnitude differs


@dataclass
class Pile:
    """Gradients piled up: their sum, the sum of their norms, their number."""

    total: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    norms: float = 0.0
    count: int = 0

    def add(self, gradient: Tensor) -> None:
        """Lay a gradient on top."""
        self.total, self.norms = self.total + gradient, self.norms + gradient.norm().item()
        self.count += 1

    def with_all(self, other: "Pile") -> "Pile":
        """Return a pile of both."""
        return Pile(self.total + other.total, self.norms + other.norms, self.count + other.count)

    @property
    def magnitude(self) -> float:
        """The mean norm."""
        return self.norms / self.count


def splitguard_score(fake: Pile, first: Pile, second: Pile, *, alpha: float = 5.0, beta: float = 2.0) -> float:
    """Return σ(α·S)^β, in [0, 1]: near 1 where false labels change the gradients, as they do with an honest server.

    S = (θ(F, R)·d(F, R) − θ(R₁, R₂)·d(R₁, R₂)) / (d(F, R) + d(R₁, R₂)) for the gradients F of batches with false
    labels and two halves R₁, R₂ of the regular ones R; d is the difference of mean norms, θ the angle between means.
    """
    regular = first.with_all(second)
    apart, within = _difference(fake, regular), _difference(first, second)
    s = (_angle(fake, regular) * apart - _angle(first, second) * within) / (apart + within + TINY)
    return (1 / (1 + exp(-alpha * s))) ** beta


class SplitGuard(Detector):
    """Sends a batch with false labels with ``probability``, after the first ``start`` batches, and compares gradients.

    A share ``share`` of such a batch's labels is replaced, each by another class at random. The gradients that come
    back for it are looked at and not trained with, so that a step of the client is lost; the server trains with
    them, as the paper has it. There is one score for each such batch; below ``threshold`` is suspicious, in the mean
    of ten where no other policy is given. The first score or two are over few gradients, and low with honest servers
    too: ``Fast()`` needs a later ``start``.

    Gradients are those of the first layer's weights, from the batches since ``start``; with a guard's penalty in them.
    Who knows ``seed`` knows which batches are false: without one it is drawn by chance. Servers that tell the false
    batches by a model of their own evade it (SplitSpy, Fu et al. 2023).

    Deviation: every false label is drawn on its own; the authors' notebook shifts those of a batch by one number.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        num_classes: int,
        probability: float = 0.1,
        share: float = 1.0,
        start: int = 20,
        alpha: float = 5.0,
        beta: float = 2.0,
        threshold: float = 0.9,
        policy: Policy = Average(10),
        stop: bool = False,
        seed: int | None = None,
    ):
        super().__init__(learner, threshold=threshold, policy=policy, stop=stop)
        if num_classes < 2:
            raise ValueError(f"expected at least two classes, of which one can be a false label, got {num_classes}")
        if not 0 < probability < 1 or not 0 < share <= 1:
            raise ValueError(
                f"expected a probability in (0, 1) and a share in (0, 1], got {probability} and {share}; the paper "
                "takes 0.1 and 1"
            )
        if start < 0 or alpha <= 0 or beta <= 0:
            raise ValueError(f"expected start ≥ 0, alpha and beta > 0, got {start}, {alpha} and {beta}")
        first_gradient(learner)  # one that does not train is an error now, not after the first batch
        self.num_classes, self.probability, self.share, self.start = num_classes, probability, share, start
        self.alpha, self.beta = alpha, beta
        self._fake, self._first, self._second = Pile(), Pile(), Pile()
        self._rng = Randomness(secrets.randbits(48) if seed is None else seed, learner.name, "splitguard")
        self._false = False

    def _chosen(self, y: Tensor) -> Tensor:
        self._false = False
        if y.is_floating_point() or (y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes):
            raise ValueError(
                f"{self.name}: expected labels from 0 to {self.num_classes - 1}, got {y.dtype} from {y.min().item()} "
                f"to {y.max().item()}; set SplitGuard(num_classes=…)"
            )
        if self.batches < self.start:
            return y
        with self._rng.own(torch.device("cpu")):
            self._false = torch.rand(()).item() < self.probability
            if not self._false:
                return y
            shift = torch.randint(1, self.num_classes, y.shape)
            shift[torch.randperm(len(y))[max(1, round(self.share * len(y))) :]] = 0
        return (y + shift.to(y.device)) % self.num_classes

    def _taken(self, g: Tensor) -> tuple[Tensor | None, float | None]:
        if self._false:
            self._false = False
            back = _without_update(self.learner, g)
            self._fake.add(first_gradient(self.learner))
            if not (self._first.count and self._second.count):
                return back, None
            return back, splitguard_score(self._fake, self._first, self._second, alpha=self.alpha, beta=self.beta)
        back = self.learner.backward(g)
        if self.batches >= self.start:
            with self._rng.own(torch.device("cpu")):
                half = self._first if torch.rand(()).item() < 0.5 else self._second
            half.add(first_gradient(self.learner))
        return back, None

    def _evidence(self) -> dict[str, Any]:
        piles = [self._fake, self._first, self._second]
        return {
            "piles": [{"total": pile.total.clone(), "norms": pile.norms, "count": pile.count} for pile in piles],
            "rng": self._rng.state_dict(),
        }

    def _load_evidence(self, evidence: Mapping[str, Any]) -> None:
        self._fake, self._first, self._second = (Pile(**pile) for pile in evidence["piles"])
        self._rng.load_state_dict(evidence["rng"])
        self._false = False


class _Still(torch.optim.SGD):
    """An optimizer that leaves its parameters as they are."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        pass


def _without_update(learner: Learner, g: Tensor) -> Tensor | None:
    """Have the learner take ``g`` as ever, but leave its weights and its optimizer's state as they are."""
    optimizer = learner.optimizer
    assert optimizer is not None
    learner.optimizer = _Still([parameter for group in optimizer.param_groups for parameter in group["params"]], lr=0.0)
    try:
        return learner.backward(g)
    finally:
        learner.optimizer = optimizer


def _difference(a: Pile, b: Pile) -> float:
    return abs(a.magnitude - b.magnitude)


def _angle(a: Pile, b: Pile) -> float:
    """Return the angle between the means in radians; 0 where one of them vanishes."""
    norms = a.total.norm().item() * b.total.norm().item()
    return acos(min(1.0, max(-1.0, (a.total @ b.total).item() / norms))) if norms > 0 else 0.0
