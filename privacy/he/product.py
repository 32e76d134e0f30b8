"""The server's side of an encrypted product: ciphertexts of X times weights, in the clear or encrypted too."""

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, log2, sqrt
from typing import Any

import numpy as np

from privacy.he.ciphertexts import Ciphertexts, nbytes_each
from privacy.he.layout import Cost, Layout, Real, cheapest
from privacy.he.parameters import Parameters
from privacy.he.periodic import encode_periodic
from privacy.he.seal import Ring

__all__ = ["MOST_HALVINGS", "Weights", "halvings_for", "plan", "received", "replied", "sums"]

# Measured at degree 2048 and one prime, to within a factor of 2 anywhere: the choice of a layout needs no more.
ENCRYPT_SECONDS = 4e-4  # encode, encrypt, pack, unpack
REPLY_SECONDS = 3e-4  # pack, unpack, decrypt, decode
PRODUCT_SECONDS = 4e-5  # encode a weight, multiply, add
MARGIN = 1 - 2**-10  # of the range: primes are somewhat below a power of 2, and errors come on top
MOST_HALVINGS = 6  # of the weights' scale; each takes a bit of precision
LINK = 100e6 / 8  # bytes a second that a transfer is reckoned at


@lru_cache(maxsize=256)
def plan(parameters: Parameters, rows: int, inner: int, outer: int, *, truncated: bool = True) -> Layout:
    """Return the layout that both sides take for X [rows, inner] · M [inner, outer]; it follows from public numbers."""
    return cheapest(rows, inner, outer, parameters.slots, costs(parameters, truncated))


@lru_cache(maxsize=256)
def costs(parameters: Parameters, truncated: bool = True) -> Cost:
    """Return what a ciphertext up, one down and a product take under these parameters."""
    size = parameters.degree / 2048 * len(parameters.data_bits)
    reply = nbytes_each(parameters, "truncated" if truncated else "whole", 2)
    return Cost(
        ENCRYPT_SECONDS * size + nbytes_each(parameters, "seeded", 2) / LINK,
        REPLY_SECONDS * size + reply / LINK,
        PRODUCT_SECONDS * size,
    )


class Weights:
    """M [inner, outer] and b [outer] as plaintexts of one layout, at the greatest scale at which nothing wraps around.

    ``ValueError`` for weights that are not finite, or so great that inputs within ±``bound`` have no such scale.
    """

    def __init__(self, ring: Ring, layout: Layout, m: Real, b: Real | None, bound: float):
        self.halvings = halvings_for(ring, layout, m, b, bound)
        scale = ring.weight_scale / 2**self.halvings
        slots = layout.periods(m).reshape(-1, layout.period)
        flat = encode_periodic(ring, slots, scale)
        self.plain = [flat[at : at + layout.up] for at in range(0, len(flat), layout.up)]  # [down][up]
        self._ring, self._scale = ring, scale
        self._fill(self.plain)
        self.bias = None if b is None else encode_periodic(ring, layout.bias_periods(b), ring.scale * scale)

    def transposed(self) -> list[list[Any]]:
        """Return the plaintexts as they serve the product of the transposed layout."""
        columns = [list(column) for column in zip(*self.plain, strict=True)]
        self._fill(columns)
        return columns

    def _fill(self, grid: list[list[Any]]) -> None:
        """Let the least weight there is stand in for a row of zeros: SEAL has no ciphertext of a product by 0."""
        for row in grid:
            if not any(row):
                least = np.full(self._ring.parameters.slots, 1 / self._scale, np.complex128)
                row[0] = self._ring.encode(least, self._scale)


def halvings_for(ring: Ring, layout: Layout, m: Real, b: Real | None, bound: float) -> int:
    """Return how often the weights' scale is halved, so that inputs within ±``bound`` cannot wrap around the modulus.

    By the worst case, the sum of magnitudes over the tiles that are added up. ``ValueError`` beyond ``MOST_HALVINGS``.
    """
    if not (np.isfinite(m).all() and (b is None or np.isfinite(b).all())):
        raise ValueError("expected finite weights, got nan or inf; the training has diverged")
    greatest = bound * (sqrt(2) if layout.fold == "up" else 1)
    sums = np.abs(layout.periods(m)).sum(1) * greatest
    worst = float(sums.max()) + (0.0 if b is None else sqrt(layout.out_fold) * float(np.abs(b).max()))
    limit = ring.parameters.range * MARGIN
    halvings = max(0, ceil(log2(worst / limit))) if worst else 0
    if halvings > MOST_HALVINGS:
        raise ValueError(
            f"expected weights under which inputs within ±{bound:g} stay below {limit * 2**MOST_HALVINGS:g}, the range "
            f"of {ring.parameters.name} at the least precision, got sums of up to {worst:.4g}, which would wrap "
            "around; give a smaller bound, parameters with a greater range (DEPTH2), or decay the weights"
        )
    return halvings


def received(ring: Ring, fresh: Ciphertexts) -> list[Any]:
    """Return SEAL's ciphertexts of a fresh upload."""
    return [
        ring.from_seed(integers[0], seed, fresh.scale)
        for integers, seed in zip(fresh.integers, fresh.seeds, strict=True)
    ]


def sums(
    ring: Ring,
    layout: Layout,
    inputs: Sequence[Any],
    weights: Sequence[Sequence[Any]],
    bias: Sequence[Any] | None = None,
) -> list[Any]:
    """Return for each chunk and each reply Σ over tiles of input × weight, plus the bias.

    ``weights`` [down][up] are plaintexts, None where they are 0, or ciphertexts, of which a product has three
    polynomials: there is no relinearisation, and no key for it.
    """
    evaluator, replies = ring.evaluator, []
    encrypted = any(isinstance(one, ring.api.Ciphertext) for one in weights[0])
    multiply = evaluator.multiply if encrypted else evaluator.multiply_plain
    for chunk in range(layout.chunks):
        tiles = inputs[chunk * layout.up : (chunk + 1) * layout.up]
        for number, row in enumerate(weights):
            total = None
            for tile, weight in zip(tiles, row, strict=True):
                if weight is None:
                    continue
                term = ring.new()
                multiply(tile, weight, term)
                if total is None:
                    total = term
                else:
                    evaluator.add_inplace(total, term)
            if bias is not None and bias[number] is not None:
                evaluator.add_plain_inplace(total, bias[number])
            replies.append(ring.reduced(total))
    return replies


def replied(ring: Ring, products: Sequence[Any], key: bytes, rows: int, *, truncated: bool = True) -> Ciphertexts:
    """Return products as they go back: the low bits that decryption has no use for left out, unless they are kept."""
    if truncated:
        for one in products:
            ring.evaluator.transform_from_ntt_inplace(one)
    integers = np.stack([ring.integers(one) for one in products])
    return Ciphertexts("truncated" if truncated else "whole", key, rows, products[0].scale, integers)
