"""The search for a plan: the cheapest cut, compression and protection that keep the user's bounds, in few trainings.

What a candidate costs is known before it is trained; what it is worth and what leaks is not. So candidates are glimpsed
(one short training from one start, one small attack), the hopeless are left out, and the others are measured, cheapest
first, until one keeps the bounds: nothing dearer can then do better. Nothing here trains: ``glimpse`` and ``measure``
are handed in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isinf

from experiments.summary import Spread
from splitlearn.cost import Cost

__all__ = ["OBJECTIVES", "Bounds", "Candidate", "Found", "Glimpse", "Measured", "Slack", "search"]

KNOWN = ("seconds", "joules", "nbytes")  # before anything is trained
OBJECTIVES = (*KNOWN, "leakage", "loss")


@dataclass(frozen=True)
class Candidate:
    """A way to split: how many layers the device holds, what is done to save bytes and what to protect.

    ``place`` names the last layer below the cut; it is empty where nothing is split, with all layers in the cloud
    (``at`` 0: the inputs cross) or all of them on the device.
    """

    at: int
    place: str = ""
    compression: str = "none"
    protection: str = "none"

    @property
    def split(self) -> bool:
        """Whether there is a cut."""
        return bool(self.place)

    @property
    def name(self) -> str:
        """It in a line."""
        if not self.split:
            return "all on the device" if self.at else "all in the cloud"
        more = [one for one in (self.compression, self.protection) if one != "none"]
        return " · ".join([f"cut after {self.place}", *more])


@dataclass(frozen=True)
class Bounds:
    """What a plan must keep: points of accuracy lost, leakage in [0, 1], and per sample seconds, joules and bytes."""

    loss: float = inf
    leakage: float = inf
    seconds: float = inf
    joules: float = inf
    nbytes: float = inf
    memory: float = inf  # bytes of the device

    def affords(self, cost: Cost) -> bool:
        """Whether a cost keeps them."""
        spent = cost.up_nbytes + cost.down_nbytes
        return (
            cost.seconds <= self.seconds
            and cost.joules <= self.joules
            and spent <= self.nbytes
            and cost.edge_memory <= self.memory
        )


@dataclass(frozen=True)
class Slack:
    """How far beyond a bound a glimpse may lie for its candidate to be measured all the same."""

    loss: float = 5.0  # points: a short training is not a whole one
    collapse: float = 10.0  # points: bounds on the loss up to here allow for no training that a penalty has ruined
    leakage: float = 0.05  # the small attack gets less than its family, but on weights that are not the measured ones


@dataclass(frozen=True)
class Glimpse:
    """What a short look tells: points of accuracy lost, and leakage by a small attack.

    ``doubt`` is how much lower the leakage may be measured, beyond the slack of all: infinite where the small attack is
    no member of those that will be run; more where a penalty shapes the training, which counts under bounds that let it
    ruin that.
    """

    loss: float
    leakage: float
    doubt: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What whole trainings and attacks tell, over the seeds, and what a sample costs with what then crossed."""

    candidate: Candidate
    cost: Cost
    loss: Spread
    leakage: Spread

    @property
    def nbytes(self) -> float:
        """Bytes a sample, both ways."""
        return self.cost.up_nbytes + self.cost.down_nbytes

    def keeps(self, bounds: Bounds) -> bool:
        """Whether the means over the seeds, and the cost, are within the bounds."""
        within = self.loss.mean <= bounds.loss and self.leakage.mean <= bounds.leakage
        return within and bounds.affords(self.cost)

    def objective(self, name: str) -> float:
        """Return what is to be small."""
        if name in KNOWN:
            return of_cost(self.cost, name)
        return self.leakage.mean if name == "leakage" else self.loss.mean


@dataclass(frozen=True)
class Found:
    """The outcome of a search: the best plan, or None; all that was measured and glimpsed, and why the others fell."""

    best: Measured | None
    measured: tuple[Measured, ...]
    glimpses: Mapping[Candidate, Glimpse]
    dear: tuple[Candidate, ...]  # beyond the bounds of cost, by what is known beforehand
    hopeless: tuple[Candidate, ...]  # beyond the bounds of loss or leakage by more than the slack, at a glimpse

    @property
    def front(self) -> tuple[Measured, ...]:
        """The measured that no other beats in seconds, loss and leakage at once."""
        return tuple(one for one in self.measured if not any(_beats(other, one) for other in self.measured))


def search(
    costs: Mapping[Candidate, Cost],
    bounds: Bounds,
    minimise: str,
    *,
    glimpse: Callable[[Sequence[Candidate]], Mapping[Candidate, Glimpse]],
    measure: Callable[[Sequence[Candidate]], Sequence[Measured]],
    slack: Slack | None = None,
    at_once: int = 1,
    whole_front: bool = False,
) -> Found:
    """Return the best plan under ``bounds``, and what was seen on the way.

    ``costs`` are the candidates, with what a sample costs each. ``at_once`` are measured in one go. Of equal ones the
    first counts. With ``whole_front`` it goes on after the best is known, until all that are not hopeless are measured.
    The result is that of measuring everything, unless a glimpse misleads by more than the ``slack`` and its doubt, or
    bytes change in training (entropy coding) more than the costs' order does. Under a penalty a training may collapse,
    which leaks less than any glimpse says: with a generous bound on the loss it may be left out.
    """
    if minimise not in OBJECTIVES:
        raise ValueError(f"expected something to minimise among {', '.join(OBJECTIVES)}, got {minimise!r}")
    if at_once < 1:
        raise ValueError(f"expected at least one measurement at a time, got {at_once}")
    slack = slack or Slack()
    affordable = [one for one, cost in costs.items() if bounds.affords(cost)]
    glimpses = dict(glimpse(affordable)) if affordable else {}
    hopeful = [
        one
        for one in affordable
        if glimpses[one].loss <= bounds.loss + slack.loss
        and _least_leak(glimpses[one], slack, bounds) <= bounds.leakage
    ]

    def least(one: Candidate) -> float:
        """What it can come down to at best."""
        if minimise in KNOWN:
            return of_cost(costs[one], minimise)
        return _least_leak(glimpses[one], slack, bounds) if minimise == "leakage" else glimpses[one].loss - slack.loss

    waiting = sorted(hopeful, key=least)
    measured: list[Measured] = []
    best: Measured | None = None
    while waiting and (whole_front or best is None or least(waiting[0]) < best.objective(minimise)):
        now, waiting = waiting[:at_once], waiting[at_once:]
        for one in measure(now):
            measured.append(one)
            if one.keeps(bounds) and (best is None or one.objective(minimise) < best.objective(minimise)):
                best = one
    dear = tuple(one for one in costs if one not in affordable)
    return Found(best, tuple(measured), glimpses, dear, tuple(one for one in affordable if one not in hopeful))


def _least_leak(seen: Glimpse, slack: Slack, bounds: Bounds) -> float:
    """Return what leakage may come down to; a penalty takes off more only where it ruins the training, too."""
    doubt = seen.doubt if isinf(seen.doubt) or bounds.loss > slack.collapse else 0.0
    return max(0.0, seen.leakage - slack.leakage - doubt)


def of_cost(cost: Cost, name: str) -> float:
    """Return a cost's seconds, joules or bytes."""
    return cost.up_nbytes + cost.down_nbytes if name == "nbytes" else float(getattr(cost, name))


def _beats(other: Measured, one: Measured) -> bool:
    theirs = (other.cost.seconds, other.loss.mean, other.leakage.mean)
    ours = (one.cost.seconds, one.loss.mean, one.leakage.mean)
    return theirs != ours and all(a <= b for a, b in zip(theirs, ours, strict=True))
