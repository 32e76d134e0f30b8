"""Additive shares: a value in fixed point, split into two halves of which either alone is uniformly random.

x is round(2^16·x) in the ring of integers modulo 2^64; one server gets r, drawn from a seed that it is sent, the other
x − r. Sums of shares are shares of sums; products take CrypTen and a dealer (Beaver 1991).
"""

from collections.abc import Mapping
from math import isnan, prod

import torch
from torch import Tensor

from privacy.mpc.randomness import SEED_NBYTES, Stream
from splitlearn.frames import Kind
from splitlearn.misfit import Refused
from splitlearn.service import keyed, named

__all__ = [
    "BITS", "LIMIT", "REVEALED_LIMIT", "SERVERS", "WEIGHT_BITS", "decoded", "encoded", "held", "joined", "shared",
]  # fmt: skip

SERVERS = 2  # CrypTen's protocols are exact and well tried with two parties alone
BITS = 16  # of the fraction; a product holds twice as many until it is cut back
WEIGHT_BITS = 32  # of the fraction of weights, in which small steps add up
LIMIT = float(1 << 13)  # of what is shared: a product of two still has a factor of 16 left of the ring
REVEALED_LIMIT = float(1 << 20)  # past it a revealed value is no result but a wrapped one
MOST_ELEMENTS = 1 << 27
Held = Mapping[str, Tensor]  # shares, or ring elements, by name


def encoded(x: Tensor, what: str, *, bits: int = BITS, limit: float = LIMIT) -> Tensor:
    """Return ``x`` in fixed point, int64, rounded to the nearest; ``Refused`` for what the range does not hold."""
    if not isinstance(x, Tensor):
        raise Refused(f"expected {what} as a tensor, got {type(x).__name__}; torch.as_tensor makes one")
    wide = x.detach().cpu().double()
    most = float(wide.abs().max()) if wide.numel() else 0.0
    if not most <= limit:  # nan is not, either
        raise Refused(
            f"expected {what} within ±{limit:g}, which is what fixed point with {bits} bits of fraction holds and "
            f"computes with, got {most:g}; "
            + ("look for what has diverged" if isnan(most) else "scale or clip them, or lower the learning rate")
        )
    return (wide * (1 << bits)).round().long()


def decoded(ring: Tensor, what: str, *, bits: int = BITS, limit: float = REVEALED_LIMIT) -> Tensor:
    """Return the values of ring elements, float64; ``Refused`` where they have wrapped around."""
    values = ring.double() / (1 << bits)
    most = float(values.abs().max()) if values.numel() else 0.0
    if not most <= limit:
        raise Refused(
            f"expected {what} within ±{limit:g}, got {most:g}: a product has left the ring's range, or a truncation "
            "has wrapped (which the greater values are, the more often it does); lower the learning rate or scale the "
            "activations, and go on from the last good weights"
        )
    return values


def shared(values: Held) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what each of the two servers is sent of ring elements: shares, and the seed of all other shares."""
    seed = Stream.seed()
    stream = Stream(seed)
    masked = {name: value - stream.elements(value.shape) for name, value in values.items()}
    shapes = {name: torch.tensor(value.shape, dtype=torch.int64) for name, value in values.items()}
    drawn = {Kind.SEED: torch.frombuffer(bytearray(seed), dtype=torch.uint8), **keyed(shapes, Kind.COUNT)}
    return keyed(masked, Kind.SHARE), drawn


def held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a server's shares by name, of either of the two messages."""
    if Kind.SEED not in tensors:
        found = named(tensors, Kind.SHARE)
        if wrong := [name for name, share in found.items() if share.dtype is not torch.int64]:
            raise ValueError(f"expected shares of int64, got {found[wrong[0]].dtype} for {wrong[0]!r}")
        return found
    seed, shapes = tensors[Kind.SEED], named(tensors, Kind.COUNT)
    if seed.dtype is not torch.uint8 or seed.shape != (SEED_NBYTES,):
        raise ValueError(f"expected a seed of {SEED_NBYTES} bytes, got {seed.dtype} of shape {tuple(seed.shape)}")
    stream, found = Stream(seed.numpy().tobytes()), {}
    for name, shape in shapes.items():
        sizes = shape.flatten().tolist()
        if shape.dtype is not torch.int64 or min(sizes, default=0) < 0 or prod(sizes) > MOST_ELEMENTS:
            raise ValueError(f"expected a shape of at most {MOST_ELEMENTS} elements for {name!r}, got {sizes}")
        found[name] = stream.elements(sizes)
    return found


def joined(replies: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the ring elements that the two servers' shares add up to."""
    mine, other = (named(reply, Kind.SHARE) for reply in replies)
    if {n: s.shape for n, s in mine.items()} != {n: s.shape for n, s in other.items()}:
        raise ValueError(f"expected the same shares from both servers, got {sorted(mine)} and {sorted(other)}")
    return {name: share + other[name] for name, share in mine.items()}
