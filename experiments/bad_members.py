"""One federation with bad members in it, round by round: who trains, who lies, and what the servers do about it.

What members and main server tell each other crosses real frames. Bad members are drawn by the seed; Dirichlet shares
make members unlike.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from attacks.poisoning import VILLAIN, Colluding, EdgeCases, UpdateAttack
from defenses.aggregation import Robust
from defenses.poisoning import (
    ClippedSteps,
    FilteredServer,
    NeuralCleanse,
    PerClientServer,
    Rates,
    SafeSplitServer,
    WitnessedServer,
    batch_sizes,
    rates,
)
from experiments.rooted import rooted
from experiments.setups import counted
from experiments.training import Training, build_model, optimizer_for
from privacy.dp import Account
from splitlearn.cut import cut
from splitlearn.data import Splits, partition
from splitlearn.federation import (
    Aggregator,
    Member,
    fedavg_round,
    mean,
    parallel_round,
    splitfed_v1_round,
    splitfed_v2_round,
    splitfed_v3_round,
)
from splitlearn.guard import Guard
from splitlearn.members import Weights
from splitlearn.party import Learner, Party
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.train import Batches, Predictor, predict
from splitlearn.wire import Framed, Metered, serve

__all__ = [
    "FEDERATIONS",
    "Federated",
    "Sabotage",
    "Safeguard",
    "answers",
    "bad_members",
    "federate",
    "member_shares",
    "top_optimizer",
]

DIVERGED = re.compile("expected (a finite (loss|penalty)|a finite floating-point gradient)")  # also as told over a wire
FEDERATIONS = ("splitfed_v1", "splitfed_v2", "splitfed_v3", "parallel", "fedavg")
Step = tuple[Tensor, Tensor]


class Seats(Protocol):
    """Makes what takes the top's place, with a session for each member: a frozen set of settings."""

    def __call__(self, top: Learner, learners: Mapping[str, Learner], batches: int) -> Any:
        """Return it, given whom each member's batches train (the one top, or copies), and all batches of a round."""


@dataclass(frozen=True)
class Sabotage:
    """What bad members do, or a bad server; by default nothing. Made for one training.

    ``data(n)`` is what the n-th of them does to its samples before training, ``guard(n)`` sits on its learner,
    ``updates`` replaces what all of them send to the fed server, ``server`` takes the main server's place with labelled
    samples of its own. A backdoor is tested by ``trigger`` on inputs or on activations, on which ``target`` is meant;
    one without a trigger on the test set's ``tail``.
    """

    data: Callable[[int], Callable[[Tensor, Tensor], Step]] | None = None
    guard: Callable[[int], Guard] | None = None
    updates: UpdateAttack | None = None
    server: Callable[[Learner, Tensor, Tensor], Party] | None = None
    trigger: Callable[[Tensor], Tensor] | None = None
    on_activations: bool = False
    target: int = 0
    tail: EdgeCases | None = None
    villain: Callable[[tuple[int, ...]], VILLAIN] | None = None  # of the samples that it knows (vertical)


@dataclass(frozen=True)
class Safeguard:
    """What honest servers do about bad members; by default nothing. Made for one training.

    ``bottoms`` and ``tops`` aggregate, or with ``root`` FLTrust does in their place, by the auxiliary samples; ``clip``
    bounds each step of the top, ``step`` is a rule on the clients' gradients of the top (parallel), ``seats`` take the
    top's place (V1, V2), ``inspect`` looks for a backdoor in the joined model after training.
    """

    bottoms: Aggregator = mean
    tops: Aggregator = mean
    clip: float | None = None
    step: Callable[[Tensor], Tensor] | None = None
    seats: Seats | None = None
    noise: Callable[[], Guard] | None = None  # what every honest member does to its activations
    account: Account | None = None  # of an average that is private
    root: bool = False
    inspect: NeuralCleanse | None = None


@dataclass
class Federated:
    """A trained federation: what answers, how accurate it was after each round, who was shut out, what went wrong."""

    bottom: Predictor | None  # None in FedAvg, where the model is whole
    top: Predictor
    bad: list[int]
    members: int
    nbytes: dict[str, dict[str, int]] = field(default_factory=dict)
    accuracy: list[float] = field(default_factory=list)
    out: list[list[int]] = field(default_factory=list)  # by round, who had no part in the result, where a rule says
    lost: int = 0  # times that a member's numbers were not finite
    skipped: int = 0  # steps of the top left out, their gradient not being finite
    suspects: Tensor | None = None  # classes [C] whose trigger stands out in the joined model, where one looked
    flagged: Rates | None = None  # a filter's, on samples as members would send them after training
    stopped: str = ""  # why it ended early
    trigger: Callable[[Tensor], Tensor] | None = None  # on activations, made in training

    def logits(self, x: Tensor, trigger: Callable[[Tensor], Tensor] | None = None, *, inner: bool = False) -> Tensor:
        """Return the model's logits, the trigger on inputs or, with ``inner``, on activations."""
        x = trigger(x) if trigger is not None and not inner else x
        if self.bottom is None:
            return predict([self.top], x)
        z = predict([self.bottom], x)
        return predict([self.top], trigger(z) if trigger is not None and inner else z)


def bad_members(members: int, bad: int, seed: int) -> list[int]:
    """Return the positions of the bad ones, drawn by the seed."""
    return torch.randperm(members, generator=torch.Generator().manual_seed(seed))[:bad].sort().values.tolist()


def federate(
    training: Training, splits: Splits, *, alpha: float, bad: int, sabotage: Sabotage, safeguard: Safeguard
) -> Federated:
    """Train a federation of ``training.clients`` for ``training.epochs`` rounds, ``bad`` of them sabotaging.

    A member whose numbers are not finite any more does nothing in that round, and neither does its server's copy. In
    parallel training a step needs all who are in it: there, and where all members are lost, the training ends, and says
    so. A bad main server does not defend itself: of the safeguard only the fed server's part is left.
    """
    if sabotage.server is not None:
        safeguard = replace(safeguard, tops=mean, clip=None, step=None, seats=None, inspect=None)
    whole = training.protocol == "fedavg"
    model = build_model(splits, seed=training.seed).to(training.device)
    below, above = (model, nn.Sequential()) if whole else cut(model, training.cut)
    names = [f"client{number}" for number in range(training.clients)]
    liars = bad_members(training.clients, bad, training.seed)
    shares = _shares(training, splits, alpha, liars, sabotage)
    clients = [
        _client(name, below, training, _guard(place, liars, sabotage, safeguard), place)
        for place, name in enumerate(names)
    ]
    bottom = Learner("bottom", copy.deepcopy(below))
    if whole:
        if safeguard.root:
            safeguard = replace(safeguard, bottoms=rooted([bottom], training, splits.auxiliary)[0])
        members = [_Steady(Member(one, None, own), own) for one, own in zip(clients, shares, strict=True)]
        watch = _Watched(_colluding(safeguard.bottoms, sabotage, liars))
        result = Federated(None, bottom, liars, training.clients)
        _rounds(training, splits, result, lambda: fedavg_round(members, bottom, aggregate=watch), members, watch)
        if safeguard.inspect is not None:
            result.suspects = _suspects(safeguard.inspect, [bottom], splits, training)
        return result
    top = Learner("server", above, top_optimizer(above, training, safeguard), seed=training.seed * 1000)
    if safeguard.root:
        bottoms, tops = rooted([bottom, top], training, splits.auxiliary)
        safeguard = replace(safeguard, bottoms=bottoms, tops=tops if sabotage.server is None else mean)
    apart = training.protocol in ("splitfed_v1", "splitfed_v3")
    replicas = {name: top.replica(name) for name in names} if apart else {}
    sessions, answering = _sessions(top, names, replicas, sabotage, safeguard, shares, training, splits)
    meters = [Metered(serve(Service({name: sessions[name]}))) for name in names]
    lines = {name: Remote(name, Framed(meter), name) for name, meter in zip(names, meters, strict=True)}
    members = [
        _Steady(Member(one, lines[one.name], own), own, replicas.get(one.name))
        for one, own in zip(clients, shares, strict=True)
    ]
    watch = _Watched(_colluding(safeguard.bottoms, sabotage, liars))
    honest = next(place for place in range(training.clients) if place not in liars)
    result = Federated(
        clients[honest] if training.protocol == "splitfed_v3" else bottom, answering, liars, training.clients
    )
    one: dict[str, Callable[[], object]] = {
        "splitfed_v1": lambda: splitfed_v1_round(
            members, replicas, bottom, top, aggregate=watch, aggregate_tops=safeguard.tops
        ),
        "splitfed_v2": lambda: splitfed_v2_round(members, bottom, aggregate=watch),
        "splitfed_v3": lambda: splitfed_v3_round(cast(list[Member], members), replicas, top, aggregate=safeguard.tops),
        "parallel": lambda: parallel_round(clients, lines[names[0]], shares, bottom=bottom, aggregate=watch),
    }
    _rounds(training, splits, result, one[training.protocol], members, watch)
    if safeguard.inspect is not None:
        result.suspects = _suspects(safeguard.inspect, [cast(Learner, result.bottom), top], splits, training)
    result.nbytes = counted(meters)
    optimizers = [learner.optimizer for learner in (replicas.values() if replicas else [top])]
    result.skipped = sum(one.skipped for one in optimizers if isinstance(one, ClippedSteps))
    if isinstance(answering, FilteredServer):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            result.flagged = _flagged(answering, bottom, shares, training, splits, alpha, liars, sabotage)
    return result


def _rounds(
    training: Training, splits: Splits, result: Federated, one: Callable[[], object], members: Sequence["_Steady"],
    watch: "_Watched",
) -> None:  # fmt: skip
    x, y = splits.test.x.to(training.device), splits.test.y.to(training.device)
    for number in range(training.epochs):
        try:
            one()
            _end_round(result, members)
        except ValueError as error:
            if not DIVERGED.search(str(error)):
                raise
            result.stopped = f"stopped in round {number + 1}: {error}"
            break
        if all(member.lost > number for member in members):
            result.stopped = f"stopped in round {number + 1}: no member's numbers are finite"
            break
        if watch.out is not None and not isinstance(result.top, SafeSplitServer):
            result.out.append(watch.out)
        result.accuracy.append((answers(result.logits(x)) == y).double().mean().item())
    if isinstance(result.top, WitnessedServer):
        doubted = result.top.doubted()
        result.out = [[place for place, one in enumerate(members) if doubted[one.name] > result.top.tolerance]]
    if isinstance(result.top, FilteredServer):
        result.out = [
            [place for place, one in enumerate(members) if one.name in out] for out in result.top.left_out[:-1]
        ]
    result.lost = sum(member.lost for member in members)


def _end_round(result: Federated, members: Sequence["_Steady"]) -> None:
    """Tell whoever takes the top's place that a round is over; whose turn was rolled back had no part in it."""
    if isinstance(result.top, FilteredServer):
        result.top.end_round()
    if isinstance(result.top, SafeSplitServer):
        result.top.end_turn()
        rolled, result.top.rolled_back = result.top.rolled_back, []
        result.out.append([place for place, one in enumerate(members) if one.name in rolled])


class _Steady:
    """A member who, once its numbers are not finite, sends back what it was given; ``lost`` counts how often.

    ``session``, the server's copy of its own, is put back too.
    """

    def __init__(self, member: Member, batches: Batches, session: Learner | None = None):
        self.name, self.learner, self.lost = member.name, member.learner, 0
        self._member, self._batches, self._session = member, batches, session

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Return what the member does, or the weights as they came, with its count of samples."""
        parties = [self.learner] if self._session is None else [self.learner, self._session]
        before = copy.deepcopy([party.state_dict() for party in parties])  # an optimizer's is its own live buffers
        try:
            return self._member.round(weights)
        except ValueError as error:
            if not DIVERGED.search(str(error)):
                raise
            self.lost += 1
            for party, state in zip(parties, before, strict=True):
                party.put_back(state)
            return {name: entry.clone() for name, entry in weights.items()}, len(self._batches.x)


def answers(logits: Tensor) -> Tensor:
    """Return the class that each row of logits [N, C] answers, [N]; -1, none, where a row is not finite."""
    return torch.where(logits.isfinite().all(1), logits.nan_to_num().argmax(1), -1)


class _Watched:
    """An aggregator that notes whose update had no part in the last result, where the rule says."""

    def __init__(self, aggregate: Aggregator):
        self.aggregate = aggregate
        self.out: list[int] | None = None

    def __call__(
        self, weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> Weights:
        found = self.aggregate(weights, counts, start)
        inner = self.aggregate.aggregate if isinstance(self.aggregate, Colluding) else self.aggregate
        shares = inner.last.shares if isinstance(inner, Robust) and inner.last is not None else None
        self.out = None if shares is None else (shares == 0).nonzero()[:, 0].tolist()
        return found


def _colluding(aggregate: Aggregator, sabotage: Sabotage, liars: Sequence[int]) -> Aggregator:
    if sabotage.updates is None or not liars:
        return aggregate
    return Colluding(sabotage.updates, tuple(liars), aggregate)


def _sessions(
    top: Learner, names: Sequence[str], replicas: Mapping[str, Learner], sabotage: Sabotage, safeguard: Safeguard,
    shares: Sequence[Batches], training: Training, splits: Splits,
) -> tuple[dict[str, Any], Predictor]:  # fmt: skip
    """Return whom each member trains against, and who answers in the end."""
    if sabotage.server is not None:
        x, y = (one.to(training.device) for one in (splits.auxiliary.x, splits.auxiliary.y))
        if replicas:
            return {name: sabotage.server(replica, x, y) for name, replica in replicas.items()}, top
        return dict.fromkeys(names, sabotage.server(top, x, y)), top
    if training.protocol == "parallel" and safeguard.step is not None:
        sizes = [batch_sizes(len(own.x), own.batch_size) for own in shares]
        return dict.fromkeys(names, PerClientServer(top, safeguard.step, sizes)), top
    if safeguard.seats is not None and training.protocol in ("splitfed_v1", "splitfed_v2"):
        seats = safeguard.seats(top, replicas or dict.fromkeys(names, top), sum(map(len, shares)))
        return {name: seats.session(name) for name in names}, seats
    return (dict(replicas) if replicas else {name: top.session(name) for name in names}), top


def member_shares(y: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Return the rows of each member; ``ValueError`` where there are too few for all."""
    return partition.dirichlet(y, clients, alpha, seed, min_rows=2)


def _shares(
    training: Training, splits: Splits, alpha: float, liars: Sequence[int], sabotage: Sabotage
) -> list[Batches]:
    x, y = splits.private.x, splits.private.y
    found = []
    for place, rows in enumerate(member_shares(y, training.clients, alpha, training.seed)):
        own_x, own_y = x[rows], y[rows]
        if place in liars and sabotage.data is not None:
            own_x, own_y = sabotage.data(liars.index(place))(own_x, own_y)
        seed = training.seed * 1000 + place
        found.append(Batches(own_x, own_y, batch_size=training.batch_size, seed=seed))
    return found


def _suspects(inspect: NeuralCleanse, parts: Sequence[Learner], splits: Splits, training: Training) -> Tensor:
    """Return the classes [C] whose smallest trigger on the auxiliary inputs is an outlier in the joined model."""
    model = nn.Sequential(*(copy.deepcopy(part.stage) for part in parts)).eval().requires_grad_(False)
    x = splits.auxiliary.x.to(training.device)
    return inspect(model, x, splits.auxiliary.num_classes).flagged.cpu()


def _flagged(
    server: FilteredServer, bottom: Learner, shares: Sequence[Batches], training: Training, splits: Splits,
    alpha: float, liars: Sequence[int], sabotage: Sabotage,
) -> Rates:  # fmt: skip
    """Return how right the server's filter is on samples as members would send them in the next round.

    Poisoned is a sample whose input or label is not what it was, or of which a bad member's guard lies: the first
    ``share`` of each batch.
    """
    sent = []
    honest = _shares(training, splits, alpha, liars, Sabotage())
    for place, (own, was) in enumerate(zip(shares, honest, strict=True)):
        guard = sabotage.guard(liars.index(place)) if place in liars and sabotage.guard is not None else None
        for rows in torch.arange(len(own.x)).split(training.batch_size):
            x, y = own.x[rows].to(training.device), own.y[rows].to(training.device)
            z = bottom.predict(x)
            lied = (own.x[rows] != was.x[rows]).flatten(1).any(1) | (own.y[rows] != was.y[rows])
            if guard is not None:
                z, y = guard.activation(z), guard.label(y)
                lied = lied | (torch.arange(len(rows)) < int(getattr(guard, "share", 1.0) * len(rows) + 0.5))
            sent.append((z, y, lied))
    z, y, lied = (torch.cat(parts) for parts in zip(*sent, strict=True))
    return rates(server.verdict(z, y), lied)


def _guard(place: int, liars: Sequence[int], sabotage: Sabotage, safeguard: Safeguard) -> Guard | None:
    if place in liars and sabotage.guard is not None:
        return sabotage.guard(liars.index(place))
    return safeguard.noise() if safeguard.noise is not None else None


def _client(name: str, stage: nn.Module, training: Training, guard: Guard | None, place: int) -> Learner:
    own = copy.deepcopy(stage)
    return Learner(name, own, optimizer_for(own, training), guard, seed=training.seed * 1000 + place + 1)


def top_optimizer(stage: nn.Module, training: Training, safeguard: Safeguard) -> torch.optim.Optimizer | None:
    """Return the optimizer of a server's stage, its steps clipped where the safeguard says so."""
    inner = optimizer_for(stage, training)
    return inner if inner is None or safeguard.clip is None else ClippedSteps(inner, safeguard.clip)
