"""Fewer bits an entry: evenly spaced levels, half precision, and the few values that a tensor takes.

Activations and gradients are packed row by row, a row being a sample, so that no sample's code depends on another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from splitlearn.codecs.rows import CUT, check_finite, fine_type, greatest, part_of, row_shape, rows_of
from splitlearn.frames import Codec, Kind

__all__ = ["Float16", "Int8", "Levelled", "Palette", "Uniform"]

MOST_BITS = 8  # of a level, which is to fit a byte
ACTIVATIONS = frozenset({Kind.ACTIVATION})


class Levelled(Codec, Protocol):
    """A codec whose entries are levels of at most eight bits, which an entropy coder can take one by one."""

    @property
    def bits(self) -> int:
        """How many bits a level has."""

    def to_levels(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the parts with ``levels`` (uint8, in the tensor's shape) not yet packed into bits."""

    def from_levels(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of what ``to_levels`` gave."""


class _Packed:
    """Packs the levels of a ``Levelled`` codec row by row into bits, least significant first."""

    bits: int

    def pack(self: Levelled, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the parts, levels packed into bits (uint8 [rows, bytes]; of eight bits in the tensor's shape)."""
        parts = self.to_levels(key, tensor)
        return {**parts, "levels": _squeezed(parts["levels"], self.bits)}

    def unpack(self: Levelled, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor."""
        return self.from_levels({**parts, "levels": _spread(parts, self.bits, shape)}, dtype, shape)


@dataclass(frozen=True)
class Uniform(_Packed):
    """Affine quantisation to 2^``bits`` levels between each row's least and greatest value, packed into so many bits.

    The error is at most range / (2·(2^bits − 1)). A constant row comes back exactly. Beside that bound stand a few
    roundings of the row's greatest magnitude, in the tensor's type or in float32, whichever is finer. Training
    through it is straight-through (Bengio, Léonard & Courville 2013, arXiv:1308.3432): the gradient that comes back is
    that of what crossed.
    """

    bits: int
    kinds: frozenset[Kind] = CUT

    def __post_init__(self) -> None:
        _check_bits(self.bits, "Uniform(4)")

    @property
    def name(self) -> str:
        """The name, bits included."""
        return f"int{self.bits}"

    def to_levels(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the levels (uint8) and each row's least value and step (float64 for float64, else float32)."""
        rows, most = rows_of(tensor), 2**self.bits - 1
        low, high = (rows.amin(1), rows.amax(1)) if rows.shape[1] else (rows.new_zeros(len(rows)),) * 2
        step = (high - low) / most
        # Not a number or infinite if any entry is, or if unpacking would overflow.
        check_finite(key, low + most * step)
        levels = (rows - low[:, None]).div_(step.masked_fill(step == 0, 1)[:, None]).round_().clamp_(0, most)
        return {"levels": levels.to(torch.uint8).reshape(tensor.shape), "low": low, "step": step}

    def from_levels(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return low + level · step."""
        rows, fine = row_shape(shape), fine_type(dtype)
        levels = part_of(parts, "levels", torch.uint8, shape).reshape(rows)
        low, step = part_of(parts, "low", fine, rows[:1]), part_of(parts, "step", fine, rows[:1])
        return levels.to(fine).mul_(step[:, None]).add_(low[:, None]).to(dtype).reshape(shape)


@dataclass(frozen=True)
class Int8(Uniform):
    """``Uniform(8)``: 256 levels, error at most range / 510."""

    bits: int = field(default=8, init=False, repr=False)


@dataclass(frozen=True)
class Palette(_Packed):
    """Carries tensors of at most 2^``bits`` distinct values exactly: the values, and which of them each entry is.

    For what comes out of a quantiser already: a ``LearnedQuantiser`` at the end of a stage, or a guard that rounds.
    It packs activations alone, unless told otherwise. A tensor of more values is a ``ValueError``. The values are those
    of the whole batch, so that a sample's code depends on the others'; what comes back does not.
    """

    bits: int
    kinds: frozenset[Kind] = ACTIVATIONS

    def __post_init__(self) -> None:
        _check_bits(self.bits, "Palette(4)")

    @property
    def name(self) -> str:
        """The name, bits included."""
        return f"palette{self.bits}"

    def to_levels(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the levels (uint8), in rising order of their values, and the values in the tensor's type."""
        check_finite(key, tensor)
        values, levels = torch.unique(tensor, return_inverse=True)
        if len(values) > 2**self.bits:
            raise ValueError(
                f"expected {str(key)!r} of at most {2**self.bits} distinct values, got {len(values)}; quantise first "
                f"(LearnedQuantiser({self.bits}) at the end of the stage), or use Uniform({self.bits})"
            )
        return {"levels": levels.to(torch.uint8).reshape(tensor.shape), "values": values}

    def from_levels(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return the value of each level."""
        levels = part_of(parts, "levels", torch.uint8, shape)
        values = parts.get("values")
        most = int(levels.max()) if levels.numel() else -1
        if values is None or values.dtype != dtype or values.ndim != 1 or most >= len(values):
            raise ValueError(f"malformed frame: expected a part 'values' of type {dtype} for {most + 1} levels or more")
        return values[levels.long()].reshape(shape)


@dataclass(frozen=True)
class Float16:
    """Half precision of each row divided by its greatest magnitude, so that nothing overflows."""

    kinds: frozenset[Kind] = CUT
    name = "float16"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the scaled rows (float16) and each row's scale (float64 for float64, else float32)."""
        rows = rows_of(tensor)
        scale = greatest(rows.abs())
        check_finite(key, scale)
        scaled = rows / scale.masked_fill(scale == 0, 1)[:, None]
        return {"scaled": scaled.half().reshape(tensor.shape), "scale": scale}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return scaled · scale."""
        rows, fine = row_shape(shape), fine_type(dtype)
        scaled = part_of(parts, "scaled", torch.float16, shape).reshape(rows)
        return scaled.to(fine).mul_(part_of(parts, "scale", fine, rows[:1])[:, None]).to(dtype).reshape(shape)


def _check_bits(bits: int, example: str) -> None:
    if not (type(bits) is int and 1 <= bits <= MOST_BITS):
        raise ValueError(f"expected whole bits from 1 to {MOST_BITS}, got {bits!r}; for example {example}")


def _squeezed(levels: Tensor, bits: int) -> Tensor:
    if bits == MOST_BITS:
        return levels
    rows, width = row_shape(tuple(levels.shape))
    spread = np.unpackbits(levels.reshape(rows, width, 1).numpy(), axis=2, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(spread.reshape(rows, width * bits), axis=1, bitorder="little"))


def _spread(parts: Mapping[str, Tensor], bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return the levels in ``shape``; bits that fill a row's last byte must be zero."""
    if bits == MOST_BITS:
        return part_of(parts, "levels", torch.uint8, shape)
    rows, width = row_shape(shape)
    packed = part_of(parts, "levels", torch.uint8, (rows, ceil(width * bits / 8))).numpy()
    spread = np.unpackbits(packed, axis=1, bitorder="little")
    if spread[:, width * bits :].any():
        raise ValueError("malformed frame: expected zeros after the last level of a row")
    levels = np.packbits(spread[:, : width * bits].reshape(rows, width, bits), axis=2, bitorder="little")
    return torch.from_numpy(levels).reshape(shape)
