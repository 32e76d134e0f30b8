"""Members' updates as one matrix: what each changed of the weights that all started from, a row a member, float64.

Differences and not weights: distances between weights are lost in float32 beside the weights' own size.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from splitlearn.members import Weights

__all__ = ["applied", "deltas", "gram", "inner_products", "squared_distances"]

BLOCK = 2048  # coordinates at a time


def deltas(weights: Sequence[Mapping[str, Tensor]], start: Mapping[str, Tensor]) -> Tensor:
    """Return each member's weights less ``start``, [n, d] in float64; floating entries alone, in ``start``'s order.

    Entries that members keep to themselves are left out. Raises ``ValueError`` where members' entries or shapes differ.
    """
    if not weights:
        raise ValueError("expected weights of at least one member, got none")
    if any(set(own) != set(weights[0]) for own in weights) or not set(weights[0]) <= set(start):
        raise ValueError("expected the same entries of the start from every member; train one model in all of them")
    names = _floating(weights[0], start)
    for name in names:
        if any(own[name].shape != start[name].shape for own in weights):
            shapes = ", ".join(str(tuple(own[name].shape)) for own in weights)
            raise ValueError(f"expected {name!r} of shape {tuple(start[name].shape)} from every member, got {shapes}")
    rows = [
        [(own[name].to(start[name].device).double() - start[name].double()).flatten() for name in names]
        for own in weights
    ]
    return torch.stack([torch.cat(row) for row in rows])


def applied(delta: Tensor, weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Weights:
    """Return ``start`` moved by one row [d] of ``deltas``, in its types; other entries are those of ``weights``.

    ``weights`` are one member's, and say which entries there are.
    """
    result, at = {}, 0
    for name, own in weights.items():
        if not own.is_floating_point():
            result[name] = own.clone()
    for name in _floating(weights, start):
        size = start[name].numel()
        move = delta[at : at + size].view_as(start[name]).to(start[name].device)
        result[name] = (start[name].double() + move).to(start[name].dtype)
        at += size
    if at != len(delta):
        raise ValueError(f"expected a delta of {at} numbers, as many as the weights have, got {len(delta)}")
    return {name: result[name] for name in weights}


def inner_products(rows: Tensor, centre: Tensor | None = None) -> Tensor:
    """Return the inner products of rows [n, d], less ``centre`` [d] where given, with each other, [n, n] in float64.

    Where distances are asked for, a centre near the rows keeps them from being lost beside the rows' common part.
    """
    array, (n, d) = rows.detach().cpu().numpy(), rows.shape
    found, block = np.zeros((n, n)), np.empty((n, min(BLOCK, d)))
    for start in range(0, d, BLOCK):
        part = array[:, start : start + BLOCK]
        here = block[:, : part.shape[1]]
        np.subtract(part, 0.0 if centre is None else centre.cpu().numpy()[start : start + BLOCK], out=here)
        found += here @ here.T
    return torch.from_numpy(found).to(rows.device)


def gram(rows: Tensor) -> Tensor:
    """Return the inner products of rows [n, d] less their mean, [n, n] in float64.

    One row far enough off carries the mean with it, and the distances among the others are lost: take another centre.
    """
    return inner_products(rows, rows.double().mean(0))


def squared_distances(products: Tensor) -> Tensor:
    """Return the squared distances between rows, [n, n], of their inner products; exact zeros on the diagonal."""
    squares = products.diagonal()
    found = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0)
    return found.fill_diagonal_(0)


def _floating(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> list[str]:
    return [name for name in start if name in weights and start[name].is_floating_point()]
