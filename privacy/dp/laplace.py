"""The Laplace mechanism on a single activation: clipped in L1 norm, then noised (Dwork et al. 2006)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from privacy.dp.clipping import check_clip, check_multiplier, clipped
from privacy.dp.releases import Clear, LaplaceRelease, Release
from splitlearn import Guard, Kind

__all__ = ["ClippedLaplace"]


@dataclass(frozen=True)
class ClippedLaplace(Guard):
    """Sends each activation scaled down to an L1 norm of at most ``clip``, plus Laplace noise on every entry.

    (Dwork, McSherry, Nissim and Smith 2006, "Calibrating noise to sensitivity in private data analysis".)

    - Adjacency: one input is replaced by any other; local, like ``ClippedGaussian``.
    - Sensitivity: 2 · ``clip`` in L1.
    - Noise: Laplace of scale ``scale`` = ``noise_multiplier`` · 2 · ``clip``, drawn anew for every release; one release
      is ε-DP with ε = 1 / ``noise_multiplier`` and δ = 0.
    - Protects and does not protect: as ``ClippedGaussian``, caveats on floating point and generator included. The L1
      norm of an activation grows with the number of its entries, so that Gaussian noise is the smaller one for all but
      the narrowest cuts.
    """

    clip: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        check_clip(self.clip, "L1")
        check_multiplier(self.noise_multiplier, "scale ÷ sensitivity")

    @property
    def sensitivity(self) -> float:
        """The greatest L1 distance between the clipped activations of two samples: 2 · clip."""
        return 2 * self.clip

    @property
    def scale(self) -> float:
        """The scale b of the noise on each entry, in the activation's unit; its standard deviation is √2 · b."""
        return self.noise_multiplier * self.sensitivity

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    @property
    def releases(self) -> dict[Kind, Release]:
        """What one crossing releases, by kind."""
        return {Kind.ACTIVATION: LaplaceRelease(self.noise_multiplier) if self.noise_multiplier else Clear()}

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` (batch first) with each row clipped and noised; ``ValueError`` if an entry is not finite."""
        bounded = clipped(z, self.clip, 1)
        if not self.noise_multiplier:
            return bounded
        # The difference of two exponentials is Laplace, and draws from the generator that the party swaps in.
        noise = torch.empty_like(bounded).exponential_() - torch.empty_like(bounded).exponential_()
        return bounded + self.scale * noise
