"""Federated and split-federated training, one function a round. The fed server drives; members answer.

A member trains its own bottom against its own session on the main server; the fed server averages bottoms, the
main server averages its sessions. Averages are (n/N)·w, summed in the members' order, so that one member's
weights come out of it bit for bit. Integer buffers are never averaged.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from splitlearn.frames import Kind, Message
from splitlearn.party import Learner, Party
from splitlearn.protocols import parallel, vanilla
from splitlearn.wire import Transport, keyed, named

__all__ = [
    "Aggregator", "FedMember", "Member", "RemoteMember", "Round", "apart_round", "batch_norm_entries", "fedavg_round",
    "in_turn_round", "mean", "parallel_round", "sample", "splitfed_v1_round", "splitfed_v2_round", "splitfed_v3_round",
]  # fmt: skip

Weights = dict[str, Tensor]
Aggregator = Callable[[Sequence[Mapping[str, Tensor]], Sequence[int]], Weights]


class FedMember(Protocol):
    """What takes part in a round. One that cannot be reached raises ``ConnectionError`` and is left out."""

    name: str

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Train from ``weights`` on own data; return the new weights and the number of samples behind them."""


class Member:
    """A member that trains a Learner: the bottom against ``server``, or the whole model where that is None.

    ``batches`` yields (x, y) anew on every round. Entries named in ``local`` stay with the member and are never
    taken from the fed server: batch norm's, for example (FedBN, Li et al. 2021, arXiv:2102.07623). The
    optimizer's state is the member's own and outlives the round.
    """

    def __init__(
        self,
        learner: Learner,
        server: Party | None,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        local: Collection[str] = (),
    ):
        self.name = learner.name
        self.learner, self.server, self.batches, self.local = learner, server, batches, frozenset(local)
        self.loss = float("nan")  # mean over the samples of the last round

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Train from ``weights`` over all batches; return the new weights and the number of samples."""
        own = self.learner.weights()
        self.learner.load_weights({**weights, **{name: own[name] for name in self.local}})
        count, total = 0, 0.0
        for x, y in self.batches:
            if self.server is None:
                loss, _ = self.learner.learn(x, self.learner.label(y))
            else:
                loss = vanilla(self.learner, self.server, x, y)
            count, total = count + len(x), total + loss.item() * len(x)
        self.loss = total / count if count else float("nan")
        return self.learner.weights(), count

    def state_dict(self) -> dict[str, Any]:
        """Return the learner's state, and that of the batches where they have one."""
        batches = self.batches.state_dict() if hasattr(self.batches, "state_dict") else {}
        return {"learner": self.learner.state_dict(), "batches": batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.learner.load_state_dict(state["learner"])
        if hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(state["batches"])


class RemoteMember:
    """A member on the other end of a transport.

    With ``updates`` it answers with the difference to the weights that it was given, which a codec may pack;
    without, with the weights themselves, bit for bit.
    """

    def __init__(self, name: str, transport: Transport, session: str, *, updates: bool = False):
        self.name = name
        self._transport, self._session, self._updates, self._steps = transport, session, updates, 0

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Have the member train from ``weights``; return its new weights and its number of samples."""
        verb = "update" if self._updates else "round"
        message = Message(verb, keyed(weights, Kind.WEIGHTS), self._session, self._steps + 1)
        reply = self._transport.request(message).tensors
        self._steps += 1
        if self._updates:
            new = {name: weights[name] + change for name, change in named(reply, Kind.UPDATE).items()}
        else:
            new = named(reply, Kind.WEIGHTS)
        return new, int(reply[Kind.COUNT])


def mean(weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int]) -> Weights:
    """Return Σ (n/N)·w over the members, entry by entry; integer entries are the first member's."""
    if not weights or len(weights) != len(counts) or min(counts) < 0 or sum(counts) == 0:
        raise ValueError(
            f"expected weights of members with some samples, got {len(weights)} weights, counts {list(counts)}"
        )
    if any(set(other) != set(weights[0]) for other in weights):
        raise ValueError("expected the same entries from every member; train one model in all of them")
    total = sum(counts)
    result = {}
    for name, first in weights[0].items():
        if not first.is_floating_point():
            result[name] = first.clone()
            continue
        average = torch.zeros_like(first)
        for own, count in zip(weights, counts, strict=True):
            average += (count / total) * own[name]
        result[name] = average
    return result


@dataclass(frozen=True)
class Round:
    """Who took part in a round with how many samples, who dropped out, and the mean loss where the server knows it."""

    counts: dict[str, int]
    dropped: tuple[str, ...] = ()
    loss: float = float("nan")


def fedavg_round(members: Sequence[FedMember], model: Party, *, aggregate: Aggregator = mean) -> Round:
    """Every member trains the whole model on its own data, the fed server averages.

    (McMahan et al. 2017, arXiv:1602.05629.) ``model`` is the fed server's copy: it gives the round's
    start and takes its result.
    """
    results, dropped = _collect(members, model.weights())
    model.load_weights(aggregate(*_columns(results)))
    return _round(results, dropped)


def splitfed_v1_round(
    members: Sequence[FedMember],
    sessions: Mapping[str, Party],
    bottom: Party,
    top: Party,
    *,
    aggregate: Aggregator = mean,
) -> Round:
    """Each member trains against a server copy of its own; bottoms and tops are averaged.

    (Thapa et al. 2022, arXiv:2004.12088.) ``sessions`` are the main server's copies by
    member name, ``bottom`` and ``top`` the global ones.
    """
    start = top.weights()
    for member in members:
        sessions[member.name].load_weights(start)
    results, dropped = _collect(members, bottom.weights())
    weights, counts = _columns(results)
    bottom.load_weights(aggregate(weights, counts))
    top.load_weights(aggregate([sessions[name].weights() for name in results], counts))
    return _round(results, dropped)


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
    interleaving open.
    """
    places = list(range(len(members)) if order is None else order)
    if sorted(places) != list(range(len(members))):
        raise ValueError(f"expected an order that visits each of {len(members)} members once, got {places}")
    results, dropped = _collect([members[place] for place in places], bottom.weights())
    in_place = {member.name: results[member.name] for member in members if member.name in results}
    bottom.load_weights(aggregate(*_columns(in_place)))
    return _round(in_place, dropped)


def splitfed_v3_round(
    members: Sequence[Member],
    sessions: Mapping[str, Party],
    top: Party,
    *,
    aggregate: Aggregator = mean,
) -> Round:
    """Bottoms stay with their members, only the tops are averaged (Gawali et al. 2020, arXiv:2012.12591)."""
    start = top.weights()
    for member in members:
        sessions[member.name].load_weights(start)
    done = apart_round(members)
    top.load_weights(aggregate([sessions[name].weights() for name in done.counts], list(done.counts.values())))
    return done


def in_turn_round(members: Sequence[FedMember], bottom: Party) -> Round:
    """Vanilla split learning with several clients in turn: each starts from the bottom that the last one left.

    (Gupta & Raskar 2018, arXiv:1810.06060.) ``bottom`` gives the first member's start and takes the last one's
    weights. Optimizer states are never handed over.
    """
    weights: Mapping[str, Tensor] = bottom.weights()
    results: dict[str, tuple[Weights, int]] = {}
    dropped: list[str] = []
    for member in members:
        finished, lost = _collect([member], weights, needed=0)
        results |= finished
        dropped += lost
        weights = finished[member.name][0] if finished else weights
    _columns(results)
    bottom.load_weights(weights)
    return _round(results, dropped)


def apart_round(members: Sequence[Member]) -> Round:
    """Several clients in turn against one server, each with a bottom of its own; nothing is handed over."""
    results: dict[str, tuple[Weights, int]] = {}
    dropped: list[str] = []
    for member in members:
        finished, lost = _collect([member], member.learner.weights(), needed=0)
        results |= finished
        dropped += lost
    _columns(results)
    return _round(results, dropped)


def parallel_round(
    clients: Sequence[Learner],
    server: Party,
    batches: Sequence[Iterable[tuple[Tensor, Tensor]]],
    *,
    bottom: Party | None = None,
    aggregate: Aggregator = mean,
) -> Round:
    """Parallel split learning: each step is one server pass over all clients (Jeon & Kim 2020; see ``parallel``).

    A client whose batches end sooner leaves the later steps. Where ``bottom`` is given, the clients start from
    it and their bottoms are averaged into it at the end; otherwise they stay apart.
    """
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
    if bottom is not None:
        bottom.load_weights(aggregate([client.weights() for client in clients], list(counts.values())))
    return Round(counts, loss=total / sum(counts.values()))


def sample(members: Sequence[Any], count: int, generator: torch.Generator) -> list[Any]:
    """Return ``count`` members drawn without replacement, in their own order."""
    if not 1 <= count <= len(members):
        raise ValueError(f"expected a sample of 1 to {len(members)} members, got {count}")
    chosen = torch.randperm(len(members), generator=generator)[:count].sort().values
    return [members[place] for place in chosen.tolist()]


def batch_norm_entries(stage: nn.Module) -> frozenset[str]:
    """Return the names of all entries of batch-norm layers, for ``Member(local=…)``."""
    kinds = nn.modules.batchnorm._BatchNorm
    layers = [(name, layer) for name, layer in stage.named_modules() if isinstance(layer, kinds)]
    return frozenset(f"{name}.{entry}" if name else entry for name, layer in layers for entry in layer.state_dict())


def _collect(
    members: Sequence[FedMember], weights: Mapping[str, Tensor], *, needed: int = 1
) -> tuple[dict[str, tuple[Weights, int]], list[str]]:
    """Return the result of each member that finished the round, and the names of those that dropped out."""
    results, dropped = {}, []
    for member in members:
        try:
            results[member.name] = member.round(weights)
        except ConnectionError:
            dropped.append(member.name)
    if len(results) < needed:
        raise ValueError(f"expected a member to finish the round, all dropped out: {', '.join(dropped)}; run it again")
    return results, dropped


def _columns(results: Mapping[str, tuple[Weights, int]]) -> tuple[list[Weights], list[int]]:
    if not results:
        raise ValueError("expected a member to finish the round, all dropped out; run it again")
    return [weights for weights, _ in results.values()], [count for _, count in results.values()]


def _round(results: Mapping[str, tuple[Weights, int]], dropped: Sequence[str]) -> Round:
    return Round({name: count for name, (_, count) in results.items()}, tuple(dropped))
