"""What the codecs share: tensors as rows, one a sample, and the parts of a frame that describe them."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from splitlearn.frames import Kind

__all__ = ["CUT", "check_finite", "fine_type", "greatest", "part_of", "row_shape", "rows_of"]

CUT = frozenset({Kind.ACTIVATION, Kind.GRADIENT})


def row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape as rows: one a sample (or output channel), or a single one for a vector."""
    return (1, prod(shape)) if len(shape) < 2 else (shape[0], prod(shape[1:]))


def fine_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type to reckon in: float64 for float64, float32 for all narrower ones."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def rows_of(tensor: Tensor) -> Tensor:
    """Return the tensor as rows, in the type to reckon in."""
    return tensor.reshape(row_shape(tuple(tensor.shape))).to(fine_type(tensor.dtype))


def greatest(rows: Tensor) -> Tensor:
    """Return each row's greatest value, zero for rows without entries; nan where a row has one."""
    return rows.amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def check_finite(key: str, values: Tensor) -> None:
    """Raise ``ValueError`` for what a codec cannot carry."""
    if not torch.isfinite(values).all():
        raise ValueError(
            f"expected finite values in {str(key)!r}, got nan, inf or too wide a range; a codec cannot carry them"
        )


def part_of(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return one part of a frame, of this type and shape, or raise ``ValueError``."""
    part = parts.get(name)
    if part is None or part.dtype != dtype or tuple(part.shape) != shape:
        got = "none" if part is None else f"{part.dtype} of shape {tuple(part.shape)}"
        raise ValueError(f"malformed frame: expected a part {name!r} of type {dtype} and shape {shape}, got {got}")
    return part
