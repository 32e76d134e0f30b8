"""Padding: what another codec puts out, filled up to a multiple of so many bytes, so that sizes tell less."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitlearn.frames import DTYPE_NAMES, DTYPES, MAX_DIMS, Codec, Kind

__all__ = ["Padded"]

LENGTH = struct.Struct("<I")  # of what is no padding
PART = struct.Struct("<BBB")  # of a part: bytes of its name, place of its type in DTYPES, dimensions


@dataclass(frozen=True)
class Padded:
    """Packs all parts of ``inner`` into one, with zeros after it up to a multiple of ``multiple`` bytes; lossless.

    Tensors whose packed parts take the same number of multiples make frames of the same length, and one as large as
    any of them makes all frames equal. It hides the length within a multiple, and not which multiple it is: how many
    steps there are still tells. What it costs is half a multiple a tensor on average, beside 4 bytes, and 3 a part with
    its name and 4 a dimension.
    """

    inner: Codec
    multiple: int
    kinds: frozenset[Kind] = field(init=False)

    def __post_init__(self) -> None:
        if not (type(self.multiple) is int and self.multiple >= 1):
            raise ValueError(
                f"expected whole bytes of 1 or more, got {self.multiple!r}; for example Padded(Int8(), 256)"
            )
        if not hasattr(self.inner, "pack"):
            raise ValueError(f"expected a codec to pad, got {self.inner!r}; for example Padded(Ans(Uniform(4)), 256)")
        object.__setattr__(self, "kinds", self.inner.kinds)

    @property
    def name(self) -> str:
        """The name, the multiple and the inner codec's included."""
        return f"padded{self.multiple}({self.inner.name})"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return one part, ``padded`` (uint8)."""
        body = b"".join(_written(name, part) for name, part in self.inner.pack(key, tensor).items())
        content = LENGTH.pack(len(body)) + body
        whole = self.multiple * ceil(len(content) / self.multiple)
        return {"padded": torch.frombuffer(bytearray(content.ljust(whole, b"\0")), dtype=torch.uint8)}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return what the inner codec unpacks; the padding must be as long as it has to be, and zeros."""
        padded = parts.get("padded")
        if padded is None or padded.dtype != torch.uint8 or padded.ndim != 1 or len(padded) % self.multiple:
            raise ValueError(f"malformed frame: expected a part 'padded' of a multiple of {self.multiple} bytes")
        raw = padded.numpy().tobytes()
        end = LENGTH.size + (LENGTH.unpack_from(raw)[0] if len(raw) >= LENGTH.size else len(raw))
        if len(raw) != self.multiple * ceil(end / self.multiple) or raw[end:].strip(b"\0"):
            raise ValueError("malformed frame: expected zeros after the last part, as many as fill up the multiple")
        inside: dict[str, Tensor] = {}
        at = LENGTH.size
        while at < end:
            name, part, at = _read(raw[:end], at)
            inside[name] = part
        return self.inner.unpack(inside, dtype, shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner codec's state; empty where it has none."""
        return self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        if hasattr(self.inner, "load_state_dict"):
            self.inner.load_state_dict(state)


def _written(name: str, part: Tensor) -> bytes:
    letters, place = name.encode(), list(DTYPES).index(DTYPE_NAMES[part.dtype])
    fresh = part.detach().cpu().clone(memory_format=torch.contiguous_format)
    head = PART.pack(len(letters), place, part.ndim) + letters + struct.pack(f"<{part.ndim}I", *part.shape)
    return head + fresh.reshape(-1).view(torch.uint8).numpy().tobytes()


def _read(raw: bytes, at: int) -> tuple[str, Tensor, int]:
    """Return the name, the part and where the next one starts."""
    try:
        length, place, ndim = PART.unpack_from(raw, at)
        at += PART.size
        name, at = raw[at : at + length].decode(), at + length
        shape = struct.unpack_from(f"<{ndim}I", raw, at)
        dtype, at = list(DTYPES.values())[place], at + 4 * ndim
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"malformed frame: no part starts where one should ({error})") from error
    nbytes = prod(shape) * dtype.itemsize
    # Sizes of zero count as one: torch multiplies the others all the same.
    most = prod(size or 1 for size in shape) * dtype.itemsize
    if ndim > MAX_DIMS or at + nbytes > len(raw) or most > max(len(raw), nbytes):
        raise ValueError(f"malformed frame: {name!r} promises more than there is")
    part = torch.empty(nbytes, dtype=torch.uint8)
    part.numpy()[:] = np.frombuffer(raw, np.uint8, nbytes, at)
    if dtype is torch.bool and nbytes and int(part.max()) > 1:
        raise ValueError("malformed frame: a truth value is neither 0 nor 1")
    return name, part.view(dtype).reshape(shape), at + nbytes
