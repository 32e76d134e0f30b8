"""Members that are unlike, in labels, amounts or devices: what each holds, and what it is judged on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn.data import Dataset, Splits, partition
from splitlearn.data.skew import device_noise, quantities

__all__ = ["KINDS", "Share", "Skew", "judged_by", "shares_of", "skew_of"]

KINDS = {
    "iid": "members are alike",
    "label": "members' classes are drawn from a Dirichlet of this concentration: small is unlike",
    "quantity": "members' amounts are drawn from a Dirichlet of this concentration: small is unlike",
    "feature": "devices add noise, the last member's of this variance, the first's nearly none",
}
LEAST_ROWS = 2  # of a member
JUDGED_ON = 200  # samples, drawn for each member


@dataclass(frozen=True)
class Skew:
    """In what members are unlike, and how much; ``level`` is 0 where they are alike."""

    kind: str
    level: float

    def __str__(self) -> str:
        return self.kind if self.kind == "iid" else f"{self.kind}:{self.level:g}"


@dataclass(frozen=True)
class Share:
    """One member's samples, and those that its own model is judged on."""

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


def judged_by(part: str, splits: Splits) -> Dataset:
    """Return the samples that models are judged on: ``test``, or ``auxiliary``."""
    return splits.test if part == "test" else splits.auxiliary


def shares_of(skew: Skew, private: Dataset, judged: Dataset, clients: int, seed: int) -> list[Share]:
    """Return each member's share of the private samples, and what it is judged on; fixed by the seed.

    A member is judged on 200 samples of ``judged``: a class is drawn with that class's share of the member's
    training samples, then one of its samples, with replacement; under a feature skew its device's noise is on them,
    drawn afresh. They depend on skew, seed and member alone, so that all methods have the same.
    """
    if LEAST_ROWS * clients > len(private):
        raise ValueError(
            f"expected {LEAST_ROWS} samples or more for each of {clients} clients, got {len(private)} for all of them; "
            "raise --private, or lower --clients"
        )
    if skew.kind == "label":
        try:
            rows = partition.dirichlet(private.y, clients, skew.level, seed, min_rows=LEAST_ROWS)
        except ValueError as error:
            raise ValueError(
                f"expected a skew that leaves {LEAST_ROWS} samples or more to each of {clients} clients, got {skew}, "
                f"which leaves too few in every draw of seed {seed}; raise its level or --private, or lower --clients"
            ) from error
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
            raise ValueError(
                f"expected samples to judge client {number} on, of a class that it has, got none; raise the level of "
                f"{skew}, or lower --clients"
            )
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
