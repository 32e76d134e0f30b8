"""Truncation without wraps: a division by a power of two that is right for every sharing, at one opening.

Truncating each share by itself is right but for a chance of about |v| / 2^63, and then wrong by 2^64 over the divisor.
Here the dealer draws r, uniform in the ring, and shares r, ⌊r / 2^bits⌋ and r's highest bit; the servers open v + r,
which says nothing of v, and take both quotients apart (Dalskov, Escudero and Keller 2020, arXiv:1910.12435, whose
parties make the masks themselves). This half is arithmetic alone and needs no CrypTen.
"""

from torch import Tensor

__all__ = ["MOST_BITS", "RANGE_BITS", "masks", "positive", "quotient"]

RANGE_BITS = 62  # |v| must be below 2^62: one bit of the ring is spent on the sign, one on telling of a wrap
MOST_BITS = 61


def masks(r: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return ⌊r / 2^bits⌋ of r read as unsigned, and its highest bit; what the dealer shares of its mask."""
    return _unsigned_quotient(r, bits), _highest(r)


def positive(share: Tensor, *, first: bool) -> Tensor:
    """Return the share of v + 2^62, which is positive; the first server adds."""
    return share + (1 << RANGE_BITS) if first else share


def quotient(opened: Tensor, low: Tensor, high: Tensor, bits: int, *, first: bool) -> Tensor:
    """Return the share of v / 2^bits from the opened v + 2^62 + r and shares of ``masks(r, bits)``.

    It is one of v's two neighbours among the multiples, the nearer one with the greater chance: right on average.
    """
    wrapped = high * (1 - _highest(opened))  # only r's highest bit can carry v + 2^62 + r past the ring
    known = _unsigned_quotient(opened, bits) - (1 << RANGE_BITS - bits) if first else 0
    return known - low + wrapped * (1 << 64 - bits)


def _unsigned_quotient(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << 64 - bits) - 1)


def _highest(x: Tensor) -> Tensor:
    return (x < 0).long()
