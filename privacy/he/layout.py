"""The packed, rotation-free layout of an encrypted product, and the rule that chooses it.

X [rows, inner] is encrypted by the client, M [inner, outer] is the server's. A ciphertext holds, row after row,
``replicas`` copies of a ``tile`` of the row's inner entries; a reply holds, in each copy, another outer entry. The
server multiplies slot by slot and adds up over the tiles; the client folds the entries of a tile into one sum. No
rotation, no relinearisation, multiplicative depth one. Weights are the same for every row: their slots repeat with a
``period``, a power of 2, which makes their plaintexts cheap (``periodic.py``).

Slots are complex numbers, which halve one direction: ``up`` packs two inner entries as x₁ + i·x₂ against m₁ − i·m₂, of
which the real part is wanted; ``down`` packs two outer entries as m + i·m′ against real x.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cost", "Layout", "cheapest", "room_for"]

Fold = Literal["none", "up", "down"]
FOLDS: tuple[Fold, ...] = ("none", "up", "down")

Real = NDArray[np.float64]
Complex = NDArray[np.complex128]


@dataclass(frozen=True)
class Layout:
    """Where each number of X [rows, inner] · M [inner, outer] lies; ``rows`` over ``slots`` go in several ``chunks``.

    ``conjugate`` is for ``down`` alone: outer entries are then packed as m − i·m′, as ``up`` of the transposed product
    packs its inner ones, so that encrypted weights serve both.
    """

    rows: int
    inner: int
    outer: int
    slots: int
    tile: int
    replicas: int
    fold: Fold
    conjugate: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.inner, self.outer) < 1:
            raise ValueError(
                f"expected at least one row, input and output, got {self.rows}, {self.inner}, {self.outer}"
            )
        if self.fold not in FOLDS:
            raise ValueError(f"expected a fold among {', '.join(FOLDS)}, got {self.fold!r}")
        if self.tile < 1 or self.replicas < 1 or self.period * self.height > self.slots:
            raise ValueError(
                f"expected a tile and replicas of 1 or more, whose product, as a power of 2, fits {self.slots} slots "
                f"{self.height} times, got {self.tile} and {self.replicas}"
            )

    @property
    def chunks(self) -> int:
        """How many parts the rows go in."""
        return ceil(self.rows / self.slots)

    @property
    def height(self) -> int:
        """How many rows one ciphertext holds."""
        return ceil(self.rows / self.chunks)

    @property
    def period(self) -> int:
        """How many slots a row has: a power of 2."""
        return 1 << (self.tile * self.replicas - 1).bit_length()

    @property
    def in_fold(self) -> int:
        """How many inner entries one slot holds."""
        return 2 if self.fold == "up" else 1

    @property
    def out_fold(self) -> int:
        """How many outer entries one slot holds."""
        return 2 if self.fold == "down" else 1

    @property
    def up(self) -> int:
        """How many ciphertexts go up, for each chunk."""
        return ceil(self.inner / (self.tile * self.in_fold))

    @property
    def down(self) -> int:
        """How many come back, for each chunk."""
        return ceil(self.outer / (self.replicas * self.out_fold))

    @property
    def products(self) -> int:
        """How many products the server makes."""
        return self.chunks * self.up * self.down

    def transposed(self) -> "Layout":
        """Return the layout of X′ [rows, outer] · Mᵀ under which each plaintext of M serves again, as it is packed.

        Of an ``up`` layout without replicas: a tile's entries become replicas, folded inner entries folded outer ones.
        """
        assert (self.fold, self.replicas) == ("up", 1), self
        return Layout(self.rows, self.outer, self.inner, self.slots, 1, self.tile, "down", conjugate=True)

    def pack_rows(self, x: Real) -> Complex:
        """Return X [rows, inner] as slots [chunks · up, slots]."""
        full = np.zeros((self.chunks * self.height, self.up * self.in_fold * self.tile))
        full[: self.rows, : self.inner] = x
        tiles = full.reshape(self.chunks, self.height, self.up, self.in_fold, self.tile).transpose(0, 2, 1, 3, 4)
        one = tiles[..., 0, :] + 1j * tiles[..., 1, :] if self.fold == "up" else tiles[..., 0, :]
        slots = np.zeros((self.chunks * self.up, self.slots // self.period, self.period), np.complex128)
        slots[:, : self.height, : self.replicas * self.tile] = np.tile(one, self.replicas).reshape(
            self.chunks * self.up, self.height, -1
        )
        return slots.reshape(-1, self.slots)

    def periods(self, m: Real) -> Complex:
        """Return M [inner, outer] as it is multiplied, [down, up, period]: the slots of one row, the same for all."""
        full = np.zeros((self.up * self.in_fold * self.tile, self.down * self.out_fold * self.replicas))
        full[: self.inner, : self.outer] = m
        tiles = full.reshape(self.up, self.in_fold, self.tile, self.down, self.out_fold, self.replicas)
        tiles = tiles.transpose(3, 0, 5, 2, 1, 4)  # down, up, replicas, tile, in_fold, out_fold
        one = tiles[..., 0, 0].astype(np.complex128)
        if self.fold == "up":
            one -= 1j * tiles[..., 1, 0]
        if self.fold == "down":
            one += (-1j if self.conjugate else 1j) * tiles[..., 0, 1]
        return self._filled(one)

    def bias_periods(self, b: Real) -> Complex:
        """Return b [outer] as slots of one row [down, period]: once in each tile, whose entries are added up."""
        full = np.zeros(self.down * self.out_fold * self.replicas)
        full[: self.outer] = b
        parts = full.reshape(self.down, self.out_fold, self.replicas)
        one = np.zeros((self.down, self.replicas, self.tile), np.complex128)
        one[..., 0] = parts[:, 0]
        if self.fold == "down":
            one[..., 0] += (-1j if self.conjugate else 1j) * parts[:, 1]
        return self._filled(one)

    def unpack(self, slots: Complex) -> Real:
        """Return X·M [rows, outer] from slots [chunks · down, slots]."""
        rows = slots.reshape(self.chunks, self.down, -1, self.period)[:, :, : self.height]
        used = rows[..., : self.replicas * self.tile]
        sums = used.reshape(*used.shape[:-1], self.replicas, self.tile).sum(-1)
        parts = [sums.real]
        if self.fold == "down":
            parts.append(-sums.imag if self.conjugate else sums.imag)
        both = np.stack(parts, 3)  # chunks, down, height, out_fold, replicas
        return both.transpose(0, 2, 1, 3, 4).reshape(self.chunks * self.height, -1)[: self.rows, : self.outer]

    def _filled(self, one: Complex) -> Complex:
        """Return [..., replicas, tile] as [..., period], with zeros after those that are used."""
        full = np.zeros((*one.shape[:-2], self.period), np.complex128)
        full[..., : self.replicas * self.tile] = one.reshape(*one.shape[:-2], -1)
        return full


@dataclass(frozen=True)
class Cost:
    """What a ciphertext up, one down and a product take, in seconds, with transfer. Public, and so is the choice."""

    up: float
    down: float
    product: float

    def of(self, layout: Layout) -> float:
        """Return what a layout takes, in seconds."""
        return layout.chunks * (layout.up * self.up + layout.down * self.down) + layout.products * self.product


def room_for(rows: int, slots: int) -> int:
    """Return the greatest period: how many slots each row can have, a power of 2, where rows go in as few chunks."""
    height = ceil(rows / ceil(rows / slots))
    return 1 << (slots // height).bit_length() - 1


def cheapest(rows: int, inner: int, outer: int, slots: int, cost: Cost) -> Layout:
    """Return the layout that takes least: for each number of uploads the least tile, and all the replicas that fit.

    A greater tile that needs as many uploads only takes room from replicas, and more replicas never cost more; so no
    other layout needs to be looked at.
    """
    room = room_for(rows, slots)
    best: tuple[float, Layout] | None = None
    for fold in FOLDS:
        entries = ceil(inner / (2 if fold == "up" else 1))
        groups = ceil(outer / (2 if fold == "down" else 1))
        for tile in sorted({ceil(entries / ceil(entries / most)) for most in range(1, min(entries, room) + 1)}):
            layout = Layout(rows, inner, outer, slots, tile, min(groups, room // tile), fold)
            spent = cost.of(layout)
            if best is None or spent < best[0]:
                best = spent, layout
    assert best is not None
    return best[1]
