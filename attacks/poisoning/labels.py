"""Label flips: a bad client's inputs as they are, their labels others. Of a ``share`` of the samples, drawn by a seed.

The mirrored flip y → C − 1 − y is Fang et al.'s (2020, arXiv:1911.11815), the one of a source class to a target
Tolpegin, Truex, Gursoy and Liu's (2020, "Data poisoning attacks against federated learning systems",
arXiv:2007.08432). The adversary trains honestly otherwise, and knows nobody's data but its own.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.poisoning.data import check_labels, check_pair, check_share, chosen

__all__ = ["MirroredLabels", "NextLabels", "RandomLabels", "SourceLabels"]


@dataclass(frozen=True)
class Flip(ABC):
    """Labels of ``classes`` become others, each class's by a rule; of a ``share`` of the samples, drawn by ``seed``."""

    classes: int
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        if self.classes < 2:
            raise ValueError(f"expected two classes or more, got {self.classes}; one label cannot be flipped")

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and the flipped labels."""
        check_labels(y, self.classes)
        return x, _flipped(y, self.lies(y), torch.ones_like(y, dtype=torch.bool), self.share, self.seed)

    @abstractmethod
    def lies(self, y: Tensor) -> Tensor:
        """Return what each label would become."""


@dataclass(frozen=True)
class MirroredLabels(Flip):
    """Labels y of ``classes`` C become C − 1 − y. (An odd number of classes leaves the middle one as it is.)"""

    def lies(self, y: Tensor) -> Tensor:
        """Return C − 1 − y."""
        return self.classes - 1 - y


@dataclass(frozen=True)
class NextLabels(Flip):
    """Labels y of ``classes`` C become y + 1, the last class the first ("pairwise")."""

    def lies(self, y: Tensor) -> Tensor:
        """Return y + 1, modulo C."""
        return (y + 1) % self.classes


@dataclass(frozen=True)
class RandomLabels(Flip):
    """Labels of ``classes`` become others, each of the wrong classes as likely: none stays what it was.

    The same on every call for the same number of them.
    """

    def lies(self, y: Tensor) -> Tensor:
        """Return other labels, drawn by the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return (y + torch.randint(1, self.classes, y.shape, generator=generator).to(y.device)) % self.classes


@dataclass(frozen=True)
class SourceLabels:
    """Labels ``source`` become ``target``; ``share`` is of the samples of that class, of which there may be none."""

    source: int
    target: int
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_pair(self.source, self.target)
        check_share(self.share)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and the flipped labels."""
        return x, _flipped(y, torch.full_like(y, self.target), y == self.source, self.share, self.seed)


def _flipped(y: Tensor, lies: Tensor, where: Tensor, share: float, seed: int) -> Tensor:
    rows = chosen(where.nonzero().flatten(), share, seed)
    return y.index_copy(0, rows, lies[rows])
