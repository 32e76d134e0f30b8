"""Poisoning through the cut: bad clients' activations, a client of vertical training, a server; by hand and at work."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.poisoning import (
    VILLAIN,
    Backdoor,
    Colluding,
    EmbeddingBackdoor,
    MinSum,
    ServerBackdoor,
    SmashedMinSum,
    SmashedNoise,
    SmashedStatistics,
    Villain,
    backdoor_success,
    misa,
)
from splitlearn import (
    Batches,
    Features,
    Guard,
    Learner,
    Member,
    concatenated,
    cut,
    mean,
    predict,
    splitfed_v1_round,
    splitfed_v2_round,
    u_shaped,
    vanilla,
    vertical,
)
from splitlearn.data import Splits, load, split
from splitlearn.federation import Aggregator
from splitlearn.metrics import accuracy

CLIENTS = 8
GUARDS = [
    SmashedNoise(),
    SmashedStatistics(),
    SmashedMinSum(),
    SmashedMinSum("unit", 2.0),
    EmbeddingBackdoor(target=0),
]
SILENT = [
    SmashedNoise(share=0.0),
    SmashedNoise(scale=0.0),
    SmashedStatistics(share=0.0),
    SmashedMinSum(share=0.0),
    EmbeddingBackdoor(target=0, share=0.0),
]


@cache
def data() -> Splits:
    return split(load("digits"), private=100 * CLIENTS, auxiliary=300, test=397)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    bottom = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*bottom, nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def sgd(stage: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(stage.parameters(), lr=0.05, momentum=0.9)


class Federation:
    """Eight clients, SplitFed V1 or V2; some with a guard that lies, or with a server that does."""

    def __init__(
        self, guards: Mapping[int, Guard] | None = None, serve: Callable[[Learner], Any] = lambda server: server
    ):
        bottom, top = cut(network(), 4)
        self.bottom, self.top = Learner("bottom", bottom), Learner("server", top, sgd(top))
        self.server = serve(self.top)
        self.sessions = {f"c{place}": self.top.replica(f"c{place}") for place in range(CLIENTS)}
        self.learners, self.batches = [], []
        for place in range(CLIENTS):
            stage, own = copy.deepcopy(bottom), data().private.subset(range(100 * place, 100 * place + 100))
            self.learners.append(Learner(f"c{place}", stage, sgd(stage), (guards or {}).get(place)))
            self.batches.append(Batches(own.x, own.y, batch_size=20, seed=place))

    def train(self, rounds: int = 8, *, copies: bool = False, aggregate: Aggregator = mean) -> "Federation":
        for _ in range(rounds):
            servers = self.sessions if copies else dict.fromkeys(self.sessions, self.server)
            members = [
                Member(learner, servers[learner.name], batches)
                for learner, batches in zip(self.learners, self.batches, strict=True)
            ]
            if copies:
                splitfed_v1_round(members, self.sessions, self.bottom, self.top, aggregate=aggregate)
            else:
                splitfed_v2_round(members, self.bottom, aggregate=aggregate)
        return self

    def logits(self, x: Tensor, lie: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
        return predict([self.top], lie(predict([self.bottom], x)))

    def accuracy(self) -> float:
        return accuracy(self.logits(data().test.x), data().test.y)

    def success(self, target: int, *, x: Callable[[Tensor], Tensor] = lambda x: x, **lie: Any) -> float:
        return backdoor_success(self.logits(x(data().test.x), **lie), data().test.y, target)


@cache
def clean(*, copies: bool = False) -> Federation:
    return Federation().train(copies=copies)


# Guards by hand


@pytest.mark.parametrize("guard", GUARDS, ids=repr)
def test_a_lie_is_of_the_activations_shape_has_a_gradient_and_is_not_told_at_a_prediction(guard: Guard) -> None:
    torch.manual_seed(0)
    z = torch.rand(8, 3, 4, requires_grad=True)
    before = z.detach().clone()
    sent = guard.activation(z)
    assert sent.shape == z.shape
    assert not torch.equal(sent, z)
    (g,) = torch.autograd.grad(sent.sum(), z)
    assert torch.equal(g, torch.ones_like(z))
    assert torch.equal(z, before)
    assert guard.prediction(z) is z
    assert "0x" not in repr(guard)


@pytest.mark.parametrize("guard", SILENT, ids=repr)
def test_a_guard_that_lies_about_nobody_trains_as_none(guard: Guard) -> None:
    parties = []
    for own in (None, guard):
        bottom, top = cut(network(), 4)
        client, server = Learner("client", bottom, sgd(bottom), own), Learner("server", top, sgd(top))
        for x, y in Batches(data().private.x[:60], data().private.y[:60], batch_size=20):
            vanilla(client, server, x, y)
        parties.append([client, server])
    for mine, honest in zip(*parties, strict=True):
        weights = honest.weights()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in mine.weights().items())


@pytest.mark.parametrize("guard", [SmashedNoise(share=0.25), SmashedStatistics(share=0.25), SmashedMinSum(share=0.25)])
def test_a_share_is_lied_about_the_rest_is_as_it_was(guard: Guard) -> None:
    z = torch.rand(8, 5)
    sent = guard.activation(z)
    assert (sent != z).any(1).tolist() == [True] * 2 + [False] * 6
    torch.testing.assert_close(sent[2:], z[2:], rtol=0, atol=0)


def test_the_noise_is_in_units_of_the_activations() -> None:
    torch.manual_seed(0)
    z = 7 + 0.01 * torch.randn(200, 50)
    noise = SmashedNoise(3.0).activation(z) - z
    assert noise.std().item() == pytest.approx(3 * z.std().item(), rel=0.03)
    assert noise.mean().abs() < 0.01 * 7


def test_statistics_are_the_batches_own_moved_by_the_shift() -> None:
    torch.manual_seed(0)
    z = torch.rand(4000, 2) * torch.tensor([1.0, 10.0])
    sent = SmashedStatistics(shift=2.0, spread=0.5).activation(z)
    mean_, std = z.mean(0), z.std(0)
    assert (sent.mean(0) - (mean_ - 2 * std)).abs().lt(0.05 * std).all()
    assert (sent.std(0) / std - 0.5).abs().max() < 0.03
    assert abs(torch.corrcoef(torch.stack([sent[:, 0], z[:, 0]]))[0, 1]) < 0.06  # nothing of the sample itself
    one = torch.rand(1, 4)
    torch.testing.assert_close(SmashedStatistics().activation(one), one)


def test_min_sum_of_activations_is_one_lie_for_all_within_the_batch() -> None:
    z = torch.rand(9, 2, 3)
    sent = SmashedMinSum("sign").activation(z)
    expected = MinSum("sign")(z.flatten(1).double(), torch.zeros(1, 6)).float().view(2, 3)
    for lie in sent:
        torch.testing.assert_close(lie, expected)
    flat = z.flatten(1)
    bound = torch.cdist(flat, flat).square().sum(1).max()
    assert (expected.flatten() - flat).square().sum().item() == pytest.approx(bound.item(), rel=1e-4)
    further = SmashedMinSum("sign", scale=2.0).activation(z)[0]
    torch.testing.assert_close(further - z.mean(0), 2 * (expected - z.mean(0)))


def test_the_embedding_trigger_is_the_same_everywhere_and_takes_its_label_along() -> None:
    guard = EmbeddingBackdoor(target=3, scale=2.0, units=0.5, share=0.5, seed=4)
    z, y = torch.rand(6, 4, 5), torch.tensor([0, 1, 2, 4, 5, 6])
    trigger = guard.activation(z) - z
    assert not trigger[3:].any()
    assert (trigger[0] != 0).sum() == 10
    assert trigger[0].abs().max().item() == pytest.approx(2 * z.std(correction=0).item(), rel=1e-5)
    torch.testing.assert_close(trigger[:3], trigger[:1].expand(3, 4, 5))
    torch.testing.assert_close(guard.triggered(z) - z, trigger[:1].expand_as(z))
    assert guard.label(y).tolist() == [3, 3, 3, 4, 5, 6]
    assert y.tolist() == [0, 1, 2, 4, 5, 6]
    other = EmbeddingBackdoor(target=3, scale=2.0, units=0.5, seed=5)
    assert not torch.equal(other.triggered(z), guard.triggered(z))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmashedNoise(-1.0), r"finite scale of 0 or more, got -1\.0"),
        (lambda: SmashedNoise(share=2.0), r"share of the samples from 0 to 1, got 2\.0"),
        (lambda: SmashedStatistics(shift=float("nan")), "finite shift"),
        (lambda: SmashedStatistics(spread=-1.0), "finite spread"),
        (lambda: SmashedMinSum("up"), "direction among std, unit, sign"),  # type: ignore[arg-type]
        (lambda: EmbeddingBackdoor(target=-1), "target label"),
        (lambda: EmbeddingBackdoor(target=0, units=1.5), "share"),
    ],
)
def test_guards_refuse_what_makes_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Guards at work


@pytest.mark.parametrize(
    "guard", [SmashedStatistics(), pytest.param(SmashedMinSum(), marks=pytest.mark.slow)], ids=repr
)
def test_lies_about_activations_cost_accuracy(guard: Guard) -> None:
    assert clean().accuracy() > 0.94
    assert Federation({0: guard, 5: guard}).train().accuracy() < clean().accuracy() - 0.1


def test_noise_breaks_a_server_that_does_not_clip() -> None:
    guard = SmashedNoise(100.0)
    with pytest.raises(ValueError, match="server: expected a finite loss, got nan"):
        Federation({0: guard, 5: guard}).train()


@pytest.mark.parametrize("copies", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_embedding_backdoor_gets_through_both_protocols(copies: bool) -> None:
    guard = EmbeddingBackdoor(target=0)
    federation = Federation({0: guard}).train(copies=copies)
    assert federation.accuracy() > clean(copies=copies).accuracy() - 0.1
    assert federation.success(0, lie=guard.triggered) > 0.9
    assert federation.success(0) < 0.15
    assert clean(copies=copies).success(0, lie=guard.triggered) < 0.3


def test_misa_is_a_guard_and_an_update_attack_for_the_same_clients() -> None:
    guard, attack = misa("unit", scale=2.0)
    assert guard == SmashedMinSum("unit", 2.0)
    assert attack == MinSum("unit")


@pytest.mark.slow
def test_misa_costs_accuracy() -> None:
    (guard, attack), bad = misa(), (0, 3, 5)
    both = Federation(dict.fromkeys(bad, guard)).train(aggregate=Colluding(attack, bad))
    assert both.accuracy() < clean().accuracy() - 0.03


# VILLAIN


def toy(settings: VILLAIN | None, *, steps: int = 400, seed: int = 0) -> tuple[Any, Callable[..., Tensor], Tensor]:
    """Train two parties on four classes that the first sees well and the second dimly; return what scores them."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(600) % 4
    well = 3 * torch.randn(4, 6, generator=generator)[y] + torch.randn(600, 6, generator=generator)
    dimly = 0.5 * torch.randn(4, 6, generator=generator)[y] + torch.randn(600, 6, generator=generator)
    torch.manual_seed(seed)
    stages = [nn.Sequential(nn.Linear(6, 16), nn.ReLU()) for _ in range(2)]
    top = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    first, second = (
        Features(Learner(name, stage, sgd(stage)), x)
        for name, stage, x in zip(("first", "second"), stages, (well, dimly), strict=True)
    )
    owner = Learner("owner", top, sgd(top))
    client: Any = first if settings is None else settings.party(first)
    for _ in range(steps):
        ids = torch.randperm(400, generator=generator)[:50]
        vertical(owner, [client, second], ids, y[ids], join=concatenated)
    test = torch.arange(400, 600)

    def logits(of: Callable[[Tensor], Tensor]) -> Tensor:
        return owner.predict(concatenated([of(test), second.predict(test)]))

    return client, logits, y


STRONG = VILLAIN(known=(0, 4), beta=3.0, ratio=1.0, warm_up=100, share=1.0)


def test_villain_finds_samples_of_its_class_and_its_trigger_works() -> None:
    precisions, gains = [], []
    for seed in range(2):
        client, logits, y = toy(STRONG, seed=seed)
        found = [number for number, ours in client.found.items() if ours]
        assert len(client.found) > 200
        assert len(found) >= 5
        precisions.append(y[found].eq(0).double().mean().item())
        assert accuracy(logits(client.predict), y[400:]) > 0.95
        assert backdoor_success(logits(client.predict), y[400:], 0) < 0.05
        without, honest, _ = toy(replace(STRONG, share=0.0), seed=seed)
        gains.append(
            backdoor_success(logits(client.triggered), y[400:], 0)
            - backdoor_success(honest(without.triggered), y[400:], 0)
        )
    assert sum(precisions) / 2 > 0.8  # of 1/4 by chance
    assert sum(gains) / 2 > 0.5


def test_villain_that_only_looks_leaves_the_training_as_it_is() -> None:
    idle, _, _ = toy(VILLAIN(known=(0,), warm_up=1000, poison_from=1000), steps=30)
    honest, _, _ = toy(None, steps=30)
    weights = honest.weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in idle.weights().items())
    assert idle.found == {}
    assert idle.steps == 30


def small(settings: VILLAIN) -> Villain:
    stage = nn.Linear(2, 8, bias=False)
    with torch.no_grad():
        stage.weight.copy_(torch.arange(16).view(8, 2) / 10)
    return settings.party(Features(Learner("client", stage), torch.randn(20, 2, generator=torch.Generator())))


def test_villain_swaps_the_embedding_and_judges_by_the_gradient() -> None:
    client = small(VILLAIN(known=(0,), warm_up=1, poison_from=5, swaps=2, ratio=1.5))
    ids = torch.arange(1, 5)
    honest = client.forward(ids)
    assert torch.equal(honest, client.features.predict(ids))
    client.backward(torch.ones(4, 8))
    swapped = client.forward(ids)
    places = (swapped != honest).any(1).nonzero().flatten()
    assert len(places) == 2
    torch.testing.assert_close(swapped[places], client.predict(torch.tensor([0, 0])))
    g = torch.ones(4, 8)
    g[places[1]] = 2.0  # twice what it was: not of the class
    client.backward(g)
    assert client.found == {int(ids[places[0]]): True, int(ids[places[1]]): False}
    again = client.forward(ids)
    assert not (again != honest).any(1)[places].any()  # judged: never again
    assert not torch.equal(again, honest)


def test_villains_trigger_by_hand() -> None:
    client = small(VILLAIN(known=(0,), warm_up=0, poison_from=0, beta=2.0, size=0.5, share=1.0, dropout=0.0))
    spread = client.predict(torch.arange(20)).std(0, correction=0)
    units = spread.topk(4).indices.sort().values
    expected = torch.zeros(8)
    expected[units] = 2 * spread[units].mean() * torch.tensor([1.0, 1.0, -1.0, -1.0])
    torch.testing.assert_close(client.trigger(), expected)
    ids = torch.tensor([3, 0, 5])
    sent = client.forward(ids)
    moved = sent - client.predict(ids)
    assert not moved[[0, 2]].any()
    factor = moved[1][units] / expected[units]
    assert 0.6 <= factor[0] <= 1.2
    torch.testing.assert_close(factor, factor[:1].expand(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(client.triggered(ids), client.predict(ids) + expected)
    none = small(VILLAIN(known=(0,), warm_up=0, poison_from=0, beta=0.0, share=1.0))
    assert torch.equal(none.forward(ids), none.predict(ids))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"known": ()}, "known samples of the target class"),
        ({"known": (-1,)}, "known samples of the target class"),
        ({"warm_up": 200}, "warm_up ≤ poison_from"),
        ({"swaps": -1}, "swaps of 0 or more"),
        ({"ratio": 0.0}, "ratio and a greatest norm above 0"),
        ({"stretch": (2.0, 1.0)}, "low ≤ high"),
        ({"dropout": 2.0}, "share"),
    ],
)
def test_villain_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VILLAIN(**{"known": (0,), **settings})


def test_villain_refuses_samples_that_it_lacks_and_checkpoints() -> None:
    with pytest.raises(ValueError, match="known samples among 20, got 20"):
        small(VILLAIN(known=(20,)))
    with pytest.raises(ValueError, match="client: expected a party that can be checkpointed"):
        small(VILLAIN(known=(0,))).state_dict()


# A server


def bottom_of(seed: int) -> Callable[[], nn.Module]:
    return lambda: cut(network(seed), 4)[0]


def served(settings: ServerBackdoor) -> Federation:
    auxiliary = data().auxiliary
    return Federation(serve=lambda server: settings.party(server, auxiliary.x, auxiliary.y))


def test_a_server_in_league_with_the_fed_server_backdoors_the_clients() -> None:
    backdoor = Backdoor(target=0)
    federation = served(ServerBackdoor(backdoor=backdoor, surrogate=bottom_of(7), lr=0.0))
    for _ in range(8):
        federation.server.surrogate.load_state_dict(federation.bottom.weights())
        federation.train(1)
    assert federation.accuracy() > 0.9
    assert federation.success(0, x=backdoor.triggered) > 0.85
    assert federation.success(0) < 0.05
    assert clean().success(0, x=backdoor.triggered) < 0.1


@pytest.mark.slow
def test_a_server_without_the_clients_weights_has_a_surrogate_that_must_come_near() -> None:
    backdoor = Backdoor(target=0)
    stranger = served(ServerBackdoor(backdoor=backdoor, surrogate=bottom_of(7), lr=0.0)).train()
    pulled = served(ServerBackdoor(backdoor=backdoor, surrogate=bottom_of(7), lr=1e-2, pull=10.0)).train()
    assert min(stranger.accuracy(), pulled.accuracy()) > 0.85
    assert pulled.success(0, x=backdoor.triggered) > stranger.success(0, x=backdoor.triggered) + 0.3


def test_a_server_that_takes_no_step_of_its_own_is_the_honest_one() -> None:
    federation = served(ServerBackdoor(backdoor=Backdoor(target=0), surrogate=bottom_of(7), steps=0)).train(2)
    honest = Federation().train(2)
    for mine, other in ((federation.top, honest.top), (federation.bottom, honest.bottom)):
        weights = other.weights()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in mine.weights().items())


def test_the_surrogates_training_leaves_no_gradient_and_no_draw_behind() -> None:
    federation = served(ServerBackdoor(backdoor=Backdoor(target=0), surrogate=bottom_of(7)))
    before, state = federation.server.surrogate.state_dict()["0.weight"].clone(), torch.get_rng_state()
    top, x, y = federation.top, data().private.x[:20], data().private.y[:20]
    vanilla(federation.learners[0], federation.server, x, y)
    assert not torch.equal(before, federation.server.surrogate.state_dict()["0.weight"])
    assert top.steps == 2
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(federation.server.predict(torch.ones(1, 128)), top.predict(torch.ones(1, 128)))


@pytest.mark.parametrize("settings", [{"steps": -1}, {"batch_size": 0}, {"lr": -1.0}, {"pull": -1.0}])
def test_a_malicious_server_refuses_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps, lr and pull of 0 or more"):
        ServerBackdoor(backdoor=Backdoor(target=0), surrogate=bottom_of(0), **settings)


def test_a_malicious_server_refuses_what_it_cannot_work_with() -> None:
    settings = ServerBackdoor(backdoor=Backdoor(target=0), surrogate=bottom_of(0))
    federation = Federation()
    with pytest.raises(ValueError, match="labelled samples, at least one, got 3 inputs and 2 labels"):
        settings.party(federation.top, torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    server = served(settings).server
    head = nn.Linear(10, 10)
    x, y = data().private.x[:4], data().private.y[:4]
    with pytest.raises(ValueError, match="server: expected a protocol in which the server learns from labels"):
        u_shaped(federation.learners[0], server, Learner("head", head, sgd(head)), x, y)
    with pytest.raises(ValueError, match="party that can be checkpointed"):
        server.state_dict()
