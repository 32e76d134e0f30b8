"""Asking members for their round: who answers, who drops out."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from splitlearn.members import FedMember, Weights
from splitlearn.party import Party

__all__ = ["NobodyFinishedError", "Round", "check_names", "collect", "collect_each", "finished"]


@dataclass(frozen=True)
class Round:
    """Who took part in a round with how many samples, who dropped out, and the mean loss where the server knows it."""

    counts: dict[str, int]
    dropped: tuple[str, ...] = ()
    loss: float = float("nan")


class NobodyFinishedError(ValueError):
    """A round that all members dropped out of."""


class Named(Protocol):
    """What has a name."""

    name: str


def check_names(members: Sequence[Named], sessions: Mapping[str, Party] | None = None) -> None:
    """Refuse members that share a name, or one without a session on the main server."""
    names = [member.name for member in members]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected members, each of a name of its own, got {', '.join(names) or 'none'}")
    if sessions is not None and (missing := [name for name in names if name not in sessions]):
        raise ValueError(
            f"expected a session of the main server for each member, got none for {', '.join(missing)}; "
            "make one with server.replica(name)"
        )


def collect(
    members: Sequence[FedMember], weights: Mapping[str, Tensor], *, at_once: bool = False
) -> tuple[dict[str, tuple[Weights, int]], list[str]]:
    """Return the result of each member that finished the round, and the names of those that dropped out.

    ``at_once`` asks those in other processes (``elsewhere``) at the same time; the order of results stays.
    """
    results, dropped = {}, []
    far = [member for member in members if at_once and getattr(member, "elsewhere", False)]
    pool = ThreadPoolExecutor(len(far) or 1)
    try:
        asked = {member.name: pool.submit(member.round, weights) for member in far}
        for member in members:
            try:
                one = asked[member.name].result() if member.name in asked else member.round(weights)
                results[member.name] = one
            except (ConnectionError, TimeoutError):
                dropped.append(member.name)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for them
    return results, dropped


def collect_each(
    members: Sequence[FedMember], weights: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, tuple[Weights, int]], list[str]]:
    """Return the same where each member, one after the other, starts from weights of its own."""
    results: dict[str, tuple[Weights, int]] = {}
    dropped: list[str] = []
    for member, own in zip(members, weights, strict=True):
        one, lost = collect([member], own)
        results, dropped = results | one, dropped + lost
    return results, dropped


def finished(
    results: Mapping[str, tuple[Weights, int]], dropped: Sequence[str]
) -> tuple[list[Weights], list[int], Round]:
    """Return the weights, the counts and the record of a round that somebody finished."""
    if not results:
        raise NobodyFinishedError(
            f"expected a member to finish the round, all dropped out: {', '.join(dropped)}; run it again"
        )
    counts = {name: count for name, (_, count) in results.items()}
    return [weights for weights, _ in results.values()], list(counts.values()), Round(counts, tuple(dropped))
