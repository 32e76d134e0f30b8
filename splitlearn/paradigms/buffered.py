"""Asynchronous federated training: updates are taken in as they come, however old what they started from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from splitlearn.federation import Aggregator, mean
from splitlearn.members import FedMember, Weights
from splitlearn.party import Party
from splitlearn.rounds import check_names

__all__ = ["Buffered", "fedbuff", "polynomial"]


@dataclass(frozen=True)
class Buffered:
    """One update of the server's: at what time of the virtual clock, of whose answers, how stale each was."""

    seconds: float
    counts: tuple[tuple[str, int], ...]  # a member may be in a buffer more than once
    staleness: tuple[int, ...]  # updates that the server made between a member's start and its answer
    dropped: tuple[str, ...] = ()


def polynomial(staleness: int) -> float:
    """Return 1/√(1 + staleness): what an answer counts for, FedBuff's choice (there s(τ), section 5)."""
    return (1 + staleness) ** -0.5


def fedbuff(
    members: Sequence[FedMember],
    model: Party,
    *,
    buffer: int,
    updates: int,
    delay: Callable[[str, int], float],
    weight: Callable[[int], float] = polynomial,
    aggregate: Aggregator = mean,
) -> Iterator[Buffered]:
    """Train asynchronously for so many updates of the server's, each of ``buffer`` answers; yield after each.

    (FedBuff, Nguyen et al. 2022, arXiv:2106.06581.) A virtual clock: the n-th training of a member takes
    ``delay(name, n)`` seconds, and whoever answers starts again with the newest model. An answer that is τ updates
    old moves the model by ``weight(τ)`` of its own move. What arrives at the same instant is taken in, in the
    members' order, before any of them starts again: with one delay for all and a buffer of all members it equals
    ``fedavg_round``, bit for bit. A member that cannot be reached starts again. Deviations: answers are weighted by
    samples, as in FedAvg; the server's rate is 1; all members train all the time.
    """
    check_names(members)
    if not (buffer >= 1 and updates >= 1):
        raise ValueError(f"expected a buffer of 1 answer or more and 1 update or more, got {buffer} and {updates}")
    begun = dict.fromkeys((member.name for member in members), 0)
    version, now = 0, model.weights()
    waiting: list[tuple[float, int, int, Weights]] = []  # until when, place, version and weights that it began with

    def start(place: int, at: float) -> None:
        name = members[place].name
        took = delay(name, begun[name])
        if not 0 < took < float("inf"):
            raise ValueError(f"expected a delay above 0 seconds, got {took} for {name}")
        begun[name] += 1
        waiting.append((at + took, place, version, now))

    for place in range(len(members)):
        start(place, 0.0)
    held: list[tuple[str, int, int, Weights, Weights]] = []
    dropped: list[str] = []
    lost = 0
    while True:
        clock = min(one[0] for one in waiting)
        arrived = sorted((one for one in waiting if one[0] == clock), key=lambda one: one[1])
        waiting = [one for one in waiting if one[0] != clock]
        for _, place, began, weights in arrived:
            try:
                found, count = members[place].round(weights)
            except (ConnectionError, TimeoutError) as error:
                dropped.append(members[place].name)
                lost += 1
                if lost > 100 * len(members):
                    raise ValueError(f"expected members that answer, {lost} in a row were lost") from error
                continue
            lost = 0
            held.append((members[place].name, count, began, weights, found))
            if len(held) == buffer:
                stale = tuple(version - one[2] for one in held)
                moved = [
                    _rebased(one[4], one[3], now, weight(old)) if old or weight(old) != 1 else one[4]
                    for one, old in zip(held, stale, strict=True)
                ]
                counts = [one[1] for one in held]
                model.load_weights({**now, **aggregate(moved, counts, now)})
                version, now = version + 1, model.weights()
                yield Buffered(clock, tuple((one[0], one[1]) for one in held), stale, tuple(dropped))
                held, dropped = [], []
                if version == updates:
                    return
        for _, place, _, _ in arrived:
            start(place, clock)


def _rebased(found: Weights, began: Weights, now: Weights, share: float) -> Weights:
    """Return the model as it is now, moved by a share of what a member moved what it began with."""

    def moved(name: str, w: Tensor) -> Tensor:
        return now[name] + share * (w.to(now[name].device) - began[name]) if w.is_floating_point() else w

    return {name: moved(name, w) for name, w in found.items()}
