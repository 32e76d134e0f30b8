"""Split training without protection is unsplit training: to the bit where theory says so, else as it says."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from splitlearn import (
    Features,
    Framed,
    Learner,
    Member,
    RemoteMember,
    Service,
    apart_round,
    cut,
    fedavg_round,
    in_turn_round,
    mean,
    parallel,
    serve,
    splitfed_v1_round,
    splitfed_v2_round,
    splitfed_v3_round,
    summed,
    u_shaped,
    vanilla,
    vertical,
    wire,
)
from splitlearn.models import digits_cnn, resnet18

Optim = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optim] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}
CUTS = range(1, 11)  # every boundary of the digits CNN


def digits_model() -> nn.Sequential:
    torch.manual_seed(0)
    return digits_cnn().double()


def batches(steps: int = 4, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(size, 1, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(steps)
    ]


def learner(name: str, stage: nn.Module, optim: Optim, seed: int = 0) -> Learner:
    parameters = list(stage.parameters())
    return Learner(name, stage, optim(parameters) if parameters else None, seed=seed)


def unsplit(model: nn.Sequential, optim: Optim, data: list[tuple[Tensor, Tensor]]) -> nn.Sequential:
    """The plain training loop, without this toolkit."""
    optimizer = optim(list(model.parameters()))
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    for (name, left), (other, right) in pairs:
        assert name == other
        assert torch.equal(left, right), f"{name} differs by {(left - right).abs().max()}"


@pytest.mark.parametrize("framed", [False, True], ids=["local", "framed"])
@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("at", CUTS)
def test_vanilla_equals_unsplit_at_every_cut(at: int, optim: Optim, framed: bool) -> None:
    expected = unsplit(digits_model(), optim, batches())
    model = digits_model()
    bottom, top = cut(model, at)
    client, server = learner("client", bottom, optim), learner("server", top, optim)
    seen = wire(server).party if framed else server
    for x, y in batches():
        vanilla(client, seen, x, y)
    assert_same(model, expected)


@pytest.mark.parametrize("framed", [False, True], ids=["local", "framed"])
@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("at", [(low, high) for low in CUTS for high in CUTS if low < high][::3])
def test_u_shaped_equals_unsplit_at_every_cut(at: tuple[int, int], optim: Optim, framed: bool) -> None:
    expected = unsplit(digits_model(), optim, batches(2))
    model = digits_model()
    bottom, middle, head = (learner(n, s, optim) for n, s in zip("bmh", cut(model, *at), strict=True))
    seen = wire(middle).party if framed else middle
    for x, y in batches(2):
        u_shaped(bottom, seen, head, x, y)
    assert_same(model, expected)


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_batch_norm_and_residual_blocks_keep_parity(optim: Optim) -> None:
    data = [(torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (4,))) for _ in range(2)]
    torch.manual_seed(0)
    model = resnet18().double()
    twin = copy.deepcopy(model)
    expected = unsplit(twin, optim, data)
    bottom, top = cut(model, 5)
    client, server = learner("client", bottom, optim), learner("server", top, optim)
    for x, y in data:
        vanilla(client, wire_once(server), x, y)
    assert_same(model, expected)


def wire_once(server: Learner) -> object:
    return wire(server).party


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("at", CUTS)
def test_splitfed_v1_with_one_client_equals_vanilla(at: int, optim: Optim) -> None:
    expected = unsplit(digits_model(), optim, batches())
    bottom, top = cut(digits_model(), at)
    client, server = learner("client", copy.deepcopy(bottom), optim), learner("server", top, optim)
    sessions = {"client": server.replica("client")}
    globally = Learner("bottom", bottom)
    for batch in batches():  # one local step a round: the average of one is itself, stateful optimizers included
        member = Member(client, wire(sessions["client"]).party, [batch])
        remote = RemoteMember("client", Framed(serve(Service({"client": member}))), "client")
        splitfed_v1_round([remote], sessions, globally, server)
    assert_same(nn.Sequential(*globally.stage, *server.stage), nn.Sequential(*expected))


def one_of_each(optim: Optim) -> dict[str, Callable[[], nn.Module]]:
    """Every other protocol with one client, as a function that trains and returns the whole model."""

    def split() -> tuple[Learner, Learner, Learner]:
        bottom, top = cut(digits_model(), 4)
        return learner("c", copy.deepcopy(bottom), optim), learner("s", top, optim), Learner("bottom", bottom)

    def v2() -> nn.Module:
        client, server, globally = split()
        splitfed_v2_round([Member(client, server.session("c"), batches())], globally)
        return nn.Sequential(*globally.stage, *server.stage)

    def v3() -> nn.Module:
        client, server, _ = split()
        sessions = {"c": server.replica("c")}
        splitfed_v3_round([Member(client, sessions["c"], batches())], sessions, server)
        return nn.Sequential(*client.stage, *server.stage)

    def in_turn() -> nn.Module:
        client, server, globally = split()
        in_turn_round([Member(client, server, batches())], globally)
        return nn.Sequential(*globally.stage, *server.stage)

    def apart() -> nn.Module:
        client, server, _ = split()
        apart_round([Member(client, server, batches())])
        return nn.Sequential(*client.stage, *server.stage)

    def side_by_side() -> nn.Module:
        client, server, _ = split()
        for batch in batches():
            parallel([client], server, [batch])
        return nn.Sequential(*client.stage, *server.stage)

    def federated() -> nn.Module:
        everywhere = Learner("all", digits_model())
        fedavg_round([Member(learner("c", digits_model(), optim), None, batches())], everywhere)
        return nn.Sequential(*everywhere.stage)

    def one_holder() -> nn.Module:
        client, server, _ = split()
        x = torch.cat([x for x, _ in batches()])
        holder = Features(client, x)
        for step, (_, y) in enumerate(batches()):
            vertical(server, [holder], torch.arange(step * 16, step * 16 + 16), y, join=summed)
        return nn.Sequential(*client.stage, *server.stage)

    return {
        "splitfed_v2": v2, "splitfed_v3": v3, "in_turn": in_turn, "apart": apart, "parallel": side_by_side,
        "fedavg": federated, "vertical": one_holder,
    }  # fmt: skip


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("protocol", list(one_of_each(OPTIMIZERS["adam"])))
def test_every_protocol_with_one_client_equals_unsplit(protocol: str, optim: Optim) -> None:
    expected = unsplit(digits_model(), optim, batches())
    assert_same(one_of_each(optim)[protocol](), nn.Sequential(*expected))


def test_in_turn_with_hand_over_equals_unsplit_on_the_batches_in_a_row() -> None:
    # Stateless optimizer: the optimizer's state is each client's own, so momentum would differ, and rightly so.
    optim: Optim = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    expected = unsplit(digits_model(), optim, batches(4))
    bottom, top = cut(digits_model(), 4)
    server, globally = learner("server", top, optim), Learner("bottom", bottom)
    clients = [learner(f"c{n}", copy.deepcopy(bottom), optim) for n in range(2)]
    shares = [batches(4)[:2], batches(4)[2:]]
    in_turn_round([Member(c, server, own) for c, own in zip(clients, shares, strict=True)], globally)
    assert_same(nn.Sequential(*globally.stage, *server.stage), nn.Sequential(*expected))


def test_parallel_server_and_summed_bottoms_equal_unsplit_on_the_joint_batch() -> None:
    # Plain SGD, equal bottoms: each client's step is its part of the joint gradient, so the steps add up to
    # unsplit training's. Equal up to the order of summation over the batch.
    optim: Optim = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    data = batches(3)
    joint = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    expected = unsplit(digits_model(), optim, joint).state_dict()
    bottom, top = cut(digits_model(), 4)
    start = {name: tensor.clone() for name, tensor in bottom.state_dict().items()}
    clients = [learner(f"c{n}", copy.deepcopy(bottom), optim) for n in range(3)]
    server = learner("server", top, optim)
    parallel(clients, wire(server).party, data)
    for name, before in start.items():
        summed_up = before + sum(client.weights()[name] - before for client in clients)
        assert torch.allclose(summed_up, expected[name], rtol=0, atol=1e-13)
    for name, tensor in server.weights().items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-13)


def test_fedavg_and_v1_with_one_step_each_equal_unsplit_on_the_weighted_batch() -> None:
    # One SGD step a client from common weights: the average of the steps is the step on the weighted mean loss.
    optim: Optim = lambda p: torch.optim.SGD(p, lr=0.05)  # noqa: E731
    whole = batches(1, 24)[0]
    shares = [(whole[0][:8], whole[1][:8]), (whole[0][8:], whole[1][8:])]
    expected = unsplit(digits_model(), optim, [whole]).state_dict()
    everywhere = Learner("all", digits_model())
    fedavg_round([Member(learner(f"c{n}", digits_model(), optim), None, [b]) for n, b in enumerate(shares)], everywhere)
    bottom, top = cut(digits_model(), 4)
    server, globally = learner("server", top, optim), Learner("bottom", bottom)
    sessions = {f"c{n}": server.replica(f"c{n}") for n in range(2)}
    clients = [learner(f"c{n}", copy.deepcopy(bottom), optim) for n in range(2)]
    members = [Member(c, sessions[c.name], [b]) for c, b in zip(clients, shares, strict=True)]
    splitfed_v1_round(members, sessions, globally, server)
    for name, tensor in {**globally.weights(), **server.weights()}.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-13)
        assert torch.allclose(everywhere.weights()[name], expected[name], rtol=0, atol=1e-13)


def test_vertical_sum_of_linear_bottoms_equals_the_unsplit_linear_layer() -> None:
    optim = OPTIMIZERS["adam"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y = torch.rand(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))
    parts = [nn.Linear(2, 5, bias=False).double(), nn.Linear(4, 5, bias=False).double()]
    with torch.no_grad():
        parts[0].weight.copy_(model[0].weight[:, :2])
        parts[1].weight.copy_(model[0].weight[:, 2:])
    owner = learner("owner", copy.deepcopy(model[1:]), optim)
    columns = [x[:, :2], x[:, 2:]]
    holders = [Features(learner(f"c{n}", part, optim), columns[n]) for n, part in enumerate(parts)]
    remote = [wire(holder).party for holder in holders]
    ids = [torch.arange(start, start + 8) for start in range(0, 32, 8)]
    expected = unsplit(model, optim, [(x[rows], y[rows]) for rows in ids])
    for rows in ids:
        vertical(owner, remote, rows, y[rows], join=summed)
    joined = torch.cat([part.weight for part in parts], dim=1)
    assert torch.allclose(joined, expected[0].weight, rtol=0, atol=1e-12)
    assert torch.allclose(owner.stage[1].weight, expected[2].weight, rtol=0, atol=1e-12)


def test_mean_by_hand_leaves_integers_and_inputs_alone() -> None:
    first = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(7)}
    second = {"w": torch.tensor([5.0, 4.0]), "n": torch.tensor(9)}
    result = mean([first, second], [1, 3])
    assert torch.equal(result["w"], torch.tensor([4.0, 3.5]))
    assert result["n"] == 7
    assert torch.equal(first["w"], torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="some samples"):
        mean([first], [0])
