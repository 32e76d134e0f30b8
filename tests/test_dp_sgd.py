"""DP-SGD across the cut against a loop over single samples; its noise, its batches, and what is refused."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from privacy.dp import (
    Account,
    Budget,
    BudgetExceeded,
    GaussianRelease,
    PaddedCrossEntropy,
    PoissonBatches,
    PrivateLearner,
    epsilon,
    joint_noise_multiplier,
)
from privacy.dp.poisson import PADDING, capacity_for
from splitlearn import Batches, Encoder, Guard, Learner, cut, epochs_of, fit, u_shaped, vanilla, wire
from splitlearn.models import digits_cnn, ecg_cnn, mlp, token_transformer
from splitlearn.train import TrainingStopped

EXPECTED = 4.0
NONE = 1e-30  # a noise multiplier whose noise is below the last bit of every sum here
Sums = dict[str, Tensor]


def private(name: str, stage: nn.Module, *, lr: float = 0.1, noise: float = NONE, **options: Any) -> PrivateLearner:
    options = {"clip": 0.5, "expected_batch_size": EXPECTED, "seed": 0, **options}
    return PrivateLearner(name, stage, torch.optim.SGD(stage.parameters(), lr=lr), noise_multiplier=noise, **options)


def plain(name: str, stage: nn.Module, *, expected: float = EXPECTED) -> Learner:
    return Learner(name, stage, loss=PaddedCrossEntropy(expected))


def watched(party: PrivateLearner) -> list[Sums]:
    """The clipped sum of each noised step to come, before noise and division."""
    sums: list[Sums] = []

    def note(_: object) -> None:
        sums.append({n: p.summed_grad.clone() for n, p in party.stage.named_parameters() if p.requires_grad})

    party.optimizer.attach_step_hook(note)
    return sums


def clipped_sum(model: nn.Module, names: Sequence[str], x: Tensor, y: Tensor, clip: float) -> Sums:
    """Each sample alone through the whole model, its gradient in ``names`` clipped, and all added up.

    The factor is Opacus': clip / (norm + 1e-6), at most 1. The 1e-6 scales a sample down by 1e-6 / norm more than the
    definition does, which is on the safe side; with it here, float64 sums agree to rounding.
    """
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    for row in range(len(x)):
        loss = cross_entropy(model(x[row : row + 1]), y[row : row + 1], reduction="sum", ignore_index=PADDING)
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for name, g in zip(names, gradients, strict=True):
            total[name] += g * (clip / (norm + 1e-6)).clamp(max=1)
    return total


def assert_near(found: Sums, expected: Sums, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=atol), (name, (found[name] - tensor).abs().max())


def padded(kind: str, rows: int, padding: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A batch of a few samples of unlike sizes, and padding."""
    shape = {"digits": (1, 8, 8), "mlp": (6,), "ecg": (1, 16)}.get(kind)
    y = torch.cat([torch.randint(0, 3, (rows,)), torch.full((padding,), PADDING)])
    if shape is None:
        return torch.cat([torch.randint(0, 20, (rows, 6)), torch.zeros(padding, 6, dtype=torch.int64)]), y
    scale = torch.logspace(-1, 1, rows, dtype=dtype).reshape(-1, *[1] * len(shape))
    return torch.cat([torch.randn(rows, *shape, dtype=dtype) * scale, torch.zeros(padding, *shape, dtype=dtype)]), y


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "digits": lambda: digits_cnn(3),
    "mlp": lambda: mlp(6, 3, (5, 4)),
    "ecg": lambda: ecg_cnn(3, 16),
    "tokens": lambda: token_transformer(20, 3, 6, 8, 1, 2),
}
CUTS = [("digits", 1), ("digits", 3), ("digits", 6), ("digits", 9), ("mlp", 1), ("mlp", 4), ("ecg", 4), ("tokens", 2)]
TOLERANCE = {
    torch.float32: 1e-6,  # sums of a few numbers of at most 0.5 each, behind norms over thousands of entries
    torch.float64: 1e-10,  # rounding alone
}


# The clipped sum


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
@pytest.mark.parametrize("who", ["bottom", "top", "both"])
@pytest.mark.parametrize(("kind", "at"), CUTS)
def test_the_clipped_sum_is_that_of_a_loop_over_single_samples_through_the_unsplit_model(
    kind: str, at: int, who: str, ghost: bool, dtype: torch.dtype
) -> None:
    model = MODELS[kind]().to(dtype)
    whole, stages = copy.deepcopy(model), cut(model, at)
    x, y = padded(kind, 5, 2, dtype)
    parties = [
        private(name, stage, ghost=ghost) if who in (name, "both") else plain(name, stage)
        for name, stage in zip(("bottom", "top"), stages, strict=True)
    ]
    notes = {}
    for party in parties:
        if isinstance(party, PrivateLearner):
            notes[party.name] = watched(party)
            party.allow(last=True)
    vanilla(*parties, x, y)
    for party, stage in zip(parties, stages, strict=True):
        if party.name in notes:
            names = [name for name, _ in stage.named_parameters()]  # those of the whole model: cut keeps them
            expected = clipped_sum(whole, names, x, y, clip=0.5)
            assert_near(notes[party.name][0], expected, TOLERANCE[dtype])


def test_the_update_of_plain_sgd_is_the_clipped_sum_over_the_expected_size() -> None:
    model = MODELS["mlp"]().double()
    whole, (bottom, top) = copy.deepcopy(model), cut(model, 2)
    party, above = private("bottom", bottom, lr=1.0), plain("top", top)
    x, y = padded("mlp", 3, 4, torch.float64)  # neither 3 nor 7 is the divisor
    party.allow(last=True)
    before = party.weights()
    vanilla(party, above, x, y)
    change = {name: (before[name] - tensor) * EXPECTED for name, tensor in party.weights().items()}
    assert_near(change, clipped_sum(whole, list(before), x, y, 0.5), 1e-10)


LAYERS: dict[str, Callable[[int, int, bool], tuple[nn.Module, tuple[int, ...], int]]] = {
    # Layer, shape of a sample, width of what comes out of it flat.
    "linear": lambda i, o, bias: (nn.Linear(i, o, bias=bias), (i,), o),
    "linear over a sequence": lambda i, o, bias: (nn.Linear(i, o, bias=bias), (3, i), 3 * o),
    "conv1d": lambda i, o, bias: (nn.Conv1d(i, o, 3, padding=1, bias=bias), (i, 5), 5 * o),
    "conv2d": lambda i, o, bias: (nn.Conv2d(i, o, 3, stride=2, padding=1, bias=bias), (i, 4, 4), 4 * o),
    "group norm": lambda i, o, bias: (nn.GroupNorm(1, i, affine=True), (i, 4), 4 * i),
    "layer norm": lambda i, o, bias: (nn.LayerNorm(i), (i,), i),
}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5), width_in=st.integers(1, 4), width=st.integers(1, 4), bias=st.booleans(),
    clip=st.sampled_from([1e-3, 0.3, 100.0]),
)  # fmt: skip
@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_shape_has_the_sum_of_the_loop(
    layer: str, ghost: bool, rows: int, width_in: int, width: int, bias: bool, clip: float
) -> None:
    below, shape, flat = LAYERS[layer](width_in, width, bias)
    model = nn.Sequential(below, nn.Tanh(), nn.Flatten(), nn.Linear(flat, 3)).double()
    whole, (bottom, top) = copy.deepcopy(model), cut(model, 2)
    party = private("bottom", bottom, clip=clip, ghost=ghost)
    notes = watched(party)
    party.allow(last=True)
    x, y = torch.randn(rows, *shape, dtype=torch.float64), torch.randint(0, 3, (rows,))
    vanilla(party, plain("top", top), x, y)
    expected = clipped_sum(whole, [name for name, _ in bottom.named_parameters()], x, y, clip)
    # Ghost norms of a sequence are square roots of Gram sums: half the digits where they cancel.
    assert_near(notes[0], expected, 1e-7 * clip if ghost and "sequence" in layer else 1e-10)


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_a_module_of_ones_own_and_a_layer_that_is_called_twice(ghost: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.mix = nn.Parameter(torch.rand(6)), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.tanh(self.mix(x * self.scale)))

    model = nn.Sequential(Own(), nn.Linear(6, 3)).double()
    whole, (bottom, top) = copy.deepcopy(model), cut(model, 1)
    party, (x, y) = private("bottom", bottom, ghost=ghost), padded("mlp", 4, 1, torch.float64)
    notes = watched(party)
    party.allow(last=True)
    vanilla(party, plain("top", top), x, y)
    assert_near(notes[0], clipped_sum(whole, [n for n, _ in bottom.named_parameters()], x, y, 0.5), 1e-10)


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
@pytest.mark.parametrize("physical", [1, 2, 3, 7])
def test_virtual_batches_make_the_sum_and_the_one_noise_of_the_whole_batch(ghost: bool, physical: int) -> None:
    x, y = padded("mlp", 5, 2, torch.float64)
    found = {}
    for size in (7, physical):
        torch.manual_seed(0)
        bottom, top = cut(MODELS["mlp"]().double(), 2)
        parties = [private("bottom", bottom, noise=1.0, ghost=ghost), private("top", top, noise=1.0, ghost=ghost)]
        notes = [watched(party) for party in parties]
        parts = list(zip(x.split(size), y.split(size), strict=True))
        for number, (part, labels) in enumerate(parts):
            for party in parties:
                party.allow(first=number == 0, last=number == len(parts) - 1)
            before = parties[0].weights()
            vanilla(*parties, part, labels)
            changed = not torch.equal(before["fc1.weight"], parties[0].weights()["fc1.weight"])
            assert changed == (number == len(parts) - 1)
        assert [len(note) for note in notes] == [1, 1]
        assert [party.steps for party in parties] == [1, 1]
        found[size] = {**notes[0][0], **notes[1][0]}, {**parties[0].weights(), **parties[1].weights()}
    for whole, virtual in zip(found[7], found[physical], strict=True):
        assert_near(virtual, whole, 1e-12)  # another order of summation; the noise is the same draw


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_padding_has_exactly_no_influence(ghost: bool) -> None:
    x, y = padded("mlp", 4, 3, torch.float64)
    found = []
    for fill in (0.0, 7.0):  # whatever stands in a padding row
        torch.manual_seed(0)
        bottom, top = cut(MODELS["mlp"]().double(), 2)
        parties = private("bottom", bottom, noise=1.0, ghost=ghost), private("top", top, noise=1.0, ghost=ghost)
        for party in parties:
            party.allow(last=True)
        filled = x.clone()
        filled[4:] = fill
        loss = vanilla(*parties, filled, y)
        found.append((loss, parties[0].weights(), parties[1].weights()))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_a_batch_of_padding_alone_makes_a_step_of_noise_alone(ghost: bool) -> None:
    bottom, top = cut(MODELS["mlp"]().double(), 2)
    parties = private("bottom", bottom, noise=1.0, ghost=ghost), private("top", top, noise=1.0, ghost=ghost)
    notes = [watched(party) for party in parties]
    before = parties[0].weights()
    for party in parties:
        party.allow(last=True)
    assert vanilla(*parties, *padded("mlp", 0, 5, torch.float64)) == 0
    assert all(not tensor.any() for note in notes for tensor in note[0].values())
    assert all(not torch.equal(before[name], tensor) for name, tensor in parties[0].weights().items())


# Noise


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_noise_has_its_spread_is_fresh_and_the_partys_own(ghost: bool) -> None:
    def updates(seed: int, name: str = "party") -> Tensor:
        torch.manual_seed(3)
        party = private(name, nn.Linear(30, 40), lr=1.0, noise=2.0, clip=0.7, seed=seed, ghost=ghost)
        rows = []
        for _ in range(25):
            before = party.weights()
            party.allow(last=True)
            party.learn(torch.randn(2, 30), torch.full((2,), PADDING))
            rows.append(torch.cat([(before[n] - w).flatten() for n, w in party.weights().items()]))
        return torch.stack(rows)

    found = updates(0)
    std = 2.0 * 0.7 / EXPECTED
    # The standard errors of a standard deviation, a mean and a correlation of n normal numbers.
    assert abs(found.std() / std - 1) < 4 / math.sqrt(2 * found.numel())
    assert abs(found.mean()) < 4 * std / math.sqrt(found.numel())
    assert abs((found[1:] * found[:-1]).mean()) / std**2 < 4 / math.sqrt(found[1:].numel())
    outside = torch.random.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(updates(0), found)
    assert not torch.equal(updates(1), found)
    assert not torch.equal(updates(0, "another"), found)
    party = private("party", nn.Linear(2, 2), noise=1.0)
    torch.random.set_rng_state(outside)
    party.allow(last=True)
    party.learn(torch.zeros(2, 2), torch.full((2,), PADDING))
    assert torch.equal(torch.random.get_rng_state(), outside)


# What crosses


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
@pytest.mark.parametrize("clip", [1e-3, 100.0])
def test_a_private_top_returns_the_gradient_of_a_plain_one(ghost: bool, clip: float) -> None:
    _, top = cut(MODELS["digits"]().double(), 3)
    x, y = torch.rand(6, 32, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, PADDING])
    expected = plain("top", copy.deepcopy(top)).learn(x.clone().requires_grad_(), y)
    party = private("top", top, clip=clip, ghost=ghost)
    party.allow(last=True)
    loss, g = party.learn(x.clone().requires_grad_(), y)
    assert torch.equal(loss, expected[0])
    assert g is not None
    assert expected[1] is not None
    assert torch.allclose(g, expected[1], rtol=1e-12, atol=0)  # it was multiplied by the divisor and divided again
    assert not g[-1].any()


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
@pytest.mark.parametrize("who", [("bottom",), ("middle",), ("bottom", "head"), ("bottom", "middle", "head")])
def test_a_u_shaped_chain_has_the_sums_of_the_loop(who: tuple[str, ...], ghost: bool) -> None:
    model = MODELS["digits"]().double()
    whole, stages = copy.deepcopy(model), cut(model, 3, 8)
    x, y = padded("digits", 4, 2, torch.float64)
    parties = [
        private(name, stage, ghost=ghost) if name in who else plain(name, stage)
        for name, stage in zip(("bottom", "middle", "head"), stages, strict=True)
    ]
    notes = {party.name: watched(party) for party in parties if isinstance(party, PrivateLearner)}
    for party in parties:
        if isinstance(party, PrivateLearner):
            party.allow(last=True)
    u_shaped(*parties, x, y)
    for party in parties:
        if party.name in notes:
            names = [name for name, _ in party.stage.named_parameters()]
            assert_near(notes[party.name][0], clipped_sum(whole, names, x, y, 0.5), 1e-10)


class World:
    """A client with a private bottom and a private top, on Poisson batches of one account."""

    def __init__(self, *, budget: Budget | None = None, framed: bool = False, noise: float = 1.0, **options: Any):
        torch.manual_seed(5)
        self.x, self.y = torch.randn(40, 6), torch.randint(0, 3, (40,))
        self.model = mlp(6, 3, (5, 4))
        bottom, top = cut(self.model, 2)
        options = {"rate": 0.1, "steps": 40, "seed": 0, **options}
        expected = options["rate"] * 40
        self.client = private("client", bottom, noise=noise, expected_batch_size=expected, seed=1)
        self.server = private("server", top, noise=noise, expected_batch_size=expected, seed=1)
        self.wire = wire(self.server)
        self.seen = self.wire.party if framed else self.server
        self.budget = budget or Budget()
        self.account = opened(self.budget, self.client, self.server)
        self.batches = PoissonBatches(
            self.x, self.y, account=self.account, parties=[self.client, self.server], **options
        )  # fmt: skip

    def epoch(self) -> None:
        for x, y in self.batches:
            vanilla(self.client, self.seen, x, y)

    def weights(self) -> Sums:
        return {**self.client.weights(), **self.server.weights()}


def opened(budget: Budget, *parties: Any) -> Account:
    return budget.account("users", "client", "add or remove one sample", model="central", shaped_by=parties)


def same(a: Sums, b: Sums) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("physical", [None, 2])
def test_framed_and_in_process_are_equal(physical: int | None) -> None:
    worlds = [World(framed=framed, physical=physical) for framed in (False, True)]
    for world in worlds:
        world.epoch()
    assert same(worlds[0].weights(), worlds[1].weights())
    assert worlds[0].client.steps == 10


def test_weights_are_named_and_placed_as_those_of_a_plain_stage() -> None:
    world = World()
    world.epoch()
    (bottom, _) = cut(mlp(6, 3, (5, 4)), 2)
    other = Learner("plain", bottom)
    other.load_weights(world.client.weights())
    assert torch.equal(other.predict(world.x), world.client.predict(world.x))
    world.client.load_weights(other.weights())


def test_an_encoder_copies_a_private_stage_and_trains_nothing() -> None:
    world = World()
    world.epoch()
    encoder = Encoder(world.client.stage)
    x = world.x[:3].clone().requires_grad_()
    z = encoder(x)
    assert torch.equal(z.detach(), world.client.predict(world.x[:3]))
    z.sum().backward()
    assert x.grad is not None
    world.epoch()
    assert not torch.equal(encoder(world.x[:3]), world.client.predict(world.x[:3]))


def test_predict_leaves_no_trace_between_forward_and_backward() -> None:
    found = []
    for peeks in (False, True):
        world = World()
        for x, y in world.batches:
            z = world.client.forward(x)
            if peeks:
                world.client.predict(world.x)
                world.server.predict(world.client.predict(world.x[:3]))
            _, g = world.server.learn(z, y)
            if peeks:
                world.client.predict(world.x[:2])
            assert g is not None
            world.client.backward(g)
        found.append(world.weights())
    assert same(*found)


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_an_abandoned_step_leaves_nothing_behind(ghost: bool) -> None:
    found = []
    for lost in (0, 1, 3):
        torch.manual_seed(0)
        bottom, top = cut(MODELS["digits"](), 3)
        party, above = private("bottom", bottom, noise=1.0, ghost=ghost), plain("top", top)
        for _ in range(lost):
            party.allow(last=True)
            party.forward(torch.rand(lost + 1, 1, 8, 8))
        if lost == 1:
            party.abandon()
            assert all("activations" not in layer.__dict__ for layer in bottom.modules())
        torch.manual_seed(1)
        party.allow(last=True)
        vanilla(party, above, *padded("digits", 4, 1, torch.float32))
        found.append(party.weights())
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_an_abandoned_batch_lets_no_other_one_in() -> None:
    bottom, top = cut(MODELS["mlp"](), 2)
    party, above = private("bottom", bottom), plain("top", top)
    party.allow(last=True)
    party.forward(torch.rand(2, 6))
    party.abandon()
    with pytest.raises(ValueError, match="holds for samples drawn by chance"):
        vanilla(party, above, *padded("mlp", 2, 0, torch.float32))


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
@pytest.mark.parametrize("left_at", ["after a part", "before the step of a part"])
def test_an_unfinished_poisson_batch_never_enters_the_step_of_the_next(left_at: str, ghost: bool) -> None:
    # Two batches under one draw of noise would count a sample twice that is in both.
    model = MODELS["mlp"]().double()
    whole, (bottom, top) = copy.deepcopy(model), cut(model, 2)
    party, above = private("bottom", bottom, ghost=ghost), plain("top", top)
    notes = watched(party)
    x, y = padded("mlp", 6, 0, torch.float64)
    party.allow(first=True, last=False)
    if left_at == "after a part":
        vanilla(party, above, x[:2], y[:2])
    else:
        party.forward(x[:2])
    for first, rows in ((True, slice(0, 3)), (False, slice(3, 6))):
        party.allow(first=first, last=not first)
        vanilla(party, above, x[rows], y[rows])
    assert len(notes) == 1
    assert_near(notes[0], clipped_sum(whole, list(dict(bottom.named_parameters())), x, y, 0.5), 1e-10)


def test_a_part_that_was_lost_on_the_way_does_not_shift_the_noised_step() -> None:
    world = World(physical=2)
    notes = watched(world.server)
    lost = 0
    for number, (x, y) in enumerate(world.batches):
        if number == 1:  # the wire breaks before the server has it
            lost += 1
            world.client.forward(x)
            world.client.abandon()
            continue
        before = world.server.steps
        vanilla(world.client, world.server, x, y)
        parts = math.ceil(world.batches.capacity / 2)
        assert world.server.steps - before == (number % parts == parts - 1)
    assert lost == 1
    assert len(notes) == world.client.steps == world.server.steps == 10


def test_sessions_of_a_private_stage_take_turns_and_one_does_not_give_up_the_others_step() -> None:
    bottom, top = cut(MODELS["mlp"]().double(), 2)
    server = private("server", top)
    one, other = server.session("one"), server.session("other")
    server.allow(last=True)
    z = one.forward(Learner("client", bottom).forward(torch.rand(3, 6, dtype=torch.float64)))
    other.abandon()
    one.backward(torch.ones_like(z))
    assert one.steps == 1
    with pytest.raises(ValueError, match="got one from elsewhere"):
        other.learn(torch.rand(3, 5, dtype=torch.float64), torch.tensor([0, 1, 2]))


def test_resuming_from_a_checkpoint_is_bit_equal_to_an_uninterrupted_run(tmp_path: Path) -> None:
    def run(epochs: Sequence[int], path: Path) -> tuple[Sums, str, float]:
        for upto in epochs:
            world = World(physical=2, budget=Budget(50.0, 1e-5, by="rdp"))
            state = {"c": world.client, "s": world.server, "b": world.batches, "budget": world.budget}

            def epoch(world: World = world) -> float:
                world.epoch()
                return 0.0

            fit(epoch, epochs=upto, state=state, checkpoint=path)
        return world.weights(), str(world.budget), world.account.slack

    whole, resumed = run([4], tmp_path / "whole"), run([1, 3, 4], tmp_path / "resumed")
    assert same(whole[0], resumed[0])
    assert whole[1:] == resumed[1:]
    assert "40 ×" in whole[1]


def test_no_state_is_taken_in_the_middle_of_a_poisson_batch_and_a_loaded_one_voids_it() -> None:
    world = World(physical=2)
    saved = world.client.state_dict()
    parts = iter(world.batches)
    x, y = next(parts)
    with pytest.raises(ValueError, match="end of a Poisson batch"):
        world.client.state_dict()
    vanilla(world.client, world.server, x, y)
    with pytest.raises(ValueError, match="end of a Poisson batch"):
        world.client.state_dict()
    world.client.load_state_dict(saved)
    assert all(parameter.summed_grad is None for parameter in world.client.stage.parameters())
    world.client.state_dict()
    with pytest.raises(ValueError, match="got one from elsewhere"):
        vanilla(world.client, world.server, x, y)


def test_the_loop_of_plain_training_runs_it() -> None:
    world = World()
    history = fit(
        epochs_of(lambda x, y: vanilla(world.client, world.server, x, y), world.batches),  # type: ignore[arg-type]
        epochs=2,
    )
    assert len(history.losses) == 2
    assert world.account.releases.total() == 20


# What is refused


class _Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x - x.mean(0))


class _Tokens(nn.Module):
    """Folds a sequence into the batch, so that a layer sees tokens for samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(-1, 2)).reshape(len(x), 6)


class _Past(nn.Module):
    """Uses a weight past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) @ self.fc.weight


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
@pytest.mark.parametrize(
    ("layer", "told"),
    [(_Mixing, "depends on other samples"), (_Tokens, "per-sample gradients of"), (_Past, "by calling the layer")],
)
def test_a_stage_whose_samples_cannot_be_clipped_apart_is_refused_at_its_first_step(
    layer: Callable[[], nn.Module], told: str, ghost: bool
) -> None:
    stage = nn.Sequential(layer(), nn.Tanh())
    party, above = private("bottom", stage, ghost=ghost), plain("top", nn.Linear(6, 3))
    before = party.weights()
    party.allow(last=True)
    with pytest.raises(ValueError, match=told):
        vanilla(party, above, torch.rand(4, 6), torch.tensor([0, 1, 2, 0]))
    assert same(before, party.weights())


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_a_layer_that_is_unfrozen_later_is_not_trained_unclipped(ghost: bool) -> None:
    stage = mlp(6, 3, (5,))
    stage.fc1.requires_grad_(False)
    party = private("top", stage, ghost=ghost)
    party.allow(last=True)
    party.learn(torch.rand(2, 6), torch.tensor([0, 1]))
    stage.fc1.requires_grad_(True)
    party.allow(last=True)
    with pytest.raises(ValueError, match=r"got fc1\.bias, fc1\.weight frozen or unfrozen since"):
        party.learn(torch.rand(2, 6), torch.tensor([0, 1]))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "batch norm": (
        lambda: private("p", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))),
        "each sample on its own, which ε for one sample rests on; batch norm '1'",
    ),
    "batch norm without weights": (
        lambda: private("p", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False))),
        "each sample on its own.*batch norm '1' goes by the batch",
    ),
    "penalty": (lambda: private("p", nn.Linear(3, 2), guard=Penalising()), "guard without a penalty.*no per-sample"),
    "no noise": (lambda: private("p", nn.Linear(3, 2), noise=0.0), "noise multiplier .* above 0"),
    "infinite noise": (lambda: private("p", nn.Linear(3, 2), noise=math.inf), "finite noise multiplier"),
    "no clip": (lambda: private("p", nn.Linear(3, 2), clip=0.0), "finite clip above 0"),
    "no expected size": (lambda: private("p", nn.Linear(3, 2), expected_batch_size=0), "expected batch size above 0"),
    "frozen": (lambda: private("p", nn.Linear(3, 2).requires_grad_(False)), "got no optimizer or frozen"),
    "no optimizer": (
        lambda: PrivateLearner(
            "p", nn.Linear(3, 2), None, clip=1, noise_multiplier=1, expected_batch_size=1  # type: ignore[arg-type]
        ),
        "got no optimizer",
    ),
    "part of the parameters": (
        lambda: PrivateLearner(
            "p", (stage := mlp(3, 2, (4,))), torch.optim.SGD(stage.fc2.parameters(), lr=1.0), clip=1.0,
            noise_multiplier=1.0, expected_batch_size=1,
        ),
        r"all trainable parameters .* none for fc1\.weight, fc1\.bias",
    ),
    "replica": (lambda: private("p", nn.Linear(3, 2)).replica("q"), "one account for each private party"),
}  # fmt: skip


class Penalising(Guard):
    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        return z.square().mean()


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_proof_is_refused(case: str) -> None:
    make, told = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){told}"):
        make()


@pytest.mark.parametrize("protocol", ["learn", "backward"])
def test_a_step_outside_of_poisson_batches_is_refused_for_its_amplification(protocol: str) -> None:
    bottom, top = cut(MODELS["mlp"](), 2)
    party = private("p", top if protocol == "learn" else bottom)
    other = plain("o", bottom if protocol == "learn" else top)
    client, server = (other, party) if protocol == "learn" else (party, other)
    before = party.weights()
    for x, y in Batches(torch.rand(8, 6), torch.zeros(8, dtype=torch.int64), batch_size=4):
        with pytest.raises(ValueError, match="drawn by chance and in secret, and for no other loader"):
            vanilla(client, server, x, y)
    assert same(before, party.weights())


def test_a_spent_budget_stops_in_good_order_before_the_batch() -> None:
    release = GaussianRelease(1 / math.sqrt(2), 0.1)
    limit = epsilon({release: 13}, 1e-5, by="rdp") + 1e-2  # between those of 13 and of 14 steps, overflow included
    assert limit < epsilon({release: 14}, 1e-5, by="rdp")
    world = World(budget=Budget(limit, 1e-5, by="rdp"))

    def epoch() -> float:
        world.epoch()
        return 0.0

    history = fit(epoch, epochs=9)
    assert world.account.releases == {GaussianRelease(joint_noise_multiplier([1.0, 1.0]), 0.1): 13}
    assert world.client.steps == world.server.steps == 13
    assert "expected at most ε=" in history.stopped_by
    assert world.account.epsilon <= limit
    with pytest.raises(BudgetExceeded):
        next(iter(world.batches))
    with pytest.raises(ValueError, match="got one from elsewhere"):  # nothing was allowed with it
        world.server.learn(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))


# Poisson batches


def drawn(batches: PoissonBatches, epochs: int) -> Tensor:
    """Which samples (numbered by their first feature, from 1) are in each batch, [batches, samples]."""
    rows = []
    for _ in range(epochs):
        for x, y in batches:
            real = y != PADDING
            assert not x[~real].any()
            rows.append(torch.bincount(x[real, 0].long() - 1, minlength=len(batches.x)))
    return torch.stack(rows)


def numbered(rate: float, samples: int = 40, **options: Any) -> PoissonBatches:
    x = torch.arange(1.0, samples + 1).unsqueeze(1).expand(-1, 2).contiguous()
    party = private("party", nn.Linear(2, 3), noise=1.0, expected_batch_size=rate * samples)
    options = {"steps": 10, "account": opened(Budget(), party), "seed": 0, **options}
    return PoissonBatches(x, torch.zeros(samples, dtype=torch.int64), rate=rate, parties=[party], **options)


def test_each_sample_takes_part_with_the_rate_and_on_its_own() -> None:
    rate, samples = 0.1, 40
    found = drawn(numbered(rate, samples, steps=3000), 300).double()
    steps = len(found)
    assert steps == 3000
    assert found.max() == 1
    # Standard errors of a mean of yes and no; 5 of them, since the greatest of 40 (and of 780 pairs) is looked at.
    error = math.sqrt(rate * (1 - rate) / steps)
    assert (found.mean(0) - rate).abs().max() < 5 * error
    covariance = torch.cov(found.T)
    pairs = covariance[~torch.eye(samples, dtype=torch.bool)]
    assert pairs.abs().max() < 5 * rate * (1 - rate) / math.sqrt(steps)
    # A binomial size: fixed-size or shuffled batches have another variance. Its standard error is about √(2/n) of it.
    variance = samples * rate * (1 - rate)
    assert abs(found.sum(1).var() / variance - 1) < 4 * math.sqrt(2 / steps) + 0.01
    after = (found[1:] * found[:-1]).mean()  # the next batch is drawn anew
    assert abs(after - rate**2) < 5 * rate / math.sqrt(found[1:].numel())


def test_batches_follow_their_seed_and_differ_between_epochs() -> None:
    one = drawn(numbered(0.1, seed=1, steps=20), 2)
    assert torch.equal(one, drawn(numbered(0.1, seed=1, steps=20), 2))
    assert not torch.equal(one, drawn(numbered(0.1, seed=2, steps=20), 2))
    assert not torch.equal(one[:10], one[10:])
    late = numbered(0.1, seed=2, steps=20)
    late.load_state_dict({"epoch": 1, "made": 10, "seed": 1, "entered": 0})  # the seed goes with the state
    assert torch.equal(drawn(late, 1), one[10:])


def test_everybody_always() -> None:
    batches = numbered(1.0)
    assert len(batches) == 1
    assert batches.capacity == 41  # room for one sample more, so that the frame does not tell
    assert batches.overflow == 0
    assert drawn(batches, 3).eq(1).all()
    assert batches.accounts[0].releases == {GaussianRelease(1.0): 3}
    assert batches.accounts[0].slack == 0


@pytest.mark.parametrize("physical", [None, 5])
def test_every_frame_is_of_one_shape_and_on_a_wire_of_one_size(physical: int | None) -> None:
    world = World(framed=True, physical=physical, capacity=10)
    sizes, real, before = set(), set(), {"up": 0, "down": 0}
    for x, y in world.batches:
        assert x.shape == (10 if physical is None else 5, 6)
        assert y.shape == (len(x),)
        real.add(int((y != PADDING).sum()))
        vanilla(world.client, world.seen, x, y)
        now = {way: sum(counts.values()) for way, counts in world.wire.meter.nbytes.items()}
        sizes.add((now["up"] - before["up"], now["down"] - before["down"]))
        before = now
    assert len(real) > 2  # so many samples, or so many
    assert len(sizes) == 1


def test_the_excess_over_the_capacity_is_dropped_at_random() -> None:
    batches = numbered(0.5, capacity=8, steps=800)
    found = drawn(batches, 400).double()
    assert found.sum(1).max() == 8
    # Nearly all batches are over it, and keep 8 of 40 at random; standard errors of 800 draws, the greatest of 40.
    assert (found.mean(0) - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 800)


def tail(samples: int, rate: float, above: int) -> float:
    """The probability that more than ``above`` of ``samples`` take part, term by term."""
    return math.fsum(
        math.comb(samples, k) * rate**k * (1 - rate) ** (samples - k) for k in range(above + 1, samples + 1)
    )


@pytest.mark.parametrize(("samples", "rate", "failure"), [(40, 0.1, 1e-3), (40, 0.5, 1e-6), (200, 0.05, 1e-30)])
def test_the_capacity_is_the_least_that_fails_as_seldom(samples: int, rate: float, failure: float) -> None:
    capacity = capacity_for(samples, rate, failure)
    assert tail(samples, rate, capacity) <= failure < tail(samples, rate, capacity - 1)


def test_overflow_is_the_binomial_tail_and_enters_delta() -> None:
    batches = numbered(0.1, capacity=12)
    # That of the greater neighbour, 41 samples; a binomial tail in double precision.
    assert batches.overflow == pytest.approx(tail(41, 0.1, 12), rel=1e-9)
    assert batches.overflow > tail(40, 0.1, 12)
    drawn(batches, 1)
    assert batches.accounts[0].slack == pytest.approx(10 * batches.overflow)
    tight = epsilon({GaussianRelease(1.0, 0.1): 10}, 1e-5)
    assert batches.accounts[0].epsilon == math.inf  # ten such overflows are more than δ
    roomy = numbered(0.1, capacity=20)
    drawn(roomy, 1)
    assert tight < roomy.accounts[0].epsilon < tight + 0.1
    found = roomy.accounts[0].epsilon
    left = 1e-5 - (1 + math.exp(found)) * 10 * tail(41, 0.1, 20)
    assert found == pytest.approx(epsilon({GaussianRelease(1.0, 0.1): 10}, left), abs=1e-6)


def test_the_capacity_left_open_spends_a_thousandth_of_delta() -> None:
    party = private("party", nn.Linear(2, 3), noise=1.0, expected_batch_size=4.0)
    account = opened(Budget(3.0, 1e-5), party)
    found = PoissonBatches(
        torch.rand(40, 2), torch.zeros(40, dtype=torch.int64), rate=0.1, account=account, parties=[party], steps=100
    )
    # Of the tail of one sample more, which is entered.
    assert (
        (1 + math.exp(3)) * 100 * found.overflow <= 1e-8 < (1 + math.exp(3)) * 100 * tail(41, 0.1, found.capacity - 1)
    )


def test_the_account_and_the_parties_must_be_those_of_the_steps() -> None:
    x, y = torch.rand(40, 2), torch.zeros(40, dtype=torch.int64)
    one, other = (private(name, nn.Linear(2, 2), expected_batch_size=4) for name in ("one", "other"))
    budget = Budget()
    account = opened(budget, one, other)

    def batches(**options: Any) -> PoissonBatches:
        settled = {"rate": 0.1, "account": account, "parties": [one, other], "steps": 10, **options}
        return PoissonBatches(x, y, **settled)

    alone = Budget().account("users", "client", "add or remove one sample", model="central", shaped_by=())
    local = Budget().account("users", "client", "add or remove one sample", shaped_by=[one])
    clients = Budget().account("users", "client", "add or remove one client", model="central", shaped_by=[one])
    batches()
    for options, told in [
        ({"parties": [one]}, "in this account, one, other, got one"),
        ({"parties": []}, "got none"),
        ({"account": opened(Budget(), one)}, "in this account, one, got one, other"),
        ({"account": alone}, "in this account, none"),
        ({"account": local, "parties": [one]}, "central account .* got a local one"),
        ({"account": clients, "parties": [one]}, "to add or remove one sample, .* to add or remove one client"),
        ({"rate": 0.2}, "batch size of all parties, about rate · samples = 8, got 4"),
        ({"rate": 0.0}, "rate above 0"),
        ({"rate": 1.1}, "at most 1"),
        ({"steps": 0}, "at least one step"),
        ({"capacity": 0}, "capacity of at least one row"),
        ({"physical": 0}, "at least one row at once"),
    ]:
        with pytest.raises(ValueError, match=told):
            batches(**options)
    with pytest.raises(ValueError, match="as many labels as samples"):
        PoissonBatches(x, y[:-1], rate=0.1, account=account, parties=[one, other], steps=1)


def test_a_plain_party_that_shapes_the_gradients_voids_the_account() -> None:
    bottom, top = cut(MODELS["mlp"](), 2)
    trained = Learner("server", top, torch.optim.SGD(top.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"got server, trained without privacy"):
        opened(Budget(), private("client", bottom), trained)


def test_without_amplification_each_step_is_entered_in_full_and_said() -> None:
    with pytest.warns(UserWarning, match="amplification by sampling is void for client against users"):
        batches = numbered(0.1, amplified=False)
    drawn(batches, 1)
    assert batches.accounts[0].releases == {GaussianRelease(1.0): 10}


def test_without_a_seed_noise_and_batches_are_drawn_by_chance() -> None:
    def weights(seed: int | None) -> Sums:
        torch.manual_seed(3)  # the stage's, which tells nothing of the noise
        party = private("party", nn.Linear(2, 3), noise=1.0, seed=seed)
        party.allow(last=True)
        party.learn(torch.zeros(2, 2), torch.full((2,), PADDING))
        return party.weights()

    assert same(weights(7), weights(7))
    assert not same(weights(None), weights(None))
    assert not same(weights(None), weights(0))
    assert numbered(0.1, seed=None).seed != numbered(0.1, seed=None).seed
    assert not torch.equal(drawn(numbered(0.1, seed=None), 1), drawn(numbered(0.1, seed=None), 1))


def test_the_planned_steps_are_a_cap_that_ends_training_in_good_order() -> None:
    world = World(steps=15)

    def epoch() -> float:
        world.epoch()
        return 0.0

    history = fit(epoch, epochs=9)
    assert len(history.losses) == 2  # ten steps, and the five that are left
    assert history.stopped_by == "all 15 steps that were planned are made"
    assert world.client.steps == world.server.steps == world.batches.made == world.account.releases.total() == 15
    with pytest.raises(TrainingStopped, match="all 15 steps"):
        next(iter(world.batches))


def samples_of(party: PrivateLearner, account: Account | Sequence[Account], **options: Any) -> PoissonBatches:
    """Batches of 40 samples for one party."""
    settled = {"rate": 0.1, "steps": 10, "seed": 0, "parties": [party], "account": account, **options}
    return PoissonBatches(torch.rand(40, 2), torch.zeros(40, dtype=torch.int64), **settled)


def test_steps_are_entered_into_every_account_that_the_parties_shape_and_none_is_left_out() -> None:
    budget, party = Budget(), private("party", nn.Linear(2, 3), noise=1.0)
    users, rivals = (
        budget.account(observer, "client", "add or remove one sample", model="central", shaped_by=[party])
        for observer in ("users", "rivals")
    )
    with pytest.raises(ValueError, match=r"all accounts that party shape, got none of client against rivals"):
        samples_of(party, users)
    with pytest.raises(ValueError, match="at least one account"):
        samples_of(party, [])
    batches = samples_of(party, [users, rivals])
    drawn_of = list(batches)
    assert len(drawn_of) == 10
    assert users.releases == rivals.releases == {GaussianRelease(1.0, 0.1): 10}
    assert users.slack == rivals.slack == pytest.approx(10 * batches.overflow)
    opened(Budget(), party)  # another budget counts for itself
    budget.account("late", "client", "add or remove one sample", model="central", shaped_by=[party])
    batches.made = 0
    with pytest.raises(ValueError, match="got none of client against late"):
        next(iter(batches))


def test_an_account_that_is_spent_stops_a_step_for_all() -> None:
    limit = epsilon({GaussianRelease(1.0, 0.1): 3}, 1e-5, by="rdp") + 1e-2
    budget, party = Budget(limit, 1e-5, by="rdp"), private("party", nn.Linear(2, 3), noise=1.0)
    users, rivals = (
        budget.account(observer, "client", "add or remove one sample", model="central", shaped_by=[party])
        for observer in ("users", "rivals")
    )
    rivals.spend(GaussianRelease(1.0, 0.1))
    batches = samples_of(party, [users, rivals])
    with pytest.raises(BudgetExceeded, match="against rivals"):
        list(batches)
    assert batches.made == 2
    assert rivals.releases.total() == 3


LOSSES: dict[str, tuple[Callable[[nn.Module], Learner], bool]] = {
    "a learner's default": (lambda top: Learner("server", top.requires_grad_(False)), False),
    "torch's module": (lambda top: Learner("server", top.requires_grad_(False), loss=nn.CrossEntropyLoss()), False),
    "of a private party": (lambda top: private("server", top, loss=nn.CrossEntropyLoss(ignore_index=PADDING)), False),
    "padding counts": (lambda top: private("server", top, loss=lambda o, _: (o + 9).square().sum()), False),
    "padded": (lambda top: plain("server", top.requires_grad_(False)), True),
    "padded, of a private party": (lambda top: private("server", top), True),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_that_does_not_add_up_over_samples_is_refused_by_name(case: str) -> None:
    bottom, top = cut(MODELS["mlp"](), 2)
    make, taken = LOSSES[case]
    client, server = private("client", bottom), make(top)
    parties = [one for one in (client, server) if isinstance(one, PrivateLearner)]
    account = opened(Budget(), client, server)

    def batches() -> PoissonBatches:
        y = torch.arange(40) % 3
        return PoissonBatches(torch.rand(40, 6), y, rate=0.1, account=account, parties=parties, steps=1)

    if taken:
        batches()
    else:
        with pytest.raises(ValueError, match=r"server: expected a loss that is the sum .* loss=PaddedCrossEntropy"):
            batches()


@pytest.mark.parametrize("sees", ["a party of the training", "an account of its frames"])
def test_an_observer_who_sees_who_is_in_a_batch_is_refused_amplification(sees: str) -> None:
    budget, bottom = Budget(), private("client", nn.Linear(2, 3), noise=1.0)
    observer = "server" if "party" in sees else "users"
    frozen = plain(observer if "party" in sees else "head", nn.Linear(3, 3).requires_grad_(False))
    account = budget.account(
        observer, "client", "add or remove one sample", model="central", shaped_by=[bottom, frozen]
    )
    if "party" not in sees:
        budget.account(observer, "client", "replace one sample", shaped_by=())
    with pytest.raises(ValueError, match=rf"got {observer}, .* frames of single samples.*: amplification .* is void"):
        samples_of(bottom, account)
    with pytest.warns(UserWarning, match=f"void for client against {observer}"):
        batches = samples_of(bottom, account, amplified=False)
    next(iter(batches))
    assert account.releases == {GaussianRelease(1.0): 1}


def test_a_run_is_resumed_with_its_budget_and_its_secret_seeds_or_not_at_all(tmp_path: Path) -> None:
    def run(world: World, epochs: int, *, budget: bool = True, path: Path | None = None) -> Sums:
        state = {
            "c": world.client,
            "s": world.server,
            "b": world.batches,
            **({"budget": world.budget} if budget else {}),
        }

        def epoch() -> float:
            world.epoch()
            return 0.0

        fit(epoch, epochs=epochs, state=state, checkpoint=path)
        return world.weights()

    for budget in (True, False):
        first = World(seed=None)
        run(first, 1, budget=budget, path=tmp_path / f"{budget}")
        run(first, 1)  # goes on in the same process
        second = World(seed=None)
        if budget:
            assert same(run(second, 2, path=tmp_path / "True"), first.weights())
            assert second.account.releases == first.account.releases
            assert second.batches.state_dict() == first.batches.state_dict()
        else:
            with pytest.raises(ValueError, match=r"the 10 steps of .* got 0; resume with the budget too"):
                run(second, 2, budget=False, path=tmp_path / "False")
            assert second.account.releases.total() == 0


def test_a_batch_larger_than_its_capacity_is_no_more_likely_than_delta() -> None:
    x, y, party = torch.rand(40, 2), torch.zeros(40, dtype=torch.int64), private("party", nn.Linear(2, 3), noise=1.0)
    with pytest.raises(ValueError, match=r"probability below δ = 1e-05, got capacity=12, exceeded with 0\.000"):
        PoissonBatches(x, y, rate=0.1, account=opened(Budget(5.0), party), parties=[party], steps=1, capacity=12)
    PoissonBatches(x, y, rate=0.1, account=opened(Budget(5.0), party), parties=[party], steps=1, capacity=16)


@pytest.mark.parametrize("ghost", [False, True], ids=["per-sample", "ghost"])
def test_a_batch_of_other_rows_than_were_handed_out_is_refused(ghost: bool) -> None:
    party = private("party", nn.Linear(2, 3), noise=1.0, ghost=ghost)
    before = party.weights()
    x, y = next(iter(samples_of(party, opened(Budget(), party), capacity=20)))
    with pytest.raises(ValueError, match="party: expected the 20 rows that PoissonBatches handed out, got 19"):
        party.learn(x[1:], y[1:])
    assert same(party.weights(), before)
    with pytest.raises(ValueError, match="got one from elsewhere"):  # and the permission is used up
        party.learn(x, y)


def test_the_best_state_put_back_draws_neither_noise_nor_samples_twice() -> None:
    world = World()
    scores = iter([1.0, 0.0])

    def epoch() -> float:
        world.epoch()
        return 0.0

    fit(epoch, epochs=2, state={"c": world.client, "b": world.batches}, validate=lambda: next(scores), patience=9)
    other = World()
    other.epoch()
    assert same(world.client.weights(), other.client.weights())  # the best is back
    here, there = (one.client.state_dict() for one in (world, other))
    assert not torch.equal(here["rng"]["cpu"], there["rng"]["cpu"])
    assert (world.batches.epoch, world.batches.made) == (2, 20)


def test_noise_multipliers_join_by_hand() -> None:
    assert joint_noise_multiplier([1.7]) == pytest.approx(1.7)
    assert joint_noise_multiplier([3.0, 4.0]) == pytest.approx(2.4)  # 1/9 + 1/16 = 25/144
    assert joint_noise_multiplier([2.0, 2.0, 2.0, 2.0]) == pytest.approx(1.0)
    bottom, top = cut(MODELS["mlp"](), 2)
    parties = [private(n, s, noise=m, clip=c) for n, s, m, c in (("b", bottom, 3.0, 0.1), ("t", top, 4.0, 9.0))]
    batches = PoissonBatches(
        torch.rand(40, 6), torch.zeros(40, dtype=torch.int64), rate=0.1, account=opened(Budget(), *parties),
        parties=parties, steps=1,
    )  # fmt: skip
    assert isinstance(batches.release, GaussianRelease)
    assert batches.release.noise_multiplier == pytest.approx(2.4)  # whatever the clips are
    assert batches.release.sampling == 0.1
