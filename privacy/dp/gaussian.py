"""The Gaussian mechanism on a single activation: clipped in norm, then noised (Dwork & Roth 2014, appendix A)."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from privacy.dp.clipping import check_clip, check_multiplier, clipped
from privacy.dp.releases import Clear, GaussianRelease, Release
from splitlearn import Guard, Kind

__all__ = ["ClippedGaussian"]


@dataclass(frozen=True)
class ClippedGaussian(Guard):
    """Sends each activation scaled down to an L2 norm of at most ``clip``, plus Gaussian noise on every entry.

    - Adjacency: one input is replaced by any other. The mechanism is local: each release depends on one sample. So
      nothing below may mix samples: batch norm in training does (one replaced sample then moves every row of the
      batch, further than the sensitivity), and voids the proof.
    - Sensitivity: 2 · ``clip`` in L2, since any two clipped activations lie in one ball of that radius.
    - Noise: N(0, ``std``²) with ``std`` = ``noise_multiplier`` · 2 · ``clip``, drawn anew for every release.
    - Protects: what one release tells about the input behind it, from whoever reads the wire. Who sees whose row it is
      gains nothing by it, and subsampling amplifies nothing.
    - Does not protect: labels, gradients, or weights that were trained on the data; nor one sample's releases taken
      together. Every epoch and every prediction is a release, and they compose: ``Accounted`` enters them into a
      ``Budget``, which says when an ε for each sample holds at all (a bottom that trains on the data voids it).

    ``noise_multiplier`` 0 clips only and protects nothing. The gradient runs through the clipping, so that
    training and an adaptive attack do, too. The noise is floating-point: its lowest bits, and the rounding of the
    clipped norm, are no part of the proof (Mironov 2012, "On significance of the least significant bits for
    differential privacy"). Nor is torch's generator, which no cryptographer made: it starts from the ``seed`` and the
    name of its ``Learner``, and who knows both draws the same noise and takes it off again. Give no seed outside of
    experiments: it is then drawn by chance. In a loop of one's own the noise comes from torch's global generator, of
    which the same holds.
    """

    clip: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        check_clip(self.clip, "L2")
        check_multiplier(self.noise_multiplier, "σ ÷ sensitivity")

    @property
    def sensitivity(self) -> float:
        """The greatest L2 distance between the clipped activations of two samples: 2 · clip."""
        return 2 * self.clip

    @property
    def std(self) -> float:
        """The standard deviation of the noise on each entry, in the activation's unit."""
        return self.noise_multiplier * self.sensitivity

    @property
    def zcdp(self) -> float:
        """The ρ of zero-concentrated DP of a single release: 1 / (2 · noise_multiplier²); infinite without noise.

        Bun & Steinke 2016 (arXiv:1605.02065), proposition 1.6.
        """
        return inf if self.noise_multiplier == 0 else 1 / (2 * self.noise_multiplier**2)

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    @property
    def releases(self) -> dict[Kind, Release]:
        """What one crossing releases, by kind."""
        return {Kind.ACTIVATION: GaussianRelease(self.noise_multiplier) if self.noise_multiplier else Clear()}

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` (batch first) with each row clipped and noised; ``ValueError`` if an entry is not finite."""
        bounded = clipped(z, self.clip, 2)
        return bounded + self.std * torch.randn_like(bounded)
