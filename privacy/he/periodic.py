"""Plaintexts of slots that repeat, made without a transform of the whole ring.

Slots of period P are those of a polynomial in Y = X^(N/2P), of 2P coefficients. Its NTT form takes but 2P values, each
N/2P times in a row, and is a small matrix product modulo the prime. All plaintexts of a layer are made at once;
besides, 2P rounded coefficients make less of an error than N.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.he.layout import Complex
from privacy.he.seal import Integers, Ring

__all__ = ["encode_periodic"]

MOST = 64  # the greatest period that pays: beyond it SEAL's own transform is faster
PART = 20  # bits of the parts that coefficients are taken in
EXACT = 53  # bits that double precision holds


def encode_periodic(ring: Ring, slots: Complex, scale: float) -> list[Any]:
    """Return the plaintexts of slots [count, period], each repeated over all slots; None for those that round to 0."""
    if slots.shape[1] == 1:  # 3 is of order P modulo 4P from P = 2 on
        slots = np.repeat(slots, 2, axis=1)
    period = slots.shape[1]
    if period > MOST:
        whole = ring.parameters.slots // period
        encoded = [ring.encode(np.tile(one, whole), scale) for one in slots]
        return [None if plain.is_zero() else plain for plain in encoded]
    coefficients = np.rint(scale * (slots @ _embedding(period)).real)
    primes = [_values(ring, coefficients, period, number) for number in range(len(ring.primes))]
    values = np.repeat(np.stack(primes, 1), ring.parameters.degree // (2 * period), axis=2)
    some: list[bool] = coefficients.any(axis=1).tolist()  # type: ignore[assignment]
    return [ring.plain_from_integers(one, scale) if there else None for one, there in zip(values, some, strict=True)]


@lru_cache(maxsize=16)
def _embedding(period: int) -> Complex:
    """Return the matrix that takes slots of one period to coefficients of Y (their real part)."""
    turns = np.outer(_powers(period), np.arange(2 * period)) % (4 * period)
    return np.exp(-0.5j * np.pi / period * turns) / period


def _powers(period: int) -> NDArray[np.int64]:
    """Return 3^i modulo 4P: slot i is the value at the 4P-th root to that power."""
    return np.array([pow(3, i, 4 * period) for i in range(period)])


def _values(ring: Ring, coefficients: NDArray[np.float64], period: int, number: int) -> Integers:
    """Return the values [count, 2P] that the NTT form takes modulo one prime: in parts, whose sums are exact."""
    prime = ring.primes[number]
    width = EXACT - PART - (2 * period).bit_length()
    powers = _powers_of(_first(ring, period, number), prime, width)
    total = np.zeros(coefficients.shape, np.int64)
    signs, rest, shift = np.sign(coefficients), np.abs(coefficients), 0
    while rest.any():
        low = np.mod(rest, 1 << PART) * signs
        for limb, part in enumerate(powers):
            total = (total + _shifted((low @ part).astype(np.int64), shift + width * limb, prime)) % prime
        rest, shift = np.floor(rest / (1 << PART)), shift + PART
    return total.astype(np.uint64)


def _shifted(values: NDArray[np.int64], bits: int, prime: int) -> NDArray[np.int64]:
    """Return values · 2^bits modulo the prime, a few bits at a time, so that nothing overflows."""
    values, most = values % prime, 62 - prime.bit_length()
    while bits:
        step = min(bits, most)
        values, bits = (values << step) % prime, bits - step
    return values


@lru_cache(maxsize=32)
def _powers_of(first: tuple[int, ...], prime: int, width: int) -> list[NDArray[np.float64]]:
    """Return the powers [power, value] of the values that Y takes in NTT form, as SEAL orders them, in parts."""
    powers = [[pow(one, k, prime) for one in first] for k in range(len(first))]
    return [
        np.array([[(v >> at) % (1 << width) for v in row] for row in powers], np.float64)
        for at in range(0, prime.bit_length(), width)
    ]


def _first(ring: Ring, period: int, number: int) -> tuple[int, ...]:
    """Return the values that Y takes in NTT form."""
    known = ring.known.get((period, number))
    if known is None:
        slots = np.exp(0.5j * np.pi / period * _powers(period))
        whole = np.tile(slots, ring.parameters.slots // period)
        integers = ring.plain_integers(ring.encode(whole, 1.0))[number].reshape(2 * period, -1)
        assert (integers == integers[:, :1]).all(), "SEAL orders its NTT form in another way"
        known = ring.known[period, number] = tuple(int(v) for v in integers[:, 0])
    return known
