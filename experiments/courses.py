"""One function a paradigm: who holds what in a fleet of devices and a cloud, and what one round of it is."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from experiments.fleet import Fleet
from splitlearn.federation import (
    Member,
    fedavg_round,
    in_turn_round,
    splitfed_v1_round,
    splitfed_v2_round,
)
from splitlearn.frames import Kind, Message, decode, encode
from splitlearn.members import FedMember, RemoteMember, Weights
from splitlearn.paradigms import (
    Consensus,
    Distilled,
    DistillingMember,
    LocalLossMember,
    ProximalMember,
    ScaffoldMember,
    distillation_round,
    fedbuff,
    gossip_round,
    metropolis,
    no_control,
    ring,
    scaffold_round,
    taught,
)
from splitlearn.party import Learner
from splitlearn.service import keyed, named
from splitlearn.train import Batches, Predictor

__all__ = ["PARADIGMS", "RATES", "Course", "Paradigm"]

MU = 0.01  # of FedProx
SLOWEST = 3.0  # times the fastest device's round, of the slowest (asynchronous)
SOFT = Distilled(alpha=0.5, temperature=4.0)
WIDTH = 32  # of a student's hidden layer


@dataclass
class Course:
    """A training that is set up: ``round()`` is one pass of every device over its samples.

    ``chains()`` are the parties that a prediction passes through: of one global model, or of each device's own.
    ``schedule`` says who waits for whom, ``streamed`` whether a device waits for replies. ``device`` are the stages
    that one device trains. ``baselines`` train, by the name of their accuracy, what a paradigm has to beat by itself.
    """

    round: Callable[[], object]
    chains: Callable[[], list[Sequence[Predictor]]]
    schedule: Literal["in turn", "at once", "asynchronous", "nobody"]
    device: list[nn.Module]
    visible: dict[str, list[str]]
    streamed: bool = False
    notes: list[str] = field(default_factory=list)
    baselines: dict[str, Callable[[], Sequence[Predictor]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Paradigm:
    """A way in which devices and a cloud learn together.

    ``partitioning`` says who holds what of the model, ``leaves`` what leaves a device, ``asks`` who can ask the trained
    model, which is what membership is inferred from.
    """

    summary: str
    build: Callable[[Fleet], Course]
    family: Literal["central", "alone", "split", "federated", "split-federated", "distilled", "peer to peer"]
    partitioning: str
    leaves: str
    asks: str = "servers and devices"


# Learning rates at which 30 rounds of ten even devices end high and do not diverge, of a small grid on another seed.
# SCAFFOLD's is about the highest that does not diverge: 30 rounds of it end low.
RATES = {
    "central": 0.02, "alone": 0.05, "split": 0.01, "splitfed_v1": 0.05, "splitfed_v2": 0.01, "local_loss": 0.01,
    "fedavg": 0.05, "fedprox": 0.05, "scaffold": 0.1, "fedbuff": 0.05, "teacher": 0.02, "answers": 0.05, "gossip": 0.05,
}  # fmt: skip
SMASHED = ["the activation of every sample", "the labels", "the loss"]
WEIGHTS = ["every device's weights after every round", "how many samples each has"]
NOTHING = ["gradients at the cut", "the loss"]


def central(fleet: Fleet) -> Course:
    """All samples are sent to the cloud once, which trains the whole model."""
    shares = fleet.shares()
    x, y = torch.cat([x for x, _ in shares]), torch.cat([y for _, y in shares])
    whole = fleet.learner("server", fleet.model(), 0)
    seat = fleet.cloud.seat(whole)
    batches = Batches(x, y, batch_size=fleet.training.batch_size, seed=fleet.training.seed)

    def one() -> None:
        for name, (own, labels) in zip(fleet.names, shares, strict=True):  # what a copy of the data costs
            frame = encode(Message("send", {Kind.INPUT: own, Kind.LABEL: labels}, name, 1))
            fleet.traffic.one_way(name, "up", frame)
        for rows, labels in batches:
            seat.learn(rows, labels)

    return Course(
        one, lambda: [[whole]], "nobody", [], {"server": ["every sample and label"]}, streamed=True,
        notes=["samples cross once, not once a round: their bytes are those of the whole training"],
    )  # fmt: skip


def alone(fleet: Fleet) -> Course:
    """Every device trains on its own samples alone, and nothing crosses: what the others must be worth."""
    devices, batches = fleet.devices(fleet.model()), fleet.batches()

    def one() -> None:
        for device, own in zip(devices, batches, strict=True):
            for x, y in own:
                device.learn(x, y)

    return Course(one, lambda: [[device] for device in devices], "at once", [devices[0].stage], {"nobody": ["nothing"]})


def split(fleet: Fleet) -> Course:
    """Vanilla split learning, devices in turn, the bottom handed on."""
    return _around(fleet, shared=True, in_turn=True)


def splitfed_v1(fleet: Fleet) -> Course:
    """SplitFed V1: a server copy a device, bottoms and tops averaged."""
    return _around(fleet, shared=False)


def splitfed_v2(fleet: Fleet) -> Course:
    """SplitFed V2: one server for all, bottoms averaged."""
    return _around(fleet, shared=True)


def local_losses(fleet: Fleet) -> Course:
    """SplitFed V2 with an auxiliary head on every device: no gradient crosses."""
    return _around(fleet, shared=True, local=True)


def fedavg(fleet: Fleet) -> Course:
    """FedAvg: every device trains the whole model, the cloud averages."""
    return _federated(fleet, Member)


def fedprox(fleet: Fleet) -> Course:
    """FedProx: the same, each device held near the round's start."""
    return _federated(fleet, lambda learner, server, batches: ProximalMember(learner, server, batches, mu=MU))


def scaffold(fleet: Fleet) -> Course:
    """SCAFFOLD: the same, drift corrected by control variates; plain SGD."""
    model, everywhere, members = _whole_models(fleet, ScaffoldMember, momentum=False)
    state = {"control": no_control(everywhere)}

    def one() -> None:
        _, state["control"] = scaffold_round(members, everywhere, state["control"])

    visible = {"fed server": [*WEIGHTS, "the change of every device's control"]}
    notes = ["plain SGD, where all others have momentum; controls cross beside weights and are counted as such"]
    return Course(one, lambda: [[everywhere]], "at once", [model], visible, notes=notes)


def buffered(fleet: Fleet) -> Course:
    """FedBuff: devices of unlike speed, the cloud takes half of them at a time as they come."""
    model, everywhere, members = _whole_models(fleet, Member)
    count = len(members)
    buffer = max(1, count // 2)
    steps = -(-count // buffer)  # of the server's in a round
    pace = {name: 1 + (SLOWEST - 1) * place / max(1, count - 1) for place, name in enumerate(fleet.names)}
    updates = fedbuff(
        members, everywhere, buffer=buffer, updates=10**9, delay=lambda name, number: pace[name]
    )  # as many as are asked for

    def one() -> None:
        for _ in range(steps):
            next(updates)

    notes = [
        f"devices take 1 to {SLOWEST:g} times as long for a round; buffer of {buffer}; a round is {steps * buffer} "
        "answers, of fast devices more than of slow ones"
    ]
    return Course(one, lambda: [[everywhere]], "asynchronous", [model], {"fed server": WEIGHTS}, notes=notes)


def taught_alone(fleet: Fleet) -> Course:
    """A teacher in the cloud, trained on public samples, teaches each device's small model; devices never answer."""
    public = fleet.splits.auxiliary
    x, y = public.x.to(fleet.training.device), public.y.to(fleet.training.device)
    teacher = fleet.learner("teacher", fleet.model(), 0)
    own = fleet.cloud.seat(teacher)
    lessons = Batches(x, y, batch_size=fleet.training.batch_size, seed=fleet.training.seed)
    students = _students(fleet)
    numbers = torch.arange(len(x), device=x.device)

    def public_order(place: int) -> Batches:
        seed = fleet.training.seed * 1000 + place
        return Batches(numbers, numbers, batch_size=fleet.training.batch_size, seed=seed)

    orders = [public_order(place) for place in range(len(students))]
    batches = fleet.batches()

    def one() -> None:
        for rows, labels in lessons:
            own.learn(rows, labels)
        said = own.predict(x)
        for name, student, order, mine in zip(fleet.names, students, orders, batches, strict=True):
            frame = encode(Message("teach", {Kind.PREDICTION: said}, name, 1))
            fleet.traffic.one_way(name, "down", frame)
            for rows, _ in order:
                student.learn(x[rows], taught(y[rows], said[rows]))
            for own_x, own_y in mine:
                student.learn(own_x, own_y)

    def public_alone() -> list[Learner]:
        """The first student in the same public batches, of their labels alone: no teacher, no device's samples."""
        student, order = _students(fleet)[0], public_order(0)
        for _ in range(fleet.training.epochs):
            for rows, _ in order:
                student.learn(x[rows], y[rows])
        return [student]

    visible = {"server": ["nothing of a device's"], "device": ["the teacher's answers on public samples"]}
    notes = [
        f"{len(x)} public samples with labels, from which no other paradigm learns, are on every device and in the "
        "cloud, and are not counted in bytes",
        "accuracy_public_alone: a student that has as many steps on these labels, no teacher and no device's samples",
    ]
    return Course(
        one, lambda: [[student] for student in students], "at once", [students[0].stage], visible, streamed=True,
        notes=notes, baselines={"accuracy_public_alone": public_alone},
    )  # fmt: skip


def answers(fleet: Fleet) -> Course:
    """FedMD: devices tell what their small models say on public samples, and learn from what all say."""
    public = fleet.splits.auxiliary
    x = public.x.to(fleet.training.device)
    students = _students(fleet)
    size, seed = fleet.training.batch_size, fleet.training.seed * 1000
    members = fleet.federated(
        [
            DistillingMember(student, own, x, batch_size=size, seed=seed + place)
            for place, (student, own) in enumerate(zip(students, fleet.batches(), strict=True))
        ]
    )
    consensus = Consensus(len(x), public.num_classes)
    visible = {"fed server": ["every device's answers on public samples, every round", "how many samples each has"]}
    notes = [
        f"{len(x)} public samples, without labels, are on every device, and are not counted in bytes; answers cross as "
        "entries of a round, and are counted as weights; nothing attacks them"
    ]
    return Course(
        lambda: distillation_round(members, consensus),
        lambda: [[student] for student in students], "at once", [students[0].stage], visible, notes=notes,
    )  # fmt: skip


def gossip(fleet: Fleet) -> Course:
    """Peer to peer on a ring: every device averages with two neighbours, and there is no server."""
    model = fleet.model()
    devices = fleet.devices(model)
    members: list[FedMember] = [Member(one, None, own) for one, own in zip(devices, fleet.batches(), strict=True)]
    mixing = metropolis(ring(len(members)))
    held = {"states": [one.weights() for one in devices]}

    def carry(sender: str, receiver: str, weights: Weights) -> Weights:
        frame = encode(Message("gossip", keyed(weights, Kind.WEIGHTS), sender, 1))
        fleet.traffic.one_way(sender, "up", frame)
        fleet.traffic.one_way(receiver, "down", frame)
        return named(decode(frame).tensors, Kind.WEIGHTS)

    def one() -> None:
        held["states"] = gossip_round(members, held["states"], mixing, carry=carry).states

    def chains() -> list[Sequence[Predictor]]:
        found: list[Sequence[Predictor]] = []
        for device, state in zip(devices, held["states"], strict=True):
            device.load_weights(state)
            found.append([device])
        return found

    visible = {"each neighbour": ["its neighbours' weights after every round, before they are averaged"]}
    notes = [
        "what devices send each other counts at both ends, in bytes and messages; nothing attacks the weights that "
        "neighbours see"
    ]
    return Course(one, chains, "at once", [model], visible, streamed=True, notes=notes)


def _students(fleet: Fleet) -> list[Learner]:
    """Return a small model a device: one hidden layer."""
    private = fleet.splits.private
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fleet.training.seed)
        small = nn.Sequential(
            nn.Flatten(), nn.Linear(private.x[0].numel(), WIDTH), nn.ReLU(), nn.Linear(WIDTH, private.num_classes)
        ).to(fleet.training.device)
    return [fleet.learner(name, small, place + 1, SOFT) for place, name in enumerate(fleet.names)]


def _whole_models(
    fleet: Fleet, kind: Callable[..., Member], *, momentum: bool = True
) -> tuple[nn.Module, Learner, list[RemoteMember]]:
    """Return the model that all start from, the fed server's copy, and the devices that train one each."""
    model = fleet.model()
    devices = fleet.devices(model, momentum=momentum)
    members = [kind(one, None, own) for one, own in zip(devices, fleet.batches(), strict=True)]
    return model, Learner("fed server", copy.deepcopy(model)), fleet.federated(members)


def _federated(fleet: Fleet, kind: Callable[..., Member]) -> Course:
    model, everywhere, members = _whole_models(fleet, kind)
    visible = {"fed server": WEIGHTS}
    return Course(lambda: fedavg_round(members, everywhere), lambda: [[everywhere]], "at once", [model], visible)


def _around(fleet: Fleet, *, shared: bool, in_turn: bool = False, local: bool = False) -> Course:
    """Set devices around a server whose stage they share, or of which each has a copy."""
    below, above = fleet.halves()
    bottom, top = Learner("bottom", copy.deepcopy(below)), fleet.learner("server", above, 0)
    sessions = {name: top.session(name) if shared else top.replica(name) for name in fleet.names}
    lines = fleet.lines(sessions)
    devices, batches = fleet.devices(below), fleet.batches()
    trained = [below]
    members: list[Member]
    if local:
        heads = [
            fleet.learner(f"head of {one.name}", _head(fleet, below), place + 1) for place, one in enumerate(devices)
        ]
        trained.append(heads[0].stage)
        members = [
            LocalLossMember(one, head, lines[one.name], own)
            for one, head, own in zip(devices, heads, batches, strict=True)
        ]
    else:
        members = [Member(one, lines[one.name], own) for one, own in zip(devices, batches, strict=True)]
    remote = fleet.federated(members)

    def one() -> object:
        if in_turn:
            return in_turn_round(remote, bottom)
        if shared:
            return splitfed_v2_round(remote, bottom)
        return splitfed_v1_round(remote, sessions, bottom, top)

    visible = {"server": list(SMASHED), "fed server": WEIGHTS, "device": ["the loss"] if local else NOTHING}
    if in_turn:
        visible = {"server": [*SMASHED, "every bottom handed on"], "device": NOTHING}
    schedule: Literal["in turn", "at once"] = "in turn" if shared and not local else "at once"
    notes = [
        "activations that ask for no gradient are counted as inputs; heads stay with their devices, where Han et al. "
        "average them beside the bottoms"
    ]
    return Course(
        one,
        lambda: [[bottom, top]],
        schedule,
        trained,
        visible,
        streamed=local,
        notes=notes if local else [],
    )


def _head(fleet: Fleet, below: nn.Module) -> nn.Module:
    """Return an auxiliary head: one layer over the whole activation."""
    private = fleet.splits.private
    with torch.no_grad():
        z = below(private.x[:1].to(fleet.training.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fleet.training.seed)
        head = nn.Sequential(nn.Flatten(), nn.Linear(z[0].numel(), private.num_classes))
    return head.to(fleet.training.device)


PARADIGMS: dict[str, Paradigm] = {
    "central": Paradigm(
        "all samples go to the cloud, which trains alone", central, "central", "all in the cloud", "samples and labels",
        asks="the cloud",
    ),
    "alone": Paradigm(
        "every device by itself, the baseline of all that cross anything", alone, "alone", "all on each device",
        "nothing", asks="the device itself",
    ),
    "split": Paradigm(
        "vanilla split learning, devices in turn (Gupta & Raskar 2018)", split, "split",
        "bottom on devices, top in the cloud", "activations, labels, bottoms to the next device",
    ),
    "splitfed_v1": Paradigm(
        "a server copy for each device, bottoms and tops averaged (Thapa et al. 2022)", splitfed_v1, "split-federated",
        "bottom on devices, top in the cloud", "activations, labels, bottoms", asks="devices, by way of the server",
    ),
    "splitfed_v2": Paradigm(
        "one server for all devices in turn, bottoms averaged (Thapa et al. 2022)", splitfed_v2, "split-federated",
        "bottom on devices, top in the cloud", "activations, labels, bottoms", asks="devices, by way of the server",
    ),
    "local_loss": Paradigm(
        "SplitFed with auxiliary heads on devices: no gradient crosses (Han et al. 2021)", local_losses,
        "split-federated", "bottom and a head on devices, top in the cloud", "activations, labels, bottoms",
        asks="devices, by way of the server",
    ),
    "fedavg": Paradigm(
        "every device trains the whole model, the cloud averages (McMahan et al. 2017)", fedavg, "federated",
        "all on devices", "weights",
    ),
    "fedprox": Paradigm(
        "FedAvg, each device held near the round's start (Li et al. 2020)", fedprox, "federated", "all on devices",
        "weights",
    ),
    "scaffold": Paradigm(
        "FedAvg with control variates against drift (Karimireddy et al. 2020)", scaffold, "federated",
        "all on devices", "weights and controls",
    ),
    "fedbuff": Paradigm(
        "asynchronous: the cloud takes answers as they come (Nguyen et al. 2022)", buffered, "federated",
        "all on devices", "weights",
    ),
    "teacher": Paradigm(
        "a teacher in the cloud, of public samples, teaches small models on devices (Hinton et al. 2015)", taught_alone,
        "distilled", "a small model on each device, a teacher in the cloud", "nothing", asks="the device itself",
    ),
    "answers": Paradigm(
        "devices learn from each other's answers on public samples (FedMD, Li & Wang 2019)", answers, "distilled",
        "a small model on each device", "answers on public samples", asks="the device itself",
    ),
    "gossip": Paradigm(
        "devices average with two neighbours, no server (D-PSGD, Lian et al. 2017)", gossip, "peer to peer",
        "all on devices", "weights, to neighbours", asks="devices",
    ),
}  # fmt: skip
