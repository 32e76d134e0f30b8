"""Learner, Guard and Features: what a party returns, whose randomness it draws from, and what it refuses."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from splitlearn import Features, Guard, Guards, Learner, cut, u_shaped, vanilla, wire

X, Y = torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def mlp(*, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 8), middle, nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 3))


def sgd(stage: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(stage.parameters(), lr=lr, momentum=0.9)


def adam(stage: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(stage.parameters(), lr=0.01)


def pair(model: nn.Sequential, guard: Guard | None = None, top_guard: Guard | None = None) -> tuple[Learner, Learner]:
    bottom, top = cut(model, 4)
    return Learner("client", bottom, adam(bottom), guard), Learner("server", top, adam(top), top_guard)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Noise(Guard):
    def activation(self, z: Tensor) -> Tensor:
        return z + 0.1 * torch.randn_like(z)

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        return g + 0.1 * torch.randn_like(g)

    def label(self, y: Tensor) -> Tensor:
        return torch.where(torch.rand(y.shape) < 0.2, torch.randint_like(y, 3), y)


class Double(Guard):
    def activation(self, z: Tensor) -> Tensor:
        return 2 * z


# What forward, backward and learn return


def test_forward_returns_a_fresh_leaf_and_backward_a_gradient_only_if_asked() -> None:
    stage = nn.Linear(4, 3)
    party = Learner("p", stage, sgd(stage))
    x = X.clone().requires_grad_()
    z = party.forward(x)
    assert z.is_leaf
    assert z.requires_grad
    before = stage.weight.detach().clone()
    g = torch.rand(6, 3)
    assert torch.allclose(party.backward(g), g @ before, atol=1e-6)
    assert x.grad is None  # it was detached: nothing reaches the caller's graph
    party.forward(X)
    assert party.backward(g) is None
    assert party.learn(X, Y)[1] is None
    loss, gradient = party.learn(x, Y)
    assert loss.ndim == 0
    assert not loss.requires_grad
    assert gradient.shape == x.shape


def test_token_inputs_need_no_gradient() -> None:
    stage = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    bottom, top = cut(stage, 2)
    client, server = Learner("c", bottom, sgd(bottom)), Learner("s", top, sgd(top))
    tokens = torch.arange(6).reshape(2, 3)
    before = client.weights()
    for seen in (server, wire(server).party):
        vanilla(client, seen, tokens, torch.tensor([0, 1]))
    assert not same(before, client.weights())
    with pytest.raises(ValueError, match=r"c: expected tokens that the embedding holds, got 10 to 15"):
        client.forward(tokens + 10)


def test_an_input_that_the_stage_ignores_gets_zeros() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.value.expand(len(x), 3)

    party = Learner("p", Constant())
    z = X.clone().requires_grad_()
    assert torch.equal(party.learn(z, Y)[1], torch.zeros_like(z))


def test_every_backward_needs_its_own_forward() -> None:
    stage = nn.Linear(4, 3)
    party = Learner("p", stage, sgd(stage))
    message = "p: expected an open step, begun by forward; call forward"
    with pytest.raises(ValueError, match=message):
        party.backward(torch.ones(6, 3))
    party.forward(X)
    party.backward(torch.ones(6, 3))
    with pytest.raises(ValueError, match=message):
        party.backward(torch.ones(6, 3))
    party.forward(X)
    party.learn(X, Y)
    with pytest.raises(ValueError, match=message):  # learn gave the open step up
        party.backward(torch.ones(6, 3))
    party.forward(X)
    party.abandon()
    with pytest.raises(ValueError, match=message):
        party.backward(torch.ones(6, 3))


def test_the_last_forward_counts() -> None:
    party, twin = (Learner("p", stage, sgd(stage)) for stage in (mlp(), mlp()))
    party.forward(X + 1)
    for one in (party, twin):
        one.forward(X)
        one.backward(torch.ones(6, 3))
    assert same(party.weights(), twin.weights())


def test_a_failed_forward_leaves_no_open_step() -> None:
    party = Learner("p", nn.Linear(4, 3))
    party.forward(X)
    with pytest.raises(ValueError, match="does not fit"):
        party.forward(torch.rand(6, 5))
    with pytest.raises(ValueError, match="open step"):
        party.backward(torch.ones(6, 3))


def test_a_gradient_of_another_shape_is_refused_and_may_be_sent_again() -> None:
    stage = nn.Linear(4, 3)
    party = Learner("p", stage, sgd(stage))
    party.forward(X)
    before = party.weights()
    with pytest.raises(ValueError, match=r"p: expected a gradient of shape \(6, 3\), got \(6, 1\)"):
        party.backward(torch.ones(6, 1))
    assert same(before, party.weights())
    party.backward(torch.ones(6, 3))
    assert not same(before, party.weights())


def test_a_frozen_party_returns_gradients_and_keeps_none() -> None:
    model = mlp()
    bottom, top = cut(model, 4)
    frozen, server = Learner("frozen", bottom), Learner("server", top)
    before = copy.deepcopy(model.state_dict())
    x = X.clone().requires_grad_()
    z = frozen.forward(x)
    _, g = server.learn(z, Y)
    got = frozen.backward(g)
    (expected,) = torch.autograd.grad(cross_entropy(model(x), Y), x)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-8)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same(before, model.state_dict())


@pytest.mark.parametrize("layer", [nn.Flatten(), nn.ReLU(), nn.Identity()])
def test_a_stage_without_parameters_is_a_party(layer: nn.Module) -> None:
    party = Learner("p", layer)
    z = party.forward(X)
    assert torch.equal(z, layer(X))
    assert party.backward(torch.ones_like(z)) is None
    x = X.clone().requires_grad_()
    party.forward(x)
    assert party.backward(torch.ones_like(z)).shape == x.shape
    assert party.weights() == {}
    party.load_state_dict(party.state_dict())


# Guards


def test_a_guard_that_does_nothing_is_no_guard_bit_for_bit() -> None:
    results = []
    for guard in (None, Guard(), Guards(), Guards(Guard(), Guards(Guard()))):
        client, server = pair(mlp(dropout=0.5), guard, guard)
        losses = [vanilla(client, server, X, Y).item() for _ in range(5)]
        results.append((losses, client.weights(), server.weights()))
    for losses, bottom, top in results[1:]:
        assert losses == results[0][0]
        assert same(bottom, results[0][1])
        assert same(top, results[0][2])


def test_an_activation_guard_stands_in_the_graph() -> None:
    x, g = X.clone().requires_grad_(), torch.rand(6, 3)
    plain, doubled = Learner("p", nn.Linear(4, 3)), Learner("p", nn.Linear(4, 3), guard=Double())
    doubled.load_weights(plain.weights())
    assert torch.equal(doubled.forward(x), 2 * plain.forward(x))
    assert torch.equal(doubled.backward(g), 2 * plain.backward(g))
    assert torch.equal(doubled.predict(X), 2 * plain.predict(X))


class Sign(Guard):
    def __init__(self, *, straight_through: bool):
        self.straight_through = straight_through

    def activation(self, z: Tensor) -> Tensor:
        return z + (z.sign() - z).detach() if self.straight_through else z.sign().detach()


def test_a_guard_without_a_gradient_goes_straight_through_or_is_refused() -> None:
    x, g = X.clone().requires_grad_(), torch.rand(6, 3)
    stage = nn.Linear(4, 3)
    party = Learner("p", stage, guard=Sign(straight_through=True))
    assert torch.allclose(party.forward(x), stage(x).sign(), atol=1e-6)
    assert torch.allclose(party.backward(g), g @ stage.weight, atol=1e-6)
    with pytest.raises(ValueError, match=r"p: expected a guard that can be differentiated.*straight through"):
        Learner("p", stage, sgd(stage), Sign(straight_through=False)).forward(X)
    Learner("p", stage, guard=Sign(straight_through=False)).forward(X)  # frozen, and nobody asks for a gradient


class Shrink(Guard):
    def __init__(self, weight: float):
        self.weight = weight

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        return self.weight * (z * x.sum(1, keepdim=True)).square().mean()


def test_a_penalty_adds_its_gradient_to_the_joint_loss() -> None:
    model = mlp().double()
    x = X.double()
    bottom, top = cut(copy.deepcopy(model), 4)
    optimizers = [torch.optim.SGD(stage.parameters(), lr=1.0) for stage in (bottom, top)]
    client = Learner("c", bottom, optimizers[0], Guards(Shrink(0.3), Guard(), Shrink(0.2)))
    server = Learner("s", top, optimizers[1])
    vanilla(client, server, x, Y)
    z = cut(model, 4)[0](x)
    joint = cross_entropy(model(x), Y) + 0.5 * (z * x.sum(1, keepdim=True)).square().mean()
    gradients = torch.autograd.grad(joint, list(model.parameters()))
    trained = [*bottom.parameters(), *top.parameters()]
    for before, g, after in zip(model.parameters(), gradients, trained, strict=True):
        assert torch.allclose(after, before - g, rtol=0, atol=1e-14)


def test_a_penalty_trains_where_what_is_sent_has_no_gradient_for_the_stage() -> None:
    class Elsewhere(Guard):
        def activation(self, z: Tensor) -> Tensor:
            return 0 * z

        def penalty(self, x: Tensor, z: Tensor) -> Tensor:
            return z.square().mean()

    stage = nn.Linear(4, 3)
    party = Learner("p", stage, sgd(stage), Elsewhere())
    before = stage(X).square().mean().item()
    party.backward(torch.ones_like(party.forward(X)))
    assert stage(X).square().mean().item() < before


@pytest.mark.parametrize(
    ("penalty", "message"),
    [(torch.ones(3), r"penalty of one number, got shape \(3,\)"), (torch.tensor(torch.nan), "finite penalty, got nan")],
)
def test_a_penalty_is_one_finite_number(penalty: Tensor, message: str) -> None:
    class Broken(Guard):
        def penalty(self, x: Tensor, z: Tensor) -> Tensor:
            return penalty

    with pytest.raises(ValueError, match=message):
        Learner("p", nn.Linear(4, 3), guard=Broken()).forward(X)


def test_the_gradient_guard_gets_the_labels_where_the_party_knows_them() -> None:
    seen: list[Tensor | None] = []

    class Spy(Guard):
        def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
            seen.append(y)
            return 3 * g

    bottom, middle, head = cut(mlp(), 1, 4)
    learners = [Learner(n, s, guard=Spy()) for n, s in zip("bmh", (bottom, middle, head), strict=True)]
    u_shaped(*learners, X, Y)
    assert torch.equal(seen[0], Y)
    assert seen[1] is None
    assert len(seen) == 2  # the bottom's data asks for no gradient
    plain = Learner("h", head)
    z = torch.rand(6, 8).requires_grad_()
    assert torch.equal(learners[2].learn(z, Y)[1], 3 * plain.learn(z, Y)[1])


def test_guards_apply_in_the_order_given() -> None:
    class Add(Guard):
        def activation(self, z: Tensor) -> Tensor:
            return z + 1

        def label(self, y: Tensor) -> Tensor:
            return y + 1

        def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
            return g + 1

    class Times(Double):
        def label(self, y: Tensor) -> Tensor:
            return 2 * y

        def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
            return 2 * g

    chain, one = Guards(Add(), Times()), torch.ones(1)
    assert chain.activation(one) == chain.gradient(one) == chain.label(one) == 4
    assert Guards(Times(), Add()).activation(one) == 3
    assert chain.penalty(one, one) is None
    assert Guards(Shrink(1.0), Add()).penalty(torch.ones(1, 1), torch.ones(1, 1)) == 1


class Counting(Guard):
    """Stateful: it moves in training alone."""

    def __init__(self) -> None:
        self.calls = torch.zeros(())

    def activation(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.calls += 1
        return z + 0.01 * self.calls * torch.randn_like(z)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = state["calls"].clone()


def test_guards_carry_each_ones_state() -> None:
    first, second = Guards(Counting(), Guard(), Counting()), Guards(Counting(), Guard(), Counting())
    first.guards[2].calls += 5
    second.load_state_dict(first.state_dict())
    assert [g.calls.item() for g in second.guards if isinstance(g, Counting)] == [0, 5]
    with pytest.raises(ValueError, match="expected the state of 1 guards, got 3"):
        Guards(Counting()).load_state_dict(first.state_dict())


# Randomness


def trained(seen: Callable[[Learner], Any], between: Callable[[Learner, Learner], object]) -> dict[str, Tensor]:
    client, server = pair(mlp(dropout=0.5, norm=True), Noise(), Noise())
    party = seen(server)
    for _ in range(4):
        vanilla(client, party, X, Y)
        between(client, server)
    return {**client.weights(), **server.weights()}


def test_randomness_depends_neither_on_the_wire_nor_on_others() -> None:
    def others(client: Learner, server: Learner) -> None:
        torch.rand(7)
        torch.manual_seed(5)
        client.predict(X)
        server.predict(client.predict(X))

    plain = trained(lambda server: server, lambda *_: None)
    assert same(plain, trained(lambda server: wire(server).party, lambda *_: None))
    assert same(plain, trained(lambda server: server, others))


def test_a_step_leaves_the_global_generator_alone() -> None:
    client, server = pair(mlp(dropout=0.5), Noise(), Noise())
    before = torch.get_rng_state()
    vanilla(client, server, X, Y)
    server.predict(client.predict(X))
    with pytest.raises(ValueError, match="does not fit"):
        client.forward(torch.rand(0, 9))
    assert torch.equal(before, torch.get_rng_state())


def test_each_name_and_each_seed_has_its_own_stream() -> None:
    def first(name: str, seed: int) -> Tensor:
        return Learner(name, nn.Identity(), guard=Noise(), seed=seed).forward(torch.zeros(8))

    drawn = [first("a", 0), first("b", 0), first("a", 1), first("a", 10**30)]
    assert torch.equal(drawn[0], first("a", 0))
    assert len({tuple(one.tolist()) for one in drawn}) == 4


def test_a_stream_goes_on_from_step_to_step() -> None:
    party = Learner("p", nn.Identity(), guard=Noise())
    training = [party.forward(torch.zeros(8)).tolist() for _ in range(3)]
    evaluation = [party.predict(torch.zeros(8)).tolist() for _ in range(3)]
    assert len({tuple(one) for one in training + evaluation}) == 6


def test_predict_moves_nothing_that_training_depends_on() -> None:
    model = mlp(dropout=0.5, norm=True)
    model[1].eval()  # frozen statistics
    twin_bottom, _ = cut(copy.deepcopy(model), 4)
    client, _ = pair(model, Counting())
    twin = Learner("client", twin_bottom, adam(twin_bottom), Counting())
    client.forward(X)
    before, modes = client.weights(), [module.training for module in model.modules()]
    client.predict(X)
    assert same(before, client.weights())
    assert [module.training for module in model.modules()] == modes
    assert not model[1].training
    assert model[2].training
    client.backward(torch.ones(6, 8))  # the open step is still there
    twin.forward(X)
    twin.backward(torch.ones(6, 8))
    assert same(client.weights(), twin.weights())
    assert torch.equal(client.forward(X), twin.forward(X))


def test_predict_restores_the_modes_after_an_error() -> None:
    party = Learner("p", mlp(dropout=0.5))
    with pytest.raises(ValueError, match="does not fit"):
        party.predict(torch.rand(2, 9))
    assert all(module.training for module in party.stage.modules())
    assert not party.predict(X.clone().requires_grad_()).requires_grad


# What is refused


def test_a_batch_of_one_with_batch_norm() -> None:
    party = Learner("p", mlp(norm=True))
    with pytest.raises(ValueError, match=r"p: expected more than one sample, got a batch of 1; .*drop_last=True"):
        party.forward(X[:1])
    assert party.predict(X[:1]).shape == (1, 3)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    party = Learner("p", mlp(), None)
    before = party.weights()
    with pytest.raises(ValueError, match=r"p: expected a finite loss, got nan at step 0; lower the learning rate"):
        party.learn(X * torch.nan, Y)
    assert same(before, party.weights())


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0, 0]), r"p: expected labels from 0 to 2, got 0 to 3; match the last layer"),
        (torch.tensor([0, -1, 2, 0, 0, 0]), r"expected labels from 0 to 2, got -1 to 2"),
        (torch.zeros(5, dtype=torch.int64), r"its loss takes no outputs of shape \(6, 3\) with labels of shape \(5,\)"),
        (torch.zeros(6), r"labels of shape \(6,\) and type torch.float32 .*; send one label a sample"),
    ],
)
def test_labels_that_do_not_fit(y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Learner("p", mlp()).learn(X, y)
    assert "\n" not in str(caught.value)


def test_an_input_that_does_not_fit() -> None:
    party = Learner("p", mlp())
    for call in (party.forward, party.predict, lambda x: party.learn(x, Y)):
        with pytest.raises(
            ValueError, match=r"p: its stage does not fit an input of shape \(6, 5\) and type"
        ) as caught:
            call(torch.rand(6, 5))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"type torch.float64"):
        party.forward(X.double())


def test_a_stage_puts_out_one_tensor() -> None:
    party = Learner("p", nn.Sequential(nn.LSTM(4, 3)))
    for call in (party.forward, party.predict, lambda x: party.learn(x, Y)):
        with pytest.raises(ValueError, match="p: expected a stage that puts out one tensor, got a tuple"):
            call(X)


def test_training_without_gradients_is_refused() -> None:
    party = Learner("p", mlp())
    for call in (party.forward, lambda x: party.learn(x, Y)):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"p: expected to train with gradients on, .*call predict"),
        ):
            call(X)
    party.backward(torch.zeros_like(party.forward(X)))  # the turn is free


def test_an_empty_batch_has_no_loss() -> None:
    party = Learner("p", mlp())
    assert party.forward(X[:0]).shape == (0, 3)
    before = party.weights()
    with pytest.raises(ValueError, match=r"at least one sample, got outputs of shape \(0, 3\); skip empty batches"):
        party.learn(X[:0], Y[:0])
    assert same(before, party.weights())


def test_a_stage_that_overwrites_what_it_received() -> None:
    party = Learner("p", nn.ReLU(inplace=True))
    with pytest.raises(
        ValueError, match="p: expected a stage that leaves what it receives as it is; set inplace=False"
    ):
        party.forward(X.clone().requires_grad_())


def test_a_guards_own_error_is_passed_on_as_it_is() -> None:
    class Refusing(Guard):
        def penalty(self, x: Tensor, z: Tensor) -> Tensor:
            raise ValueError("expected features, got tokens")

    with pytest.raises(ValueError, match=r"^expected features, got tokens$"):
        Learner("p", nn.Linear(4, 3), guard=Refusing()).forward(X)


def test_losses_that_are_no_mean_or_no_function() -> None:
    z = torch.rand(6, 3).requires_grad_()
    with pytest.raises(ValueError, match=r"loss of one number, got shape \(6,\); take the mean"):
        Learner("p", nn.Identity(), loss=lambda out, y: cross_entropy(out, y, reduction="none")).learn(z, Y)
    with pytest.raises(ValueError, match="loss that can be differentiated"):
        Learner("p", nn.Identity(), loss=lambda out, y: (out.argmax(1) == y).float().mean()).learn(z, Y)
    loss, _ = Learner("p", nn.Identity(), loss=mse_loss).learn(z, torch.zeros(6, 3))
    assert loss == z.square().mean()


def test_an_optimizer_of_another_module_is_refused() -> None:
    model = mlp()
    bottom, _ = cut(model, 4)
    for wrong in (sgd(model), sgd(copy.deepcopy(bottom))):
        with pytest.raises(
            ValueError, match=r"p: expected an optimizer of its own stage's parameters, got \d of another"
        ):
            Learner("p", bottom, wrong)
    Learner("p", bottom, torch.optim.SGD([bottom[0].bias], lr=0.1))  # a part of them will do


def test_weights_are_clones_and_wrong_ones_change_nothing() -> None:
    party = Learner("p", mlp(norm=True))
    before = party.weights()
    party.weights()["0.weight"].zero_()
    assert same(before, party.weights())
    cases: dict[str, dict[str, Tensor]] = {
        r"p: expected the weights of its own stage, '4.bias' of shape \(3,\), got none;": {
            name: torch.zeros_like(tensor) for name, tensor in before.items() if name != "4.bias"
        },
        r"'4.bias' of shape \(3,\), got \(1,\)": {
            **{name: torch.zeros_like(tensor) for name, tensor in before.items()},
            "4.bias": torch.zeros(1),
        },
        r"'9.bias' of shape none, got \(1,\)": {**before, "9.bias": torch.zeros(1)},
        r"'0.weight' of shape \(8, 4\), got none and 8 more differ": {},
    }
    for message, weights in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            party.load_weights(weights)
        assert "\n" not in str(caught.value)
        assert same(before, party.weights())


# Replicas and checkpoints


def test_a_replica_is_independent_optimizer_state_included() -> None:
    _, server = pair(mlp(), None, Noise())
    z = torch.rand(6, 8).requires_grad_()
    server.learn(z, Y)
    replica = server.replica("copy")
    assert replica.name == "copy"
    own = {id(parameter) for parameter in replica.stage.parameters()}
    assert {id(p) for group in replica.optimizer.param_groups for p in group["params"]} == own
    assert not own & {id(parameter) for parameter in server.stage.parameters()}
    assert all(state["step"] == 1 for state in replica.optimizer.state.values())
    before = server.weights()
    replica.learn(z, Y)
    assert same(before, server.weights())
    assert all(state["step"] == 1 for state in server.optimizer.state.values())
    server.learn(z, Y)  # the same loss gradient from the same state: Adam's next step is the same
    assert same(server.weights(), replica.weights())


def test_replicas_draw_noise_of_their_own() -> None:
    server = Learner("server", nn.Identity(), guard=Noise())
    zeros, before = torch.zeros(8), server._rng.state_dict()["cpu"]
    drawn = [server.replica(name).forward(zeros).tolist() for name in ("a", "b", "a")]
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
    assert torch.equal(before, server._rng.state_dict()["cpu"])
    assert server.forward(zeros).tolist() not in drawn


def test_a_state_taken_in_the_middle_gives_the_bit_same_continuation() -> None:
    def parties() -> tuple[Learner, Learner]:
        return pair(mlp(dropout=0.5, norm=True), Guards(Noise(), Counting()), Noise())

    client, server = parties()
    for _ in range(3):
        vanilla(client, server, X, Y)
    states = copy.deepcopy((client.state_dict(), server.state_dict()))
    losses = [vanilla(client, server, X, Y).item() for _ in range(3)]
    outputs = server.predict(client.predict(X))
    again, again_server = parties()
    vanilla(again, again_server, X + 1, Y)  # whatever stood there before
    again.forward(X)  # an open step is void
    again.load_state_dict(states[0])
    again_server.load_state_dict(states[1])
    assert [vanilla(again, again_server, X, Y).item() for _ in range(3)] == losses
    assert same(again.weights(), client.weights())
    assert same(again_server.weights(), server.weights())
    assert torch.equal(again_server.predict(again.predict(X)), outputs)
    assert again.steps == client.steps == 6


def test_a_state_that_is_put_back_leaves_the_randomness_where_it_is() -> None:
    def party() -> Learner:
        stage = mlp(dropout=0.5)
        return Learner("client", stage, sgd(stage), Noise())

    def step(learner: Learner) -> Tensor:
        sent = learner.forward(X)
        learner.backward(torch.ones_like(sent))
        return torch.cat([sent.detach(), learner.predict(X)])

    put_back, loaded = party(), party()
    for learner in (put_back, loaded):
        step(learner)
    before = copy.deepcopy(put_back.state_dict())
    second = step(put_back)
    assert torch.equal(step(loaded), second)
    now = copy.deepcopy(put_back.state_dict())
    put_back.put_back(before)
    assert put_back.steps == 1
    assert same(put_back.weights(), before["stage"])
    for stream in ("rng", "predict_rng"):
        assert same({"cpu": put_back.state_dict()[stream]["cpu"]}, {"cpu": now[stream]["cpu"]})
    loaded.load_state_dict(before)
    assert torch.equal(step(loaded), second)
    third = step(put_back)
    assert not torch.equal(third[:6], second[:6])
    assert not torch.equal(third[6:], second[6:])


def test_a_loaded_state_stays_as_it_was() -> None:
    client, server = pair(mlp())
    vanilla(client, server, X, Y)
    state = copy.deepcopy(client.state_dict())
    kept = copy.deepcopy(state)
    client.load_state_dict(state)
    vanilla(client, server, X, Y)
    assert same(state["stage"], kept["stage"])
    for number, slots in kept["optimizer"]["state"].items():
        assert same(state["optimizer"]["state"][number], slots)


def test_a_state_is_taken_between_steps_and_fits_its_party() -> None:
    stage = nn.Linear(4, 3)
    party = Learner("p", stage, adam(stage))
    party.forward(X)
    with pytest.raises(ValueError, match=r"p: expected no open step.*abandon"):
        party.state_dict()
    party.abandon()
    state = party.state_dict()
    with pytest.raises(ValueError, match=r"q: expected the state of no optimizer, got one"):
        Learner("q", nn.Linear(4, 3)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"p: expected the state of an optimizer, got none"):
        party.load_state_dict(Learner("q", nn.Linear(4, 3)).state_dict())


# Features


def test_features_looks_its_own_rows_up() -> None:
    stage = nn.Linear(4, 3)
    holder, twin = Features(Learner("h", stage, sgd(stage)), X), Learner("h", copy.deepcopy(stage))
    rows = torch.tensor([3, 0])
    assert torch.equal(holder.forward(rows), twin.forward(X[rows]))
    assert holder.backward(torch.ones(2, 3)) is None
    twin.load_weights(holder.weights())
    assert torch.equal(holder.predict(rows), twin.predict(X[rows]))
    assert torch.equal(holder.learn(rows, Y[:2])[0], twin.learn(X[rows], Y[:2])[0])
    holder.load_weights({name: torch.zeros_like(tensor) for name, tensor in twin.weights().items()})
    assert not stage.weight.any()
    assert torch.equal(holder.label(Y), Y)
    state = holder.state_dict()
    holder.forward(rows)
    holder.load_state_dict(state)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 6]), "h: expected sample numbers from 0 to 5, got 0 to 6"),
        (torch.tensor([-1, 2]), "from 0 to 5, got -1 to 2"),
        (torch.tensor([0.0]), "int64 sample numbers, got torch.float32"),
        (torch.tensor([[0]]), "got torch.int64 of 2 dims"),
    ],
)
def test_sample_numbers_that_are_not_there(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Features(Learner("h", nn.Linear(4, 3)), X).forward(ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_and_moves_nothing(bad: float) -> None:
    party = Learner("client", nn.Linear(3, 2), None)
    before = party.weights()
    z = party.forward(torch.rand(4, 3))
    with pytest.raises(ValueError, match="client: expected a finite floating-point gradient"):
        party.backward(torch.full_like(z, bad))
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        party.backward(torch.ones_like(z, dtype=torch.int64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in party.weights().items())


def test_a_label_that_torch_would_leave_out_is_refused() -> None:
    party = Learner("server", nn.Linear(3, 2))
    with pytest.raises(ValueError, match="server: expected labels of 0 or more, got -100"):
        party.learn(torch.rand(2, 3), torch.tensor([0, -100]))


def test_a_penalty_on_a_party_that_sends_no_activation_is_refused() -> None:
    class Penalised(Guard):
        def penalty(self, x: Tensor, z: Tensor) -> Tensor:
            return z.square().mean()

    for guard in (Penalised(), Guards(Guard(), Penalised())):
        with pytest.raises(ValueError, match="expected a guard without a penalty on a party that learns"):
            Learner("top", nn.Linear(3, 2), guard=guard).learn(torch.rand(2, 3), torch.tensor([0, 1]))


def test_what_is_no_guard_or_no_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="client: expected a Guard, got <function"):
        Learner("client", nn.Linear(3, 2), guard=lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected an optimizer over the stage's parameters, got <class"):
        Learner("client", nn.Linear(3, 2), torch.optim.SGD)  # type: ignore[arg-type]


def test_a_guard_that_forgets_to_return_is_one_line() -> None:
    class Forgetful(Guard):
        def activation(self, z: Tensor) -> Tensor:
            z * 2  # type: ignore[return]

    with pytest.raises(
        ValueError, match=r"client: expected Forgetful\(\) to return what is sent for 4 samples, got None"
    ):
        Learner("client", nn.Linear(3, 2), guard=Forgetful()).forward(torch.rand(4, 3))


def test_a_finite_gradient_whose_sum_overflows_is_taken() -> None:
    party = Learner("client", nn.Linear(3, 2))
    z = party.forward(torch.rand(4, 3))
    party.backward(torch.full_like(z, 1e38))
    assert party.steps == 1
