"""Sparse activations: only the largest entries of each sample are sent."""

from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn import Guard
from splitlearn.codecs import kept_of

__all__ = ["TopKActivations"]


@dataclass(frozen=True)
class TopKActivations(Guard):
    """Sends the ``fraction`` of each sample's entries, at least one, largest in magnitude; the rest is sent as zeros.

    It keeps what the codec ``TopK`` keeps, and differs in three ways: it is part of the graph, so that only the entries
    sent have a gradient (the codec trains straight through); it works in a loop without a wire; it saves no bytes.
    Both together send what either sends. 1 sends z as it is.

    It bounds nothing: the largest entries, and which ones they are, tell the most of an input. Who knows it trains a
    decoder on what is left.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"expected a fraction of entries in (0, 1], got {self.fraction}; as in TopKActivations(.1)"
            )

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` with all but its samples' largest entries set to zero."""
        rows = z.reshape(len(z), -1)
        places = rows.detach().abs().topk(kept_of(rows.shape[1], self.fraction), dim=1, sorted=False).indices
        mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, places, True)
        return rows.masked_fill(~mask, 0).reshape(z.shape)
