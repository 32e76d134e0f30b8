"""Codecs: what is done to tensors on the wire to save bytes. None of them is a privacy mechanism.

Activations and gradients are packed row by row, a row being a sample, so that no sample's code depends on another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from splitlearn.frames import DTYPE_NAMES, DTYPES, MAX_DIMS, Codec, Kind

__all__ = ["ErrorFeedback", "Float16", "Int8", "TopK", "Zstd", "kept_of", "through"]

CUT = frozenset({Kind.ACTIVATION, Kind.GRADIENT})


@dataclass(frozen=True)
class Int8:
    """Affine quantisation to 256 levels between each row's least and greatest value: error at most range / 510.

    A constant row comes back exactly. Beside that bound stand a few roundings of the row's greatest magnitude, in
    the tensor's type or in float32, whichever is finer.
    """

    kinds: frozenset[Kind] = CUT
    name = "int8"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the levels (uint8) and each row's least value and step (float64 for float64, else float32)."""
        rows = _rows(tensor)
        low, high = (rows.amin(1), rows.amax(1)) if rows.shape[1] else (rows.new_zeros(len(rows)),) * 2
        step = (high - low) / 255
        # Not a number or infinite if any entry is, or if unpacking would overflow.
        _check_finite(key, low + 255 * step)
        levels = (rows - low[:, None]).div_(step.masked_fill(step == 0, 1)[:, None]).round_().clamp_(0, 255)
        return {"levels": levels.to(torch.uint8).reshape(tensor.shape), "low": low, "step": step}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return low + level · step."""
        rows, fine = _row_shape(shape), _fine(dtype)
        levels = _part(parts, "levels", torch.uint8, shape).reshape(rows)
        low, step = _part(parts, "low", fine, rows[:1]), _part(parts, "step", fine, rows[:1])
        return levels.to(fine).mul_(step[:, None]).add_(low[:, None]).to(dtype).reshape(shape)


@dataclass(frozen=True)
class Float16:
    """Half precision of each row divided by its greatest magnitude, so that nothing overflows."""

    kinds: frozenset[Kind] = CUT
    name = "float16"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the scaled rows (float16) and each row's scale (float64 for float64, else float32)."""
        rows = _rows(tensor)
        scale = _greatest(rows.abs())
        _check_finite(key, scale)
        scaled = rows / scale.masked_fill(scale == 0, 1)[:, None]
        return {"scaled": scaled.half().reshape(tensor.shape), "scale": scale}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return scaled · scale."""
        rows, fine = _row_shape(shape), _fine(dtype)
        scaled = _part(parts, "scaled", torch.float16, shape).reshape(rows)
        return scaled.to(fine).mul_(_part(parts, "scale", fine, rows[:1])[:, None]).to(dtype).reshape(shape)


@dataclass(frozen=True)
class TopK:
    """Keeps the ``fraction`` of each row's entries, at least one, largest in magnitude; the rest becomes zero."""

    fraction: float
    kinds: frozenset[Kind] = CUT

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"expected a fraction of entries in (0, 1], got {self.fraction}; for example TopK(0.1)")

    @property
    def name(self) -> str:
        """The name, fraction included."""
        return f"top{self.fraction:.12g}"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the kept values and their places in the row (int16 where a row has at most 2^15, else int32)."""
        rows = tensor.reshape(_row_shape(tuple(tensor.shape)))
        sizes = rows.abs()
        _check_finite(key, _greatest(sizes))
        places = sizes.topk(self._kept(rows.shape[1]), dim=1, sorted=False).indices.sort(1).values
        return {"values": rows.gather(1, places), "places": places.to(_place_type(rows.shape[1]))}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return zeros with the values in their places."""
        rows, width = _row_shape(shape)
        kept = (rows, self._kept(width))
        values = _part(parts, "values", dtype, kept)
        places = _part(parts, "places", _place_type(width), kept).long()
        rising = bool((places[:, 1:] > places[:, :-1]).all())
        if places.numel() and not (rising and int(places[:, 0].min()) >= 0 and int(places[:, -1].max()) < width):
            raise ValueError(f"malformed frame: expected rising places from 0 to {width - 1} in each row")
        return torch.zeros(rows, width, dtype=dtype).scatter_(1, places, values).reshape(shape)

    def _kept(self, width: int) -> int:
        return kept_of(width, self.fraction)


@dataclass(frozen=True)
class Zstd:
    """Lossless compression (Zstandard, RFC 8878) of what ``inner`` puts out, or of the tensor itself."""

    inner: Codec | None = None
    level: int = 3
    kinds: frozenset[Kind] = field(default=CUT)

    def __post_init__(self) -> None:
        if self.inner is not None:
            object.__setattr__(self, "kinds", self.inner.kinds)

    @property
    def name(self) -> str:
        """The name, the inner codec's included."""
        return f"zstd{self.level}({self.inner.name if self.inner else ''})"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return each inner part compressed (uint8), and its type and shape (int64)."""
        compressor = zstandard.ZstdCompressor(level=self.level)
        packed: dict[str, Tensor] = {}
        for part, inside in (self.inner.pack(key, tensor) if self.inner else {"tensor": tensor}).items():
            # A clone: contiguous() keeps the strides of an empty tensor, which then has no view as bytes.
            fresh = inside.detach().cpu().clone(memory_format=torch.contiguous_format)
            raw = fresh.reshape(-1).view(torch.uint8).numpy()
            packed[f"{part}.zst"] = torch.frombuffer(bytearray(compressor.compress(raw.data)), dtype=torch.uint8)
            packed[f"{part}.as"] = torch.tensor([list(DTYPES).index(DTYPE_NAMES[inside.dtype]), *inside.shape])
        return packed

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return the decompressed tensor. All inner parts together may take what the widest codec here puts out."""
        rows, width = _row_shape(shape)
        left = (
            (dtype.itemsize + 4) * rows * width + 2 * _fine(dtype).itemsize * rows + 1024
        )  # values and places, two numbers a row, slack
        inside: dict[str, Tensor] = {}
        for name in (name for name in parts if name.endswith(".as")):
            part = _inflate(name, parts, left)
            inside[name[: -len(".as")]] = part
            left -= part.nbytes
        if self.inner is not None:
            return self.inner.unpack(inside, dtype, shape)
        return _part(inside, "tensor", dtype, shape)


class ErrorFeedback:
    """Adds what earlier packings lost to the next one (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847).

    For model updates only: on activations the residual of one batch would leak into the code of another. One
    instance belongs to one sender.
    """

    kinds = frozenset({Kind.UPDATE})

    def __init__(self, inner: Codec):
        self.inner = inner
        self._residual: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        """The name, the inner codec's included."""
        return f"feedback({self.inner.name})"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the inner codec's parts of ``tensor`` plus what was lost under this key so far."""
        if Kind.of(key) is not Kind.UPDATE:
            raise ValueError(
                f"expected a model update, got {str(key)!r}; error feedback would mix samples in anything else"
            )
        residual = self._residual.get(key)
        if residual is not None and residual.shape != tensor.shape:
            raise ValueError(
                f"expected {str(key)!r} of shape {tuple(residual.shape)} as before, got {tuple(tensor.shape)}; "
                "use one ErrorFeedback a sender and model"
            )
        wanted = tensor if residual is None else tensor + residual
        parts = self.inner.pack(key, wanted)
        self._residual[key] = wanted - self.inner.unpack(parts, tensor.dtype, tuple(tensor.shape))
        return parts

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return what the inner codec unpacks."""
        return self.inner.unpack(parts, dtype, shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals by key."""
        return {key: residual.clone() for key, residual in self._residual.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._residual = {key: residual.clone() for key, residual in state.items()}


def kept_of(width: int, fraction: float) -> int:
    """Return how many of a row's ``width`` entries a ``fraction`` of them is: at least one, where there are any."""
    return min(width, max(1, ceil(round(fraction * width, 6))))  # 0.1 * 30 is a little more than 3


def through(codec: Codec, z: Tensor) -> Tensor:
    """Return the activation ``z`` as the other end of the wire gets it, with the identity as its gradient.

    Split training itself is straight-through in this sense: the gradient that comes back is used as it is.
    """
    sent = codec.unpack(codec.pack(Kind.ACTIVATION, z.detach().cpu()), z.dtype, tuple(z.shape)).to(z.device)
    return z + (sent - z).detach() if z.requires_grad else sent


def _row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape as rows: one a sample (or output channel), or a single one for a vector."""
    return (1, prod(shape)) if len(shape) < 2 else (shape[0], prod(shape[1:]))


def _fine(dtype: torch.dtype) -> torch.dtype:
    """Return the type to reckon in: float64 for float64, float32 for all narrower ones."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(_row_shape(tuple(tensor.shape))).to(_fine(tensor.dtype))


def _greatest(rows: Tensor) -> Tensor:
    """Return each row's greatest value, zero for rows without entries; nan where a row has one."""
    return rows.amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def _check_finite(key: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(
            f"expected finite values in {str(key)!r}, got nan, inf or too wide a range; a codec cannot carry them"
        )


def _place_type(width: int) -> torch.dtype:
    return torch.int16 if width <= 1 << 15 else torch.int32


def _part(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    part = parts.get(name)
    if part is None or part.dtype != dtype or tuple(part.shape) != shape:
        got = "none" if part is None else f"{part.dtype} of shape {tuple(part.shape)}"
        raise ValueError(f"malformed frame: expected a part {name!r} of type {dtype} and shape {shape}, got {got}")
    return part


def _inflate(name: str, parts: Mapping[str, Tensor], limit: int) -> Tensor:
    """Return one decompressed part, after its promised size has been checked against its shape and the limit."""
    described, squeezed = parts[name], parts.get(name[: -len(".as")] + ".zst")
    fits = described.dtype == torch.int64 and described.ndim == 1 and 1 <= len(described) <= 1 + MAX_DIMS
    numbers = described.tolist() if fits else [-1]
    if squeezed is None or squeezed.dtype != torch.uint8 or min(numbers) < 0 or numbers[0] >= len(DTYPES):
        raise ValueError(f"malformed frame: {name!r} does not describe a compressed part")
    dtype, shape = list(DTYPES.values())[numbers[0]], tuple(numbers[1:])
    nbytes = prod(shape) * dtype.itemsize
    raw = squeezed.numpy().tobytes()
    try:
        promised = zstandard.frame_content_size(raw)
        # Sizes of zero count as one: torch multiplies the others all the same.
        if prod(size or 1 for size in shape) * dtype.itemsize > limit or promised != nbytes:
            raise ValueError(
                f"malformed frame: {name!r} promises {promised} bytes, its shape takes {nbytes} of {limit} allowed"
            )
        flat = zstandard.ZstdDecompressor().decompress(raw) if nbytes else b""
    except zstandard.ZstdError as error:
        raise ValueError(f"malformed frame: {name!r} is not Zstandard data ({error})") from error
    if len(flat) != nbytes:
        raise ValueError(f"malformed frame: {name!r} holds {len(flat)} bytes, its shape takes {nbytes}")
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    tensor.numpy()[:] = np.frombuffer(flat, np.uint8)
    if dtype is torch.bool and nbytes and int(tensor.max()) > 1:
        raise ValueError("malformed frame: a truth value is neither 0 nor 1")
    return tensor.view(dtype).reshape(shape)
