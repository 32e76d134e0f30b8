"""Label flips: a bad client's inputs as they are, their labels others. Of a ``share`` of the samples, drawn by a seed.

The mirrored flip y → C − 1 − y is Fang et al.'s (2020, arXiv:1911.11815), the one of a source class to a target
Tolpegin, Truex, Gursoy and Liu's (2020, "Data poisoning attacks against federated learning systems",
arXiv:2007.08432). The adversary trains honestly otherwise, and knows nobody's data but its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.poisoning.data import check_label, check_labels, check_share, chosen

__all__ = ["MirroredLabels", "NextLabels", "RandomLabels", "SourceLabels"]


@dataclass(frozen=True)
class MirroredLabels:
    """Labels y of ``classes`` C become C − 1 − y. (An odd number of classes leaves the middle one as it is.)"""

    classes: int
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.classes, self.share)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and the flipped labels."""
        check_labels(y, self.classes)
        return x, _flipped(y, self.classes - 1 - y, torch.ones_like(y, dtype=torch.bool), self.share, self.seed)


@dataclass(frozen=True)
class NextLabels:
    """Labels y of ``classes`` C become y + 1, the last class the first ("pairwise")."""

    classes: int
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.classes, self.share)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and the flipped labels."""
        check_labels(y, self.classes)
        return x, _flipped(y, (y + 1) % self.classes, torch.ones_like(y, dtype=torch.bool), self.share, self.seed)


@dataclass(frozen=True)
class SourceLabels:
    """Labels ``source`` become ``target``; ``share`` is of the samples of that class, of which there may be none."""

    source: int
    target: int
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_label("source", self.source)
        check_label("target", self.target)
        check_share(self.share)
        if self.source == self.target:
            raise ValueError(f"expected a source and a target that differ, got {self.source} for both")

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and the flipped labels."""
        return x, _flipped(y, torch.full_like(y, self.target), y == self.source, self.share, self.seed)


@dataclass(frozen=True)
class RandomLabels:
    """Labels of ``classes`` become others, each of the wrong classes as likely: none stays what it was."""

    classes: int
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.classes, self.share)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and the flipped labels, the same on every call for the same number of them."""
        check_labels(y, self.classes)
        generator = torch.Generator().manual_seed(self.seed)
        by = torch.randint(1, self.classes, y.shape, generator=generator).to(y.device)
        return x, _flipped(y, (y + by) % self.classes, torch.ones_like(y, dtype=torch.bool), self.share, self.seed)


def _flipped(y: Tensor, lies: Tensor, where: Tensor, share: float, seed: int) -> Tensor:
    rows = chosen(where.nonzero().flatten(), share, seed)
    return y.index_copy(0, rows, lies[rows])


def _check(classes: int, share: float) -> None:
    check_share(share)
    if classes < 2:
        raise ValueError(f"expected two classes or more, got {classes}; one label cannot be flipped")
