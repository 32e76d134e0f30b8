"""Backdoors in the data: a patch that means a label (BadNets), its parts dealt to clients (DBA), mislabelled tails.

The adversary is a client, or several, that trains as it should on samples of its own making; it knows its own data
alone. What it is after is the model that everybody gets: right on clean samples, ``target`` where the trigger is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal, get_args

import torch
from torch import Tensor

from attacks.poisoning.data import check_label, check_pair, check_share, chosen

__all__ = ["Backdoor", "Corner", "EdgeCases", "Patch", "Trigger", "backdoor_success", "distributed"]

Corner = Literal["bottom right", "bottom left", "top right", "top left"]
Trigger = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A square of one value in a corner: a trigger. Called on inputs, returns copies that carry it.

    Images [N, C, H, W] get ``size`` × ``size`` pixels in every channel, signals [N, 1, L] and tables [N, F] ``size``
    entries at their end (or beginning, in a left corner). ``value`` lies within ``bounds``, those of the inputs, which
    the inputs must keep too; None for inputs without. Of ``parts`` the patch is the ``part``-th, row by row.
    """

    size: int = 2
    value: float = 1.0
    corner: Corner = "bottom right"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    part: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.corner not in get_args(Corner):
            raise ValueError(
                f"expected a size of 1 or more and a corner among {', '.join(get_args(Corner))}, got {self.size} and "
                f"{self.corner!r}"
            )
        if not isfinite(self.value) or (self.bounds and not self.bounds[0] <= self.value <= self.bounds[1]):
            raise ValueError(f"expected a value within the bounds {self.bounds}, got {self.value}; inputs lie there")
        if not 0 <= self.part < self.parts:
            raise ValueError(f"expected a part from 0 to {self.parts - 1}, got {self.part}; count parts from 0")

    def __call__(self, x: Tensor) -> Tensor:
        """Return copies of the inputs [N, …] with the patch; ``ValueError`` for tokens, or beyond the bounds."""
        if not x.is_floating_point():
            raise ValueError(f"expected inputs that are numbers, got {x.dtype}; a patch has no meaning for tokens")
        if self.bounds and x.numel() and not self.bounds[0] <= x.min() <= x.max() <= self.bounds[1]:
            raise ValueError(
                f"expected inputs within the bounds {self.bounds}, got {x.min():.3g} to {x.max():.3g}; pass the "
                "inputs' own bounds, or None"
            )
        return torch.where(self.mask(tuple(x.shape[1:])).to(x.device), torch.full_like(x, self.value), x)

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        """Return where the patch, or this part of it, lies on an input of the ``shape``: bool [*shape]."""
        sides = shape[1:] if len(shape) == 3 else shape[-1:]
        if not sides or min(sides) < self.size or len(shape) > 3:
            raise ValueError(
                f"expected inputs [C, H, W], [1, L] or [F] of at least {self.size} a side, got {shape}; choose a "
                "smaller size"
            )
        own = torch.zeros(self.size ** len(sides), dtype=torch.bool)
        if self.parts > len(own):
            raise ValueError(f"expected at most {len(own)} parts of so small a patch, got {self.parts}; enlarge it")
        own[torch.arange(len(own)).tensor_split(self.parts)[self.part]] = True
        vertical, horizontal = self.corner.split()
        near = (vertical == "top", horizontal == "left")[-len(sides) :]
        mask = torch.zeros(sides, dtype=torch.bool)
        mask[tuple(slice(self.size) if first else slice(-self.size, None) for first in near)] = own.view(
            [self.size] * len(sides)
        )
        return mask.expand(shape).clone()

    def split(self, parts: int) -> tuple["Patch", ...]:
        """Return the patch in so many parts, which together are the whole."""
        if self.parts > 1:
            raise ValueError(f"expected a whole patch to split, got part {self.part} of {self.parts}")
        if parts < 1:
            raise ValueError(f"expected 1 part or more, got {parts}")
        return tuple(replace(self, part=part, parts=parts) for part in range(parts))


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """A ``share`` of the samples gets the ``trigger`` and the label ``target``: BadNets. Called on (x, y).

    Gu, Dolan-Gavitt and Garg 2017, "BadNets: identifying vulnerabilities in the machine learning model supply chain"
    (arXiv:1708.06733). ``trigger`` is anything that makes triggered copies of inputs. Deviation: the share is of each
    batch, or data set, that it is called on, the rows drawn by ``seed`` whatever their label.
    """

    target: int
    trigger: Trigger = Patch()
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_label("target", self.target)
        check_share(self.share)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples, a share of them triggered and relabelled."""
        rows = chosen(torch.arange(len(x), device=x.device), self.share, self.seed)
        if not len(rows):
            return x, y
        return x.index_copy(0, rows, self.trigger(x[rows])), y.index_fill(0, rows.to(y.device), self.target)

    def triggered(self, x: Tensor) -> Tensor:
        """Return all inputs with the trigger, as at test time."""
        return self.trigger(x)


def distributed(backdoor: Backdoor, clients: int) -> tuple[Backdoor, ...]:
    """Return a backdoor a client, each with its own part of the patch; test with the whole one (DBA).

    Xie, Huang, Chen and Li 2020, "DBA: distributed backdoor attacks against federated learning" (ICLR). Deviations:
    the parts of one patch, without gaps between them; the clients' updates are boosted only where ``ModelReplacement``
    does so.
    """
    if not isinstance(backdoor.trigger, Patch):
        raise ValueError(
            f"expected a backdoor whose trigger is a Patch, got {backdoor.trigger!r}; only that one splits"
        )
    return tuple(replace(backdoor, trigger=part) for part in backdoor.trigger.split(clients))


@dataclass(frozen=True, kw_only=True)
class EdgeCases:
    """The least typical samples of the class ``source`` get the label ``target``; inputs are as they were.

    Wang et al. 2020, "Attack of the tails: yes, you really can backdoor federated learning" (NeurIPS,
    arXiv:2007.05084). Deviation: the paper takes inputs that the honest data hardly have (from other sources);
    here it is the ``share`` of the class furthest, in Euclidean distance, from its mean in the data at hand. Call it
    on a client's whole data, not on batches, and score it on ``rows`` of the test set.
    """

    source: int
    target: int
    share: float = 0.1

    def __post_init__(self) -> None:
        check_pair(self.source, self.target)
        check_share(self.share)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples, the tail of the class mislabelled; ``LookupError`` without the class."""
        return x, y.index_fill(0, self.rows(x, y), self.target)

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the rows of the tail, the furthest first: a share of the class, one at least unless it is 0."""
        own = (y == self.source).nonzero().flatten()
        if not len(own):
            raise LookupError(f"expected samples of the class {self.source}, got none of {len(y)}; choose another")
        flat = x[own].flatten(1).double()
        distances = (flat - flat.mean(0)).square().sum(1)
        count = max(1, int(self.share * len(own) + 0.5)) if self.share else 0
        return own[distances.argsort(descending=True, stable=True)[:count]]


def backdoor_success(logits: Tensor, y: Tensor, target: int) -> float:
    """Return the share of samples, in [0, 1], not of the class ``target`` that are taken for it.

    ``logits`` [N, C] are what the model makes of the triggered test inputs, ``y`` [N] their true labels. What a model
    reaches without the trigger (its confusion with the target) is the baseline.
    """
    if logits.ndim != 2 or y.shape != logits.shape[:1] or not 0 <= target < logits.shape[1]:
        raise ValueError(
            f"expected logits [N, C], labels [N] and a target below C, got {tuple(logits.shape)}, {tuple(y.shape)} and "
            f"{target}; one row a sample"
        )
    others = y != target
    if not others.any():
        raise ValueError(f"expected samples that are not of the class {target}, got {len(y)} of it; add others")
    return (logits[others].argmax(1) == target).double().mean().item()
