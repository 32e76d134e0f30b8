"""Audits: never above the truth more often than they say, close to it from below, and every planted fault convicted."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from math import exp, log, sqrt
from statistics import median

import numpy
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, laplace, multivariate_normal, norm
from torch import Tensor, nn

from experiments import bench_dp, planted
from experiments.bench_dp import audit_power, dp_overhead
from experiments.canaries import _participation, audited_in_one_run
from experiments.catalogue import BENCHES
from experiments.planted import CASES, Case
from experiments.training import load_splits
from privacy.dp import (
    Budget,
    ClippedGaussian,
    ClippedLaplace,
    GaussianRelease,
    LaplaceRelease,
    PoissonBatches,
    PrivateLearner,
    RandomisedResponse,
    calibrate,
)
from privacy.dp.audit import Bound, FittedRatio, audit, audit_guard, log_ratio, lower_bound
from privacy.dp.one_run import OneRun, one_run_bound, p_value

DELTA = 1e-5
Array = NDArray[numpy.float64]
Guarded = ClippedGaussian | ClippedLaplace | RandomisedResponse


def often(repetitions: int, share: float) -> float:
    """How often something of at most this share happens in so many repetitions, exceeded in one of 1000 tests."""
    return float(binom.isf(1e-3, repetitions, share))


def scores(beyond: int, of: int) -> Array:
    return numpy.array([1.0] * beyond + [0.0] * (of - beyond))


# ---- one bound, by hand


@pytest.mark.parametrize("delta", [0.0, 0.01, 0.2])
@pytest.mark.parametrize(
    ("hits", "of", "misses", "of_rare"),
    [(90, 100, 10, 100), (100, 100, 0, 100), (1, 100, 0, 1000), (100, 100, 100, 100), (37, 50, 3, 400), (0, 9, 0, 9)],
)
def test_a_bound_is_that_of_clopper_and_pearson(hits: int, of: int, misses: int, of_rare: int, delta: float) -> None:
    bound = lower_bound(scores(9, 9), scores(0, 9) - 1, scores(0, 9), scores(0, 9), delta=0)
    assert bound.lower == 0  # nothing to find
    chosen = scores(0, 99), scores(99, 99)  # the threshold is 1, whatever the fresh draws are
    bound = lower_bound(*chosen, scores(misses, of_rare), scores(hits, of), delta=delta)
    low = binomtest(hits, of).proportion_ci(0.95, "exact").low
    high = binomtest(misses, of_rare).proportion_ci(0.95, "exact").high
    assert bound.lower == pytest.approx(max(0.0, log((low - delta) / high)) if low > delta else 0.0)
    assert (bound.hits, bound.misses, bound.threshold, bound.draws) == (hits, misses, 1.0, of_rare)
    assert bound.convicts(bound.lower - 1e-9)
    assert not bound.convicts(bound.lower)


def test_a_bound_by_hand() -> None:
    """All of 100 against none: (1/40)^(1/100) = 0.96378 and 1 − that = 0.03622, whose ratio's logarithm is 3.2814."""
    bound = lower_bound(scores(0, 100), scores(100, 100), scores(0, 100), scores(100, 100), delta=0)
    assert bound.lower == pytest.approx(3.2814, abs=1e-4)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.999])
def test_more_confidence_is_a_lower_bound(confidence: float) -> None:
    chosen = scores(0, 99), scores(99, 99)
    bound = lower_bound(*chosen, scores(5, 100), scores(80, 100), delta=0, confidence=confidence)
    low = binomtest(80, 100).proportion_ci(confidence, "exact").low
    high = binomtest(5, 100).proportion_ci(confidence, "exact").high
    assert bound.lower == pytest.approx(log(low / high))
    assert bound.confidence == confidence


def spiked(place: float, share: float) -> Array:
    return numpy.where(numpy.random.default_rng(0).random(2000) < share, place, 0.0)


@pytest.mark.parametrize(
    ("spiked_world", "place", "hits"),
    [(1, 5.0, "world 1 in the upper tail"), (0, -5.0, "world 0 in the lower tail")],
)
def test_either_world_may_give_itself_away(spiked_world: int, place: float, hits: str) -> None:
    """Half of one world lies where the other never does: log(0.48 / 0.0018) is 5.6; the other way about only log 2."""
    none, some = numpy.zeros(2000), spiked(place, 0.5)
    worlds = (some, none) if spiked_world == 0 else (none, some)
    bound = lower_bound(*worlds, *worlds, delta=0)
    assert bound.lower == pytest.approx(5.5, abs=0.1), hits
    assert bound.threshold == place
    assert (bound.hits, bound.misses) == (int((some != 0).sum()), 0)


def test_the_names_of_the_worlds_do_not_matter() -> None:
    draws = numpy.random.default_rng(1)
    zero, one = draws.normal(0, 1, (2, 3000)), draws.normal(1, 0.5, (2, 3000))
    bound = lower_bound(zero[0], one[0], zero[1], one[1], delta=DELTA)
    turned = lower_bound(-one[0], -zero[0], -one[1], -zero[1], delta=DELTA)
    assert bound.lower == turned.lower > 0
    assert bound.threshold == -turned.threshold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": -0.1}, "expected δ from 0 to below 1"),
        ({"delta": 1.0}, "expected δ from 0 to below 1"),
        ({"delta": float("nan")}, "expected δ from 0 to below 1"),
        ({"confidence": 1.0}, "a confidence between 0 and 1"),
        ({"confidence": 1.5}, "a confidence between 0 and 1"),
        ({"draws": 99}, "expected at least 100 draws"),
        ({"fitting": 1}, "2 to fit on"),
    ],
)
def test_bad_settings_of_an_audit_end_before_a_draw(change: dict[str, float], message: str) -> None:
    def worlds(which: int, count: int) -> Tensor:
        raise AssertionError("drawn")

    with pytest.raises(ValueError, match=message):
        audit(worlds, **{"delta": DELTA, **change})  # type: ignore[arg-type]
    if "delta" in change or "confidence" in change:
        with pytest.raises(ValueError, match=message):
            lower_bound(*[numpy.ones(3)] * 4, **{"delta": DELTA, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    fine = numpy.ones(3)
    for place in range(4):
        given = [fine.copy() for _ in range(4)]
        given[place][1] = bad
        with pytest.raises(ValueError, match="expected finite scores"):
            lower_bound(*given, delta=0)
    with pytest.raises(ValueError, match="expected finite scores"):
        lower_bound(fine, fine, fine, numpy.zeros(0), delta=0)


# ---- how often a bound is above the truth

REPETITIONS = 300


@pytest.mark.parametrize(
    ("guard", "ends", "epsilon", "delta"),
    [
        (RandomisedResponse(1.0, 2), (torch.tensor(0), torch.tensor(1)), 1.0, 0.0),
        (RandomisedResponse(3.0, 10), (torch.tensor(4), torch.tensor(7)), 3.0, 0.0),
        (ClippedLaplace(1.0, 1.0), (torch.tensor([-1.0]), torch.tensor([1.0])), 1.0, 0.0),
        # δ so great that the bound on (ε, δ) is met in the bulk of the draws, and not in tails that no draw reaches.
        (ClippedGaussian(1.0, 1.0), (torch.tensor([-1.0]), torch.tensor([1.0])), None, 0.2),
    ],
    ids=["answers of two", "answers of ten", "Laplace", "Gaussian"],
)
def test_a_bound_is_above_the_truth_no_more_often_than_it_says(
    guard: Guarded, ends: tuple[Tensor, Tensor], epsilon: float | None, delta: float
) -> None:
    if epsilon is None:  # the exact ε of one Gaussian release at this δ (Balle and Wang 2018, theorem 8)
        epsilon = next(e for e in numpy.linspace(0, 3, 3001) if norm.cdf(0.5 - e) - exp(e) * norm.cdf(-0.5 - e) < delta)
    found = [audit_guard(guard, *ends, delta=delta, draws=400).lower for _ in range(REPETITIONS)]
    # One of 20 at most, and what chance adds to that in one of 1000 runs of this test: 28 of 300.
    assert sum(lower > epsilon for lower in found) <= often(REPETITIONS, 0.05)
    assert max(found) > 0


def test_a_threshold_is_chosen_on_other_draws_than_it_is_judged_by() -> None:
    """On two worlds that are one, whoever judges by the draws that he chose by finds something far too often."""
    draws = numpy.random.default_rng(0)

    def bound(share: bool) -> Bound:
        # Many draws of one world, whose rates are known nearly exactly, and few of the other, that scatter.
        chosen = draws.normal(size=10_000), draws.normal(size=40)
        return lower_bound(*chosen, *(chosen if share else (draws.normal(size=10_000), draws.normal(size=40))), delta=0)

    limit = often(REPETITIONS, 0.05)
    assert sum(bound(share=True).lower > 0 for _ in range(REPETITIONS)) > limit  # or this test could not tell
    assert sum(bound(share=False).lower > 0 for _ in range(REPETITIONS)) <= limit


@pytest.mark.parametrize(("score", "steps"), [(None, 3), (lambda rows: rows[:, 0], 2)], ids=["fitted", "given"])
def test_score_threshold_and_judgement_have_draws_of_their_own(
    score: Callable[[Tensor], Tensor] | None, steps: int
) -> None:
    """Of the steps of an audit (fit, choose, judge) only the last one counts as evidence."""

    def judged(convincing: range) -> tuple[Bound, list[tuple[int, int]]]:
        calls: list[tuple[int, int]] = []

        def worlds(which: int, count: int) -> Tensor:
            step = sum(one == which for one, _ in calls)
            calls.append((which, count))
            return torch.randn(count, 1) + 20 * which * (step in convincing)

        return audit(worlds, score, delta=0, draws=500, fitting=200), calls

    bound, calls = judged(range(steps - 1))
    assert bound.lower < 0.1  # 500 draws of two equal worlds show nothing; shared draws would show log(500 / 3.7)
    assert calls == [(0, 200), (1, 200)] * (steps - 2) + [(0, 500), (1, 500)] * 2
    bound, _ = judged(range(steps))
    assert bound.lower == pytest.approx(log(500 / 3.7), abs=0.02)


def test_discrete_scores_are_judged_at_their_own_values() -> None:
    draws = numpy.random.default_rng(0)

    def world(shares: list[float]) -> Array:
        return draws.choice([0.0, 1.0, 2.0], size=4000, p=shares)

    rare, likely = [0.7, 0.299, 0.001], [0.3, 0.3, 0.4]
    bound = lower_bound(world(rare), world(likely), world(rare), world(likely), delta=0)
    assert bound.threshold == 2.0
    assert bound.hits == pytest.approx(1600, abs=130)  # four standard deviations
    assert 4 < bound.lower < log(400)
    same = lower_bound(*[numpy.zeros(100)] * 4, delta=0)
    assert (same.lower, same.hits, same.misses) == (0, 100, 100)


# ---- scores


def gaussian(mean: list[float], covariance: list[list[float]], count: int) -> Tensor:
    root = torch.linalg.cholesky(torch.tensor(covariance))
    return torch.tensor(mean) + torch.randn(count, len(mean)) @ root.T


PLAIN = [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("means", "covariances", "least"),
    [
        (([0.0, 0.0], [0.0, 2.5]), (PLAIN, PLAIN), 2.5),
        (([0.0, 0.0], [0.0, 0.0]), (PLAIN, [[1.0, 0.0], [0.0, 25.0]]), 2.5),
        (([0.0, 0.0], [0.0, 0.0]), (PLAIN, [[1.0, 0.99], [0.99, 1.0]]), 1.2),
        (([0.0, 0.0], [0.0, 0.0]), (PLAIN, [[1.0, -0.99], [-0.99, 1.0]]), 1.2),
        # Numbers of very different units: what the small one shows is not lost beside the great one.
        (([0.0, 0.0], [0.0, 0.0]), ([[1e12, 0.0], [0.0, 1.0]], [[1e12, 0.0], [0.0, 25.0]]), 2.5),
        (([0.0, 0.0], [2.5e6, 0.0]), ([[1e12, 0.0], [0.0, 1e-6]], [[1e12, 0.0], [0.0, 1e-6]]), 2.5),
    ],
    ids=["shift", "spread", "correlation", "anticorrelation", "a small number", "a great number"],
)
def test_a_fitted_ratio_finds(
    means: tuple[list[float], ...], covariances: tuple[list[list[float]], ...], least: float
) -> None:
    def worlds(which: int, count: int) -> Tensor:
        return gaussian(means[which], covariances[which], count)

    assert audit(worlds, delta=DELTA, draws=5000, fitting=2000).lower > least
    assert audit(lambda _, count: worlds(0, count), delta=DELTA, draws=5000, fitting=2000).lower < 0.3


def test_a_fitted_ratio_is_that_of_two_normal_densities() -> None:
    zero, one = gaussian([0.0, 1.0], PLAIN, 900), gaussian([1.0, -1.0], [[2.0, 0.6], [0.6, 0.5]], 700)
    points = torch.randn(50, 2)
    densities = [
        multivariate_normal(rows.double().mean(0).numpy(), rows.double().T.cov().numpy()) for rows in (zero, one)
    ]
    expected = densities[1].logpdf(points.numpy()) - densities[0].logpdf(points.numpy())
    # The ridge is 1e-9 of a variance, and these are some 10 of a unit each.
    torch.testing.assert_close(FittedRatio.of(zero, one)(points), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "clear",
    [
        lambda which, count: torch.full((count, 2), float(which)),
        lambda which, count: torch.full((count,), 0.1 + 1e-3 * which),
        lambda which, count: torch.stack([torch.randn(count), torch.full((count,), 3.0 + which)], 1),
        lambda which, count: torch.stack([torch.full((count,), 1e4), torch.randn(count) * (0.01 + which)], 1),
    ],
    ids=["all in the clear", "nearly alike", "beside noise", "beside a constant"],
)
def test_what_crosses_without_noise_is_convicted(clear: Callable[[int, int], Tensor]) -> None:
    assert audit(clear, delta=DELTA, draws=2000, fitting=500).lower > 3


def test_constants_alone_show_nothing() -> None:
    assert audit(lambda _, count: torch.full((count, 3), 0.1), delta=DELTA, draws=200, fitting=100).lower == 0


WORLDS = torch.tensor([[0.3, -0.2, 0.1], [4.0, 1.0, -2.0]])  # the second one is beyond every clip below


@pytest.mark.parametrize("guard", [ClippedGaussian(1.5, 0.4), ClippedLaplace(1.5, 0.4)])
def test_the_ratio_is_that_of_the_densities(guard: ClippedGaussian | ClippedLaplace) -> None:
    sent = guard.activation(WORLDS[:1].expand(200, 3))
    order, law = (2, norm) if isinstance(guard, ClippedGaussian) else (1, laplace)
    scale = guard.std if isinstance(guard, ClippedGaussian) else guard.scale
    centres = [world * min(1.0, 1.5 / float(world.norm(p=order))) for world in WORLDS]
    logs = [law.logpdf(sent.numpy(), centre.numpy(), scale).sum(1) for centre in centres]
    # The noise was added in float32, and the clipped centres were rounded to it.
    torch.testing.assert_close(
        log_ratio(guard, sent, *WORLDS), torch.tensor(logs[1] - logs[0]).double(), rtol=1e-4, atol=1e-4
    )


def test_the_ratio_of_answers_is_that_of_their_probabilities() -> None:
    guard = RandomisedResponse(1.7, 4)
    chance = [
        [guard.release.truth if answer == label else guard.release.other for answer in range(4)] for label in (1, 3)
    ]
    expected = [log(one / zero) for zero, one in zip(*chance, strict=True)]
    found = log_ratio(guard, torch.arange(4), torch.tensor(1), torch.tensor(3))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_no_density_no_ratio() -> None:
    with pytest.raises(ValueError, match=r"whose density is known, .*audit\(worlds\) fits one"):
        log_ratio(object(), torch.zeros(3), torch.zeros(()), torch.ones(()))
    for guard in (ClippedGaussian(1.0, 0.0), ClippedLaplace(1.0, 0.0)):
        with pytest.raises(ValueError, match="expected a mechanism with noise"):
            audit_guard(guard, torch.zeros(2), torch.ones(2), delta=DELTA)


# ---- how close a bound comes

ENDS = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize("releases", [1, 4])
@pytest.mark.parametrize(("epsilon", "least"), [(1.0, 0.5), (4.0, 2.3)])
def test_the_bound_of_a_gaussian_guard(epsilon: float, least: float, releases: int) -> None:
    """Several releases under noise made for as many are as hard to tell as one: the Gaussian composes exactly."""
    guard = ClippedGaussian(1.0, calibrate(GaussianRelease, epsilon=epsilon, delta=DELTA, releases=releases))
    bounds = [audit_guard(guard, *ENDS, delta=DELTA, releases=releases) for _ in range(3)]
    assert least < median(bound.lower for bound in bounds) < epsilon
    assert not any(bound.convicts(epsilon) for bound in bounds)


def test_releases_that_were_not_accounted_for_are_convicted() -> None:
    guard = ClippedGaussian(1.0, calibrate(GaussianRelease, epsilon=1.0, delta=DELTA))
    assert audit_guard(guard, *ENDS, delta=DELTA, releases=9).convicts(1.0)
    laplace_guard = ClippedLaplace(1.0, calibrate(LaplaceRelease, epsilon=1.0, delta=DELTA))
    assert audit_guard(laplace_guard, *ENDS, delta=DELTA, releases=3, draws=20_000).convicts(1.0)


@pytest.mark.parametrize(
    ("guard", "ends"),
    [
        (ClippedLaplace(1.0, 1 / 3), (ENDS[0], ENDS[1])),
        (RandomisedResponse(3.0, 10), (torch.tensor(2), torch.tensor(5))),
    ],
)
def test_pure_mechanisms_are_bounded_nearly_tightly(guard: Guarded, ends: tuple[Tensor, Tensor]) -> None:
    """Their worst ratio is met by a good share of the draws, so that 1e5 of them come within a few hundredths."""
    assert 2.85 < audit_guard(guard, *ends, delta=0).lower < 3


def test_equal_neighbours_show_nothing() -> None:
    for guard in (ClippedGaussian(1.0, 0.1), ClippedLaplace(1.0, 0.1)):
        assert audit_guard(guard, ENDS[0], 7 * ENDS[0], delta=DELTA, draws=1000).lower == 0  # clipped to one another


# ---- one run


def tail(m: int, guesses: int, correct: int, epsilon: float) -> float:
    """P[correct or more guesses are right], summed over every outcome of every guess."""
    hit = exp(epsilon) / (1 + exp(epsilon))
    outcomes = product((0, 1), repeat=guesses)
    return sum(hit ** sum(one) * (1 - hit) ** (guesses - sum(one)) for one in outcomes if sum(one) >= correct)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.04])
@pytest.mark.parametrize(("m", "guesses"), [(6, 6), (9, 4), (12, 1)])
def test_the_p_value_is_the_theorem(m: int, guesses: int, delta: float) -> None:
    for correct, epsilon in product(range(guesses + 1), (0.0, 0.7, 3.0)):
        f = partial(tail, m, guesses, epsilon=epsilon)
        steps = [(f(correct - i) - f(correct)) / i for i in range(1, m + 1)]
        expected = min(1.0, f(correct) + 2 * m * delta * max(steps))
        assert p_value(m, guesses, correct, epsilon, delta) == pytest.approx(expected, abs=1e-12)


def test_the_p_value_rises_and_falls_as_it_must() -> None:
    def rising(values: list[float]) -> bool:
        return all(a <= b + 1e-12 for a, b in pairwise(values)) and values[0] < values[-1]

    assert rising([p_value(200, 100, 80, epsilon, DELTA) for epsilon in numpy.linspace(0, 5, 50)])
    assert rising([p_value(200, 100, correct, 1.0, DELTA) for correct in range(100, -1, -1)])
    assert rising([p_value(m, 100, 90, 1.0, 1e-4) for m in (100, 200, 500, 5000)])
    assert rising([p_value(200, 100, 80, 1.0, delta) for delta in (0, 1e-6, 1e-4, 1e-2)])
    assert p_value(200, 100, 0, 1.0, 0.0) == 1


@pytest.mark.parametrize("m", [2, 20, 501, 2000])
def test_perfect_guesses_bound_as_much_as_so_many_can(m: int) -> None:
    """All r right: q^r = 0.05, so that ε = log(q / (1 − q)); no δ, and one share, so that nothing is divided."""
    included = torch.rand(m) < 0.5
    included[:2] = torch.tensor([True, False])
    order = torch.argsort(included.double())
    assert len(order) == m
    balanced = torch.arange(m) % 2 == 0  # as many in as out, or not all guesses could be right
    bound = one_run_bound(balanced.double(), balanced, delta=0, shares=(1.0,))
    guesses = m - m % 2
    q = 0.05 ** (1 / guesses)
    assert (bound.guesses, bound.correct, bound.canaries) == (guesses, guesses, m)
    assert bound.lower == pytest.approx(max(0.0, log(q / (1 - q))), abs=1e-6)
    many = one_run_bound(balanced.double(), balanced, delta=0)
    q = (0.05 / 6) ** (1 / guesses)
    assert many.lower == pytest.approx(max(0.0, log(q / (1 - q))), abs=1e-6)


def test_guesses_by_a_coin_bound_nothing() -> None:
    found = [one_run_bound(torch.rand(500), torch.rand(500) < 0.5, delta=DELTA) for _ in range(REPETITIONS)]
    # Each share at 0.05 / 6; all of them together in one of 20 at most.
    assert sum(bound.lower > 0 for bound in found) <= often(REPETITIONS, 0.05)
    assert sorted(bound.lower for bound in found)[REPETITIONS // 2] == 0
    assert all(bound.guesses for bound in found)  # a bound of 0 still says how many guesses came to it
    assert one_run_bound(torch.zeros(10), torch.ones(10, dtype=torch.bool), delta=0).lower == 0


def answered(m: int, epsilon: float) -> OneRun:
    """Canaries in or out by a coin, each seen through randomised response of ε: exactly ε-DP, and as tight."""
    included = torch.rand(m) < 0.5
    lies = torch.rand(m, dtype=torch.float64) >= exp(epsilon) / (1 + exp(epsilon))
    return one_run_bound((included ^ lies).double() + 0.1 * torch.rand(m), included, delta=0)


@pytest.mark.parametrize(("epsilon", "m"), [(0.5, 60), (1.0, 100), (3.0, 100)])
def test_honest_canaries_are_refuted_no_more_often_than_it_says(epsilon: float, m: int) -> None:
    found = [answered(m, epsilon).lower for _ in range(REPETITIONS)]
    assert sum(lower > epsilon for lower in found) <= often(REPETITIONS, 0.05)


@pytest.mark.parametrize(("epsilon", "least"), [(1.0, 0.7), (3.0, 2.4)])
def test_many_honest_canaries_come_close(epsilon: float, least: float) -> None:
    assert least < median(answered(4000, epsilon).lower for _ in range(11)) < epsilon


@pytest.mark.parametrize(
    ("given", "change", "message"),
    [
        ((torch.zeros(3), torch.zeros(4)), {}, "expected a score and a coin a canary"),
        ((torch.zeros(1), torch.zeros(1)), {}, "two or more"),
        ((torch.zeros(2, 2), torch.zeros(2, 2)), {}, "expected a score and a coin a canary"),
        ((torch.tensor([0.0, float("nan")]), torch.zeros(2)), {}, "expected finite scores"),
        (
            (torch.zeros(4), torch.zeros(4)),
            {"shares": (2.0,)},
            "no canary is guessed twice",
        ),  # each in and out: half right
        ((torch.zeros(4), torch.zeros(4)), {"shares": (0.0,)}, "expected shares above 0"),
        ((torch.zeros(4), torch.zeros(4)), {"delta": -1e-3}, "δ from 0 to below 1"),
        ((torch.zeros(4), torch.zeros(4)), {"confidence": 1.0}, "a confidence between 0 and 1"),
    ],
)
def test_bad_canaries_are_refused(given: tuple[Tensor, Tensor], change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_run_bound(given[0], given[1].bool(), **{"delta": 0.0, **change})


# ---- canaries in DP-SGD


def two_stages() -> nn.Sequential:
    """Two linear layers, one a stage, the second one without a bias."""
    return nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 3, bias=False)))


def test_participation_is_read_from_a_sum_of_gradients() -> None:
    """Without noise, and with fewer samples than weights, who took part is solved for: 1 or 0, each."""
    model, x, y = two_stages(), torch.randn(12, 5), torch.arange(12) % 3
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    part = torch.arange(12) % 4 == 1
    clip, summed = 0.5, {name: torch.zeros_like(value) for name, value in start.items()}
    for row in part.nonzero()[:, 0]:
        model.zero_grad()
        nn.functional.cross_entropy(model(x[row : row + 1]), y[row : row + 1]).backward()
        for number, stage in model.named_children():  # each party clips its own
            norm_ = sqrt(sum(float(p.grad.square().sum()) for p in stage.parameters() if p.grad is not None))
            for name, parameter in stage.named_parameters():
                assert parameter.grad is not None
                summed[f"{number}.{name}"] += min(1.0, clip / norm_) * parameter.grad
    rates = torch.full((12,), 0.25, dtype=torch.float64)
    found = _participation(model, start, summed, x, y, clip=clip, noise=1e-4, rates=rates)
    # The ridge of that noise, and float32 gradients, move them by less than a hundredth.
    torch.testing.assert_close(found, part.double(), rtol=0, atol=0.02)
    drowned = _participation(model, start, summed, x, y, clip=clip, noise=1e3, rates=rates)
    torch.testing.assert_close(drowned, rates, rtol=0, atol=1e-3)
    rates[3] = 1.0  # of whom it is known stays as it is
    assert _participation(model, start, summed, x, y, clip=clip, noise=1.0, rates=rates)[3] == 1


@pytest.mark.parametrize(("noise", "reached"), [(0.01, True), (50.0, False)])
def test_canaries_tell_of_dp_sgd_without_noise_to_speak_of(noise: float, reached: bool) -> None:
    splits = load_splits("breast_cancer", None)
    torch.manual_seed(0)
    width, count = splits.private.x.shape[1], len(splits.private)
    below, above = nn.Sequential(nn.Linear(width, 32), nn.ReLU()), nn.Sequential(nn.Linear(32, 2))
    steps: list[PrivateLearner] = []

    def build(x: Tensor, y: Tensor) -> tuple[PrivateLearner, PrivateLearner, PoissonBatches]:
        assert count + 20 < len(x) < count + 100  # about half of 120 canaries
        client, server = (
            PrivateLearner(
                name, stage, torch.optim.SGD(stage.parameters(), 0.1), clip=0.5, noise_multiplier=noise,
                expected_batch_size=count / 2,
            )
            for name, stage in (("client", copy.deepcopy(below)), ("server", copy.deepcopy(above)))
        )  # fmt: skip
        steps.append(client)
        account = Budget(delta=DELTA).account(
            "users", "client", "add or remove one sample", shaped_by=[client, server], model="central"
        )
        # A capacity of all rows, that no account is needed to work out; parts of a batch cross one after another.
        batches = PoissonBatches(
            x, y, rate=0.5, account=account, parties=[client, server], steps=3, capacity=len(x), physical=128
        )
        return client, server, batches

    model = nn.Sequential(copy.deepcopy(below), copy.deepcopy(above))
    found = audited_in_one_run(
        build, model, splits, 3, canaries=120, delta=DELTA, seed=0, device="cpu"
    )  # fmt: skip
    assert [client.steps for client in steps] == [3]
    assert found.canaries == 120
    assert (found.lower > 1) is reached
    assert not (found.lower > 0.5 and not reached)


# ---- faults planted on purpose, and the honest beside them

TRAINED = frozenset(
    {
        "DP-SGD below a top that trains without privacy",
        "DP-SGD below a frozen top",
        "DP-SGD on both stages in one account",
    }
)

SLOW = frozenset({"user-level average", "Laplace, exact likelihood ratio"})


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_faults_are_convicted_and_honest_mechanisms_spared_at_toy_size(case: Case) -> None:
    """A claim of ε = 2, which 100 trainings (log(100 / 7.6) is 2.6), or 20,000 frames, are enough to refute."""
    bound = case.bound(2.0, 100 if case.name in TRAINED else 2000 if case.name in SLOW else 20_000)
    assert bound.convicts(2.0) is case.broken, bound


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_faults_are_convicted_and_honest_mechanisms_spared(case: Case) -> None:
    bound = case.bound(4.0, 100_000)
    assert bound.convicts(4.0) is case.broken, bound


def test_a_mechanism_that_meets_its_claim_exactly_is_not_accused() -> None:
    """At 95 % it would be in one of 40 audits: some bench would count an accusation every other day."""
    (case,) = [case for case in CASES if case.name == "randomised response"]
    bounds = [case.bound(4.0, 2000) for _ in range(200)]
    assert sum(bound.convicts(4.0) for bound in bounds) <= often(200, 0.001)
    assert {bound.confidence for bound in bounds} == {0.999}


def test_there_are_four_faults_and_each_has_an_honest_neighbour() -> None:
    assert [case.name for case in CASES if case.broken] == [
        "half the noise",
        "noise scaled to the batch's largest norm",
        "one noise tensor for different samples",
        "DP-SGD below a top that trains without privacy",
    ]
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(not case.broken for case in CASES) >= 4


def test_a_known_row_takes_the_shared_noise_off_all_others() -> None:
    frames = torch.zeros(50, planted.ROWS, planted.WIDTH)
    alone = planted._honest(frames, 1.0)
    together = planted._shared_noise(frames, 1.0)
    assert (together[:, 0] - together[:, 1]).abs().max() == 0
    assert (alone[:, 0] - alone[:, 1]).std() > 1


# ---- benches


def test_the_benches_print_what_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (BENCHES["dp"].run, BENCHES["audit"].run) == (dp_overhead, audit_power)
    overhead = dp_overhead(rounds=1)
    assert {"step_ratio", "ghost_step_ratio"} <= set(overhead)
    assert all(overhead[name] > 0 for name in overhead if name.endswith("_ratio"))
    few = tuple(case for case in CASES if case.name not in TRAINED | SLOW)  # which have their tests above
    monkeypatch.setattr(bench_dp, "CASES", few)
    power = audit_power(repetitions=3, draws=100_000)
    assert {
        "lower_bound_eps1",
        "lower_bound_eps4",
        "faults_planted",
        "faults_caught",
        "false_accusations",
        "seconds",
    } <= (set(power))
    assert (power["faults_planted"], power["faults_caught"], power["false_accusations"]) == (3, 3, 0)
    assert 0.4 < power["lower_bound_eps1"] < 1
    assert 2 < power["lower_bound_eps4"] < 4
    assert power["seconds"] > 0
    assert set(power["lower_bounds"]) == {case.name for case in few}


def test_a_bench_counts_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(lower: float, _: float, draws: int) -> Bound:
        return Bound(lower, 0.95, draws, 0.0, 0, 0)

    lows = {("caught", True): 5.0, ("missed", True): 3.9, ("accused", False): 4.1, ("spared", False): 4.0}
    cases = tuple(Case(name, broken, partial(found, low)) for (name, broken), low in lows.items())
    monkeypatch.setattr(bench_dp, "CASES", cases)
    power = audit_power(repetitions=1, draws=100)
    assert (power["faults_planted"], power["faults_caught"]) == (2, 1)
    assert (power["honest"], power["false_accusations"]) == (2, 1)
