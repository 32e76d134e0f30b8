"""Noise on activations that are not clipped: heuristics, of which no ε is claimed.

Titcombe, Hall, Papadopoulos & Romanini 2021, "Practical defences against model inversion attacks for split neural
networks" (arXiv:2104.05743), put Laplace noise on activations as they are. Without a clip one sample may move its
activation by any amount, so that no noise hides it for sure: ``privacy.ClippedGaussian`` is the mechanism with a proof.

Who knows these guards trains a decoder on noisy activations (``attacks.Decoder`` asks anew in every epoch), averages
the releases of a sample (each epoch and prediction is one, and the error falls with their number), or steers the
client to activations that dwarf the noise (feature-space hijacking).
"""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from splitlearn import Guard

__all__ = ["GaussianNoise", "LaplaceNoise"]


@dataclass(frozen=True)
class GaussianNoise(Guard):
    """Sends z + N(0, ``std``²), drawn anew for each entry of each release; ``std`` is in the activation's unit.

    It bounds nothing: it is no differential privacy, whatever ``std`` is. 0 sends z as it is.
    """

    std: float

    def __post_init__(self) -> None:
        _check_spread(self.std, "std")

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` with noise on every entry."""
        return z + self.std * torch.randn_like(z) if self.std else z


@dataclass(frozen=True)
class LaplaceNoise(Guard):
    """Sends z + Laplace(0, ``scale``), drawn anew for each entry of each release; its standard deviation is √2·scale.

    It bounds nothing: it is no differential privacy, whatever ``scale`` is. 0 sends z as it is.
    """

    scale: float

    def __post_init__(self) -> None:
        _check_spread(self.scale, "scale")

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` with noise on every entry: the difference of two exponentials is Laplace."""
        if not self.scale:
            return z
        up, down = torch.empty_like(z).exponential_(), torch.empty_like(z).exponential_()
        return z + self.scale * (up - down)


def _check_spread(spread: float, name: str) -> None:
    if not (isfinite(spread) and spread >= 0):
        raise ValueError(f"expected a finite {name} of 0 or more, got {spread}; it is in the activation's unit")
