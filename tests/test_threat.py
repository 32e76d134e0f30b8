"""Threat, View, observe: nothing that was not granted is reachable, and what is seen is what crossed."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from splitlearn import (
    Encoder,
    ErrorFeedback,
    Float16,
    Framed,
    Grants,
    Guard,
    Int8,
    Kind,
    Learner,
    Member,
    Recorded,
    RemoteMember,
    Service,
    Threat,
    TopK,
    View,
    Zstd,
    cut,
    observe,
    predict,
    serve,
    u_shaped,
    vanilla,
    wire,
)
from splitlearn.frames import Codec
from splitlearn.remote import Wire

X, Y = torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
AUXILIARY = torch.rand(3, 4)


class Halve(Guard):
    def activation(self, z: Tensor) -> Tensor:
        return 0.5 * z


class Table:
    """A client, a server behind a wire, one training step, one prediction."""

    def __init__(self, codec: Codec | None = None, guard: Guard | None = None) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3))
        bottom, top = cut(model, 4)
        self.client = Learner("client", bottom, torch.optim.SGD(bottom.parameters(), lr=0.1), guard)
        self.server = Learner("server", top, torch.optim.SGD(top.parameters(), lr=0.1))
        self.line: Wire = wire(self.server, codec)
        self.encoder: Encoder | None = None
        vanilla(self.client, self.line.party, X, Y)
        predict([self.client, self.line.party], X)
        self.encoder = Encoder(bottom, guard, codec)

    def view(self, threat: Threat, grants: Grants | None = None) -> View:
        everything = Grants(self.encoder, AUXILIARY, torch.tensor([0, 1, 2]))
        return observe(self.line.record, threat=threat, grants=everything if grants is None else grants)


ASKING: dict[str, tuple[Callable[[View], object], dict[str, bool]]] = {
    "encoder": (lambda view: view.encoder, {"white_box": True}),
    "query": (lambda view: view.query(X), {"queries": True}),
    "auxiliary_x": (lambda view: view.auxiliary_x, {"auxiliary": True}),
    "auxiliary_y": (lambda view: view.auxiliary_y, {"auxiliary": True, "auxiliary_labels": True}),
}


@pytest.mark.parametrize("thing", ASKING)
def test_what_is_not_granted_is_not_there(thing: str) -> None:
    ask, flags = ASKING[thing]
    table = Table()
    with pytest.raises(LookupError, match="grant"):
        ask(table.view(Threat()))
    others = {name: True for _, needed in ASKING.values() for name in needed} | dict.fromkeys(flags, False)
    if thing == "auxiliary_x":
        others["auxiliary_labels"] = False  # labels come only with their samples
    if thing == "auxiliary_y":
        others["auxiliary"] = True
    if thing == "query":
        others["white_box"] = False  # whoever has the path can send through it
    view = table.view(Threat(**others))
    with pytest.raises(LookupError, match="grant"):
        ask(view)
    assert ask(table.view(Threat(**flags))) is not None
    with pytest.raises(LookupError, match=r"threat grants it, but nothing was handed over; pass Grants\("):
        ask(table.view(Threat(**flags), Grants()))


def test_a_view_carries_no_reference_to_what_was_not_granted() -> None:
    table = Table()
    granted = table.view(Threat())._granted
    assert granted == Grants()
    only_samples = table.view(Threat(auxiliary=True))._granted
    assert only_samples.encoder is None
    assert only_samples.auxiliary_y is None
    assert "Encoder" not in repr(table.view(Threat(white_box=True)))


def test_nothing_is_granted_by_default_but_the_wire() -> None:
    threat = Threat()
    assert not any((threat.white_box, threat.queries, threat.auxiliary, threat.auxiliary_labels))
    assert threat.in_words() == ["every kind of message on its wire", "one release of each sample"]
    known = Threat(sees=frozenset({Kind.LABEL, Kind.ACTIVATION}), white_box=True, queries=True, auxiliary=True)
    assert known.in_words() == [
        "on its wire: activation, label",
        "the client's weights, guard and codec",
        "what crosses for inputs of its own choice",
        "unlabelled samples of its own, disjoint from the private ones",
        "one release of each sample",
    ]
    assert Threat(releases=15).in_words()[-1] == "the mean of 15 releases"
    with pytest.raises(ValueError, match="at least one release"):
        Threat(releases=0)


def test_a_threat_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels alone; grant Threat\(auxiliary=True\) too"):
        Threat(auxiliary_labels=True)
    with pytest.raises(ValueError, match=r"expected kinds among .*activation.*; got logits"):
        Threat(sees=frozenset({"logits", "label"}))
    assert Threat(sees={"label"}).sees == frozenset({Kind.LABEL})


def test_only_kinds_that_are_seen_remain_in_the_view() -> None:
    view = Table().view(Threat(sees=frozenset({Kind.LABEL, Kind.GRADIENT})))
    assert torch.equal(view.tensors(Kind.LABEL)[0], Y)
    assert len(view.tensors(Kind.GRADIENT)) == 1
    for kind in (Kind.ACTIVATION, Kind.LOSS, Kind.PREDICTION):
        with pytest.raises(LookupError, match=rf"kind {kind}; grant them with .*Kind.{kind.name}"):
            view.tensors(kind)
    with pytest.raises(LookupError, match="kind activation; grant"):
        view.activations()
    for exchange in view.exchanges:
        for message in (exchange.request, exchange.reply):
            assert {Kind.of(key) for key in message.tensors} <= {Kind.LABEL, Kind.GRADIENT}


def test_tensors_come_in_the_order_in_which_they_crossed() -> None:
    table = Table()
    vanilla(table.client, table.line.party, X + 1, Y)
    view = table.view(Threat())
    assert [exchange.request.verb for exchange in view.exchanges] == ["learn", "predict", "learn"]
    assert len(view.tensors(Kind.ACTIVATION)) == 3
    assert len(view.tensors(Kind.ACTIVATION, verb="learn")) == 2
    assert torch.equal(view.activations(verb="learn"), torch.cat(view.tensors(Kind.ACTIVATION, verb="learn")))
    assert view.tensors(Kind.INPUT) == []
    with pytest.raises(LookupError, match="activations of 'forward' requests, and none crossed; record the wire"):
        view.activations(verb="forward")


def test_activations_are_those_of_requests() -> None:
    bottom, middle, head = cut(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)), 1, 2)
    line = wire(Learner("server", middle))
    u_shaped(Learner("b", bottom), line.party, Learner("h", head), X, Y)
    view = observe(line.record, threat=Threat())
    assert torch.equal(view.activations(verb="forward"), bottom(X))
    assert [tensor.shape[1] for tensor in view.tensors(Kind.ACTIVATION)] == [5, 6]
    assert view.tensors(Kind.LABEL) == []


def test_several_wires_are_one_view() -> None:
    one, other = Table(), Table(guard=Halve())
    view = observe(one.line.record, other.line.record, threat=Threat())
    assert len(view.exchanges) == 4
    assert view.activations().shape == (12, 5)


def test_a_view_does_not_change_later() -> None:
    table = Table()
    view = table.view(Threat())
    before = view.activations()
    view.tensors(Kind.ACTIVATION, verb="predict")[0].zero_()  # what one attack does to its copy
    vanilla(table.client, table.line.party, X, Y)
    table.line.record.clear()
    assert len(view.exchanges) == 2
    assert torch.equal(view.activations(), before)


def test_weights_that_crossed_are_those_of_that_moment() -> None:
    stage = nn.Linear(4, 3)
    learner = Learner("m", stage, torch.optim.SGD(stage.parameters(), lr=0.1))
    record = Recorded(Service({"m": Member(learner, None, [(X, Y)])}))
    remote = RemoteMember("m", Framed(serve(record)), "m")
    start = learner.weights()
    first, _ = remote.round(start)
    remote.round(first)
    seen = observe(record, threat=Threat()).tensors(Kind.WEIGHTS)
    sent = [start["weight"], first["weight"], first["weight"]]
    for crossed, expected in zip([seen[0], seen[2], seen[4]], sent, strict=True):
        assert torch.equal(crossed, expected)


# What crossed, on the server's own side of the codec


CODECS: list[Codec | None] = [
    None,
    Int8(),
    Float16(),
    TopK(0.4),
    Zstd(Int8()),
    Int8(kinds=frozenset({Kind.GRADIENT})),
    ErrorFeedback(TopK(0.4)),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name if codec else "none")
@pytest.mark.parametrize("guard", [None, Halve()], ids=["plain", "guarded"])
def test_the_encoder_gives_what_the_server_recorded_bit_for_bit(codec: Codec | None, guard: Guard | None) -> None:
    table = Table(codec, guard)
    view = table.view(Threat(white_box=True, queries=True))
    assert torch.equal(view.query(X), view.activations())
    assert torch.equal(view.encoder(X), view.activations())
    exact = table.client.stage.eval()(X).detach() * (0.5 if guard else 1)
    lossy = codec is not None and Kind.ACTIVATION in codec.kinds
    assert torch.equal(view.activations(), exact) is not lossy


def test_the_encoder_is_a_frozen_copy_in_evaluation_mode() -> None:
    table = Table()
    assert table.encoder is not None
    before = table.encoder(X)
    vanilla(table.client, table.line.party, X, Y)
    table.encoder.train()
    nn.Sequential(table.encoder, nn.Linear(5, 4)).train()  # an attack trains around it
    assert not any(module.training for module in table.encoder.modules())
    assert torch.equal(table.encoder(X), before)
    assert not any(parameter.requires_grad for parameter in table.encoder.parameters())
    assert not before.requires_grad
    assert all(module.training for module in table.client.stage.modules())
    assert all(parameter.requires_grad for parameter in table.client.stage.parameters())


@pytest.mark.parametrize("codec", [None, Int8(), TopK(0.4)], ids=["none", "int8", "topk"])
def test_an_attack_can_train_through_guard_and_codec(codec: Codec | None) -> None:
    encoder = Table(codec, Halve()).encoder
    assert encoder is not None
    x = X.clone().requires_grad_()
    (through,) = torch.autograd.grad(encoder(x).sum(), x)
    (around,) = torch.autograd.grad(0.5 * encoder.stage(x).sum(), x)
    assert torch.allclose(through, around, rtol=1e-6, atol=0)
    assert through.abs().sum() > 0


def test_the_encoders_guard_is_a_copy_and_its_noise_is_new_every_time() -> None:
    class Noise(Guard):
        def __init__(self) -> None:
            self.calls = 0

        def activation(self, z: Tensor) -> Tensor:
            self.calls += 1
            return z + torch.randn_like(z)

    guard = Noise()
    encoder = Encoder(nn.Identity(), guard)
    assert not torch.equal(encoder(X), encoder(X))
    assert guard.calls == 0
    assert isinstance(encoder.guard, Noise)
    assert encoder.guard.calls == 2


def test_the_encoder_gives_what_is_sent_of_a_prediction_where_that_differs() -> None:
    class InTraining(Guard):
        def activation(self, z: Tensor) -> Tensor:
            return 0 * z

        def prediction(self, z: Tensor) -> Tensor:
            return 2 * z

    table = Table(guard=InTraining())
    view = table.view(Threat(queries=True))
    assert torch.equal(view.query(X), view.activations())
    assert view.query(X).any()


def test_what_is_no_encoder_is_no_grant() -> None:
    stage = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"expected an Encoder, got Sequential; pass Encoder\(stage, guard, codec\)"):
        Grants(stage)  # type: ignore[arg-type]


def test_a_query_has_no_gradient() -> None:
    view = Table().view(Threat(queries=True))
    assert not view.query(X.clone().requires_grad_()).requires_grad


# No wire, no view


def test_no_wire_no_view() -> None:
    with pytest.raises(LookupError, match="no wire, no view; put the party behind wire"):
        observe(threat=Threat())
    table = Table()
    with pytest.raises(LookupError, match=r"expected recorded wires, got Wire; pass wire\(party\).record"):
        observe(table.line, threat=Threat())


def test_a_transcript_with_holes_is_no_view() -> None:
    table = Table()
    line = wire(Learner("server", copy.deepcopy(table.server.stage)), max_nbytes=200)
    for _ in range(3):
        predict([table.client, line.party], X)
    with pytest.raises(LookupError, match=r"whole transcript, 2 exchanges were dropped; raise Recorded\(max_nbytes"):
        observe(table.line.record, line.record, threat=Threat())
    line.record.clear()
    assert observe(line.record, threat=Threat()).exchanges == ()


def test_releases_of_a_sample_are_averaged_and_so_is_what_a_query_brings() -> None:
    class Noise(Guard):
        def activation(self, z: Tensor) -> Tensor:
            return z + torch.randn_like(z)

    bottom, top = nn.Linear(3, 4), nn.Linear(4, 2)
    client = Learner("client", bottom, guard=Noise())
    across = wire(Learner("server", top))
    x = torch.rand(5, 3)
    for _ in range(400):
        across.party.predict(client.predict(x))
    grants = Grants(Encoder(bottom, Noise()))
    view = observe(across.record, threat=Threat(queries=True, releases=400), grants=grants)
    clean = bottom(x).detach()
    # The mean of 400 draws of unit noise has a standard deviation of 0.05: five of them over 20 entries.
    assert (view.activations() - clean).abs().max() < 0.25
    assert (view.query(x) - clean).abs().max() < 0.25
    once = observe(across.record, threat=Threat(queries=True), grants=grants)
    assert once.activations().shape == (2000, 4)
    assert (once.query(x) - clean).abs().max() > 0.25
    uneven = observe(across.record, threat=Threat(releases=7), grants=grants)
    with pytest.raises(LookupError, match="averages 7 releases of each sample, and 2000 activations crossed"):
        uneven.activations()
