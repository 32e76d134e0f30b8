"""Poison: what a bad client does to its samples before it trains on them; on batches, or on a whole data set."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from splitlearn.data import Dataset

__all__ = ["Poison", "PoisonedBatches", "chosen", "poisoned"]


class Poison(Protocol):
    """A frozen set of settings, called on samples: makes others of them, of the same number, and changes nothing."""

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return what inputs ``x`` [n, …] and labels ``y`` int64 [n] become."""


def poisoned(dataset: Dataset, poison: Poison) -> Dataset:
    """Return the data set with its samples poisoned; everything else, ids too, stays. The given one is as it was."""
    x, y = poison(dataset.x, dataset.y)
    return replace(dataset, x=x, y=y)


class PoisonedBatches:
    """Batches (x, y) that are poisoned one by one, anew on every pass: for a bad client's ``Member``."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], poison: Poison):
        if isinstance(batches, Iterator):
            raise ValueError("expected batches that can be gone through again, got an iterator; pass a list or Batches")
        self.batches, self.poison = batches, poison

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.poison(x, y) for x, y in self.batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the batches' state, where they have one."""
        return self.batches.state_dict() if hasattr(self.batches, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        if hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(state)


def chosen(rows: Tensor, share: float, seed: int) -> Tensor:
    """Return a ``share`` of ``rows`` [n], rounded to whole ones, drawn by the seed and sorted.

    As many rows, the same places, on every call: batches are to be shuffled before.
    """
    count = int(share * len(rows) + 0.5)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return rows[drawn.sort().values.to(rows.device)]


def check_share(share: float) -> None:
    """Raise ``ValueError`` unless it is a share."""
    if not 0 <= share <= 1:
        raise ValueError(f"expected a share of the samples from 0 to 1, got {share}")


def check_label(what: str, label: int) -> None:
    """Raise ``ValueError`` unless it is a label."""
    if label < 0:
        raise ValueError(f"expected a {what} label of 0 or more, got {label}; count classes from 0")


def check_pair(source: int, target: int) -> None:
    """Raise ``ValueError`` unless these are two different labels."""
    check_label("source", source)
    check_label("target", target)
    if source == target:
        raise ValueError(f"expected a source and a target that differ, got {source} for both")


def check_labels(y: Tensor, classes: int) -> None:
    """Raise ``ValueError`` unless these are labels of so many classes."""
    if y.dtype != torch.int64 or y.ndim != 1 or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes):
        got = f"{y.dtype} of {y.ndim} dims" + (f", {y.min().item()} to {y.max().item()}" if y.numel() else "")
        raise ValueError(f"expected int64 labels [n] from 0 to {classes - 1}, got {got}; give the number of classes")
