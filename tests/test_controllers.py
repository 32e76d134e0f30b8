"""Controllers: the oracle is exact, policies learn what they can see, and none sees what it is about to pay."""

import copy
import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from splitlearn.controllers import (
    Disjoint,
    Fixed,
    LinUCB,
    Matrix,
    Played,
    Policy,
    QLearning,
    Threshold,
    best_fixed,
    oracle,
    play,
    regret,
)


def game(seed: int, times: int = 400, arms: int = 3, stay: float = 0.95) -> tuple[Matrix, Matrix]:
    """A channel that is good or bad for a while; arm 0 is cheap on the good one, arm 2 the same on both."""
    random = np.random.default_rng(seed)
    bad = np.cumsum(random.random(times) > stay) % 2
    load = 1 + np.cumsum(random.random(times) > stay) % 2
    slopes = np.linspace(6, 0, arms)
    costs = slopes * bad[:, None] + np.linspace(0, 2, arms) * load[:, None] + random.normal(0, 0.05, (times, arms))
    late = np.stack([np.ones(times), np.roll(bad, 1), np.roll(load, 1)], 1).astype(float)  # as last measured
    late[0] = [1, 0, 1]
    late[:, 1:] += random.normal(0, 0.02, (times, 2))
    return costs, late


TRAINING = [game(seed) for seed in (10, 11, 12)]


SCALE = Disjoint(3, np.array([1.0, 1.0, 2.0]))


def bandit(patience: float) -> LinUCB:
    return LinUCB.trained(TRAINING, 1.0, SCALE, alphas=(0.1,), patiences=(patience,))


TRAINED: dict[str, Policy] = {
    "fixed": Fixed.trained(TRAINING),
    "threshold": Threshold.trained(TRAINING, 0.5, columns=(1, 2)),
    "linucb": LinUCB.trained(TRAINING, 0.5, SCALE),
    "linucb cold": LinUCB(SCALE),
    "q": QLearning.trained(TRAINING, 0.5, columns=(1, 2), bins=(4, 4)),
}
POLICIES: dict[str, Callable[[], Policy]] = {name: partial(copy.deepcopy, one) for name, one in TRAINED.items()}


@pytest.mark.parametrize("seed", range(12))
def test_the_oracle_equals_the_best_of_all_sequences(seed: int) -> None:
    random = np.random.default_rng(seed)
    times, arms = (7, 2) if seed % 2 else (5, 3)
    costs = random.random((times, arms))
    switch = random.random((arms, arms)) * random.choice([0.0, 0.3, 3.0])
    np.fill_diagonal(switch, 0)
    totals = {
        arms_: sum(costs[t, a] for t, a in enumerate(arms_)) + sum(switch[a, b] for a, b in itertools.pairwise(arms_))
        for arms_ in itertools.product(range(arms), repeat=times)
    }
    found = oracle(costs, switch)
    assert found.total == pytest.approx(min(totals.values()), rel=1e-12)
    assert totals[tuple(map(int, found.arms))] == pytest.approx(found.total, rel=1e-12)
    assert found.switches == sum(a != b for a, b in itertools.pairwise(found.arms))


def test_without_a_price_the_oracle_is_the_least_of_each_time_and_at_a_high_one_the_best_fixed_arm() -> None:
    costs, _ = game(0)
    assert oracle(costs).total == pytest.approx(costs.min(1).sum())
    dear = oracle(costs, 1e9)
    assert dear.switches == 0
    assert dear.total == pytest.approx(best_fixed(costs).total) == pytest.approx(costs.sum(0).min())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("switch", [0.0, 0.5])
def test_no_policy_beats_the_oracle_and_what_it_paid_adds_up(name: str, switch: float) -> None:
    for seed in range(3):
        costs, contexts = game(seed)
        played = play(POLICIES[name](), costs, contexts, switch)
        assert regret(played, costs, switch) >= -1e-9
        assert played.total == pytest.approx(played.costs.sum() + switch * played.switches)
        assert np.array_equal(played.costs, costs[np.arange(len(costs)), played.arms])
    assert regret(oracle(costs, switch), costs, switch) == 0


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("poison", [np.nan, 1e12])
def test_no_policy_sees_present_or_future_costs_or_contexts_to_come(name: str, poison: float) -> None:
    costs, contexts = game(0, times=60)
    honest = play(POLICIES[name](), costs, contexts, 0.5).arms
    for now in (0, 1, 20, 58):
        poisoned, unseen = costs.copy(), contexts.copy()
        poisoned[now:] = poison  # the present's cost, too: it is paid after the choice
        unseen[now + 1 :] = 1e6
        with np.errstate(all="ignore"):
            arms = play(POLICIES[name](), poisoned, unseen, 0.5).arms
        assert np.array_equal(arms[: now + 1], honest[: now + 1])


def test_a_bandit_sees_the_cost_of_the_arm_that_it_chose_alone() -> None:
    costs, contexts = game(0, times=100)
    first = play(LinUCB(SCALE), costs, contexts)
    unseen = np.full_like(costs, 1e9)
    rows = np.arange(len(costs))
    unseen[rows, first.arms] = costs[rows, first.arms]
    assert np.array_equal(play(LinUCB(SCALE), unseen, contexts).arms, first.arms)


def test_linucb_finds_the_arm_that_is_best_in_each_context() -> None:
    random = np.random.default_rng(0)
    weights = np.array([[1.0, 2.0, 0.0], [2.0, 0.0, 1.0], [1.5, 1.0, -0.5], [4.0, 4.0, 4.0]])
    contexts = np.concatenate([np.ones((2000, 1)), random.random((2000, 2))], 1)
    costs = contexts @ weights.T + random.normal(0, 0.1, (2000, 4))
    policy = LinUCB(Disjoint(4, np.ones(3)), alpha=1.0)
    arms = play(policy, costs, contexts).arms
    best = (contexts @ weights.T).argmin(1)
    gap = (contexts @ weights.T)[np.arange(2000), arms] - (contexts @ weights.T).min(1)
    assert (arms == best)[1000:].mean() > 0.9
    assert gap[1000:].mean() < 0.01 < gap[:50].mean()
    assert (arms == 3).mean() < 0.05  # never worth it, and given up


def test_what_is_learnt_beats_one_arm_for_all_on_traces_that_training_never_saw() -> None:
    ratios = {}
    for name in ("fixed", "threshold", "linucb", "q"):
        totals = [
            (play(POLICIES[name](), *game(seed), 0.5).total, oracle(game(seed)[0], 0.5).total) for seed in range(3)
        ]
        ratios[name] = sum(one for one, _ in totals) / sum(best for _, best in totals)
    assert min(ratios.values()) >= 1
    for name in ("threshold", "linucb", "q"):
        assert ratios[name] < 1.25 < 2 < ratios["fixed"], ratios


def test_patience_makes_a_bandit_change_less_often_where_it_costs() -> None:
    costs, contexts = game(0)
    contexts[:, 1:] += np.random.default_rng(0).normal(0, 0.4, (len(costs), 2))
    hasty, settled = (play(bandit(patience), costs, contexts, 1.0) for patience in (1000.0, 1.0))
    assert settled.switches < hasty.switches / 2


def test_a_rule_has_the_threshold_that_divides() -> None:
    rule = TRAINED["threshold"]
    assert rule.choose(np.array([1, 0.0, 2.0]), None, np.zeros((3, 3))) == 0
    assert rule.choose(np.array([1, 1.0, 1.0]), None, np.zeros((3, 3))) == 2


def test_q_learning_looks_ahead_where_a_greedy_choice_would_pay_for_every_change() -> None:
    random = np.random.default_rng(0)
    times = 2000
    state = random.integers(0, 2, times)  # of no duration: not worth following at this price
    costs = np.stack([np.where(state, 0.0, 1.0), np.where(state, 1.0, 0.1)], 1)
    contexts = state[:, None] + 0.1 * random.random((times, 1))
    played = play(QLearning.trained([(costs, contexts)], 2.0, columns=(0,), bins=(2,)), costs, contexts, 2.0)
    assert played.switches <= 1
    free = play(QLearning.trained([(costs, contexts)], 0.01, columns=(0,), bins=(2,)), costs, contexts, 0.01)
    assert free.switches > times / 4


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: oracle(np.zeros(3)), "expected costs"),
        (lambda: oracle(np.zeros((3, 2)), -1.0), "switching costs ≥ 0"),
        (lambda: oracle(np.zeros((3, 2)), np.ones((3, 3))), r"\[2, 2\]"),
        (lambda: oracle(np.zeros((3, 2)), np.ones((2, 2))), "on the diagonal"),
        (lambda: play(Fixed(0), np.zeros((3, 2)), np.zeros((2, 1))), "a context a request"),
        (lambda: play(Fixed(2), np.zeros((3, 2)), np.zeros((3, 1))), "an arm from 0 to 1, got 2"),
        (lambda: Disjoint(2, np.zeros(2)), "scale"),
        (lambda: LinUCB(SCALE, patience=0), "patience"),
        (lambda: QLearning.trained(TRAINING, 0.0, columns=(1,), bins=(2, 2)), "bins ≥ 1 a column"),
    ],
)
def test_bad_input_is_told(call: Callable[[], Played], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
