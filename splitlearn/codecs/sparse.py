"""Few entries of each row: the largest ones, or random ones."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitlearn.codecs.rows import CUT, check_finite, greatest, part_of, row_shape
from splitlearn.frames import Kind

__all__ = ["RandomK", "TopK", "kept_of"]

DRAWN = 1 << 18  # hashes at once, in whole rows, so that drawing takes little beside the tensor itself


@dataclass(frozen=True)
class TopK:
    """Keeps the ``fraction`` of each row's entries, at least one, largest in magnitude; the rest becomes zero."""

    fraction: float
    kinds: frozenset[Kind] = CUT

    def __post_init__(self) -> None:
        _check_fraction(self.fraction, "TopK(0.1)")

    @property
    def name(self) -> str:
        """The name, fraction included."""
        return f"top{self.fraction:.12g}"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the kept values and their places in the row (int16 where a row has at most 2^15, else int32)."""
        rows = tensor.reshape(row_shape(tuple(tensor.shape)))
        sizes = rows.abs()
        check_finite(key, greatest(sizes))
        places = sizes.topk(self._kept(rows.shape[1]), dim=1, sorted=False).indices.sort(1).values
        return {"values": rows.gather(1, places), "places": places.to(_place_type(rows.shape[1]))}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return zeros with the values in their places."""
        rows, width = row_shape(shape)
        kept = (rows, self._kept(width))
        values = part_of(parts, "values", dtype, kept)
        places = part_of(parts, "places", _place_type(width), kept).long()
        rising = bool((places[:, 1:] > places[:, :-1]).all())
        if places.numel() and not (rising and int(places[:, 0].min()) >= 0 and int(places[:, -1].max()) < width):
            raise ValueError(f"malformed frame: expected rising places from 0 to {width - 1} in each row")
        return torch.zeros(rows, width, dtype=dtype).scatter_(1, places, values).reshape(shape)

    def _kept(self, width: int) -> int:
        return kept_of(width, self.fraction)


@dataclass
class RandomK:
    """Keeps a ``fraction`` of each row's entries, at least one, drawn anew for every packing; the rest becomes zero.

    Stich, Cordonnier and Jaggi 2018 (arXiv:1809.07599). The places are not sent: both ends work them out of ``seed``
    and a count of packings, which crosses, so that a frame holds the values and eight bytes. ``unbiased`` scales the
    values by width / kept, whose mean over draws is then the tensor; under ``ErrorFeedback`` leave it off.

    The draws are public and hide nothing. One instance belongs to one sender, whose count is its state.
    """

    fraction: float
    unbiased: bool = False
    seed: int = 0
    kinds: frozenset[Kind] = CUT
    _packed: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_fraction(self.fraction, "RandomK(0.1)")

    @property
    def name(self) -> str:
        """The name, settings included."""
        return f"random{self.fraction:.12g}{'u' if self.unbiased else ''}s{self.seed}"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the kept values in order of their places, and the count of this packing (int64 [1])."""
        rows = tensor.reshape(row_shape(tuple(tensor.shape)))
        scale = self._scale(rows.shape[1])
        check_finite(key, greatest(rows.abs()) * scale)  # of what could be kept, so that no draw decides
        kind = Kind.of(key).value
        count = self._packed[kind]
        self._packed[kind] += 1
        values = rows.gather(1, self._places(count, *rows.shape))
        return {"values": values * scale, "count": torch.tensor([count])}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return zeros with the values in their places."""
        rows, width = row_shape(shape)
        values = part_of(parts, "values", dtype, (rows, kept_of(width, self.fraction)))
        places = self._places(int(part_of(parts, "count", torch.int64, (1,))), rows, width)
        return torch.zeros(rows, width, dtype=dtype).scatter_(1, places, values).reshape(shape)

    def state_dict(self) -> dict[str, Any]:
        """Return how often each kind of tensor was packed."""
        return {"packed": dict(self._packed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._packed = Counter(state["packed"])

    def _scale(self, width: int) -> float:
        return width / kept_of(width, self.fraction) if self.unbiased and width else 1.0

    def _places(self, count: int, rows: int, width: int) -> Tensor:
        """Return the places [rows, kept] of one packing, rising: those whose hash is least in their row."""
        kept = kept_of(width, self.fraction)
        start = _mixed(_mixed(np.array([self.seed], np.int64).view(np.uint64)) ^ np.array([count]).view(np.uint64))
        if kept == width:
            return torch.arange(kept).repeat(rows, 1)
        places = np.empty((rows, kept), np.int64)
        some = max(1, DRAWN // width)
        for row in range(0, rows, some):
            until = min(row + some, rows)
            drawn = _mixed(start + np.arange(row * width, until * width, dtype=np.uint64)).reshape(-1, width)
            places[row:until] = np.sort(np.argpartition(drawn, kept - 1, axis=1)[:, :kept], axis=1)
        return torch.from_numpy(places)


def kept_of(width: int, fraction: float) -> int:
    """Return how many of a row's ``width`` entries a ``fraction`` of them is: at least one, where there are any."""
    return min(width, max(1, ceil(round(fraction * width, 6))))  # 0.1 * 30 is a little more than 3


def _place_type(width: int) -> torch.dtype:
    return torch.int16 if width <= 1 << 15 else torch.int32


def _check_fraction(fraction: float, example: str) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"expected a fraction of entries in (0, 1], got {fraction}; for example {example}")


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return numbers that look random, alike on all machines (SplitMix64, Steele, Lea & Flood 2014)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
