"""User-level averages: by hand, their noise, what is entered when, who takes part, and inside of rounds."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privacy.dp import (
    Account,
    Budget,
    BudgetExceeded,
    Clear,
    GaussianRelease,
    PaddedCrossEntropy,
    PrivateMean,
    epsilon,
    poisson_members,
)
from splitlearn import Learner, Member, cut, fedavg_round, splitfed_v1_round
from splitlearn.models import mlp

Weights = dict[str, Tensor]


def opened(budget: Budget | None = None, **options: Any) -> Account:
    options = {"adjacency": "add or remove one client", "model": "central", **options}
    return (budget or Budget()).account("members", "fed server", **{"shaped_by": (), **options})


def start() -> Weights:
    return {"w": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0]), "steps": torch.tensor(7)}


def members() -> list[Weights]:
    """One whose update (0.6, 0, 0.8) has a norm of 1, and one whose (0, 8, 6) has 10."""
    return [
        {"w": torch.tensor([1.6, 1.0]), "b": torch.tensor([0.8]), "steps": torch.tensor(9)},
        {"w": torch.tensor([1.0, 9.0]), "b": torch.tensor([6.0]), "steps": torch.tensor(1)},
    ]


def near(found: Weights, expected: Sequence[float]) -> bool:
    # A few float32 operations on numbers of about 1.
    return torch.allclose(torch.cat([found["w"], found["b"]]), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("clip", "expected_members", "expected"),
    [
        (2.0, 2.0, [1 + 0.3, 1 + 0.8, 0.4 + 0.6]),  # (0.6, 0, 0.8) whole and (0, 1.6, 1.2), over 2
        (2.0, 8.0, [1 + 0.075, 1 + 0.2, 0.1 + 0.15]),  # the divisor is the public number, never that of the members
        (0.5, 1.0, [1 + 0.3, 1 + 0.4, 0.4 + 0.3]),  # (0.3, 0, 0.4) and (0, 0.4, 0.3)
        (100.0, 1.0, [1 + 0.6, 1 + 8.0, 0.8 + 6.0]),  # none is clipped
    ],
)
def test_the_mean_of_clipped_updates_by_hand(clip: float, expected_members: float, expected: list[float]) -> None:
    aggregate = PrivateMean(clip, 0.0, expected_members, opened())
    given = members()
    before = copy.deepcopy((given, start()))
    origin = start()
    found = aggregate(given, [1000, 1], origin)  # the numbers of samples count for nothing
    assert near(found, expected)
    assert found["steps"] == 7  # an integer stays as it was
    for one, other in zip([*given, origin], [*before[0], before[1]], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    found["w"] += 1
    found["steps"] += 1
    assert torch.equal(origin["w"], before[1]["w"])
    assert origin["steps"] == 7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_member_with_what_is_no_number_counts_as_nothing(bad: float) -> None:
    spoiled = members()
    spoiled[1]["w"][0] = bad
    found = PrivateMean(2.0, 0.0, 2.0, opened())(spoiled, [1, 1], start())
    assert near(found, [1.3, 1.0, 0.4])


def test_an_update_as_great_as_floats_go_is_bounded_by_the_clip() -> None:
    huge = {**start(), "w": torch.tensor([3e38, -3e38])}
    found = PrivateMean(1.0, 0.0, 1.0, opened())([huge], [1], start())
    assert near(found, [1 + math.sqrt(0.5), 1 - math.sqrt(0.5), 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_has_its_spread_on_every_entry_whoever_takes_part(dtype: torch.dtype) -> None:
    origin = {"w": torch.zeros(100, 200, dtype=dtype), "b": torch.zeros(50, dtype=dtype)}
    aggregate = PrivateMean(0.5, 3.0, 4.0, opened())
    for taking_part in ([], [{"w": origin["w"] + 1e-3, "b": origin["b"]}]):
        found, again = (aggregate(taking_part, [1] * len(taking_part), origin) for _ in range(2))
        assert not torch.equal(found["w"], again["w"])
        noise = torch.cat([found["w"].flatten(), found["b"]]).double()
        assert found["w"].dtype is dtype
        # The standard errors of a standard deviation and of a mean over n numbers; the member's share is below both.
        assert abs(noise.std() / (3.0 * 0.5 / 4.0) - 1) < 4 / math.sqrt(2 * noise.numel())
        assert abs(noise.mean()) < 4 * 0.375 / math.sqrt(noise.numel())


def test_each_average_is_entered_before_it_is_made() -> None:
    limit = epsilon({GaussianRelease(2.0): 3}, 1e-5) + 1e-6
    account = opened(Budget(limit, 1e-5))
    aggregate = PrivateMean(1.0, 2.0, 2.0, account)
    for made in range(1, 4):
        aggregate(members(), [1, 1], start())
        assert account.releases == {GaussianRelease(2.0): made}
    state = torch.random.get_rng_state()
    with pytest.raises(BudgetExceeded, match="it was not made"):
        aggregate(members(), [1, 1], start())
    assert torch.equal(torch.random.get_rng_state(), state)  # no noise was drawn for it
    assert account.releases == {GaussianRelease(2.0): 3}


def test_sampling_and_no_noise_are_entered_as_what_they_are() -> None:
    account = opened()
    PrivateMean(1.0, 2.0, 1.0, account, sampling=0.1)([], [], start())
    PrivateMean(1.0, 0.0, 1.0, account)([], [], start())
    assert account.releases == {GaussianRelease(2.0, 0.1): 1, Clear(): 1}
    assert account.epsilon == math.inf


def test_two_averages_of_one_draw_of_members_are_not_entered_as_two_draws() -> None:
    # What one draw tells by two averages is one release of noise multiplier σ/√2, and more than two subsampled ones.
    together, apart = {GaussianRelease(1 / math.sqrt(2), 0.1): 50}, {GaussianRelease(1.0, 0.1): 100}
    assert epsilon(together, 1e-5) > 1.3 * epsilon(apart, 1e-5)
    account = opened()
    aggregate = PrivateMean(1.0, 1.0, 1.0, account, sampling=0.1)
    for _ in range(2):
        aggregate([], [], {"bottom": torch.zeros(2)})
    with pytest.raises(ValueError, match="one draw of members, which two subsampled releases understate"):
        aggregate([], [], {"top": torch.zeros(2)})
    assert account.releases == {GaussianRelease(1.0, 0.1): 2}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"w": torch.zeros(2)}, "all entries of the start"),
        ({**start(), "more": torch.zeros(1)}, "all entries of the start"),
        ({**start(), "w": torch.zeros(1)}, "in their shapes"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_entered(other: Weights, told: str) -> None:
    account = opened()
    with pytest.raises(ValueError, match=told):
        PrivateMean(1.0, 1.0, 1.0, account)([members()[0], other], [1, 1], start())
    assert not account.releases


@pytest.mark.parametrize(
    ("account", "told"),
    [
        ({"adjacency": "add or remove one sample"}, "central account to add or remove one client, .* one sample"),
        ({"adjacency": "replace one client's data"}, "to add or remove one client"),
        ({"model": "local"}, "got a local one"),
    ],
)
def test_accounts_of_another_unit_or_model_are_refused(account: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PrivateMean(1.0, 1.0, 1.0, opened(**account))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"clip": 0.0}, "finite clip above 0"),
        ({"clip": math.nan}, "finite clip above 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier of 0 or more"),
        ({"noise_multiplier": math.inf}, "finite noise_multiplier"),
        ({"expected_members": 0.0}, "number of members above 0"),
        ({"expected_members": math.nan}, "number of members above 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PrivateMean(**{"clip": 1.0, "noise_multiplier": 1.0, "expected_members": 1.0, **settings}, account=opened())


def test_a_sampling_that_is_no_probability_is_refused_at_the_latest_when_it_is_entered() -> None:
    for sampling in (0.0, 1.5):
        with pytest.raises(ValueError, match="sampling"):
            PrivateMean(1.0, 1.0, 1.0, opened(), sampling=sampling)([], [], start())


# Who takes part


def test_each_member_takes_part_with_the_rate_and_on_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    rounds, rate = 4000, 0.3
    taken = torch.zeros(rounds, 5, dtype=torch.float64)
    for number in range(rounds):
        chosen = poisson_members(range(5), rate, generator)
        assert chosen == sorted(chosen)
        taken[number, chosen] = 1
    # Standard errors of a mean of yes and no, and of a covariance of two; 4 of them.
    assert (taken.mean(0) - rate).abs().max() < 4 * math.sqrt(rate * (1 - rate) / rounds)
    pairs = torch.cov(taken.T)[~torch.eye(5, dtype=torch.bool)]
    assert pairs.abs().max() < 4 * rate * (1 - rate) / math.sqrt(rounds)
    assert (taken.sum(1) == 0).any()
    assert poisson_members("abc", 1.0, generator) == ["a", "b", "c"]
    for wrong in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="rate above 0 and at most 1"):
            poisson_members("abc", wrong, generator)


# Inside of rounds


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(number)
    return [(torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator))]


def trained(name: str, stage: nn.Module, lr: float = 0.5) -> Learner:
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), lr=lr), loss=PaddedCrossEntropy(6))


def clipped_mean(weights: Sequence[Weights], origin: Weights, clip: float, expected: float) -> Weights:
    """The definition, in double precision."""
    total = {name: torch.zeros_like(entry, dtype=torch.float64) for name, entry in origin.items()}
    for own in weights:
        update = {name: (own[name] - origin[name]).double() for name in origin}
        norm = math.sqrt(sum(float(entry.square().sum()) for entry in update.values()))
        for name, entry in update.items():
            total[name] += entry * min(1.0, clip / norm)
    return {name: origin[name].double() + total[name] / expected for name in origin}


def assert_near(found: Weights, expected: Weights) -> None:
    for name, entry in expected.items():
        # float32 weights of about 1 against double precision
        assert torch.allclose(found[name].double(), entry, rtol=0, atol=1e-6), name


def test_a_round_of_fedavg_ends_at_the_clipped_mean_and_enters_once() -> None:
    account, model = opened(), mlp(4, 3, (5,))
    everywhere = Learner("all", copy.deepcopy(model))
    origin = everywhere.weights()
    clip = 0.1
    fedavg_round(
        [Member(trained(f"m{n}", copy.deepcopy(model)), None, batches(n)) for n in range(3)], everywhere,
        aggregate=PrivateMean(clip, 1e-30, 4.0, account),
    )  # fmt: skip
    alone = []
    for number in range(3):
        learner = trained(f"m{number}", copy.deepcopy(model))
        learner.learn(*batches(number)[0])
        alone.append(learner.weights())
    norms = [torch.cat([(own[name] - origin[name]).flatten() for name in origin]).norm() for own in alone]
    assert min(norms) > clip  # all are clipped
    assert_near(everywhere.weights(), clipped_mean(alone, origin, clip, 4.0))
    assert account.releases == {GaussianRelease(1e-30): 1}


def test_a_round_of_splitfed_v1_averages_bottoms_and_tops_as_two_releases() -> None:
    account, model = opened(), mlp(4, 3, (5,))
    bottom, top = cut(model, 2)
    server, globally = trained("server", top), Learner("bottom", copy.deepcopy(bottom))
    sessions = {f"m{n}": server.replica(f"m{n}") for n in range(3)}
    clients = [trained(name, copy.deepcopy(bottom)) for name in sessions]
    origin = globally.weights(), server.weights()
    splitfed_v1_round(
        [Member(client, sessions[client.name], batches(n)) for n, client in enumerate(clients)], sessions, globally,
        server, aggregate=PrivateMean(0.05, 1e-30, 3.0, account),
    )  # fmt: skip
    for after, before, alone in (
        (globally.weights(), origin[0], [client.weights() for client in clients]),
        (server.weights(), origin[1], [session.weights() for session in sessions.values()]),
    ):
        assert_near(after, clipped_mean(alone, before, 0.05, 3.0))
        assert not torch.equal(
            after["fc1.weight" if "fc1.weight" in after else "fc2.weight"], next(iter(before.values()))
        )
    assert account.releases == {GaussianRelease(1e-30): 2}


def test_a_round_over_budget_leaves_the_global_model_as_it_was() -> None:
    noise = 3.0
    account = opened(Budget(epsilon({GaussianRelease(noise): 1}, 1e-5) + 1e-6, 1e-5))
    model = mlp(4, 3, (5,))
    everywhere = Learner("all", copy.deepcopy(model))
    member = Member(trained("m0", copy.deepcopy(model)), None, batches(0))
    aggregate = PrivateMean(0.1, noise, 1.0, account)
    fedavg_round([member], everywhere, aggregate=aggregate)
    before = everywhere.weights()
    with pytest.raises(BudgetExceeded):
        fedavg_round([member], everywhere, aggregate=aggregate)
    assert all(torch.equal(before[name], entry) for name, entry in everywhere.weights().items())
    assert account.releases == {GaussianRelease(noise): 1}
