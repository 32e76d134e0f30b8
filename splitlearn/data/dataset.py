"""Dataset (samples, labels, where each row came from), and its private, auxiliary and test parts, disjoint by row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Dataset", "Modality", "Splits", "split"]

Modality = Literal["image", "signal", "table", "tokens"]

_LAYOUTS: dict[str, tuple[torch.dtype, int, str]] = {
    "image": (torch.float32, 4, "float32 [N, C, H, W]"),
    "signal": (torch.float32, 3, "float32 [N, 1, L]"),
    "table": (torch.float32, 2, "float32 [N, F]"),
    "tokens": (torch.int64, 2, "int64 [N, L]"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Samples ``x`` with labels ``y``; rows keep the number (``ids``) that they had when the data set was loaded.

    Raises ``ValueError`` where a tensor does not fit its field, a value is not finite, or a label is out of range.
    """

    name: str
    x: Tensor
    """Samples first: images float32 [N, C, H, W] in [0, 1], signals float32 [N, 1, L], tables float32 [N, F],
    tokens int64 [N, L] with 0 as padding."""
    y: Tensor
    """Labels, int64 [N], from 0 to ``num_classes`` - 1."""
    num_classes: int
    kind: Modality
    ids: Tensor
    """Row numbers in the data set as loaded, int64 [N]."""
    num_train: int | None = None
    """Rows with an id below this one are the official training set, the rest the official test set."""
    groups: Tensor | None = None
    """The patient or person of each row, int64 [N]."""
    names: tuple[str, ...] | None = None
    """Tables: the column names. Tokens: the word of each token number."""

    def __post_init__(self) -> None:
        if self.kind not in _LAYOUTS:
            raise ValueError(f"{self.name}: expected a kind among {', '.join(_LAYOUTS)}, got {self.kind!r}")
        dtype, ndim, layout = _LAYOUTS[self.kind]
        doubled = dtype == torch.float32 and self.x.dtype == torch.float64  # for experiments in double precision
        if not (self.x.dtype == dtype or doubled) or self.x.ndim != ndim:
            got = f"{self.x.dtype} of shape {tuple(self.x.shape)}"
            raise ValueError(f"{self.name}: expected samples of kind {self.kind} as {layout}, got {got}; convert them")
        for what, tensor in (("labels", self.y), ("ids", self.ids), ("groups", self.groups)):
            if tensor is not None and (tensor.dtype != torch.int64 or tuple(tensor.shape) != (len(self.x),)):
                got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"{self.name}: expected {what} as int64 [{len(self.x)}], got {got}; convert them")
        self._check_values()

    def _check_values(self) -> None:
        if not self.x.numel():
            return
        low, high = (float(bound) for bound in self.x.aminmax())  # either is nan where any value is
        least, most = {"image": (0.0, 1.0), "tokens": (0.0, 2.0**62)}.get(self.kind, (-3.4e38, 3.4e38))
        if not least <= low <= high <= most:
            wanted = "values in [0, 1]" if self.kind == "image" else "finite values, and tokens of at least 0"
            raise ValueError(f"{self.name}: expected {wanted}, got {low:g} to {high:g}; rescale or clean the data")
        first, last = (int(bound) for bound in self.y.aminmax())
        if not 0 <= first <= last < self.num_classes:
            raise ValueError(
                f"{self.name}: expected labels from 0 to {self.num_classes - 1}, got {first} to {last}; "
                "renumber them or raise num_classes"
            )

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name}: {len(self)} {self.kind} rows {tuple(self.x.shape[1:])}, {self.num_classes} classes)"
        )

    def subset(self, rows: Tensor | Sequence[int]) -> "Dataset":
        """Return a copy of these rows, numbered by their place here, in the order given; ``ids`` stay theirs."""
        rows = torch.as_tensor(rows, dtype=torch.int64).reshape(-1)
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            got = f"{int(rows.min())} to {int(rows.max())}"
            raise ValueError(f"{self.name}: expected rows from 0 to {len(self) - 1}, got {got}; count from this subset")
        groups = None if self.groups is None else self.groups[rows]
        return replace(self, x=self.x[rows], y=self.y[rows], ids=self.ids[rows], groups=groups)


@dataclass(frozen=True)
class Splits:
    """What the victim trains on, what the adversary may know, and what scores both: no row is in two of them."""

    private: Dataset
    auxiliary: Dataset
    test: Dataset

    def __post_init__(self) -> None:
        parts = {"private": self.private, "auxiliary": self.auxiliary, "test": self.test}
        for (first, one), (second, other) in combinations(parts.items(), 2):
            shared = int(torch.isin(one.ids, other.ids).sum())
            if shared:
                raise ValueError(
                    f"expected disjoint parts, got {shared} rows of {first} in {second} too; use split(dataset, …)"
                )


def split(
    dataset: Dataset, *, private: int, auxiliary: int, test: int, seed: int = 0, by_group: bool = False
) -> Splits:
    """Return disjoint parts of these numbers of rows, cut from one permutation that the seed fixes.

    Where there is an official test set, ``test`` is drawn from it and the other two from the training set. The
    test part depends on its own size alone. With ``by_group`` no group (patient, person) is in two parts: whole
    groups are dealt in seeded order to the part that lacks most rows, and what is over its size is dropped.

    Raises ``ValueError`` where there are fewer rows than asked for.
    """
    if min(private, auxiliary, test) < 0:
        raise ValueError(f"expected sizes of at least 0, got private={private}, auxiliary={auxiliary}, test={test}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    if by_group:
        parts = _deal_groups(dataset, order, {"private": private, "auxiliary": auxiliary, "test": test})
        return Splits(*(dataset.subset(rows) for rows in parts))
    if dataset.num_train is None:
        _check_enough(dataset, len(order), "all parts", private + auxiliary + test)
        training = held_out = order
    else:
        official = dataset.ids[order] >= dataset.num_train
        training, held_out = order[~official], order[official]
        _check_enough(dataset, len(training), "private and auxiliary", private + auxiliary)
        _check_enough(dataset, len(held_out), "the official test set", test)
    return Splits(
        dataset.subset(training[:private]),
        dataset.subset(training[private : private + auxiliary]),
        dataset.subset(held_out[len(held_out) - test :]),
    )


def _check_enough(dataset: Dataset, there: int, part: str, wanted: int) -> None:
    if wanted > there:
        raise ValueError(f"{dataset.name}: expected at most {there} rows for {part}, got {wanted}; ask for fewer")


def _deal_groups(dataset: Dataset, order: Tensor, sizes: dict[str, int]) -> list[Tensor]:
    if dataset.groups is None:
        raise ValueError(f"{dataset.name}: expected a data set with groups, got none; leave by_group out")
    if dataset.num_train is not None:
        raise ValueError(
            f"{dataset.name}: expected no official test set, since groups may lie across it; "
            "use replace(dataset, num_train=None)"
        )
    groups = dataset.groups[order]
    lacking = dict(sizes)
    owner: dict[int, str] = {}
    counts = dict(zip(*(part.tolist() for part in groups.unique(return_counts=True)), strict=True))
    for group in dict.fromkeys(groups.tolist()):
        owner[group] = max(lacking, key=lambda part: lacking[part])
        lacking[owner[group]] -= counts[group]
    owners = [owner[group] for group in groups.tolist()]
    parts = []
    for part, size in sizes.items():
        rows = order[torch.tensor([name == part for name in owners], dtype=torch.bool)]
        if len(rows) < size:
            raise ValueError(
                f"{dataset.name}: expected at most {len(rows)} rows for {part} when whole groups are dealt, "
                f"got {size}; ask for fewer, or try another seed"
            )
        parts.append(rows[:size])
    return parts
