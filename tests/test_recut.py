"""A cut that moves in mid-training changes nothing: to the bit, whatever moves, and what cannot move is told."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from splitlearn import Guard, Guards, Learner, cut, join, load_checkpoint, save_checkpoint, vanilla, wire
from splitlearn.models import digits_cnn
from splitlearn.recut import moved_nbytes, recut

Optim = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optim] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
}
ROUTE = ("relu2", "conv1", "relu4", 1, 6, "pool", "flatten", 10, 2)  # up and down


def small() -> nn.Sequential:
    """A model whose first and last places leave a party with nothing to train, with batch norm, and frozen weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3),
        nn.Identity(),
    )  # fmt: skip
    return model.double()


def batches(steps: int, shape: Sequence[int], classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(6, *shape, generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (6,), generator=generator),
        )
        for _ in range(steps)
    ]


def parties(model: nn.Sequential, at: int | str, optim: Optim) -> tuple[Learner, Learner]:
    return tuple(  # type: ignore[return-value]
        Learner(name, stage, optim(list(stage.parameters())) if list(stage.parameters()) else None)
        for name, stage in zip(("client", "server"), cut(model, at), strict=True)
    )


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_as_built(party: Learner) -> None:
    """The optimizer trains the stage's parameters, all and only they, in its order; none where there are none."""
    own = list(party.stage.parameters())
    trained = [p for group in party.optimizer.param_groups for p in group["params"]] if party.optimizer else []
    assert [id(p) for p in trained] == [id(p) for p in own]
    assert (party.optimizer is None) is (not own)
    if party.optimizer is not None:
        assert set(map(id, party.optimizer.state)) <= set(map(id, own))


@pytest.mark.parametrize("framed", [False, True], ids=["local", "framed"])
@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_moving_cut_trains_as_one_that_stays(optim: Optim, framed: bool) -> None:
    torch.manual_seed(0)
    model = digits_cnn().double()
    still = copy.deepcopy(model)
    data = batches(len(ROUTE) + 1, (1, 8, 8), 10)
    ours, theirs = parties(still, "relu2", optim)
    losses = [vanilla(ours, theirs, x, y) for x, y in data]
    client, server = parties(model, "fc1", optim)
    seen = wire(server).party if framed else server
    moved = [vanilla(client, seen, *data[0])]
    for at, (x, y) in zip(ROUTE, data[1:], strict=True):
        recut(client, server, at)
        assert_as_built(client)
        assert_as_built(server)
        moved.append(vanilla(client, seen, x, y))
    assert torch.equal(torch.stack(moved), torch.stack(losses))
    assert_same(join(client.stage, server.stage), still)  # type: ignore[arg-type]
    assert client.steps == server.steps == len(data)
    assert (client.name, server.name) == ("client", "server")


@pytest.mark.parametrize("optim", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_stages_with_nothing_to_train_and_batch_norm_move_too(optim: Optim) -> None:
    model = small()
    still = copy.deepcopy(model)
    route = (2, 7, 1, 3, 6, 1, 7, 4)
    data = batches(len(route), (3, 4), 3)
    ours, theirs = parties(still, 4, optim)
    client, server = parties(model, 1, optim)
    for at, (x, y) in zip(route, data, strict=True):
        recut(client, server, at)
        assert_as_built(client)
        assert_as_built(server)
        assert torch.equal(vanilla(client, server, x, y), vanilla(ours, theirs, x, y))
    assert_same(join(client.stage, server.stage), still)  # type: ignore[arg-type]


def test_frozen_weights_stay_frozen_wherever_they_go() -> None:
    model = small()
    bottom, top = cut(model, 4)
    client = Learner("client", bottom)  # trains nothing
    server = Learner("server", top, torch.optim.Adam(top.parameters(), lr=0.1))
    before = client.weights()
    data = batches(4, (3, 4), 3)
    twin = copy.deepcopy(model)
    ours = Learner("client", cut(twin, 4)[0])
    theirs = Learner("server", cut(twin, 4)[1], torch.optim.Adam(cut(twin, 4)[1].parameters(), lr=0.1))
    for at, (x, y) in zip((1, 6, 2, 4), data, strict=True):
        recut(client, server, at)
        assert torch.equal(vanilla(client, server, x, y), vanilla(ours, theirs, x, y))
    assert client.optimizer is None
    assert torch.equal(client.weights()["1.weight"], before["1.weight"])
    assert_same(model, twin)


def test_groups_with_options_of_their_own_keep_them() -> None:
    def optim(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        slow, fast = ([p for p in parameters if (p.ndim > 1) is wide] for wide in (True, False))
        return torch.optim.SGD([{"params": slow, "lr": 0.01}, {"params": fast, "lr": 0.3}], momentum=0.9)

    model = small()
    still = copy.deepcopy(model)
    data = batches(4, (3, 4), 3)
    ours, theirs = parties(still, 4, optim)
    client, server = parties(model, 4, optim)
    for at, (x, y) in zip((2, 6, 1, 5), data, strict=True):
        recut(client, server, at)
        assert torch.equal(vanilla(client, server, x, y), vanilla(ours, theirs, x, y))
    assert_same(join(client.stage, server.stage), still)  # type: ignore[arg-type]


def test_a_checkpoint_goes_on_in_parties_that_were_recut_to_the_same_place(tmp_path: Path) -> None:
    data = batches(6, (3, 4), 3)
    client, server = parties(small(), 1, OPTIMIZERS["adam"])
    for at, (x, y) in zip((4, 7, 2), data[:3], strict=True):
        recut(client, server, at)
        vanilla(client, server, x, y)
    path = tmp_path / "split.safetensors"
    save_checkpoint(path, {"client": client.state_dict(), "server": server.state_dict()})
    losses = [vanilla(client, server, x, y) for x, y in data[3:]]
    for start in (2, 6):  # built at that cut, or recut to it
        again = parties(small(), start, OPTIMIZERS["adam"])
        recut(*again, 2)
        saved = load_checkpoint(path)
        for party in again:
            party.load_state_dict(saved[party.name])
        for (x, y), loss in zip(data[3:], losses, strict=True):
            assert torch.equal(vanilla(*again, x, y), loss)


def test_what_moves_is_counted_and_the_way_back_takes_as_much() -> None:
    client, server = parties(digits_cnn(), "relu1", OPTIMIZERS["adam"])
    conv2 = (32 * 16 * 9 + 32) * 4
    assert moved_nbytes(client, server, "relu2") == moved_nbytes(client, server, "relu2", training=False) == conv2
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    vanilla(client, server, x, y)
    there = moved_nbytes(client, server, "relu2")
    assert there == conv2 + 2 * conv2 + 2 * 4  # two moments and two step counts
    assert moved_nbytes(client, server, "relu1") == moved_nbytes(client, server, "conv1") == 0
    recut(client, server, "relu2")
    assert moved_nbytes(client, server, "relu1") == there
    bn = parties(small(), 2, OPTIMIZERS["adam"])
    assert moved_nbytes(*bn, 3, training=False) == 4 * 8 * 8 + 8  # weight, bias, mean, variance; batches counted


def test_a_layer_that_stands_in_two_places_moves_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Tanh(), nn.Tanh(), layer, nn.Tanh(), layer, nn.Tanh())
    client, server = parties(model, 1, OPTIMIZERS["adam"])
    assert moved_nbytes(client, server, 5) == 4 * (4 * 4 + 4)


def test_a_service_goes_on_after_a_recut_and_so_does_a_new_session() -> None:
    client, server = parties(small(), 4, OPTIMIZERS["adam"])
    seen = wire(server).party
    data = batches(3, (3, 4), 3)
    recut(client, server, 7)  # leaves the server nothing to train
    vanilla(client, seen, *data[0])
    recut(client, server, 4)
    for party, (x, y) in zip((seen, server.session("another")), data[1:], strict=True):
        before = server.weights()["6.weight"]
        vanilla(client, party, x, y)
        assert not torch.equal(server.weights()["6.weight"], before)


def test_evaluation_between_steps_is_that_of_the_joined_model() -> None:
    model = small()
    client, server = parties(model, 2, OPTIMIZERS["adam"])
    x, y = batches(1, (3, 4), 3)[0]
    vanilla(client, server, x, y)
    before = server.predict(client.predict(x))
    recut(client, server, 5)
    assert torch.equal(server.predict(client.predict(x)), before)


class Pulled(Guard):
    def penalty(self, x: Tensor, z: Tensor) -> Tensor:
        return z.square().mean()


class Shaped(Guard):
    def __init__(self) -> None:
        self.noise = torch.zeros(8)


class Counting(torch.optim.SGD):
    """An optimizer of a user's, with an attribute of its own."""

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        super().__init__(parameters, lr)
        self.before = [parameter.detach().clone() for parameter in parameters]


def refused(
    client: dict[str, object] | None = None,
    optimizers: tuple[Optim, Optim] = (OPTIMIZERS["adam"], OPTIMIZERS["adam"]),
    at: int | str = 5,
) -> str:
    """Return why parties are not recut, after a look that nothing moved."""
    bottom, top = cut(small(), 2)
    one = Learner("client", bottom, optimizers[0](list(bottom.parameters())), **client or {})  # type: ignore[arg-type]
    other = Learner("server", top, optimizers[1](list(top.parameters())))
    held = list(one.stage._modules), list(other.stage._modules)
    with pytest.raises(ValueError) as caught:
        recut(one, other, at)
    assert (list(one.stage._modules), list(other.stage._modules)) == held
    assert_as_built(one)
    assert_as_built(other)
    return str(caught.value)


def test_what_cannot_be_kept_equal_is_told_and_nothing_moves() -> None:
    assert "without a penalty" in refused({"guard": Pulled()})
    assert "tensors of its own" in refused({"guard": Guards(Guard(), Shaped())})
    assert "Adam and SGD" in refused(optimizers=(OPTIMIZERS["momentum"], OPTIMIZERS["adam"]))
    assert "Adam and AdamW" in refused(optimizers=(OPTIMIZERS["adamw"], OPTIMIZERS["adam"]))
    assert "got other lr;" in refused(optimizers=(lambda p: torch.optim.Adam(p, lr=1), OPTIMIZERS["adam"]))
    assert "client: expected an optimizer of torch.optim, got Counting" in refused(
        optimizers=(lambda p: Counting(p, 0.1), lambda p: Counting(p, 0.1))
    )
    assert "LBFGS" in refused(optimizers=(lambda p: torch.optim.LBFGS(p), OPTIMIZERS["adam"]))
    assert "a cut between 1 and 7" in refused(at=8)
    assert "a layer below the cut" in refused(at="fc9")


def test_layers_without_weights_move_between_unlike_optimizers() -> None:
    model = small()
    bottom, top = cut(model, 4)
    client = Learner("client", bottom, torch.optim.Adam(bottom.parameters()))
    server = Learner("server", top, torch.optim.SGD(top.parameters(), lr=0.1))
    recut(client, server, 3)
    assert list(client.stage._modules) == ["0", "1", "2"]


def test_an_open_step_a_hooked_optimizer_and_other_parties_are_refused() -> None:
    client, server = parties(small(), 2, OPTIMIZERS["adam"])
    ((x, _),) = batches(1, (3, 4), 3)
    client.forward(x)
    with pytest.raises(ValueError, match="client: expected no open step"):
        recut(client, server, 4)
    client.abandon()
    with pytest.raises(ValueError, match="expected a Learner to recut, got Remote"):
        recut(client, wire(server).party, 4)  # type: ignore[arg-type]
    assert server.optimizer is not None
    server.optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="without hooks"):
        moved_nbytes(client, server, 4)
