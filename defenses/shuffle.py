"""Patch shuffling: the rows of an activation in another order for each sample.

Yao et al. 2022, "Privacy-preserving split learning via patch shuffling over transformers" (ICDM).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn import Guard

__all__ = ["PatchShuffle"]


@dataclass(frozen=True)
class PatchShuffle(Guard):
    """Sends the T rows (tokens, patches) of each activation [N, T, D] in an order drawn anew at each release.

    For models whose top does not ask for the order: positions are added below the cut, and attention and the mean
    over rows treat all rows alike. ``fraction`` of the rows, chosen at random, change places among themselves; 0 sends
    z as it is. Padding is shuffled with the rest.

    Of the paper's three shuffles only the one of positions is here, not those across the batch and the spectrum.

    It bounds nothing: every row arrives unchanged. Who knows it reads the position off each row, where one was added
    below, or matches rows to places: one estimate a row and place, assigned by the Hungarian method.
    """

    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"expected a fraction of rows in [0, 1], got {self.fraction}; PatchShuffle() shuffles all")

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed puts the rows back."""
        return True

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` with its rows shuffled; ``ValueError`` unless it is [N, T, D]."""
        if z.ndim != 3:
            raise ValueError(
                f"expected activations [N, T, D] of rows to shuffle, got shape {tuple(z.shape)}; cut a token model"
            )
        num, length, _ = z.shape
        moved = round(self.fraction * length)
        if not moved:
            return z
        drawn = torch.rand(num, length, device=z.device).argsort(1)[:, :moved]  # some places, in random order
        order = torch.arange(length, device=z.device).repeat(num, 1).scatter_(1, drawn.sort(1).values, drawn)
        return z.gather(1, order[:, :, None].expand_as(z))
