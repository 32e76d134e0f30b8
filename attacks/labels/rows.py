"""What crossed, a row a sample: activations, gradients of each sample's own loss, and the rows whose labels are known.

What comes back is the gradient of a batch's mean loss: a row of n samples is 1/n of its sample's own gradient, so that
rows of batches of different sizes compare only once they are multiplied by n.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.labels.guess import Crossed
from splitlearn import View

__all__ = ["activations", "gradients", "hinted", "normalised"]


def activations(batches: Sequence[Crossed]) -> Tensor:
    """Return the activations of all batches, [N, d], in the order in which they crossed."""
    return torch.cat([one.z.flatten(1) for one in batches])


def gradients(batches: Sequence[Crossed]) -> Tensor:
    """Return the gradient of each sample's own loss in its activation, [N, d], in the order in which they crossed."""
    return torch.cat([len(one.g) * one.g.flatten(1) for one in batches])


def normalised(rows: Tensor) -> Tensor:
    """Return the rows [N, d] at length 1; a row of zeros stays one."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def hinted(view: View, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows [m, …] of [N, …] whose labels the adversary knows, and those labels [m].

    Raises ``LookupError`` where no hints are granted, ``ValueError`` where they are not of these rows.
    """
    places, labels = view.hints
    if len(places) and int(places.max()) >= len(rows):
        raise ValueError(
            f"expected hints among the {len(rows)} samples that crossed, got one at place {int(places.max())}; pass "
            "Grants(y=…) of exactly what the recorded wire carried, in that order"
        )
    return rows[places.to(rows.device)], labels.to(rows.device)
