"""The Gaussian mechanism on a single activation: clipped in norm, then noised (Dwork & Roth 2014, appendix A)."""

from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from splitlearn import Guard

__all__ = ["ClippedGaussian"]


@dataclass(frozen=True)
class ClippedGaussian(Guard):
    """Sends each activation scaled down to an L2 norm of at most ``clip``, plus Gaussian noise on every entry.

    - Adjacency: one sample is replaced by any other. The mechanism is local: each release depends on one sample. So
      nothing below may mix samples: batch norm in training does (one replaced sample then moves every row of the
      batch, further than the sensitivity), and voids the proof.
    - Sensitivity: 2 · ``clip`` in L2, since any two clipped activations lie in one ball of that radius.
    - Noise: N(0, ``std``²) with ``std`` = ``noise_multiplier`` · 2 · ``clip``, drawn anew for every release.
    - Protects: what one release tells about the sample behind it, from whoever reads the wire.
    - Does not protect: labels, gradients, or weights that were trained on the data; nor one sample's releases taken
      together. Every epoch and every prediction is a release, and ``zcdp`` adds up over all of them. This class
      keeps no account and claims no ε for a training run.

    ``noise_multiplier`` 0 clips only and protects nothing. The gradient runs through the clipping, so that
    training and an adaptive attack do, too. The noise is floating-point: its lowest bits, and the rounding of the
    clipped norm, are no part of the proof (Mironov 2012, "On significance of the least significant bits for
    differential privacy"). Nor is torch's generator, which no cryptographer made: it starts from the ``seed`` and the
    name of its ``Learner``, and who knows both draws the same noise and takes it off again. Keep the seed secret
    outside of experiments.
    """

    clip: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        if not (isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"expected a finite clip above 0, got {self.clip}; it is the largest L2 norm that is sent")
        if not (isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(
                f"expected a finite noise_multiplier of 0 or more, got {self.noise_multiplier}; it is σ ÷ sensitivity"
            )

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

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` (batch first) with each row clipped and noised; ``ValueError`` if an entry is not finite."""
        if not z.is_floating_point() or not torch.isfinite(z).all():
            raise ValueError(
                f"expected finite activations of a floating-point type, got {z.dtype} with "
                f"{int((~torch.isfinite(z)).sum())} entries that are nan or inf; lower the learning rate"
            )
        # A guarded norm: that of a row of zeros has no gradient, and clipping leaves such a row as it is. Squares
        # overflow in half precision.
        rows = z.unsqueeze(-1).flatten(1)
        norms = (rows if z.dtype is torch.float64 else rows.float()).norm(dim=1).clamp(min=self.clip)
        clipped = z * (self.clip / norms).to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
        return clipped + self.std * torch.randn_like(clipped)
