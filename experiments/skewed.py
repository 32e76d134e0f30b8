"""Members that are unlike, in labels, amounts or devices: what each holds, and what it is judged on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn.data import Dataset, partition
from splitlearn.data.skew import device_noise, quantities

__all__ = ["KINDS", "Share", "Skew", "shares_of", "skew_of"]

KINDS = {
    "iid": "members are alike",
    "label": "members' classes are drawn from a Dirichlet of this concentration: small is unlike",
    "quantity": "members' amounts are drawn from a Dirichlet of this concentration: small is unlike",
    "feature": "devices add noise, the last member's of this variance, the first's nearly none",
}
LEAST_ROWS = 2  # of a member
JUDGED_ON = 200  # samples of each member's own test split


@dataclass(frozen=True)
class Skew:
    """In what members are unlike, and how much; ``level`` is 0 where they are alike."""

    kind: str
    level: float

    def __str__(self) -> str:
        return self.kind if self.kind == "iid" else f"{self.kind}:{self.level:g}"


@dataclass(frozen=True)
class Share:
    """One member's samples, and the test split that its own model is judged on."""

    x: Tensor
    y: Tensor
    judged_x: Tensor
    judged_y: Tensor


def skew_of(spec: str) -> Skew:
    """Return the skew of ``iid``, ``label:0.1``, ``quantity:0.5`` or ``feature:0.5``; one line of error for others."""
    kind, _, text = spec.partition(":")
    try:
        level = float(text) if text else 0.0
    except ValueError:
        level = math.nan
    if kind not in KINDS or (level != 0.0 if kind == "iid" else not 0 < level < math.inf):
        raise ValueError(
            f"expected --skews such as iid, label:0.1, quantity:0.5 or feature:0.5, a level above 0, got {spec!r}"
        )
    return Skew(kind, level)


def shares_of(skew: Skew, private: Dataset, judged: Dataset, clients: int, seed: int) -> list[Share]:
    """Return each member's share of the private samples, and what it is judged on; fixed by the seed.

    A member's own test split has 200 samples of ``judged``: a class is drawn with that class's share of the member's
    training samples, then one of its samples, with replacement; under a feature skew its device's noise is on them,
    drawn afresh. It depends on skew, seed and member alone, so that all methods have the same.
    """
    if skew.kind == "label":
        rows = partition.dirichlet(private.y, clients, skew.level, seed, min_rows=LEAST_ROWS)
    elif skew.kind == "quantity":
        rows = quantities(len(private), clients, skew.level, seed, min_rows=LEAST_ROWS)
    else:
        rows = partition.iid(len(private), clients, seed)
    of_class = [torch.nonzero(judged.y == label).flatten() for label in range(private.num_classes)]
    found = []
    for number, own in enumerate(rows):
        x, y = private.x[own], private.y[own]
        draws = torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + 1)
        mix = torch.bincount(y, minlength=private.num_classes).double()
        mix *= torch.tensor([len(some) > 0 for some in of_class])  # a class that nobody can be judged on
        if not bool(mix.any()):
            raise ValueError(f"expected test samples of a class that client {number} has, got none; raise --clients")
        labels = torch.multinomial(mix, JUDGED_ON, replacement=True, generator=draws).tolist()
        places = torch.rand(JUDGED_ON, generator=draws, dtype=torch.float64).tolist()
        taken = torch.stack(
            [of_class[label][int(u * len(of_class[label]))] for label, u in zip(labels, places, strict=True)]
        )
        judged_x = judged.x[taken]
        if skew.kind == "feature":
            x = device_noise(x, number, clients, skew.level, 2 * seed)
            judged_x = device_noise(judged_x, number, clients, skew.level, 2 * seed + 1)
        found.append(Share(x, y, judged_x, judged.y[taken]))
    return found
