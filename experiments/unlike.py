"""Methods that train unlike members, over real frames: federated, personalised, split; each begins from one model."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from experiments.bad_members import DIVERGED, answers
from experiments.setups import counted, over_wires
from experiments.skewed import Share
from experiments.training import Training
from splitlearn.cut import cut
from splitlearn.federation import fedavg_round, splitfed_v1_round
from splitlearn.members import FedMember, Member
from splitlearn.paradigms import (
    Absent,
    ProximalMember,
    ScaffoldMember,
    entries_above,
    fine_tuned,
    no_control,
    scaffold_round,
    unlike_cuts_round,
)
from splitlearn.party import Learner
from splitlearn.remote import Remote
from splitlearn.rounds import NobodyFinishedError, Round
from splitlearn.service import Service
from splitlearn.train import Batches, Predictor, predict
from splitlearn.wire import Framed, Metered, serve

__all__ = ["METHODS", "Epochs", "Federation", "Method", "Plan", "accuracy", "advance", "plain_sgd", "timed"]

WEIGHTS, ACTIVATIONS = "every client's weights after every round", "the activation of every sample in training"
# Of 0.1 and 0.2 FedAvg's best under label:0.1, label:1 and feature:0.5, judged on the auxiliary samples of seed 10,
# which takes no part in a result; all others but SCAFFOLD take it from there. SCAFFOLD learns next to nothing at 0.1
# and less, and diverges above it.
RATE, SCAFFOLD_RATE = 0.2, 0.1
COUNTS = "how many samples each client has"
OWN_DATA = "its own samples and the model that it is given"
CUT = "gradients at its cut, and the loss"


@dataclass(frozen=True)
class Plan:
    """How a method trains: its model as it starts, and every setting."""

    training: Training  # an epoch is a round
    model: nn.Sequential
    local_epochs: int = 1
    absent: float = 0.0
    mu: float = 0.0
    tune_epochs: int = 1
    shared: str = ""  # FedPer's last shared layer
    cuts: tuple[str, ...] = ()


@dataclass
class Federation:
    """What training ended in: the global model's parties, where there is one, each member's own, and what was seen."""

    everywhere: list[Learner] | None
    own: list[list[Learner]]
    meters: list[Metered] = field(default_factory=list)
    visible: dict[str, list[str]] = field(default_factory=dict)
    accuracy: list[float] = field(default_factory=list)  # of the global model after each round
    missed: int = 0  # rounds of members that were away, all members together
    idle: int = 0  # rounds in which nobody was there
    stopped: list[str] = field(default_factory=list)  # what ended early: a member diverged
    seconds: dict[str, float] = field(default_factory=dict)  # of training, and of evaluation in between

    @property
    def nbytes(self) -> dict[str, dict[str, int]]:
        """Bytes of all wires: direction, then kind; empty where nothing crossed."""
        return counted(self.meters) if self.meters else {}


Look = Callable[[Sequence[Predictor]], float]  # how accurate a chain of parties is, for the trace of a training
Train = Callable[[Plan, Sequence[Share], Look], Federation]


@dataclass(frozen=True)
class Method:
    """A way to train unlike members; ``lr`` is its usual rate, ``uses`` are the options that it alone depends on."""

    summary: str
    train: Train
    uses: tuple[str, ...] = ()
    lr: float = RATE


class Epochs:
    """Batches gone through several times a round."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], times: int):
        self.batches, self.times = batches, times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all epochs of a round."""
        for _ in range(self.times):
            yield from self.batches


def plain_sgd(stage: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return SGD without momentum, which SCAFFOLD's formula needs, and so the other methods too."""
    return torch.optim.SGD(stage.parameters(), lr=lr)


def accuracy(chain: Sequence[Predictor], x: Tensor, y: Tensor) -> float:
    """Return the share of samples whose class the joint prediction answers; a row that is not finite answers none."""
    return (answers(predict(chain, x)) == y).double().mean().item()


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add to a phase's seconds what passes inside."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begun


def advance(
    step: Callable[[], object],
    chains: Sequence[Sequence[Learner]],
    samples: Sequence[Tensor],
    seconds: dict[str, float],
) -> str:
    """Take a step of a training; where it diverges, put the chains' parties back to before it, and return how it did.

    It does where a party says so, or where ``chains[i]`` is left without finite logits of ``samples[i]``: returns "" if
    neither. ``seconds`` of training and of that evaluation are added to. Optimizers are not put back: train no further.
    """
    parties = list({id(party): party for chain in chains for party in chain}.values())
    before = [party.weights() for party in parties]
    try:
        with timed(seconds, "train"):
            step()
    except ValueError as error:
        if not DIVERGED.search(str(error)):
            raise
        said = str(error)
    else:
        with timed(seconds, "evaluate"):
            bad = [c for c, x in zip(chains, samples, strict=True) if not bool(predict(c, x).isfinite().all())]
        if not bad:
            return ""
        said = f"{bad[0][-1].name}: expected finite logits, got nan or inf; lower the learning rate"
    for party, weights in zip(parties, before, strict=True):
        party.load_weights(weights)
    return said


def train_alone(plan: Plan, shares: Sequence[Share], look: Look) -> Federation:
    """Each member by itself, for as many epochs as those train at home who are tuned there in the end."""
    members = _members(plan, shares, [plan.model] * len(shares))
    found = Federation(None, [[member.learner] for member in members], visible={"nobody": ["nothing crosses"]})
    lost = []
    for member, share in zip(members, shares, strict=True):
        for number in range(plan.training.epochs):
            if said := advance(partial(_alone, member), [[member.learner]], [share.x], found.seconds):
                lost.append(f"stopped in round {number + 1}, the model is that of the round before: {said}")
                break
    found.stopped += _told(lost)
    _tune(plan, members, shares, found)
    return found


def train_fedavg(
    plan: Plan, shares: Sequence[Share], look: Look, *, make: Callable[..., Member] = Member
) -> Federation:
    """Whole models are averaged (McMahan et al. 2017); ``make`` makes the members."""
    return _fedavg(plan, shares, look, make)[0]


def train_fedprox(plan: Plan, shares: Sequence[Share], look: Look) -> Federation:
    """FedAvg of members that are held near each round's start."""
    return train_fedavg(plan, shares, look, make=partial(ProximalMember, mu=plan.mu))


def train_fedavg_tuned(plan: Plan, shares: Sequence[Share], look: Look) -> Federation:
    """FedAvg, after which each member trains the global model further at home."""
    found, members, everywhere = _fedavg(plan, shares, look, Member)
    for member in members:
        member.begin(everywhere.weights())
    found.own = [[member.learner] for member in members]
    _tune(plan, members, shares, found)
    return found


def train_fedper(plan: Plan, shares: Sequence[Share], look: Look) -> Federation:
    """Layers up to ``shared`` are averaged, heads stay at home; each is tuned with its own on the average."""
    everywhere = Learner("fed server", copy.deepcopy(plan.model))
    heads = entries_above(plan.model, plan.shared)
    members = _members(plan, shares, [plan.model] * len(shares), make=partial(Member, local=heads))

    def one(there: Sequence[FedMember]) -> Round:
        done = fedavg_round(there, everywhere)
        for member in members:  # body and head of one round, which are judged together
            member.begin(everywhere.weights())
        return done

    found = Federation(None, [[member.learner] for member in members])
    found.visible = {"fed server": [f"{WEIGHTS}, but for its head", COUNTS], "client": [OWN_DATA]}
    _rounds(plan, members, shares, one, found, look)
    _tune(plan, members, shares, found)
    return found


def _tune(plan: Plan, members: Sequence[Member], shares: Sequence[Share], found: Federation) -> None:
    """Train each member's model further at home: the same last step for all that have one of their own."""
    lost = []
    for number, (member, share) in enumerate(zip(members, shares, strict=True)):
        step = partial(_tune_one, plan, member.learner, _batches(plan, share, number))
        if said := advance(step, [[member.learner]], [share.x], found.seconds):
            lost.append(f"stopped while tuned at home, the model is that of before: {said}")
    found.stopped += _told(lost)


def _tune_one(plan: Plan, learner: Learner, batches: Batches) -> None:
    learner.load_weights(fine_tuned(learner, batches, epochs=plan.tune_epochs, name=learner.name).weights())


def _alone(member: Member) -> None:
    member.round(member.learner.weights())


def _told(lost: Sequence[str]) -> list[str]:
    """Return the first of members' notes, and how many more there are."""
    more = f"; {len(lost) - 1} more stopped, too" if len(lost) > 1 else ""
    return [f"{lost[0]}{more}"] if lost else []


def train_scaffold(plan: Plan, shares: Sequence[Share], look: Look) -> Federation:
    """Control variates take the members' drift out of their steps; the server's rate is 1."""
    everywhere = Learner("fed server", copy.deepcopy(plan.model))
    control = no_control(everywhere)

    def one(there: Sequence[FedMember]) -> Round:
        nonlocal control
        done, control = scaffold_round(there, everywhere, control)
        return done

    members = _members(plan, shares, [plan.model] * len(shares), make=ScaffoldMember)
    found = Federation([everywhere], [[everywhere] for _ in members])
    found.visible = {
        "fed server": [WEIGHTS, "every client's change of control", COUNTS],
        "client": [OWN_DATA, "the server's control, the mean of all clients'"],
    }
    return _rounds(plan, members, shares, one, found, look)


def train_splitfed(
    plan: Plan, shares: Sequence[Share], look: Look, *, make: Callable[..., Member] = Member
) -> Federation:
    """SplitFed V1: bottoms and the server's copies of the top are averaged; ``make`` makes the members."""
    below, above = cut(copy.deepcopy(plan.model), plan.training.cut)
    bottom, top = Learner("bottom", below), Learner("server", above, plain_sgd(above, plan.training.lr))
    sessions = {name: top.replica(name) for name in _names(shares)}
    seats, meters = _seated(sessions)
    members = _members(plan, shares, [below] * len(shares), seats, make)
    found = Federation([bottom, top], [[bottom, top] for _ in members], meters)
    found.visible = {"server": [ACTIVATIONS, "its label"], "fed server": [WEIGHTS, COUNTS], "client": [OWN_DATA, CUT]}
    return _rounds(plan, members, shares, lambda there: splitfed_v1_round(there, sessions, bottom, top), found, look)


def train_splitfed_prox(plan: Plan, shares: Sequence[Share], look: Look) -> Federation:
    """SplitFed V1 of members whose bottoms are held near each round's start; the tops are free."""
    return train_splitfed(plan, shares, look, make=partial(ProximalMember, mu=plan.mu))


def train_unlike_cuts(plan: Plan, shares: Sequence[Share], look: Look) -> Federation:
    """SplitFed V1 in which members cut in turn at each of ``cuts``, and whole models are averaged."""
    everywhere = Learner("server", copy.deepcopy(plan.model))
    names = _names(shares)
    halves = [cut(copy.deepcopy(plan.model), plan.cuts[number % len(plan.cuts)]) for number in range(len(shares))]
    sessions = {
        name: Learner(name, above, plain_sgd(above, plan.training.lr))
        for name, (_, above) in zip(names, halves, strict=True)
    }
    seats, meters = _seated(sessions)
    members = _members(plan, shares, [below for below, _ in halves], seats)
    found = Federation([everywhere], [[everywhere] for _ in members], meters)
    found.visible = {"server": [ACTIVATIONS, "its label", WEIGHTS, COUNTS], "client": [OWN_DATA, CUT]}
    return _rounds(plan, members, shares, lambda there: unlike_cuts_round(there, sessions, everywhere), found, look)


def _fedavg(
    plan: Plan, shares: Sequence[Share], look: Look, make: Callable[..., Member]
) -> tuple[Federation, list[Member], Learner]:
    everywhere = Learner("fed server", copy.deepcopy(plan.model))
    members = _members(plan, shares, [plan.model] * len(shares), make=make)
    found = Federation([everywhere], [[everywhere] for _ in members])
    found.visible = {"fed server": [WEIGHTS, COUNTS], "client": [OWN_DATA]}
    return (
        _rounds(plan, members, shares, lambda there: fedavg_round(there, everywhere), found, look),
        members,
        everywhere,
    )


def _rounds(
    plan: Plan,
    members: Sequence[Member],
    shares: Sequence[Share],
    one: Callable[[Sequence[FedMember]], Round],
    found: Federation,
    look: Look,
) -> Federation:
    """Run all rounds of members across wires, some of them away, and note what came of it."""
    remote, meters = over_wires(members)
    there: list[FedMember] = list(remote)
    if plan.absent:
        there = [
            Absent(member, plan.absent, plan.training.seed * 1000 + number) for number, member in enumerate(remote)
        ]

    def step() -> None:
        try:
            found.missed += len(one(there).dropped)
        except NobodyFinishedError:
            found.missed, found.idle = found.missed + len(there), found.idle + 1

    for number in range(plan.training.epochs):
        if said := advance(step, found.own, [share.x for share in shares], found.seconds):
            found.stopped.append(f"stopped in round {number + 1}, the model is that of the round before: {said}")
            break
        if found.everywhere is not None:
            with timed(found.seconds, "evaluate"):
                found.accuracy.append(look(found.everywhere))
    found.meters += meters
    return found


def _names(shares: Sequence[Share]) -> list[str]:
    return [f"client{number}" for number in range(len(shares))]


def _batches(plan: Plan, share: Share, number: int) -> Batches:
    return Batches(share.x, share.y, batch_size=plan.training.batch_size, seed=plan.training.seed * 1000 + number)


def _members(
    plan: Plan,
    shares: Sequence[Share],
    stages: Sequence[nn.Module],
    seats: Sequence[Remote | None] | None = None,
    make: Callable[..., Member] = Member,
) -> list[Member]:
    found = []
    for number, (name, share, stage) in enumerate(zip(_names(shares), shares, stages, strict=True)):
        own = copy.deepcopy(stage)
        seed = plan.training.seed * 1000 + number + 1
        learner = Learner(name, own, plain_sgd(own, plan.training.lr), seed=seed)
        batches = Epochs(_batches(plan, share, number), plan.local_epochs)
        found.append(make(learner, seats[number] if seats is not None else None, batches))
    return found


def _seated(sessions: dict[str, Learner]) -> tuple[list[Remote], list[Metered]]:
    """Return the main server's sessions as their clients see them, and the meters on the way."""
    meters = [Metered(serve(Service({name: session}))) for name, session in sessions.items()]
    return [Remote(name, Framed(meter), name) for name, meter in zip(sessions, meters, strict=True)], meters


METHODS: dict[str, Method] = {
    "local": Method("each member alone: what a federation has to beat", train_alone, ("tune_epochs",)),
    "fedavg": Method("whole models are averaged (FedAvg)", train_fedavg),
    "fedprox": Method("FedAvg, members held near each round's start by --mu (FedProx)", train_fedprox, ("mu",)),
    "scaffold": Method("FedAvg, drift taken out by control variates (SCAFFOLD)", train_scaffold, lr=SCAFFOLD_RATE),
    "fedper": Method(
        "FedAvg of the layers up to --shared, heads stay at home (FedPer)", train_fedper, ("shared", "tune_epochs")
    ),
    "fedavg_tuned": Method(
        "FedAvg, then --tune-epochs at home: the baseline of personalisation", train_fedavg_tuned, ("tune_epochs",)
    ),
    "splitfed_v1": Method("bottoms and tops are averaged apart (SplitFed V1)", train_splitfed),
    "splitfed_v1_prox": Method(
        "SplitFed V1, bottoms held near each round's start by --mu", train_splitfed_prox, ("mu",)
    ),
    "unlike_cuts": Method(
        "SplitFed V1, members cut in turn at each of --cuts, whole models averaged", train_unlike_cuts, ("cuts",)
    ),
}
