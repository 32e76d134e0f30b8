"""Update attacks by formula: what colluders hand to the fed server in place of what they trained.

Each is called ``attack(honest, own)`` on rows of ``splitlearn.deltas`` (weights less start, float64) and returns the
colluders' rows [bad, d], as many as ``own`` has; with no colluder, none. ``honest`` [h, d] are the updates that they
know: all honest ones in the worst case, which nobody in a real federation sees (omniscient); ``own`` [bad, d] are what
they trained themselves, which most attacks do not need.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, Protocol

import torch
from scipy.stats import norm
from torch import Tensor

from splitlearn.deltas import gram

__all__ = ["ALIE", "InnerProduct", "Mimic", "ModelReplacement", "SignFlip", "UpdateAttack", "checked"]


class UpdateAttack(Protocol):
    """What colluders send: a frozen set of settings, called on the updates that they know and their own."""

    def __call__(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return the colluders' rows [bad, d] for those of honest members [h, d] and their ``own`` [bad, d]."""


@dataclass(frozen=True)
class SignFlip:
    """Every colluder sends −``scale`` · μ, μ the mean honest update. ``scale`` is 0 or more; 0 sends no change.

    After Li, Xu, Chen, Giannakis and Ling 2019 ("RSA", arXiv:1811.03761), where each flips what it trained itself.
    """

    scale: float = 5.0

    def __post_init__(self) -> None:
        _not_negative("scale", self.scale)

    def __call__(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return −scale · μ, a row a colluder."""
        honest, own = checked(honest, own)
        return (-self.scale * honest.mean(0)).repeat(len(own), 1)


@dataclass(frozen=True)
class InnerProduct:
    """Every colluder sends −``epsilon`` · μ, so that the result's inner product with μ turns negative.

    Xie, Koyejo and Gupta 2019, "Fall of empires: breaking Byzantine-tolerant SGD by inner product manipulation"
    (UAI, arXiv:1903.03936). A small ε (.1 to .5) stays near the honest updates, which is what selecting rules such as
    Krum go by; a large one (above h/bad) is needed against the mean.
    """

    epsilon: float

    def __post_init__(self) -> None:
        _not_negative("epsilon", self.epsilon)

    def __call__(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return −ε · μ, a row a colluder."""
        honest, own = checked(honest, own)
        return (-self.epsilon * honest.mean(0)).repeat(len(own), 1)


@dataclass(frozen=True)
class ALIE:
    """Every colluder sends μ − z·σ, μ and σ entry by entry over the honest updates: a little, in every entry at once.

    Baruch, Baruch and Goldberg 2019, "A little is enough: circumventing defenses for distributed learning" (NeurIPS,
    arXiv:1902.06156). With n members, m of them colluding, s = ⌊n/2 + 1⌋ − m honest ones must side with the colluders,
    and z is the standard normal quantile of a share that two published readings put differently: "rest",
    (n − m − s)/(n − m), as in the paper's algorithm, and "all", (n − s)/n. For n = 50, m = 24 these are 1.43 and 1.75.
    ``z`` given, the formula is not asked. Few colluders make z 0 or less by either (n = 10, m = 1: −.14 and 0): give z.

    Deviations: μ and σ (of the honest ones, divided by their number) are of the updates that the colluders know, in
    place of those of the colluders' own; the same sign in every entry.
    """

    z: float | None = None
    formula: Literal["rest", "all"] = "rest"

    def __post_init__(self) -> None:
        if self.z is not None and not isfinite(self.z):
            raise ValueError(f"expected a finite z, got {self.z}; leave it out for the formula")
        if self.formula not in ("rest", "all"):
            raise ValueError(f"expected the formula 'rest' or 'all', got {self.formula!r}; or give z itself")

    def __call__(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return μ − z·σ, a row a colluder; ``ValueError`` where the formula has no finite z."""
        honest, own = checked(honest, own)
        if not len(own):
            return own
        z = self.z if self.z is not None else self.quantile(len(honest) + len(own), len(own))
        return (honest.mean(0) - z * honest.std(0, correction=0)).repeat(len(own), 1)

    def quantile(self, members: int, bad: int) -> float:
        """Return the formula's z for ``bad`` colluders among ``members``."""
        sided = members // 2 + 1 - bad
        share = (members - bad - sided) / (members - bad) if self.formula == "rest" else (members - sided) / members
        if not 0 < share < 1:
            raise ValueError(
                f"expected a share between 0 and 1 of which z is the quantile, got {share:g} for {bad} colluders among "
                f"{members} members; give z, as ALIE(z=1.5)"
            )
        return float(norm.ppf(share))


@dataclass(frozen=True)
class Mimic:
    """Every colluder sends a copy of one honest update, which then counts for too much: none of them is an outlier.

    Karimireddy, He and Jaggi 2022, "Byzantine-robust learning on heterogeneous datasets via bucketing" (ICLR,
    arXiv:2006.09365). ``who`` is the position among the honest rows of the one copied. None: the one that lies
    furthest along the direction of greatest variance, found anew in every round; the paper finds it in some first
    rounds and keeps it (from its description), which ``who`` can do. Harmless where members' data are alike.
    """

    who: int | None = None

    def __post_init__(self) -> None:
        if self.who is not None and self.who < 0:
            raise ValueError(f"expected a position of 0 or more, got {self.who}; leave it out to have one chosen")

    def __call__(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return the copied row, once a colluder; ``LookupError`` where nobody has the position ``who``."""
        honest, own = checked(honest, own)
        if self.who is not None and self.who >= len(honest):
            raise LookupError(
                f"expected a position among {len(honest)} honest members, got who={self.who}; choose a smaller one"
            )
        who = self.who if self.who is not None else furthest(honest)
        return honest[who].repeat(len(own), 1)


@dataclass(frozen=True)
class ModelReplacement:
    """Every colluder sends what it trained (on poisoned data, say), scaled up to survive the average.

    Bagdasaryan, Veit, Hua, Estrin and Shmatikov 2020, "How to backdoor federated learning" (AISTATS,
    arXiv:1807.00459): γ(X − G) + G with γ = n/η. It reads no honest update but for their number. ``scale`` None is
    n / (``rate`` · bad), for members of equal weight in the average: the colluders share the n/η of the paper's single
    one, and the result is G and the mean of their changes, while honest changes are near 0. ``rate`` is η, by which the
    server scales the average (1 in ``splitlearn.federation``). Rows longer than ``longest`` are cut to that norm
    ("train and scale", for servers that clip or refuse long updates).
    """

    scale: float | None = None
    rate: float = 1.0
    longest: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            _not_negative("scale", self.scale)
        if not 0 < self.rate < float("inf") or not (self.longest is None or self.longest > 0):
            raise ValueError(
                f"expected a rate and a longest norm above 0, got {self.rate} and {self.longest}; leave them out for "
                "the defaults"
            )

    def __call__(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return the colluders' own rows, scaled."""
        honest, own = checked(honest, own)
        if not len(own):
            return own
        scale = self.scale if self.scale is not None else (len(honest) + len(own)) / (self.rate * len(own))
        rows = scale * own
        if self.longest is None:
            return rows
        return rows * (self.longest / rows.norm(dim=1, keepdim=True).clamp(min=self.longest))


def furthest(rows: Tensor) -> int:
    """Return the position of the row [h, d] furthest from their mean along the direction of their greatest variance."""
    _, vectors = torch.linalg.eigh(gram(rows))  # the last belongs to the greatest eigenvalue
    return int(vectors[:, -1].abs().argmax())


def checked(honest: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64; ``ValueError`` unless they are rows of one length, with a finite honest one at least."""
    if honest.ndim != 2 or own.ndim != 2 or honest.shape[1] != own.shape[1] or not len(honest):
        raise ValueError(
            f"expected updates [h, d] of at least one honest member and [bad, d] of colluders, got "
            f"{tuple(honest.shape)} and {tuple(own.shape)}; a row a member, as splitlearn.deltas returns"
        )
    if not honest.isfinite().all():
        raise ValueError("expected finite honest updates, got nan or inf; leave out the rows of who diverged")
    return honest.double(), own.double()


def _not_negative(what: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"expected a finite {what} of 0 or more, got {value}; the sign is the attack's own")
