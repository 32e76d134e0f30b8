"""Releases: what one application of a mechanism gives away, as its accountants need it. Plain values, no noise drawn.

A noise multiplier is that of the adjacency in question: the noise's scale over the sensitivity under it. So a local
mechanism that clips to C states its noise over 2·C (one input replaced), DP-SGD over C (one sample added or removed).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, isfinite

__all__ = ["Clear", "GaussianRelease", "LaplaceRelease", "Release", "Releases", "ResponseRelease"]


@dataclass(frozen=True)
class GaussianRelease:
    """Gaussian noise: ``noise_multiplier`` is its standard deviation over the L2 sensitivity.

    With ``sampling`` q below 1 each sample took part with probability q, on its own and in secret (Poisson sampling);
    it is then a statement under adding or removing one sample (Mironov, Talwar and Zhang 2019, arXiv:1908.10530).
    """

    noise_multiplier: float
    sampling: float = 1.0

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        if not 0 < self.sampling <= 1:
            raise ValueError(f"expected a sampling probability above 0 and of at most 1, got {self.sampling}")


@dataclass(frozen=True)
class LaplaceRelease:
    """Laplace noise on every entry: ``noise_multiplier`` is its scale b over the L1 sensitivity of the whole vector.

    (Dwork, McSherry, Nissim and Smith 2006.) A release alone is ε-DP with ε = 1 / noise_multiplier. However the
    sensitivity is shared out among the entries, no shift tells more than one entry that moves by all of it: see
    docs/decisions/0008-laplace-in-many-dimensions.md.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)


@dataclass(frozen=True)
class ResponseRelease:
    """k-ary randomised response: the true one of ``classes`` answers e^``epsilon`` times as likely as any other.

    (Warner 1965; Kairouz, Oh and Viswanath 2014, arXiv:1407.1338.)
    """

    epsilon: float
    classes: int

    def __post_init__(self) -> None:
        if not (isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"expected a finite ε above 0, got {self.epsilon}; it is that of one answer")
        if self.classes < 2:
            raise ValueError(f"expected at least 2 classes, got {self.classes}; one answer says nothing")

    @property
    def truth(self) -> float:
        """The probability of the true answer: e^ε / (e^ε + classes − 1)."""
        return 1 / (1 + (self.classes - 1) * exp(-self.epsilon))

    @property
    def other(self) -> float:
        """The probability of each answer that is not true."""
        return self.truth * exp(-self.epsilon)


@dataclass(frozen=True)
class Clear:
    """Something that crosses without protection: its ε is infinite."""


Release = GaussianRelease | LaplaceRelease | ResponseRelease | Clear
Releases = Mapping[Release, int]
"""How often each release was made of what one neighbour may change."""


def _check_noise(noise_multiplier: float) -> None:
    if not (isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ValueError(
            f"expected a finite noise multiplier above 0, got {noise_multiplier}; without noise use Clear()"
        )
