"""Members' updates as one matrix: what each changed of the weights that all started from, a row a member, float64.

Differences and not weights: distances between weights are lost in float32 beside the weights' own size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splitlearn.members import Weights

__all__ = ["applied", "deltas", "gram", "squared_distances"]


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


def gram(rows: Tensor) -> Tensor:
    """Return the inner products of rows [n, d] with each other, [n, n] in float64, of the rows less their mean.

    Centred, so that distances are not lost beside the rows' common part.
    """
    centred = rows.double() - rows.double().mean(0)
    return centred @ centred.T


def squared_distances(products: Tensor) -> Tensor:
    """Return the squared distances between rows, [n, n], of their inner products; exact zeros on the diagonal."""
    squares = products.diagonal()
    found = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0)
    return found.fill_diagonal_(0)


def _floating(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> list[str]:
    return [name for name in start if name in weights and start[name].is_floating_point()]
