"""Coarse activations: few levels a sample, and no more than two. Both train straight through.

The gradient of the rounding is the identity (Bengio, Léonard & Courville 2013, arXiv:1308.3432).
"""

from dataclasses import dataclass

from torch import Tensor

from splitlearn import Guard

__all__ = ["Binarised", "Quantised"]

MOST_BITS = 16


@dataclass(frozen=True)
class Quantised(Guard):
    """Sends each sample's activation on 2^``bits`` levels, evenly spaced from its least to its greatest entry.

    The error of an entry is at most range / (2·(2^bits − 1)). The codec ``Int8`` rounds in the same way to 8 bits and
    saves bytes; this one is coarser where asked for, is part of the graph, and sends numbers of the same size.

    It bounds nothing: the rounding is a fixed map, and who knows it trains a decoder on levels, or inverts through
    the straight-through gradient. Least and greatest entry of each sample arrive exactly.
    """

    bits: int

    def __post_init__(self) -> None:
        if not (type(self.bits) is int and 1 <= self.bits <= MOST_BITS):
            raise ValueError(f"expected whole bits from 1 to {MOST_BITS}, got {self.bits!r}; for example Quantised(2)")

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` rounded to its sample's levels, with the identity as its gradient."""
        rows = z.detach().reshape(len(z), -1)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        step = (high - low) / (2**self.bits - 1)
        levels = ((rows - low) / step.masked_fill(step == 0, 1)).round()
        return _straight_through(z, low + levels * step)


@dataclass(frozen=True)
class Binarised(Guard):
    """Sends one of two numbers an entry: the sample's mean, plus or minus its mean absolute deviation.

    One bit an entry and two numbers a sample, as XNOR-Net binarises (Rastegari et al. 2016, arXiv:1603.05279).
    Deviations: about the mean, since activations after a ReLU have one sign; the gradient is the identity everywhere,
    without a clip.

    It bounds nothing: the signs of a wide layer hold a small image. Who knows it trains a decoder on them.
    """

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` binarised, with the identity as its gradient; an entry at the mean counts as above it."""
        rows = z.detach().reshape(len(z), -1)
        centred = rows - rows.mean(1, keepdim=True)
        scale = centred.abs().mean(1, keepdim=True)
        return _straight_through(z, rows.mean(1, keepdim=True) + scale.where(centred >= 0, -scale))


def _straight_through(z: Tensor, rows: Tensor) -> Tensor:
    sent = rows.reshape(z.shape)
    return z + (sent - z).detach() if z.requires_grad else sent
