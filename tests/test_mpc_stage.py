"""Stages on shares against torch's own: every layer forward and back, training, protocols, and what is refused."""

import copy
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path
from typing import Any

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
from splitlearn import (
    Batches,
    Framed,
    Learner,
    Member,
    RemoteMember,
    Service,
    concatenated,
    epochs_of,
    evaluate,
    fit,
    serve,
    u_shaped,
    vanilla,
    vertical,
)
from splitlearn.data import load, split
from splitlearn.features import Features
from splitlearn.federation import fedavg_round, splitfed_v2_round
from splitlearn.misfit import Refused

NEAR = 1e-4  # of zero: what is as near may have the other sign in fixed point, and a gradient that it has not in torch


def looked_at(layer: nn.Module) -> nn.Module:
    """Return the layer, which fails where a value is too near to zero; then the test has to take another seed."""

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert float(args[0].detach().abs().min()) > NEAR, "take another seed"

    layer.register_forward_pre_hook(look)
    return layer


def relu() -> nn.Module:
    return looked_at(nn.ReLU())


def leaky_relu(slope: float) -> nn.Module:
    return looked_at(nn.LeakyReLU(slope))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (4, 2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (4, 2, 7, 7)),
    "conv2d apart": (lambda: nn.Conv2d(2, 2, 3, groups=2, dilation=1), (4, 2, 5, 5)),
    "relu": (lambda: nn.Sequential(nn.Linear(6, 8), relu()), (5, 6)),
    "leaky relu": (lambda: nn.Sequential(nn.Linear(6, 8), leaky_relu(0.1)), (5, 6)),
    "max pool 1d": (lambda: nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.MaxPool1d(2)), (3, 1, 8)),
    "max pool 2d": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2)), (3, 1, 6, 6)),
    "mean pool": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2)), (3, 1, 6, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 4), (3, 2, 6)),
    "conv1d dilated": (lambda: nn.Conv1d(3, 4, 3, dilation=2, bias=False), (2, 3, 9)),
    "conv1d with a rest": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 10)),
    "conv1d apart": (lambda: nn.Conv1d(4, 4, 3, groups=4), (2, 4, 9)),
    "conv2d oblong": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 2, 6, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2, bias=False), (2, 2, 9, 8)),
    "conv2d of points": (lambda: nn.Conv2d(2, 3, 1, stride=2, padding=1), (2, 2, 5, 5)),
    "conv2d apart, two of each": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1, stride=2), (2, 3, 6, 6)),
    "relu alone": (relu, (5, 6)),
    "leaky relu without a slope": (lambda: leaky_relu(0.0), (5, 6)),
    "max pool 1d overlapping": (lambda: nn.MaxPool1d(3, stride=2), (2, 3, 10)),
    "max pool 2d overlapping": (lambda: nn.MaxPool2d(3, stride=2), (2, 2, 6, 7)),
    "max pool 2d oblong": (lambda: nn.MaxPool2d((2, 3), stride=(2, 1)), (2, 2, 5, 6)),
    "max pool 2d with gaps": (lambda: nn.MaxPool2d(2, stride=3), (2, 2, 7, 8)),
    "mean pool overlapping": (lambda: nn.AvgPool2d(3, stride=1), (2, 3, 6, 5)),
    "mean pool oblong": (lambda: nn.AvgPool2d((2, 3), stride=(1, 2)), (2, 3, 6, 8)),
    "flatten": (nn.Flatten, (2, 3, 4)),
    "identity": (nn.Identity, (5, 6)),
    "depthwise separable": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, groups=2, padding=1), nn.Conv1d(4, 3, 1), leaky_relu(0.2),
            nn.Sequential(nn.MaxPool1d(2), nn.Flatten()), nn.Linear(12, 3),
        ),
        (3, 2, 8),
    ),
    "several": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Identity()), relu(), nn.Flatten(), nn.Linear(32, 3)
        ),
        (4, 1, 6, 6),
    ),
}  # fmt: skip
# A product of n terms is off by about √n · 2^-17 a factor, and cut back by up to 2^-16.
CLOSE = 1e-3


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), relu(), nn.Linear(16, 3))


def data(rows: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 8), torch.randint(0, 3, (rows,))


SLOW = {"max pool 1d overlapping", "max pool 2d oblong", "max pool 2d with gaps", "depthwise separable"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYERS]
)
def test_a_layer_on_shares_is_the_layer_forward_back_and_after_steps(name: str, servers: Servers) -> None:
    make, shape = LAYERS[name]
    plain = make()
    stage = SharedStage(servers, plain, lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD([*plain.parameters(), torch.zeros(1)], 0.1, momentum=0.9)  # some have none
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


def test_steps_far_below_fixed_point_add_up(servers: Servers) -> None:
    torch.manual_seed(3)  # of those at which no value comes too near to zero; see looked_at
    plain = two_layers()
    start = copy.deepcopy(plain.state_dict())
    stage = SharedStage(servers, plain, lr=1e-5)  # steps of 10^-6 and less: 2^-16 is 15 of them
    optimizer = torch.optim.SGD(plain.parameters(), 1e-5)
    for _ in range(10):
        x, y = data()
        loss = cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        (g,) = torch.autograd.grad(cross_entropy(out := stage.forward(x), y), out)
        optimizer.step()
        stage.backward(g)
    for key, weight in stage.weights().items():
        moved = plain.state_dict()[key] - start[key]
        assert 0 < float(moved.abs().max()) < 2**-16
        # float32 itself rounds each of ten steps by 2^-26, which is 1 % of a weight's way
        assert float((weight - plain.state_dict()[key]).norm()) < 0.05 * float(moved.norm()), key


def test_a_prediction_of_anybody_leaves_the_open_step_as_it_is(servers: Servers) -> None:
    plain, (x, _) = two_layers(), data(6)
    stage = SharedStage(servers, plain, lr=0.1)
    client = stage.client("another")
    x.requires_grad_()
    out = stage.forward(x)
    assert float((client.predict(2 * x) - plain(2 * x)).detach().abs().max()) < CLOSE
    assert float((stage.predict(x) - out).detach().abs().max()) < CLOSE
    g = torch.randn_like(out)
    plain(x).backward(g)
    back = stage.backward(g)
    assert back is not None
    assert x.grad is not None
    assert float((back - x.grad).abs().max()) < CLOSE


def test_an_open_step_that_was_given_up_comes_no_more(servers: Servers) -> None:
    stage, (x, y) = SharedStage(servers, two_layers(), lr=0.1), data(4)
    g = torch.ones(4, 3)
    before = stage.weights()
    give_up: list[Callable[[], Any]] = [
        stage.abandon, lambda: stage.load_weights(before), lambda: stage.load_state_dict(stage.state_dict()),
    ]  # fmt: skip
    for call in give_up:
        stage.forward(x)
        call()
        with pytest.raises(ValueError, match="an open step"):
            stage.backward(g)
    assert all(float((w - before[key]).abs().max()) < 1e-6 for key, w in stage.weights().items())
    stage.learn(x, y)
    assert stage.steps == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 4000.0])
def test_a_gradient_past_the_range_is_refused_before_it_crosses_and_training_goes_on(
    bad: float, servers: Servers
) -> None:
    stage, (x, _) = SharedStage(servers, two_layers(), lr=0.1), data(4)
    stage.forward(x)
    before = [meter.total_nbytes for meter in stage.meters]
    with pytest.raises(Refused, match="gradients times the batch within ±8192"):
        stage.backward(torch.full((4, 3), bad))
    assert [meter.total_nbytes for meter in stage.meters] == before
    stage.forward(x)
    stage.backward(torch.zeros(4, 3))


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
    torch.manual_seed(1)  # of those at which no value comes too near to zero; see looked_at
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


def test_a_shared_top_may_come_first_and_keeps_nothing_where_no_gradient_comes(servers: Servers) -> None:
    plain = two_layers()
    top = SharedTop(servers, plain, lr=0.1)
    assert list(top.parameters()) == []
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(3):
        x, y = data(6)  # no gradient is asked of it; the servers step all the same
        with torch.no_grad():
            assert not top(x).requires_grad
        cross_entropy(top(x), y).backward()
        with torch.inference_mode():
            top(x)
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
        assert x.grad is None
    assert top.shared.steps == 3
    assert all(float((w - plain.state_dict()[key]).abs().max()) < CLOSE for key, w in top.shared.weights().items())


@pytest.mark.parametrize("protocol", ["mpc_2pc", "mpc_u_shaped"])
def test_a_protocol_on_shares_trains_as_its_plain_twin(protocol: str, servers: Servers) -> None:
    torch.manual_seed(2)  # of those at which no value comes too near to zero; see looked_at
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
    torch.manual_seed(1)  # of those at which no value comes too near to zero; see looked_at
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


class Fixed:
    """A member that answers with weights of its own."""

    def __init__(self, name: str, weights: dict[str, Tensor], count: int):
        self.name, self.weights, self.count = name, weights, count

    def round(self, weights: object) -> tuple[dict[str, Tensor], int]:
        return self.weights, self.count


@pytest.mark.parametrize("remote", [False, True], ids=["here", "across a wire"])
def test_a_round_of_secure_members_takes_the_mean_whatever_they_hold(remote: bool, servers: Servers) -> None:
    def made(place: int) -> dict[str, Tensor]:
        return {"w": 100 * torch.randn(3, 2), "b": torch.randn(()).double(), "n": torch.tensor(place)}

    members: list[Any] = [Fixed(f"m{place}", made(place), count) for place, count in enumerate((0, 7, 50_000))]
    secure: list[Any] = [SecureMember(one, servers) for one in members]
    if remote:
        secure = [RemoteMember(one.name, Framed(serve(Service({one.name: one}))), one.name) for one in secure]

    class Kept:
        def __init__(self) -> None:
            self.own = {name: torch.zeros_like(one) for name, one in members[0].weights.items()}

        def weights(self) -> dict[str, Tensor]:
            return self.own

        def load_weights(self, weights: dict[str, Tensor]) -> None:
            self.own = weights

    plain, far = Kept(), Kept()
    told = fedavg_round(members, plain)  # type: ignore[arg-type]
    assert fedavg_round(secure, far, aggregate=SecureMean(servers)) == told  # type: ignore[arg-type]
    assert far.own.keys() == plain.own.keys()
    assert int(far.own["n"]) == 1  # of the first member with samples
    for name, one in plain.own.items():
        assert far.own[name].dtype is one.dtype
        # 2^-24 a sample; and float32 rounds values of some hundred by 2^-16
        assert torch.allclose(far.own[name].double(), one.double(), rtol=1e-6, atol=1e-5), name


def test_a_contribution_past_the_range_or_of_another_model_is_refused(servers: Servers) -> None:
    for bad in (float("nan"), 1e6):
        with pytest.raises(Refused, match=r"'w' times the samples within ±1.07374e\+09"):
            SecureMember(Fixed("m", {"w": torch.tensor([0.0, bad])}, 2000), servers).round({})
    given = [SecureMember(Fixed("m", {"w": torch.zeros(n)}, 1), servers).round({})[0] for n in (2, 3)]
    with pytest.raises(ValueError, match="the same entries of the same shapes from every member"):
        SecureMean(servers)(given, [1, 1], {"w": torch.zeros(2)})


def test_one_ticket_twice_is_one_contribution(servers: Servers) -> None:
    given = SecureMember(Fixed("m", {"w": torch.ones(2)}, 1), servers).round({})[0]
    with pytest.raises(ValueError, match="at least 2 contributions, whose sum tells of none, got 1"):
        SecureMean(servers)([given, given], [1, 1], {"w": torch.zeros(2)})
    alone = Learner("fed", nn.Linear(2, 2))
    weights = alone.weights()
    with pytest.raises(ValueError, match="at least 2 contributions"):
        fedavg_round([SecureMember(Fixed("m", weights, 4), servers)], alone, aggregate=SecureMean(servers))
    assert torch.equal(alone.weights()["weight"], weights["weight"])


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
    top, bottom = nn.Linear(8, 3), nn.Linear(8, 8)  # no ReLU, which may fall either way in fixed point
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


def test_a_state_holds_all_that_the_next_step_depends_on(servers: Servers) -> None:
    def opened() -> SharedStage:  # without ReLU, which may fall either way in fixed point
        return SharedStage(servers, nn.Linear(8, 3), lr=0.1, momentum=0.9)

    def step(stages: list[SharedStage]) -> None:
        x, g = torch.randn(8, 8), torch.randn(8, 3) / 8
        for stage in stages:
            stage.forward(x)
            stage.backward(g)

    stage, other, without = opened(), opened(), opened()
    step([stage])
    step([stage])
    state = stage.state_dict()
    assert state["stage"].keys() == state["momentum"].keys() == {"weight", "bias"}
    other.load_state_dict(state)
    without.load_weights(state["stage"])
    step([stage, other, without])
    step([stage, other, without])
    assert (stage.steps, other.steps) == (4, 4)
    assert all(float((w - other.weights()[key]).abs().max()) < CLOSE for key, w in stage.weights().items())
    # without momentum it is another training
    assert any(float((w - without.weights()[key]).abs().max()) > 10 * CLOSE for key, w in stage.weights().items())


@pytest.mark.parametrize(
    ("protocol", "far"), [("mpc_u_shaped", 0.02), pytest.param("mpc_2pc", 0.1, marks=pytest.mark.slow)]
)
def test_digits_are_learned_as_in_the_clear(protocol: str, far: float, servers: Servers) -> None:
    parts = split(load("digits"), private=96, auxiliary=600, test=397, seed=0)
    torch.manual_seed(0)
    bottom = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
    top, head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)), nn.Sequential(nn.Identity())

    def sgd(stage: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(stage.parameters(), 0.3, momentum=0.9)

    losses, scores = [], []
    for shared in (True, False):
        own = copy.deepcopy(bottom)
        client = Learner("client", own, sgd(own))
        server: Any = SharedStage(servers, top, lr=0.3, momentum=0.9) if shared else Learner("server", top, sgd(top))
        batches = Batches(parts.private.x, parts.private.y, batch_size=32, seed=1)

        def step(x: Tensor, y: Tensor, client: Learner = client, server: Any = server) -> float:
            if protocol == "mpc_2pc":
                return float(mpc_2pc(client, server, x, y))
            return float(mpc_u_shaped(client, server, Learner("head", head), x, y))

        losses.append([step(x, y) for _ in range(2) for x, y in batches])
        scores.append(evaluate([client, server], parts.test.x[:100], parts.test.y[:100])["accuracy"])
    assert len(losses[0]) == 6
    assert losses[1][-1] < losses[1][0] - 0.1  # it does learn
    assert max(abs(own - right) for own, right in zip(*losses, strict=True)) < far
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


def test_values_past_the_range_never_cross(servers: Servers) -> None:
    stage = SharedStage(servers, two_layers(), lr=0.1)
    before = [meter.total_nbytes for meter in stage.meters]
    for bad in (1e5, float("nan")):
        with pytest.raises(Refused, match="activations within ±8192"):
            stage.predict(torch.full((2, 8), bad))
        with pytest.raises(Refused, match="activations within ±8192"):
            stage.forward(torch.full((2, 8), bad))
        with pytest.raises(Refused, match="activations within ±8192"):
            stage.learn(torch.full((2, 8), bad), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        stage.learn(torch.zeros(2, 8), torch.tensor([0, 3]))
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


def test_the_closed_form_of_what_a_product_opens(servers: Servers) -> None:
    pickled = set()
    for batch, features, outputs in [(64, 256, 10), (1, 3, 2), (24, 100, 64)]:
        stage, x = SharedStage(servers, nn.Linear(features, outputs)), torch.randn(batch, features)
        stage.predict(x)
        servers.count_anew()
        stage.predict(x)
        costs = servers.costs()
        opened = 8 * (batch * features + features * outputs)  # masked inputs and weights: each server sends its half
        dealt = 8 * batch * outputs  # what a seed does not give: server 0's share of the masks' product
        assert costs.parties["server 1"]["nbytes"] == 2 * opened
        assert costs.parties["server 0"]["nbytes"] == 2 * opened + costs.parties["dealer"]["nbytes"]
        assert costs.nbytes == costs.parties["server 0"]["nbytes"]
        pickled.add(costs.nbytes - 2 * opened - dealt)
        assert (costs.rounds, set(costs.seconds)) == (4, {"linear"})
        if costs.socket_nbytes is not None and opened > 50_000:
            assert costs.socket_nbytes == pytest.approx(costs.nbytes, rel=0.05)  # gloo's headers, 3 kB
    (request,) = pickled  # as Python has its size, whatever the layer's
    assert 0 < request < 512


def test_a_message_up_is_eight_bytes_an_element_for_one_server_and_a_seed_for_the_other(servers: Servers) -> None:
    stage, (x, y) = SharedStage(servers, two_layers(), lr=0.1), data(6)
    asked: list[tuple[Callable[[], Any], int, int]] = [
        (lambda: stage.predict(x), 6 * 8, 1), (lambda: stage.learn(x, y), 6 * 8 + 6 * 3, 2),
        (lambda: stage.forward(x), 6 * 8, 1), (lambda: stage.backward(torch.zeros(6, 3)), 6 * 3, 1),
    ]  # fmt: skip
    for ask, elements, tensors in asked:
        for meter in stage.meters:
            meter.clear()
        ask()
        first, second = (meter.nbytes["up"] for meter in stage.meters)
        assert (first["share"], second["share"]) == (8 * elements, 0)
        assert (first["seed"], second["seed"]) == (0, 32)
        assert (first["count"], second["count"]) == (0, 8 * 2 * tensors)  # two sizes each


# What nobody may end the servers with


@pytest.fixture(scope="module")
def spare() -> Iterator[Callable[[], Servers]]:
    """Servers of this module's own, started anew where a test has ended them."""
    started: list[Servers] = []

    def running() -> Servers:
        if not started or started[-1]._why_closed:
            started.append(Servers(timeout=60))
        return started[-1]

    yield running
    for one in started:
        one.close()


def convolved() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def returned(servers: Servers, g: Tensor) -> None:
    stage = SharedStage(servers, two_layers(), lr=0.1)
    stage.forward(torch.randn(4, 8, requires_grad=True))
    stage.backward(g)


def joint(servers: Servers, one: Tensor, other: Tensor, rows: int = 4) -> None:
    stage = SharedStage(servers, two_layers(), lr=0.1)
    sessions = [stage.client(name) for name in "ab"]
    sessions[0].offer(one)
    sessions[1].offer(other)
    stage.learn_joined(sessions, torch.zeros(rows, dtype=torch.int64))


def resumed(servers: Servers, momentum: dict[str, Tensor]) -> None:
    stage = SharedStage(servers, two_layers(), lr=0.1, momentum=0.9)
    stage.load_state_dict({"stage": stage.weights(), "momentum": momentum, "steps": 1})
    stage.learn(*data(4))


def labelled(servers: Servers, y: Tensor) -> None:
    SharedStage(servers, two_layers(), lr=0.1).learn(torch.zeros(4, 8), y)


MISFITS: dict[str, Callable[[Servers], Any]] = {
    "a gradient of another width": lambda servers: returned(servers, torch.zeros(4, 5)),
    "a gradient of fewer rows": lambda servers: returned(servers, torch.zeros(3, 3)),
    "a gradient of one row": lambda servers: returned(servers, torch.zeros(1, 3)),
    "a gradient of one number": lambda servers: returned(servers, torch.zeros(())),
    "clients of other rows": lambda servers: joint(servers, torch.zeros(4, 4), torch.zeros(3, 4)),
    "clients of other dimensions": lambda servers: joint(servers, torch.zeros(4, 4), torch.zeros(4, 1, 4)),
    "clients of single numbers": lambda servers: joint(servers, torch.zeros(()), torch.zeros(())),
    "clients of another width": lambda servers: joint(servers, torch.zeros(4, 4), torch.zeros(4, 5)),
    "fewer labels than clients have rows": lambda servers: joint(servers, torch.zeros(4, 4), torch.zeros(4, 4), 3),
    "no sample to predict": lambda servers: SharedStage(servers, two_layers()).predict(torch.zeros(0, 8)),
    "no image to predict": lambda servers: SharedStage(servers, convolved()).predict(torch.zeros(0, 1, 4, 4)),
    "no sample to pool": lambda servers: SharedStage(servers, nn.MaxPool2d(2)).predict(torch.zeros(0, 1, 4, 4)),
    "no sample to go forward": lambda servers: SharedStage(servers, two_layers()).forward(torch.zeros(0, 8)),
    "a single number": lambda servers: SharedStage(servers, nn.Identity()).forward(torch.zeros(())),
    "an image too small": lambda servers: SharedStage(servers, convolved()).predict(torch.zeros(2, 1, 2, 2)),
    "a table for an image": lambda servers: SharedStage(servers, convolved()).predict(torch.zeros(2, 16)),
    "momentum of another shape": lambda servers: resumed(servers, {"0.weight": torch.zeros(2, 2)}),
    "momentum of no weight": lambda servers: resumed(servers, {"nonsense": torch.zeros(2, 2)}),
    "fewer labels than rows": lambda servers: labelled(servers, torch.zeros(3, dtype=torch.int64)),
    "labels in a column": lambda servers: labelled(servers, torch.zeros(4, 1, dtype=torch.int64)),
    "negative labels": lambda servers: labelled(servers, torch.full((4,), -100)),
    "labels of int32": lambda servers: labelled(servers, torch.zeros(4, dtype=torch.int32)),
    "labels of truths": lambda servers: labelled(servers, torch.zeros(4, dtype=torch.bool)),
    "a loss of outputs that are maps": lambda servers: SharedStage(servers, nn.Conv2d(1, 3, 3)).learn(
        torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    ),
    "a loss without a layer that has classes": lambda servers: SharedStage(servers, nn.ReLU()).learn(*data(4)),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_a_value_error_and_ends_nobody(what: str, spare: Callable[[], Servers]) -> None:
    servers = spare()
    stage, (x, _) = SharedStage(servers, two_layers()), data(2)
    before = stage.predict(x)
    with pytest.raises(ValueError, match=r"expected|does not fit"):
        MISFITS[what](servers)
    assert torch.allclose(stage.predict(x), before, atol=CLOSE)


def test_one_sample_without_a_batch_is_pooled_as_torch_does_it(spare: Callable[[], Servers]) -> None:
    for pool, shape in [(nn.MaxPool1d(2), (3, 8)), (nn.MaxPool2d(2), (3, 4, 4)), (nn.AvgPool2d(2), (3, 4, 4))]:
        x = torch.randn(shape)
        assert float((SharedStage(spare(), pool).predict(x) - pool(x)).abs().max()) < CLOSE


def test_a_step_that_learn_has_given_up_does_not_come_back_as_another(spare: Callable[[], Servers]) -> None:
    stage, (x, y) = SharedStage(spare(), two_layers(), lr=0.1), data(4)
    before = stage.weights()
    stage.forward(x)
    with pytest.raises(ValueError, match="label"):
        stage.learn(2 * x, y[:3])
    with pytest.raises(ValueError, match="an open step"):
        stage.backward(torch.ones(4, 3))  # of x; the servers hold 2·x
    assert all(torch.equal(w, before[key]) for key, w in stage.weights().items())


def test_a_layer_that_stands_twice_is_applied_twice(servers: Servers) -> None:
    relu = nn.ReLU()
    plain, (x, _) = nn.Sequential(nn.Linear(8, 6), relu, nn.Linear(6, 4), relu), data(6)
    assert float((SharedStage(servers, plain).predict(x) - plain(x)).detach().abs().max()) < CLOSE


# Where CrypTen's approximations end


@pytest.mark.parametrize("spread", [10.0, 300.0, 600.0, 4000.0])
def test_a_loss_on_shares_holds_however_far_logits_are_apart(spread: float, servers: Servers) -> None:
    plain = nn.Linear(3, 3)
    with torch.no_grad():
        plain.weight.copy_(torch.eye(3))
        plain.bias.zero_()
    stage = SharedStage(servers, plain, lr=1e-4, loss_to="nobody")
    x, y = torch.tensor([[spread, 0.0, 1.0], [0.0, spread, -spread]]), torch.tensor([0, 2])
    _, g = stage.learn(x.requires_grad_(), y)
    logits = plain(x)
    cross_entropy(logits, y).backward()
    assert g is not None
    assert x.grad is not None
    assert float((g - x.grad).abs().max()) < 0.02
    for key, weight in stage.weights().items():
        gradient = plain.get_parameter(key).grad
        assert gradient is not None
        moved = plain.state_dict()[key] - weight
        assert float((moved - 1e-4 * gradient).abs().max()) < 1e-4 * (0.02 * spread + 0.1), key


def test_more_classes_than_the_reciprocal_holds_for_are_refused(servers: Servers) -> None:
    stage = SharedStage(servers, nn.Linear(2, 1001), lr=0.1)
    with pytest.raises(ValueError, match=r"at most 1000 classes.*got 1001; keep the loss with the client"):
        stage.learn(torch.rand(2, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize("classes", [2, 10, 249, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_loss_on_shares_holds_for_many_classes(classes: int, servers: Servers) -> None:
    top = nn.Linear(2, classes)
    nn.init.zeros_(top.weight)
    nn.init.zeros_(top.bias)
    stage = SharedStage(servers, top, lr=1.0)
    for step in range(3):
        loss, _ = stage.learn(torch.rand(2, 2), torch.tensor([0, 1]))
        assert step or float(loss) == pytest.approx(log(classes), rel=0.05)
    bias = stage.weights()["bias"]
    assert float(bias[:2].sum()) > 0.9 if classes > 2 else abs(float(bias[0])) < 0.1
    assert float(bias.sum()) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("kernel", [3, 7, 28])
def test_the_mean_of_a_window_is_exact_in_training_too(kernel: int, servers: Servers) -> None:
    stage = SharedStage(servers, nn.Sequential(nn.AvgPool2d(kernel)))
    x = torch.ones(1, 1, kernel, kernel).requires_grad_()
    assert stage.forward(x).item() == pytest.approx(1, abs=1e-4)
    g = stage.backward(torch.full((1, 1, 1, 1), 100.0))
    assert g is not None
    assert float(g.sum()) == pytest.approx(100, rel=1e-2)


def test_a_refused_step_leaves_no_other_in_its_place(servers: Servers) -> None:
    stage = SharedStage(servers, nn.Linear(4, 3), lr=0.1)
    client = stage.client("one")
    x = torch.rand(2, 4)
    stage.forward(torch.rand(2, 4))
    client.offer(x)
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        stage.learn_joined([client], torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="open step"):
        stage.backward(torch.ones(2, 3))
    client.offer(x)
    stage.learn_joined([client], torch.tensor([0, 1]))
    client.offer(x)
    with pytest.raises(ValueError, match="one label a sample"):
        stage.learn_joined([client], torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="joint step"):
        client.collect(x)


def test_a_joint_step_of_one_sample_is_refused(servers: Servers) -> None:
    stage = SharedStage(servers, nn.Linear(4, 3), lr=0.1)
    client = stage.client("alone")
    client.offer(torch.rand(1, 4))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        stage.learn_joined([client], torch.tensor([0]))


def test_a_session_takes_nobodys_name(servers: Servers) -> None:
    stage = SharedStage(servers, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a session of a new name"):
        servers.desk("admit", {"session": stage.session, "stage": stage.session})


# In a model of torch's


def test_a_model_saves_and_loads_the_top_that_is_on_shares(servers: Servers, tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 8), SharedTop(servers, two_layers(), lr=0.1, momentum=0.9))

    first, second, x = model(), model(), torch.rand(3, 4)
    first(x).sum().backward()
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second.load_state_dict(torch.load(tmp_path / "model.pt"))
    with torch.no_grad():
        torch.testing.assert_close(second(x), first(x), atol=1e-3, rtol=0)
    with pytest.raises(TypeError, match="expected servers to stay in this process"):
        copy.deepcopy(first)


def test_what_is_no_setting_or_no_state_is_one_line(servers: Servers) -> None:
    stage = SharedStage(servers, nn.Linear(2, 2))
    for call, told in [
        (lambda: SharedTop("x", nn.Linear(2, 2)), "Servers\\(\\) to hold the stage"),  # type: ignore[arg-type]
        (lambda: SharedStage(servers, nn.Linear(2, 2), lr="0.1"), "lr from 0.*'0.1'"),  # type: ignore[arg-type]
        (lambda: stage.predict([[1.0, 2.0]]), "as a tensor, got list"),  # type: ignore[arg-type]
        (lambda: stage.predict(torch.full((1, 2), float("nan"))), "look for what has diverged"),
        (lambda: stage.load_state_dict(stage.weights()), "for weights alone there is load_weights"),
        (lambda: SharedStage(servers, nn.Sequential(nn.BatchNorm1d(3))), "got BatchNorm1d at 0; leave it below"),
    ]:
        with pytest.raises(ValueError, match=told) as error:
            call()
        assert "\n" not in str(error.value)
