"""Federated and split-federated training, one function a round. The fed server drives; members answer.

A member trains its own bottom against its own session on the main server; the fed server averages bottoms, the
main server averages its sessions. Averages are (n/N)·w, summed in the members' order, so that one member's
weights come out of it bit for bit. Integer buffers are never averaged. Entries that members keep to themselves
stay in the global model as they were.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from splitlearn.members import FedMember, Member, RemoteMember, Weights, batch_norm_entries
from splitlearn.party import Learner, Party
from splitlearn.protocols import parallel
from splitlearn.rounds import NobodyFinishedError, Round, check_names, collect, collect_each, finished

__all__ = [
    "Aggregator", "FedMember", "Member", "NobodyFinishedError", "RemoteMember", "Round", "apart_round",
    "batch_norm_entries", "fedavg_round", "in_turn_round", "mean", "parallel_round", "sample", "splitfed_v1_round",
    "splitfed_v2_round", "splitfed_v3_round",
]  # fmt: skip

T = TypeVar("T")


class Aggregator(Protocol):
    """Makes one set of weights of the members'."""

    def __call__(
        self, weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> Weights:
        """Return the entries of a round's result, given each member's weights, samples, and what all started from."""


def mean(
    weights: Sequence[Mapping[str, Tensor]], counts: Sequence[float], start: Mapping[str, Tensor] | None = None
) -> Weights:
    """Return Σ (n/N)·w over the members with samples, entry by entry; integer entries are the first such one's.

    ``start`` makes no difference to it.
    """
    if not weights or len(weights) != len(counts) or min(counts) < 0 or sum(counts) == 0:
        raise ValueError(
            f"expected weights of members with some samples, got {len(weights)} weights, counts {list(counts)}"
        )
    if any(set(other) != set(weights[0]) for other in weights):
        raise ValueError("expected the same entries from every member; train one model in all of them")
    total = sum(counts)
    # Not 0·w for a member without samples: it would pass on its nan, and its integers if it comes first.
    (first_weights, first_count), *others = [pair for pair in zip(weights, counts, strict=True) if pair[1]]
    result = {}
    for name, first in first_weights.items():
        if not first.is_floating_point():
            result[name] = first.clone()
            continue
        if any(other[name].shape != first.shape for other in weights):  # of those without samples, too
            shapes = ", ".join(str(tuple(other[name].shape)) for other in weights)
            raise ValueError(f"expected {name!r} of one shape from every member, got {shapes}; train one model in all")
        average = (first_count / total) * first
        for own, count in others:
            average += (count / total) * own[name].to(average.device)
        result[name] = average
    return result


def fedavg_round(members: Sequence[FedMember], model: Party, *, aggregate: Aggregator = mean) -> Round:
    """Every member trains the whole model on its own data, the fed server averages.

    (McMahan et al. 2017, arXiv:1602.05629.) ``model`` is the fed server's copy: it gives the round's
    start and takes its result. Members in other processes train at the same time.
    """
    check_names(members)
    start = model.weights()
    weights, counts, done = finished(*collect(members, start, at_once=True))
    model.load_weights({**start, **aggregate(weights, counts, start)})
    return done


def splitfed_v1_round(
    members: Sequence[FedMember],
    sessions: Mapping[str, Party],
    bottom: Party,
    top: Party,
    *,
    aggregate: Aggregator = mean,
    aggregate_tops: Aggregator | None = None,
) -> Round:
    """Each member trains against a server copy of its own; bottoms and tops are averaged.

    (Thapa et al. 2022, arXiv:2004.12088.) ``sessions`` are the main server's copies (``top.replica(name)``) by
    member name, ``bottom`` and ``top`` the global ones. Both averages leave out whoever dropped out. The fed server
    averages bottoms by ``aggregate``, the main server its copies by ``aggregate_tops``, by the same where None.
    Members in other processes train at the same time.
    """
    check_names(members, sessions)
    _apart(sessions)
    start, top_start = bottom.weights(), top.weights()
    for member in members:
        sessions[member.name].load_weights(top_start)
    weights, counts, done = finished(*collect(members, start, at_once=True))
    bottom.load_weights({**start, **aggregate(weights, counts, start)})
    tops = [sessions[name].weights() for name in done.counts]
    top.load_weights((aggregate_tops or aggregate)(tops, counts, top_start))
    return done


def splitfed_v2_round(
    members: Sequence[FedMember],
    bottom: Party,
    *,
    order: Sequence[int] | None = None,
    aggregate: Aggregator = mean,
) -> Round:
    """All members train against one shared server, in its order; bottoms are averaged.

    (Thapa et al. 2022, arXiv:2004.12088.) ``order`` lists positions in ``members``: a schedule of the
    server's, as given where None. Deviation: a member's batches follow each other; the paper leaves the
    interleaving open. What the server learned from a member that then dropped out stays in it.
    """
    check_names(members)
    places = list(range(len(members)) if order is None else order)
    if sorted(places) != list(range(len(members))):
        raise ValueError(f"expected an order that visits each of {len(members)} members once, got {places}")
    start = bottom.weights()
    results, dropped = collect([members[place] for place in places], start)
    in_place = {member.name: results[member.name] for member in members if member.name in results}
    weights, counts, done = finished(in_place, dropped)
    bottom.load_weights({**start, **aggregate(weights, counts, start)})
    return done


def splitfed_v3_round(
    members: Sequence[Member],
    sessions: Mapping[str, Party],
    top: Party,
    *,
    aggregate: Aggregator = mean,
) -> Round:
    """Bottoms stay with their members, only the tops are averaged (Gawali et al. 2020, arXiv:2012.12591)."""
    check_names(members, sessions)
    _apart(sessions)
    start = top.weights()
    for member in members:
        sessions[member.name].load_weights(start)
    done = apart_round(members)
    top.load_weights(aggregate([sessions[name].weights() for name in done.counts], list(done.counts.values()), start))
    return done


def in_turn_round(members: Sequence[FedMember], bottom: Party) -> Round:
    """Vanilla split learning with several clients in turn: each starts from the bottom that the last one left.

    (Gupta & Raskar 2018, arXiv:1810.06060.) ``bottom`` gives the first member's start and takes the last one's
    weights. Optimizer states are never handed over. Past one that drops out the bottom before it is handed on;
    what the server learned from it stays.
    """
    check_names(members)
    weights = bottom.weights()
    results: dict[str, tuple[Weights, int]] = {}
    dropped: list[str] = []
    for member in members:
        one, lost = collect([member], weights)
        results, dropped = results | one, dropped + lost
        weights = weights | one[member.name][0] if one else weights
    _, _, done = finished(results, dropped)
    bottom.load_weights(weights)
    return done


def apart_round(members: Sequence[Member]) -> Round:
    """Several clients in turn against one server, each with a bottom of its own; nothing is handed over."""
    check_names(members)
    return finished(*collect_each(members, [member.learner.weights() for member in members]))[2]


def parallel_round(
    clients: Sequence[Party],
    server: Party,
    batches: Sequence[Iterable[tuple[Tensor, Tensor]]],
    *,
    bottom: Party | None = None,
    aggregate: Aggregator = mean,
) -> Round:
    """Parallel split learning: each step is one server pass over all clients (Jeon & Kim 2020; see ``parallel``).

    A client whose batches end sooner leaves the later steps. Where ``bottom`` is given, the clients start from
    it and their bottoms are averaged into it at the end; otherwise they stay apart. A step needs all who are in it,
    so that a client that cannot be reached ends the round with its ``ConnectionError``.
    """
    check_names(clients)
    if len(batches) != len(clients):
        raise ValueError(f"expected batches for each client, got {len(batches)} for {len(clients)} clients")
    if bottom is not None:
        start = bottom.weights()
        for client in clients:
            client.load_weights(start)
    queues = [iter(own) for own in batches]
    counts, total = dict.fromkeys((client.name for client in clients), 0), 0.0
    while True:
        ready = [(client, batch) for client, queue in zip(clients, queues, strict=True) if (batch := next(queue, None))]
        if not ready:
            break
        loss = parallel([client for client, _ in ready], server, [batch for _, batch in ready])
        for client, (x, _) in ready:
            counts[client.name] += len(x)
        total += loss.item() * sum(len(x) for _, (x, _) in ready)
    if not any(counts.values()):
        raise ValueError("expected a client with some samples, got none; give each client its batches")
    if bottom is not None:
        bottom.load_weights(aggregate([client.weights() for client in clients], list(counts.values()), start))
    return Round(counts, loss=total / sum(counts.values()))


def sample(members: Sequence[T], count: int, generator: torch.Generator) -> list[T]:
    """Return ``count`` members drawn without replacement, in their own order."""
    if not 1 <= count <= len(members):
        raise ValueError(f"expected a sample of 1 to {len(members)} members, got {count}")
    chosen = torch.randperm(len(members), generator=generator)[:count].sort().values
    return [members[place] for place in chosen.tolist()]


def _apart(sessions: Mapping[str, Party]) -> None:
    """Refuse sessions that share a stage: training them would be SplitFed V2 under another name."""
    stages = [id(session.stage) for session in sessions.values() if isinstance(session, Learner)]
    if len(set(stages)) < len(stages):
        raise ValueError("expected a server copy for each member, got sessions of one stage; use server.replica(name)")
