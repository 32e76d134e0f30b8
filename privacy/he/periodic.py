"""Plaintexts of slots that repeat, made without a transform of the whole ring.

Slots of period P are those of a polynomial in Y = X^(N/2P), of 2P coefficients. Its NTT form takes but 2P values, each
N/2P times in a row, and is a small matrix product modulo the prime. All plaintexts of a layer are made at once; besides,
2P rounded coefficients make less of an error than N.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.he.layout import Complex
from privacy.he.seal import Integers, Ring

__all__ = ["encode_periodic"]

MOST = 64  # the greatest period that pays: beyond it SEAL's own transform is faster
LIMB = 20  # bits of the parts that products are made of, so that sums of them are exact in double precision


def encode_periodic(ring: Ring, slots: Complex, scale: float) -> list[Any]:
    """Return the plaintexts of slots [count, period], each repeated over all slots. None is 0: SEAL takes no product of 0.

    What would be rounded to 0 throughout is the least there is, 1 / ``scale`` in every slot.
    """
    if slots.shape[1] == 1:  # 3 is of order P modulo 4P from P = 2 on
        slots = np.repeat(slots, 2, axis=1)
    period = slots.shape[1]
    if period > MOST:
        whole = ring.parameters.slots // period
        encoded = [ring.encode(np.tile(one, whole), scale) for one in slots]
        least = ring.encode(np.full(ring.parameters.slots, 1 / scale, np.complex128), scale)
        return [least if plain.is_zero() else plain for plain in encoded]
    coefficients = np.rint(scale * (slots @ _embedding(period)).real)
    coefficients[~coefficients.any(axis=1), 0] = 1
    primes = [_values(ring, coefficients, period, number) for number in range(len(ring.primes))]
    values = np.repeat(np.stack(primes, 1), ring.parameters.degree // (2 * period), axis=2)
    return [ring.plain_from_integers(one, scale) for one in values]


@lru_cache(maxsize=16)
def _embedding(period: int) -> Complex:
    """Return the matrix that takes slots of one period to coefficients of Y (their real part)."""
    turns = np.outer(_powers(period), np.arange(2 * period)) % (4 * period)
    return np.exp(-0.5j * np.pi / period * turns) / period


def _powers(period: int) -> NDArray[np.int64]:
    """Return 3^i modulo 4P: slot i is the value at the 4P-th root to that power."""
    return np.array([pow(3, i, 4 * period) for i in range(period)])


def _values(ring: Ring, coefficients: NDArray[np.float64], period: int, number: int) -> Integers:
    """Return the values [count, 2P] that the NTT form takes modulo one prime, exactly."""
    prime = ring.primes[number]
    vandermonde = _vandermonde(ring, period, number)  # limbs of the powers of Y's values
    total: Any = 0
    signs, rest, shift = np.sign(coefficients), np.abs(coefficients), 0
    while rest.any():
        low = np.mod(rest, 1 << LIMB) * signs
        for limb, powers in enumerate(vandermonde):
            part = (low @ powers).astype(np.int64).astype(object)
            total = total + part * pow(2, shift + LIMB * limb, prime)
        rest, shift = np.floor(rest / (1 << LIMB)), shift + LIMB
    return (total % prime).astype(np.uint64)


@lru_cache(maxsize=32)
def _limbs(first: tuple[int, ...], prime: int) -> tuple[NDArray[np.float64], ...]:
    count = len(first)
    powers = [[pow(one, k, prime) for one in first] for k in range(count)]  # [power, value]
    limbs = range(0, prime.bit_length(), LIMB)
    return tuple(np.array([[(v >> at) % (1 << LIMB) for v in row] for row in powers], np.float64) for at in limbs)


def _vandermonde(ring: Ring, period: int, number: int) -> tuple[NDArray[np.float64], ...]:
    """Return the powers [2P, 2P] of the values that Y takes in NTT form, as SEAL orders them, in limbs."""
    return _limbs(_first(ring, period, number), ring.primes[number])


def _first(ring: Ring, period: int, number: int) -> tuple[int, ...]:
    known = ring.known.get((period, number))
    if known is None:
        slots = np.exp(0.5j * np.pi / period * _powers(period))
        whole = np.tile(slots, ring.parameters.slots // period)
        integers = ring.plain_integers(ring.encode(whole, 1.0))[number].reshape(2 * period, -1)
        assert (integers == integers[:, :1]).all(), "SEAL orders its NTT form in another way"
        known = ring.known[period, number] = tuple(int(v) for v in integers[:, 0])
    return known
