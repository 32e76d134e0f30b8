"""Stages on shares against torch's own: every layer forward and back, training, protocols, and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from privacy.mpc import (
    JoinedOnShares,
    SecureMean,
    SecureMember,
    Servers,
    SharedStage,
    SharedTop,
    mpc_2pc,
    mpc_inference,
    mpc_u_shaped,
    mpc_vertical,
)
from splitlearn import Batches, Learner, Member, concatenated, epochs_of, evaluate, fit, u_shaped, vanilla, vertical
from splitlearn.features import Features
from splitlearn.federation import splitfed_v2_round
from splitlearn.misfit import Refused

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (4, 2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (4, 2, 7, 7)),
    "conv2d apart": (lambda: nn.Conv2d(2, 2, 3, groups=2, dilation=1), (4, 2, 5, 5)),
    "relu": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()), (5, 6)),
    "leaky relu": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.1)), (5, 6)),
    "max pool 1d": (lambda: nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.MaxPool1d(2)), (3, 1, 8)),
    "max pool 2d": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2)), (3, 1, 6, 6)),
    "mean pool": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2)), (3, 1, 6, 6)),
    "several": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Identity()), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
        ),
        (4, 1, 6, 6),
    ),
}  # fmt: skip
# A product of n terms is off by about √n · 2^-17 a factor, and cut back by up to 2^-16.
CLOSE = 1e-3


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def data(rows: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 8), torch.randint(0, 3, (rows,))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_shares_is_the_layer_forward_back_and_after_steps(name: str, servers: Servers) -> None:
    make, shape = LAYERS[name]
    plain = make()
    stage = SharedStage(servers, plain, lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        x = torch.randn(shape, requires_grad=True)
        assert float((stage.predict(x) - plain(x)).detach().abs().max()) < CLOSE
        out = plain(x)
        assert float((stage.forward(x.detach().requires_grad_()) - out).detach().abs().max()) < CLOSE
        g = torch.randn_like(out) / len(x)
        optimizer.zero_grad()
        out.backward(g)
        optimizer.step()
        back = stage.backward(g)
        assert back is not None
        assert x.grad is not None
        assert float((back - x.grad).abs().max()) < CLOSE
    for key, weight in stage.weights().items():
        assert float((weight - plain.state_dict()[key]).abs().max()) < CLOSE, key


def test_a_wide_linear_layer_is_within_a_thousandth_of_float64(servers: Servers) -> None:
    layer = nn.Linear(256, 10).double()
    stage = SharedStage(servers, layer)
    x = torch.randn(64, 256, dtype=torch.float64)
    assert float((stage.predict(x) - layer(x)).detach().abs().max()) <= 1e-3


@pytest.mark.parametrize("loss_to", ["client", "nobody"])
def test_a_loss_on_shares_is_cross_entropy(loss_to: str, servers: Servers) -> None:
    plain = two_layers()
    stage = SharedStage(servers, plain, lr=0.2, loss_to=loss_to)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(plain.parameters(), 0.2)
    for _ in range(2):
        x, y = data()
        x.requires_grad_()
        loss, g = stage.learn(x.detach().requires_grad_(), y)
        right = cross_entropy(plain(x), y)
        optimizer.zero_grad()
        right.backward()
        optimizer.step()
        assert g is not None
        assert x.grad is not None
        assert float((g - x.grad).abs().max()) < CLOSE
        assert (abs(float((loss - right).detach())) < 0.05) if loss_to == "client" else bool(loss.isnan())
    assert all(float((w - plain.state_dict()[key]).abs().max()) < CLOSE for key, w in stage.weights().items())


def test_a_frozen_stage_stays_and_an_input_without_gradient_gets_none(servers: Servers) -> None:
    plain = two_layers()
    stage = SharedStage(servers, plain)
    x, y = data()
    assert stage.learn(x, y)[1] is None
    assert all(float((w - plain.state_dict()[key]).abs().max()) < 1e-6 for key, w in stage.weights().items())


def test_a_shared_top_trains_in_a_plain_loop(servers: Servers) -> None:
    bottom, top = nn.Linear(8, 8), two_layers()
    plain = copy.deepcopy(nn.Sequential(bottom, top))
    shared = SharedTop(servers, top, lr=0.1, momentum=0.9)
    model = nn.Sequential(bottom, shared)
    own = torch.optim.Adam(bottom.parameters(), 0.01)
    theirs = [torch.optim.Adam(plain[0].parameters(), 0.01), torch.optim.SGD(plain[1].parameters(), 0.1, momentum=0.9)]
    for _ in range(4):
        x, y = data()
        loss, right = cross_entropy(model(x), y), cross_entropy(plain(x), y)
        assert abs(float((loss - right).detach())) < 1e-3
        for optimizer in (own, *theirs):
            optimizer.zero_grad()
        loss.backward()
        right.backward()
        for optimizer in (own, *theirs):
            optimizer.step()
    with torch.no_grad():
        assert float((model(x) - plain(x)).abs().max()) < 5e-3
    first, _ = shared(bottom(x)), shared(bottom(x))
    with pytest.raises(Refused, match="before the next batch"):
        first.sum().backward()


@pytest.mark.parametrize("protocol", ["mpc_2pc", "mpc_u_shaped"])
def test_a_protocol_on_shares_trains_as_its_plain_twin(protocol: str, servers: Servers) -> None:
    bottom, top, head = nn.Linear(8, 8), two_layers(), Learner("head", nn.Sequential(nn.Identity()))
    stage = SharedStage(servers, top, lr=0.1)
    client = Learner("client", copy.deepcopy(bottom), None)
    client.optimizer = torch.optim.SGD(client.stage.parameters(), 0.1)
    twin = Learner("client", bottom, torch.optim.SGD(bottom.parameters(), 0.1))
    server = Learner("server", top, torch.optim.SGD(top.parameters(), 0.1))
    for _ in range(4):
        x, y = data()
        if protocol == "mpc_2pc":
            loss, right, far = mpc_2pc(client, stage, x, y), vanilla(twin, server, x, y), 0.05
        else:
            loss, right, far = mpc_u_shaped(client, stage, head, x, y), u_shaped(twin, server, head, x, y), 1e-3
        assert abs(float((loss - right).detach())) < far
    assert all(float((w - twin.weights()[key]).abs().max()) < CLOSE for key, w in client.weights().items())
    answer = mpc_inference(client, stage.client("patient"), x)
    assert float((answer - server.predict(twin.predict(x))).abs().max()) < 5e-3


def test_vertical_clients_on_shares_train_as_vertical_ones(servers: Servers) -> None:
    x, y = data(30)
    bottoms, top = [nn.Linear(4, 4), nn.Linear(4, 4)], two_layers()

    def holders(stages: list[nn.Linear]) -> list[Features]:
        return [
            Features(Learner(f"c{n}", one, torch.optim.SGD(one.parameters(), 0.1)), x[:, 4 * n : 4 * n + 4])
            for n, one in enumerate(stages)
        ]

    clients, twins = holders(copy.deepcopy(bottoms)), holders(bottoms)
    stage = SharedStage(servers, top, lr=0.1)
    sessions = [stage.client(one.name) for one in clients]
    owner = Learner("owner", top, torch.optim.SGD(top.parameters(), 0.1))
    for _ in range(3):
        ids = torch.randperm(30)[:12]
        loss = mpc_vertical(stage, sessions, clients, ids, y[ids])
        assert abs(float(loss - vertical(owner, twins, ids, y[ids], join=concatenated))) < 0.05
    for own, other in zip(clients, twins, strict=True):
        assert all(float((w - other.weights()[key]).abs().max()) < CLOSE for key, w in own.weights().items())
    together = evaluate([JoinedOnShares(stage, sessions, clients)], torch.arange(30), y)
    assert 0 <= together["accuracy"] <= 1
    with pytest.raises(ValueError, match="offer them first"):
        stage.learn_joined(sessions, y)
    with pytest.raises(ValueError, match="a joint step"):
        sessions[0].collect(x)


def test_a_secure_mean_is_the_mean_and_each_contribution_counts_once(servers: Servers) -> None:
    x, y = data(36)
    start, top = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3)

    def one_round(secure: bool) -> Learner:
        bottom, own = Learner("fed", copy.deepcopy(start)), copy.deepcopy(top)
        main = Learner("main", own, torch.optim.SGD(own.parameters(), 0.1))
        members = []
        for n in range(3):
            stage = copy.deepcopy(start)
            client = Learner(f"c{n}", stage, torch.optim.SGD(stage.parameters(), 0.1))
            rows = slice(0, 8 + 4 * n)
            members.append(Member(client, main.session(client.name), Batches(x[rows], y[rows], batch_size=4, seed=n)))
        if secure:
            splitfed_v2_round([SecureMember(one, servers) for one in members], bottom, aggregate=SecureMean(servers))
        else:
            splitfed_v2_round(members, bottom)
        return bottom

    plain, secure = one_round(False).weights(), one_round(True).weights()
    assert plain.keys() == secure.keys()
    for key, weight in plain.items():
        assert weight.dtype == secure[key].dtype
        assert float((weight - secure[key]).abs().max()) < 1e-5, key


def test_a_sum_tells_of_no_single_member(servers: Servers) -> None:
    members = [SecureMember(Given(f"m{n}"), servers) for n in range(3)]
    given = [one.round({})[0] for one in members]
    aggregate, start = SecureMean(servers), {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match="at least 2 contributions"):
        aggregate(given[:1], [1], start)
    assert aggregate(given[:2], [1, 1], start)["w"].tolist() == [1.5, 1.5]
    with pytest.raises(ValueError, match="each counts once"):
        aggregate(given, [1, 1, 1], start)


class Given:
    """A member that always answers with the same weights."""

    def __init__(self, name: str) -> None:
        self.name = name

    def round(self, weights: object) -> tuple[dict[str, Tensor], int]:
        return {"w": torch.full((2,), 1.5)}, 1


def test_a_state_goes_on_as_if_nothing_had_been(servers: Servers, tmp_path: Path) -> None:
    top, bottom = two_layers(), nn.Linear(8, 8)
    x, y = data(32)

    def trained(epochs: list[int], folder: Path) -> dict[str, Tensor]:
        for until in epochs:  # each in parties of its own
            stage = SharedStage(servers, copy.deepcopy(top), lr=0.1, momentum=0.9)
            own = copy.deepcopy(bottom)
            client = Learner("client", own, torch.optim.SGD(own.parameters(), 0.1))
            batches = Batches(x, y, batch_size=16)
            head = Learner("head", nn.Sequential(nn.Identity()))
            state = {"client": client, "stage": stage, "batches": batches}

            def step(
                x: Tensor, y: Tensor, parties: tuple[Learner, SharedStage, Learner] = (client, stage, head)
            ) -> Tensor:
                return mpc_u_shaped(*parties, x, y)

            fit(epochs_of(step, batches), epochs=until, state=state, checkpoint=folder / "state")
        return stage.weights()

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    whole, resumed = trained([3], tmp_path / "one"), trained([1, 3], tmp_path / "two")
    assert all(float((w - resumed[key]).abs().max()) < CLOSE for key, w in whole.items())


def test_values_past_the_range_never_cross(servers: Servers) -> None:
    stage = SharedStage(servers, two_layers(), lr=0.1)
    before = [meter.total_nbytes for meter in stage.meters]
    for bad in (1e5, float("nan")):
        with pytest.raises(Refused, match="activations within ±8192"):
            stage.predict(torch.full((2, 8), bad))
    assert [meter.total_nbytes for meter in stage.meters] == before
    huge = nn.Linear(2, 2)
    nn.init.constant_(huge.weight, 1e6)
    with pytest.raises(Refused, match="weights of weight within ±8192"):
        SharedStage(servers, huge)


def test_training_that_explodes_ends_in_a_clear_error(servers: Servers) -> None:
    shared, other = SharedTop(servers, two_layers(), lr=500.0, momentum=0.9), SharedStage(servers, nn.Linear(2, 2))
    x, y = 100 * torch.randn(24, 8), torch.randint(0, 3, (24,))

    def train() -> None:
        for _ in range(50):
            cross_entropy(shared(x.requires_grad_()), y).backward()

    with pytest.raises(Refused, match="within ±"):
        train()
    assert other.predict(torch.rand(1, 2)).shape == (1, 2)


def test_what_does_not_fit_is_one_line_and_the_servers_live_on(servers: Servers) -> None:
    stage = SharedStage(servers, two_layers(), lr=0.1)
    x, y = data()
    for call, told in [
        (lambda: stage.predict(torch.rand(2, 5)), "does not fit an input of shape"),
        (lambda: stage.learn(x, y + 3), "labels from 0 to 2.*3 to 5"),
        (lambda: stage.learn(x, y.float()), "labels from 0 to 2"),
        (lambda: stage.learn(x[:0], y[:0]), "at least one sample"),
        (lambda: stage.backward(x), "call forward\\(x\\) first"),
        (lambda: stage.predict(y), "floating-point activations"),
        (lambda: stage.label(y), "a party in this process"),
        (lambda: SharedStage(servers, nn.Linear(2, 2), lr=-1), "lr from 0"),
        (lambda: SharedStage(servers, nn.Linear(2, 2), loss_to="all"), "client or nobody"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(ValueError, match=told):
            call()
    assert stage.predict(x).shape == (24, 3)


def test_bytes_and_rounds_of_a_product_are_what_the_protocol_says(servers: Servers) -> None:
    batch, features, outputs = 16, 32, 4
    stage = SharedStage(servers, nn.Linear(features, outputs))
    x = torch.randn(batch, features)
    stage.predict(x)
    for meter in stage.meters:
        meter.clear()
    servers.count_anew()
    stage.predict(x)
    costs = servers.costs()
    assert stage.meters[0].nbytes["up"]["share"] == 8 * batch * features
    assert stage.meters[1].nbytes["up"]["seed"] == 32
    assert [meter.nbytes["down"]["share"] for meter in stage.meters] == [8 * batch * outputs] * 2
    opened = 2 * 8 * (batch * features + features * outputs)  # both factors, masked, sent and received
    assert costs.parties["server 1"]["nbytes"] == opened
    assert costs.parties["server 0"]["nbytes"] - opened == pytest.approx(8 * batch * outputs, abs=400)  # and pickles
    assert costs.rounds == 4  # a request, two answers, one opening
    if costs.socket_nbytes is not None:
        assert costs.socket_nbytes == pytest.approx(costs.nbytes, rel=0.5)  # headers count at this size
