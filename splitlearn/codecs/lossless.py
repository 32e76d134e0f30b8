"""Lossless coding of what another codec puts out: Zstandard, and entropy coding by ANS."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import constriction
import numpy as np
import torch
import zstandard
from torch import Tensor

from splitlearn.codecs.levels import Levelled
from splitlearn.codecs.rows import CUT, fine_type, part_of, row_shape
from splitlearn.frames import DTYPE_NAMES, DTYPES, MAX_DIMS, Codec, Kind

__all__ = ["Ans", "Zstd"]

MOST_FREQUENT = 2**15 - 1  # of the frequencies in a table


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
        rows, width = row_shape(shape)
        left = (
            (dtype.itemsize + 4) * rows * width + 2 * fine_type(dtype).itemsize * rows + 1024
        )  # values and places, two numbers a row, slack
        inside: dict[str, Tensor] = {}
        for name in (name for name in parts if name.endswith(".as")):
            part = _inflate(name, parts, left)
            inside[name[: -len(".as")]] = part
            left -= part.nbytes
        if self.inner is not None:
            return self.inner.unpack(inside, dtype, shape)
        return part_of(inside, "tensor", dtype, shape)


@dataclass(frozen=True)
class Ans:
    """Entropy coding of the levels of ``inner``, in as many bytes as their empirical entropy asks for, and a table.

    Asymmetric numeral systems (Duda 2013, arXiv:1311.2540), by ``constriction`` (Bamler 2022, arXiv:2201.01741), with
    one static table of frequencies over the whole tensor, which crosses in two bytes a level: 512 for eight bits. That
    is lossless, what comes back of a sample does not depend on the others. How long a frame is does depend on the
    samples in it, and so tells of them whoever sees sizes alone, through encryption too.
    """

    inner: Levelled
    kinds: frozenset[Kind] = field(default=CUT, init=False)

    def __post_init__(self) -> None:
        if not hasattr(self.inner, "to_levels"):
            raise ValueError(
                f"expected a codec of levels (Uniform, Int8, Palette), got {self.inner!r}; for others there is Zstd"
            )
        object.__setattr__(self, "kinds", self.inner.kinds)

    @property
    def name(self) -> str:
        """The name, the inner codec's included."""
        return f"ans({self.inner.name})"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the inner parts with ``frequencies`` (int16) and ``words`` (uint8) in place of the levels."""
        parts = self.inner.to_levels(key, tensor)
        levels = parts.pop("levels").reshape(-1).numpy()
        counts = np.bincount(levels, minlength=2**self.inner.bits)
        # At most 2^15 - 1, and never 0 for a level that is there.
        scale = (MOST_FREQUENT / max(counts.max(), MOST_FREQUENT)) if len(levels) else 1.0
        frequencies = np.where(counts > 0, np.maximum(1, np.round(counts * scale)), 0).astype(np.int16)
        coder = constriction.stream.stack.AnsCoder()
        if len(levels):
            coder.encode_reverse(levels.astype(np.int32), _model(frequencies))
        words = coder.get_compressed().astype("<u4").view(np.uint8)
        return {**parts, "frequencies": torch.from_numpy(frequencies), "words": torch.from_numpy(words.copy())}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return what the inner codec makes of the decoded levels."""
        frequencies = part_of(parts, "frequencies", torch.int16, (2**self.inner.bits,)).numpy()
        words, number = parts.get("words"), prod(shape)
        if words is None or words.dtype != torch.uint8 or words.ndim != 1 or len(words) % 4:
            raise ValueError("malformed frame: expected a part 'words' of bytes, four a word")
        if number and not (frequencies.min() >= 0 and frequencies.max() > 0):
            raise ValueError("malformed frame: expected frequencies of 0 or more, not all of them 0")
        levels = _decoded(words.numpy(), frequencies, number) if number else np.zeros(0, np.uint8)
        rest = {name: part for name, part in parts.items() if name not in ("frequencies", "words")}
        return self.inner.from_levels({**rest, "levels": torch.from_numpy(levels).reshape(shape)}, dtype, shape)


def _model(frequencies: np.ndarray) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(frequencies / frequencies.sum(dtype=np.int64), perfect=False)


def _decoded(words: np.ndarray, frequencies: np.ndarray, number: int) -> np.ndarray:
    try:
        coder = constriction.stream.stack.AnsCoder(words.view("<u4").astype(np.uint32))
        levels = coder.decode(_model(frequencies), number)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"malformed frame: these words are no ANS code ({error})") from error
    if not coder.is_empty():
        raise ValueError("malformed frame: more words than its levels take")
    return levels.astype(np.uint8)


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
