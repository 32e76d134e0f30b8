"""Clipping: each row scaled down to a norm of at most a bound, so that two of them differ by at most twice as much."""

from math import isfinite
from typing import Literal

import torch
from torch import Tensor

__all__ = ["check_clip", "check_multiplier", "clipped"]


def clipped(z: Tensor, clip: float, norm: Literal[1, 2]) -> Tensor:
    """Return ``z`` (batch first) with each row scaled down to an L1 or L2 norm of at most ``clip``.

    A row within the bound comes back bit for bit. ``ValueError`` for entries that are nan or inf.
    """
    if not z.is_floating_point() or not torch.isfinite(z).all():
        raise ValueError(
            f"expected finite values of a floating-point type to clip, got {z.dtype} with "
            f"{int((~torch.isfinite(z)).sum())} entries that are nan or inf; lower the learning rate"
        )
    # A guarded norm: that of a row of zeros has no gradient, and clipping leaves such a row as it is. In half precision
    # squares overflow, and a small factor would be rounded to a multiple of the bound.
    wide = z if z.dtype is torch.float64 else z.float()
    norms = wide.unsqueeze(-1).flatten(1).norm(p=norm, dim=1).clamp(min=clip)
    return (wide * (clip / norms).reshape(-1, *[1] * (z.ndim - 1))).to(z.dtype)


def check_clip(clip: float, norm: str) -> None:
    """Raise ``ValueError`` for a clip that is no bound."""
    if not (isfinite(clip) and clip > 0):
        raise ValueError(f"expected a finite clip above 0, got {clip}; it is the largest {norm} norm that is sent")


def check_multiplier(noise_multiplier: float, what: str) -> None:
    """Raise ``ValueError`` for a noise multiplier that is none; 0 clips only."""
    if not (isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"expected a finite noise_multiplier of 0 or more, got {noise_multiplier}; it is {what}")
