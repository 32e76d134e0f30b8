"""One function a protocol: who holds what, over which wires, trained as the training says.

All parties share this process, and everything between them crosses as real frames, metered and, at the server,
recorded. The shield is on what the clients send; each wire has a codec of its own. Each function ends in the model as
its first client sees it.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.parts import Shield
from experiments.training import Trained, Training, build_model, optimizer_for
from privacy.mpc import SecureMean, SecureMember, Servers
from splitlearn.codecs import through
from splitlearn.cut import cut
from splitlearn.data import Splits, partition
from splitlearn.enclave import Attested, Host, enclosed
from splitlearn.features import Features
from splitlearn.federation import (
    FedMember,
    Member,
    RemoteMember,
    apart_round,
    fedavg_round,
    in_turn_round,
    parallel_round,
    splitfed_v1_round,
    splitfed_v2_round,
    splitfed_v3_round,
)
from splitlearn.frames import Codec
from splitlearn.party import Learner, Party
from splitlearn.protocols import Join, u_shaped, vertical
from splitlearn.remote import Remote, Wire, wire
from splitlearn.service import Service
from splitlearn.threat import Encoder
from splitlearn.train import Batches, Predictor, epochs_of, fit
from splitlearn.wire import Framed, Metered, serve

__all__ = [
    "ATTESTED",
    "HOST",
    "counted",
    "over_wires",
    "train_enclave",
    "train_fedavg",
    "train_parallel",
    "train_splitfed_v1",
    "train_splitfed_v2",
    "train_splitfed_v3",
    "train_u_shaped",
    "train_unsplit",
    "train_vanilla",
    "train_vertical",
    "vertical_parts",
]

Infiltrate = Callable[[Learner], Party]  # whoever takes the place of this server
LABELLED = ["the activation of every sample, in training and prediction", "the labels", "the loss"]
UNLABELLED = ["the activation of every sample, in training and prediction", "gradients of the loss at its output"]
FED = ["every client's weights after every round", "how many samples each client has"]
NOTHING = ["gradients at the cut", "the loss"]
HOST = ["how many bytes each sealed frame has, which way it goes, and when", "no tensor"]
ATTESTED = Attested(
    runs="the stage above the cut, its optimizer and what hands bottoms on, and keeps what it is sent to itself",
    vouched="the processor's maker, by a remote attestation that every client checks before its first frame",
)


def train_unsplit(training: Training, splits: Splits, shield: Shield, *, model: nn.Sequential | None = None) -> Trained:
    """The whole model in one place: the reference that every protocol is measured against."""
    model = (build_model(splits, seed=training.seed) if model is None else model).to(training.device)
    whole = Learner("unsplit", model, optimizer_for(model, training), seed=training.seed)
    batches = _batches(training, splits.private.x, splits.private.y)
    losses = fit(epochs_of(lambda x, y: whole.learn(x, y)[0], batches), epochs=training.epochs).losses
    return Trained([whole], model, losses, {}, {"nobody": ["nothing crosses"]}, splits.private.x, splits.private.y)


def train_vanilla(
    training: Training,
    splits: Splits,
    shield: Shield,
    *,
    infiltrate: Infiltrate | None = None,
    model: nn.Sequential | None = None,
) -> Trained:
    """Vanilla split learning: the server learns the labels; several clients take turns and hand their bottom on.

    ``infiltrate`` returns whoever takes the server's place, where there is one client. ``model`` is trained in place of
    the zoo's.
    """
    table = _table(training, splits, shield, shared=True, infiltrate=infiltrate, model=model)
    if training.clients == 1:
        losses = table.rounds(lambda: apart_round(table.members))
        return table.finished(losses, {"server": LABELLED, "client": NOTHING})
    losses = table.rounds(lambda: in_turn_round(table.remote, table.bottom))
    table.members[0].learner.load_weights(table.bottom.weights())
    return table.finished(losses, {"server": [*LABELLED, "every bottom handed on"], "client": NOTHING})


def train_enclave(training: Training, splits: Splits, shield: Shield) -> Trained:
    """Vanilla split learning with the server in an enclave, modelled: its host sees sizes and times of sealed frames.

    What is computed is vanilla's to the bit. All bytes are of sealed frames, the clients' handing on of bottoms too.
    """
    plain = _table(training, splits, shield, shared=True)
    hosts: list[Host] = []

    def sealed(party: Any, codec: Codec | None, requests: str) -> Framed:
        carrier, host = enclosed(serve(Service({party.name: party}), codec), ATTESTED, requests=requests)
        hosts.append(host)
        return Framed(carrier, codec)

    seats = [
        Remote(one.name, sealed(one, copy.deepcopy(shield.codec), "up"), one.name) for one in plain.sessions.values()
    ]
    members = [
        Member(one, seat, own)
        for one, seat, own in zip([member.learner for member in plain.members], seats, plain.batches, strict=True)
    ]
    remote: list[RemoteMember] = []
    if training.clients > 1:
        remote = [RemoteMember(one.name, sealed(one, None, "down"), one.name) for one in members]
    table = replace(plain, members=members, remote=remote)
    losses = table.rounds(lambda: in_turn_round(remote, table.bottom) if remote else apart_round(members))
    if remote:
        members[0].learner.load_weights(table.bottom.weights())
    handed_on = ["every bottom handed on"] if remote else []
    inside = [f"{what}: trusted by assumption" for what in (*LABELLED, *handed_on)]
    visible = {"host": [*HOST, *ATTESTED.in_words()], "enclave": inside, "client": NOTHING}
    nbytes = {way: dict(sum((Counter(host.nbytes[way]) for host in hosts), Counter())) for way in ("up", "down")}
    chain: list[Predictor] = [members[0].learner, seats[0]]
    return replace(table.finished(losses, visible), chain=chain, nbytes=nbytes, record=None)


def train_u_shaped(
    training: Training, splits: Splits, shield: Shield, *, infiltrate: Infiltrate | None = None
) -> Trained:
    """U-shaped split learning: bottom, head and labels stay with the client, the server holds the middle."""
    model = build_model(splits, seed=training.seed).to(training.device)
    below, middle, head = cut(model, training.cut, len(model) - 1)
    bottom, between = _shaped(below, middle, shield, splits.private.x[:1], training)
    client = _client(training, bottom, shield, 0)
    top = Learner("head", head, optimizer_for(head, training), seed=training.seed + 7)
    server = _server(training, between)
    line = wire(server if infiltrate is None else infiltrate(server), copy.deepcopy(shield.codec))
    batches = _batches(training, splits.private.x, splits.private.y)
    step = partial(u_shaped, client, line.party, top)
    losses = fit(epochs_of(step, batches), epochs=training.epochs).losses
    visible = {"server": UNLABELLED, "client": ["everything but the server's weights"]}
    encoder = Encoder(client.stage, client.guard, copy.deepcopy(shield.codec))
    model = nn.Sequential(client.stage, between, head)
    chain: list[Predictor] = [client, line.party, top]
    return Trained(chain, model, losses, counted([line.meter]), visible, batches.x, batches.y, encoder, line.record)


def train_splitfed_v1(training: Training, splits: Splits, shield: Shield) -> Trained:
    """SplitFed V1: a server copy for each client; bottoms and tops are averaged every round."""
    table = _table(training, splits, shield, shared=False)
    losses = table.rounds(lambda: splitfed_v1_round(table.remote, table.sessions, table.bottom, table.top))
    table.members[0].learner.load_weights(table.bottom.weights())
    table.sessions[table.members[0].name].load_weights(table.top.weights())
    return table.finished(losses, {"server": LABELLED, "fed server": FED, "client": NOTHING})


def train_splitfed_v2(training: Training, splits: Splits, shield: Shield, *, servers: Servers | None = None) -> Trained:
    """SplitFed V2: all clients share one server in its order; bottoms are averaged every round.

    With ``servers``, the bottoms are added up on shares, and no single one reaches the fed server.
    """
    table = _table(training, splits, shield, shared=True)
    if servers is None:
        losses = table.rounds(lambda: splitfed_v2_round(table.remote, table.bottom))
    else:
        remote, meters = over_wires([SecureMember(one, servers) for one in table.members])
        losses = table.rounds(lambda: splitfed_v2_round(remote, table.bottom, aggregate=SecureMean(servers)))
        table = replace(table, meters=[*meters, *servers.meters])
    table.members[0].learner.load_weights(table.bottom.weights())
    return table.finished(losses, {"server": LABELLED, "fed server": FED, "client": NOTHING})


def train_splitfed_v3(training: Training, splits: Splits, shield: Shield) -> Trained:
    """SplitFed V3: every client keeps its own bottom; tops are averaged every round."""
    table = _table(training, splits, shield, shared=False)
    losses = table.rounds(lambda: splitfed_v3_round(table.members, table.sessions, table.top))
    table.sessions[table.members[0].name].load_weights(table.top.weights())
    return table.finished(losses, {"server": LABELLED, "client": NOTHING})


def train_parallel(training: Training, splits: Splits, shield: Shield) -> Trained:
    """Parallel split learning: one server pass over all clients' activations; bottoms are averaged every epoch."""
    table = _table(training, splits, shield, shared=True)
    clients = [member.learner for member in table.members]
    server = table.wires[0].party

    def epoch() -> float:
        done = parallel_round(clients, server, table.batches, bottom=table.bottom)
        return done.loss

    losses = fit(epoch, epochs=training.epochs).losses
    clients[0].load_weights(table.bottom.weights())
    return table.finished(losses, {"server": LABELLED, "fed server": FED, "client": NOTHING})


def train_fedavg(training: Training, splits: Splits, shield: Shield) -> Trained:
    """FedAvg: every client trains the whole model, the fed server averages. No activation crosses."""
    model = build_model(splits, seed=training.seed).to(training.device)
    everywhere = Learner("fed server", model)
    batches = _shares(training, splits)
    members = [Member(_client(training, model, Shield(), number), None, own) for number, own in enumerate(batches)]
    remote, meters = over_wires(members, shield.updates)
    losses = _rounds(training, members, batches, lambda: fedavg_round(remote, everywhere))
    return Trained([everywhere], model, losses, counted(meters), {"fed server": FED}, batches[0].x, batches[0].y)


def train_vertical(training: Training, splits: Splits, shield: Shield) -> Trained:
    """Vertical split learning: each client holds some columns, the server the labels and no feature."""
    holders, side, top = vertical_parts(training, splits, shield)
    learners, columns, joined = [one.learner for one in holders], side.columns, side.joined
    server = _server(training, top)
    codecs = [copy.deepcopy(shield.codec) for _ in holders]
    meters = [
        Metered(serve(Service({one.name: one}), codec), requests="down")
        for one, codec in zip(holders, codecs, strict=True)
    ]
    remote = [
        Remote(one.name, Framed(meter, codec), one.name)
        for one, meter, codec in zip(holders, meters, codecs, strict=True)
    ]
    batches = _batches(training, torch.arange(len(splits.private)), splits.private.y)
    step = partial(vertical, server, remote, join=joined)
    losses = fit(epochs_of(step, batches), epochs=training.epochs).losses
    # Each part is packed on its own wire.
    paths = [Encoder(one.stage, one.guard, copy.deepcopy(shield.codec)) for one in learners]
    encoder = Encoder(SideBySide(paths, columns, joined))
    visible = {
        "server": ["each client's activation of every sample, in training and prediction", "the labels, its own"],
        "each client": ["gradients at its cut", "which samples are in a batch"],
    }
    seen = wire(server)  # what it reads are the parts, which have crossed their clients' wires by then
    chain: list[Predictor] = [_Together(learners, columns, joined, copy.deepcopy(shield.codec)), seen.party]
    whole_model = nn.Sequential(side, top)
    return Trained(
        chain, whole_model, losses, counted(meters), visible, splits.private.x, splits.private.y, encoder, seen.record
    )


def vertical_parts(
    training: Training, splits: Splits, shield: Shield
) -> tuple[list[Features], "SideBySide", nn.Module]:
    """Return clients that hold some columns each of the private samples, their bottoms as one, and the top."""
    clients = max(2, training.clients)
    if shield.above is not None:
        raise ValueError(
            "expected a protection without layers above the cut, where several activations are joined; leave narrow out"
        )
    private = splits.private
    names = private.names if private.kind == "table" else None
    columns = partition.attributes(names, clients) if names else partition.vertical(private.x.shape[-1], clients)
    model = build_model(splits, seed=training.seed).to(training.device)
    whole, top = cut(model, training.cut)
    learners = []
    for number, own in enumerate(columns):
        narrow = _narrow(splits, training, whole, len(own), clients) if splits.private.kind == "table" else whole
        narrow, _ = _shaped(narrow, top, shield, splits.private.x[:1][..., own], training)
        learners.append(_client(training, narrow, shield, number))
    # Images are joined side by side as they were parted, a table's clients by their features.
    side = SideBySide([one.stage for one in learners], columns, partial(torch.cat, dim=-1))
    holders = [Features(one, splits.private.x[..., own]) for one, own in zip(learners, columns, strict=True)]
    return holders, side, top


class SideBySide(nn.Module):
    """The bottoms of several clients as one stage over all columns."""

    def __init__(self, stages: Sequence[nn.Module], columns: Sequence[Tensor], joined: Join):
        super().__init__()
        self.stages, self.columns, self.joined = nn.ModuleList(stages), list(columns), joined

    def forward(self, x: Tensor) -> Tensor:
        """Return the joined activation for inputs with all columns."""
        return self.joined([stage(x[..., own]) for stage, own in zip(self.stages, self.columns, strict=True)])


class _Together:
    """Several vertical clients asked as one for a prediction, each on its columns of ``x``."""

    def __init__(self, learners: Sequence[Learner], columns: Sequence[Tensor], joined: Join, codec: Codec | None):
        self.name, self._learners, self._columns, self._joined = "clients", learners, columns, joined
        self._codec = codec

    def predict(self, x: Tensor) -> Tensor:
        """Return the joined activation that the clients send for ``x``."""
        sent = [one.predict(x[..., own]) for one, own in zip(self._learners, self._columns, strict=True)]
        return self._joined([z if self._codec is None else through(self._codec, z) for z in sent])


@dataclass(frozen=True)
class _Table:
    """Clients around one server, each with its share of the private data and its own wire."""

    training: Training
    batches: list[Batches]  # each client's share of the private data
    members: list[Member]
    remote: list[RemoteMember]  # the same members as the fed server sees them
    sessions: dict[str, Learner]  # the server's side of each wire
    wires: list[Wire]
    meters: list[Metered]
    bottom: Learner  # the global one
    top: Learner
    shield: Shield

    def rounds(self, one: Callable[[], object]) -> list[float]:
        """Run the training's epochs, one round each, and return the mean losses."""
        return _rounds(self.training, self.members, self.batches, one)

    def finished(self, losses: list[float], visible: dict[str, list[str]]) -> Trained:
        """Return the model as the first client sees it, and that client as the victim."""
        member = self.members[0]
        client, session = member.learner, self.sessions[member.name]
        encoder = Encoder(client.stage, client.guard, copy.deepcopy(self.shield.codec))
        return Trained(
            [client, self.wires[0].party],
            nn.Sequential(client.stage, session.stage),
            losses,
            counted([*self.meters, *(line.meter for line in self.wires)]),
            visible,
            self.batches[0].x,
            self.batches[0].y,
            encoder,
            self.wires[0].record,
        )


def _table(
    training: Training,
    splits: Splits,
    shield: Shield,
    *,
    shared: bool,
    infiltrate: Infiltrate | None = None,
    model: nn.Sequential | None = None,
) -> _Table:
    """Set the clients around a server whose stage they share, or of which each has a copy."""
    if infiltrate is not None and training.clients != 1:
        raise ValueError(f"expected one client where the server is infiltrated, got {training.clients}")
    model = build_model(splits, seed=training.seed) if model is None else model
    below, top = cut(model.to(training.device), training.cut)
    bottom, above = _shaped(below, top, shield, splits.private.x[:1], training)
    server = _server(training, above)
    clients = [_client(training, bottom, shield, number) for number in range(training.clients)]
    sessions = {one.name: server.session(one.name) if shared else server.replica(one.name) for one in clients}
    seated: list[Party] = list(sessions.values()) if infiltrate is None else [infiltrate(server)]
    wires = [wire(one, copy.deepcopy(shield.codec)) for one in seated]
    batches = _shares(training, splits)
    members = [Member(one, line.party, own) for one, line, own in zip(clients, wires, batches, strict=True)]
    remote, meters = over_wires(members, shield.updates)
    return _Table(
        training, batches, members, remote, sessions, wires, meters, Learner("bottom", bottom), server, shield
    )


def _shaped(
    bottom: nn.Module, top: nn.Module, shield: Shield, x: Tensor, training: Training
) -> tuple[nn.Module, nn.Module]:
    """Return both stages with the shield's layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        x = x.to(training.device)
        return shield.shaped(bottom, x), shield.raised(top, bottom, x)


def _client(training: Training, stage: nn.Module, shield: Shield, number: int) -> Learner:
    own = copy.deepcopy(stage)
    guard = copy.deepcopy(shield.guard)
    return Learner(f"client{number}", own, optimizer_for(own, training), guard, seed=training.seed * 1000 + number + 1)


def _server(training: Training, stage: nn.Module) -> Learner:
    return Learner("server", stage, optimizer_for(stage, training), seed=training.seed * 1000)


def _batches(training: Training, x: Tensor, y: Tensor) -> Batches:
    return Batches(x, y, batch_size=training.batch_size, seed=training.seed)


def _shares(training: Training, splits: Splits) -> list[Batches]:
    x, y = splits.private.x, splits.private.y
    if training.clients == 1:
        return [_batches(training, x, y)]
    return [_batches(training, x[rows], y[rows]) for rows in partition.iid(len(x), training.clients, training.seed)]


def over_wires(
    members: Sequence[FedMember], updates: Callable[[], Codec] | None = None
) -> tuple[list[RemoteMember], list[Metered]]:
    """Return the members as the fed server sees them, its requests going down, and the meters on the way.

    With ``updates`` they answer with updates, each member's packed by a codec of its own.
    """
    codecs = [None if updates is None else updates() for _ in members]
    meters = [
        Metered(serve(Service({one.name: one}), codec), requests="down")
        for one, codec in zip(members, codecs, strict=True)
    ]
    remote = [
        RemoteMember(one.name, Framed(meter, codec), one.name, updates=codec is not None)
        for one, meter, codec in zip(members, meters, codecs, strict=True)
    ]
    return remote, meters


def _rounds(
    training: Training, members: Sequence[Member], batches: Sequence[Batches], one: Callable[[], object]
) -> list[float]:
    sizes = [len(own.x) for own in batches]

    def epoch() -> float:
        one()
        return sum(member.loss * size for member, size in zip(members, sizes, strict=True)) / sum(sizes)

    return fit(epoch, epochs=training.epochs).losses


def counted(meters: Sequence[Metered]) -> dict[str, dict[str, int]]:
    """Return the bytes of all wires together: direction, then kind."""
    total = {direction: sum((meter.nbytes[direction] for meter in meters), Counter()) for direction in ("up", "down")}
    return {direction: dict(sorted(counts.items())) for direction, counts in total.items()}


def _narrow(splits: Splits, training: Training, whole: nn.Module, columns: int, clients: int) -> nn.Module:
    """Return a bottom for some columns of a table, as wide at the cut as this client's share of the whole bottom."""
    with torch.no_grad():
        width = whole(splits.private.x[:1].to(training.device)).shape[-1]
    if width % clients:
        raise ValueError(
            f"expected clients that share {width} features at the cut evenly, got {clients}; use --clients 2"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        narrow = nn.Sequential(nn.Linear(columns, width // clients), nn.ReLU())
    return narrow.to(training.device, splits.private.x.dtype)
