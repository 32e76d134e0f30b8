"""Accountants against what others and pencil and paper say: closed forms, dp-accounting, Opacus, brute force."""

import itertools
import time
from collections.abc import Callable
from functools import partial
from math import exp, inf, isfinite, log, sqrt

import dp_accounting
import mpmath
import numpy
import pytest
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.optimize import brentq

from privacy.dp import Clear, GaussianRelease, LaplaceRelease, Release, ResponseRelease, accountants, calibrate, epsilon
from privacy.dp.accountants import FINEST_GRID, ORDERS, TOLERANCE, Accountant, delta
from privacy.dp.analytic import delta_of, epsilon_of, mu_of

Array = NDArray[numpy.float64]
SGD = GaussianRelease(1.1, 0.01)


# The Gaussian mechanism in closed form


def _exact_delta(epsilon: float, mu: float) -> float:
    with mpmath.workdps(60):
        e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return float(mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m))


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 8.0, 400.0])
def test_delta_of_a_gaussian_is_the_formula(epsilon: float, mu: float) -> None:
    # Two terms of at most 1 are subtracted, each of float64 and an exponent of up to a few hundred.
    assert delta_of(epsilon, mu) == pytest.approx(_exact_delta(epsilon, mu), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 5.0, 40.0, 1e3, 1e5])
@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.01])
def test_epsilon_and_mu_undo_delta(mu: float, delta: float) -> None:
    found = epsilon_of(delta, mu)
    if found:
        # δ moves by at most e^… of its own size per unit of ε; the root itself is found to 1e-12 of ε and more.
        assert delta_of(found, mu) == pytest.approx(delta, rel=1e-6)
        assert mu_of(found, delta) == pytest.approx(mu, rel=1e-6)
        assert delta_of(found, mu_of(found, delta)) <= delta * (1 + 1e-9)
    else:
        assert delta_of(0.0, mu) <= delta


def test_the_ends_of_the_closed_form() -> None:
    assert delta_of(1.0, 0.0) == 0
    assert delta_of(1.0, inf) == 1
    assert delta_of(inf, 1.0) == 0
    assert epsilon_of(1e-5, inf) == epsilon_of(0.0, 1.0) == inf
    assert epsilon_of(0.4, 1.0) == 0  # Φ(1/2) − Φ(−1/2) = 0.383
    assert mu_of(0.0, 0.382925) == pytest.approx(1, rel=1e-5)  # six digits of it


@pytest.mark.parametrize(("noise", "times"), [(1.0, 1), (3.0, 20), (0.2, 7)])
def test_gaussians_compose_to_one(noise: float, times: int) -> None:
    whole = epsilon({GaussianRelease(noise): times}, 1e-5)
    assert whole == pytest.approx(epsilon_of(1e-5, sqrt(times) / noise), rel=1e-12)
    assert whole == pytest.approx(epsilon({GaussianRelease(noise / sqrt(times)): 1}, 1e-5), rel=1e-12)
    mixed = epsilon({GaussianRelease(noise): times - 1, GaussianRelease(noise * (1 + 1e-15)): 1}, 1e-5)
    assert mixed == pytest.approx(whole, rel=1e-9)  # of two kinds, whose noise is the same to the last bits


# Rényi DP


@pytest.mark.parametrize(
    ("release", "event"),
    [
        (GaussianRelease(0.7), dp_accounting.GaussianDpEvent(0.7)),
        (LaplaceRelease(0.2), dp_accounting.LaplaceDpEvent(0.2)),
        (LaplaceRelease(30.0), dp_accounting.LaplaceDpEvent(30.0)),
        (ResponseRelease(0.5, 2), dp_accounting.RandomizedResponseDpEvent(2 / (exp(0.5) + 1), 2)),
        (ResponseRelease(3.0, 10), dp_accounting.RandomizedResponseDpEvent(10 / (exp(3.0) + 9), 10)),
        (SGD, dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.1))),
    ],
)
def test_renyi_divergences_are_those_of_dp_accounting(release: Release, event: dp_accounting.DpEvent) -> None:
    replaced = isinstance(release, ResponseRelease)
    relation = dp_accounting.NeighboringRelation
    neighbours = relation.REPLACE_ONE if replaced else relation.ADD_OR_REMOVE_ONE
    # Of a subsampled Gaussian, dp-accounting interpolates between whole orders: an upper bound, 6 % above at 1.07.
    sampled = isinstance(release, GaussianRelease) and release.sampling < 1
    alike = numpy.round(ORDERS) == ORDERS if sampled else numpy.full(len(ORDERS), True)
    theirs = RdpAccountant(list(ORDERS), neighbours).compose(event)._rdp
    ours = accountants._rdp(release)
    assert numpy.all(ours > 0)
    assert numpy.all(ours <= theirs * (1 + 1e-6) + 1e-12)
    assert numpy.allclose(ours[alike], theirs[alike], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("release", [SGD, GaussianRelease(0.6, 0.3), GaussianRelease(8.0, 1e-3)])
def test_subsampled_renyi_divergences_are_those_of_opacus_and_the_integral(release: GaussianRelease) -> None:
    q, noise = release.sampling, release.noise_multiplier
    ours = accountants._rdp(release)
    opacus = compute_rdp(q=q, noise_multiplier=noise, steps=1, orders=list(ORDERS))
    assert numpy.allclose(ours, opacus, rtol=1e-12)
    # ∫ N(x; 0, σ²) · (1 − q + q·e^((2x−1)/2σ²))^α dx by the trapezoid rule, exponentially accurate here.
    for index in (0, 4, 8, 20, 60, 110):
        order = ORDERS[index]
        x, step = numpy.linspace(-40 * noise, 40 * noise + order, 400_001, retstep=True)
        ratio = numpy.logaddexp(numpy.log1p(-q), log(q) + (2 * x - 1) / (2 * noise**2))
        exponent = order * ratio - x**2 / (2 * noise**2)
        top = exponent.max()
        integral = numpy.exp(exponent - top).sum() * step / sqrt(2 * numpy.pi * noise**2)
        # The sum itself is right to 1e-13, which the division by α − 1 = 0.001 makes 1e-10.
        assert ours[index] == pytest.approx((top + log(integral)) / (order - 1), rel=1e-6, abs=1e-10)


def test_renyi_epsilon_is_the_conversion_of_their_sum() -> None:
    made: dict[Release, int] = {SGD: 100, LaplaceRelease(5.0): 3, ResponseRelease(1.0, 4): 2}
    rdp = 100 * accountants._rdp(SGD)
    rdp = rdp + 3 * accountants._rdp(LaplaceRelease(5.0)) + 2 * accountants._rdp(ResponseRelease(1.0, 4))
    best = min(
        value + log((order - 1) / order) - (log(1e-5) + log(order)) / (order - 1)
        for value, order in zip(rdp, ORDERS, strict=True)
    )
    assert epsilon(made, 1e-5, by="rdp") == pytest.approx(best, rel=1e-12)


def test_a_thousand_steps_of_dp_sgd_as_published() -> None:
    rdp, prv, pld = (epsilon({SGD: 1000}, 1e-5, by=by) for by in ("rdp", "prv", "pld"))
    assert rdp == pytest.approx(1.7118, abs=5e-5)
    assert prv == pytest.approx(1.5255, abs=5e-5)
    # PRV reports the upper end: its estimate plus its error of 0.01, at a δ less by a thousandth. PLD adds no error.
    assert prv - 0.011 < pld < prv


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_prv_is_opacus_and_knows_releases_without_sampling(noise: float) -> None:
    made: dict[Release, int] = {GaussianRelease(noise): 5}
    exact = epsilon_of(1e-5, sqrt(5) / noise)
    assert exact < epsilon(made, 1e-5, by="prv") < exact + 0.02 + 1e-3  # its stated error of 0.01, up and down
    accountant = PRVAccountant()
    accountant.history = [(noise, 0.1, 40)]
    assert epsilon({GaussianRelease(noise, 0.1): 40}, 1e-5, by="prv") == accountant.get_epsilon(1e-5)


def test_prv_knows_gaussians_alone() -> None:
    with pytest.raises(ValueError, match="expected Gaussian releases alone for by='prv', got LaplaceRelease"):
        epsilon({SGD: 1, LaplaceRelease(1.0): 1}, 1e-5, by="prv")


# Privacy loss distributions


@pytest.mark.parametrize(("noise", "times"), [(1.0, 1), (4.0, 30), (0.5, 3)])
def test_distributions_of_gaussians_reach_the_closed_form(noise: float, times: int) -> None:
    exact = epsilon_of(1e-5, sqrt(times) / noise)
    own = privacy_loss_distribution.from_gaussian_mechanism(noise, value_discretization_interval=FINEST_GRID)
    assert own.self_compose(times).get_epsilon_for_delta(1e-5) == pytest.approx(exact, abs=FINEST_GRID)
    # Beside a release that says next to nothing (ε = 1e-7) the closed form is no longer to be had.
    mixed = epsilon({GaussianRelease(noise): times, LaplaceRelease(1e7): 1}, 1e-5)
    assert exact <= mixed <= exact + 3 * FINEST_GRID  # a step of the grid for each of the two, and for the root


def _response(release: ResponseRelease) -> tuple[Array, Array]:
    """Return the answers' probabilities where the truth is 0, and where it is 1."""
    first, second = (numpy.full(release.classes, release.other) for _ in range(2))
    first[0] = second[1] = release.truth
    return first, second


def _laplace(noise: float, *, step: float = 2e-3, reach: float = 25.0) -> tuple[Array, Array]:
    """Return the masses of cells of a Laplace of scale 1 about 0, and about the shift 1 / noise, tails included."""
    cells = round(reach / step)
    edges = numpy.arange(-cells, cells + 1) * step + 0.5 / noise  # of both shifts by symmetry as well covered

    def mass(centre: float) -> Array:
        at = edges - centre
        below = numpy.where(at < 0, 0.5 * numpy.exp(-numpy.abs(at)), 1 - 0.5 * numpy.exp(-numpy.abs(at)))
        return numpy.diff(numpy.concatenate([[0.0], below, [1.0]]))

    return mass(0.0), mass(1 / noise)


def _product(*pairs: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return the joint distributions of independent releases, one probability for each combination."""
    first, second = (numpy.array([1.0]), numpy.array([1.0]))
    for p, q in pairs:
        first, second = numpy.outer(first, p).ravel(), numpy.outer(second, q).ravel()
    return first, second


def _hockey_stick(pair: tuple[Array, Array], epsilon: float) -> float:
    return float(numpy.maximum(pair[0] - exp(epsilon) * pair[1], 0).sum())


def _least_epsilon(pair: tuple[Array, Array], delta: float) -> float:
    if _hockey_stick(pair, 0.0) <= delta:
        return 0.0
    return float(brentq(lambda at: _hockey_stick(pair, at) - delta, 0.0, 100.0, xtol=1e-10))


@pytest.mark.parametrize(
    "responses",
    [[ResponseRelease(1.0, 2)] * 2, [ResponseRelease(0.7, 5)] * 4, [ResponseRelease(2.0, 3), ResponseRelease(0.5, 10)]],
)
@pytest.mark.parametrize("delta", [1e-3, 0.05])
def test_answers_compose_as_every_answer_counted_out(responses: list[ResponseRelease], delta: float) -> None:
    exact = _least_epsilon(_product(*map(_response, responses)), delta)
    made = {release: responses.count(release) for release in responses}
    # Upwards by at most one step of the grid a release.
    assert exact - 1e-9 <= epsilon(made, delta) <= exact + (1 + len(responses)) * FINEST_GRID
    assert epsilon(made, delta, by="rdp") >= exact


@pytest.mark.parametrize("delta", [1e-4, 0.02])
@pytest.mark.parametrize("noise", [2.0, 0.5])
def test_laplace_response_and_gaussian_together_as_brute_force(delta: float, noise: float) -> None:
    response = ResponseRelease(0.8, 4)
    laplace = _laplace(noise)
    # For each pair of an answer and a cell, the Gaussian in closed form at what is left of ε:
    # δ(ε) = Σ p · δ_μ(ε − log(p / q)), of which every cell is exact but for the noise's own width of 0.002.
    first, second = _product(laplace, _response(response))
    mass = first > 1e-18
    losses, weights = numpy.log(first[mass] / second[mass]), first[mass]
    mu = 1 / 1.5
    order = numpy.argsort(losses)
    losses, weights = losses[order], weights[order]
    # Losses to 1e-3 in one: at most 3e4 closed forms in place of 1e5; the error of ε is half of it.
    bins = numpy.round(losses / 1e-3).astype(int)
    values, where = numpy.unique(bins, return_inverse=True)
    summed = numpy.bincount(where, weights)

    def exact_delta(at: float) -> float:
        return sum(w * _signed_delta(at - 1e-3 * v, mu) for v, w in zip(values.tolist(), summed.tolist(), strict=True))

    exact = brentq(lambda at: exact_delta(at) - delta, 0.0, 30.0, xtol=1e-5)
    found = epsilon({LaplaceRelease(noise): 1, response: 1, GaussianRelease(1.5): 1}, delta)
    # 5e-4 for the bins of loss, 2e-3 for the cells (a step moves the loss by at most twice that), 3 steps of the grid.
    assert found == pytest.approx(exact, abs=3e-3)
    assert epsilon({LaplaceRelease(noise): 1, response: 1, GaussianRelease(1.5): 1}, delta, by="rdp") > exact


def _signed_delta(epsilon: float, mu: float) -> float:
    # For ε below 0 too: δ(−ε) = 1 − e^(−ε) + e^(−ε)·δ(ε), by the symmetry of the pair.
    return delta_of(epsilon, mu) if epsilon >= 0 else 1 - exp(epsilon) + exp(epsilon) * delta_of(-epsilon, mu)


def test_one_laplace_release_is_the_formula() -> None:
    # δ(ε') = 1 − e^((ε' − ε)/2) for the Laplace mechanism of pure ε (Balle et al. 2020, table 1).
    for pure, least in itertools.product((0.5, 2.0, 8.0), (1e-5, 0.1)):
        exact = max(0.0, pure + 2 * log(1 - least))
        assert exact - 1e-9 <= epsilon({LaplaceRelease(1 / pure): 1}, least) <= exact + 2 * FINEST_GRID
        at = pure / 2
        assert delta({LaplaceRelease(1 / pure): 1}, at) == pytest.approx(1 - exp((at - pure) / 2), abs=FINEST_GRID)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.99, 0.01), (1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)])
@pytest.mark.parametrize("shift", [0.5, 2.0, 5.0])
def test_laplace_in_many_dimensions_tells_no_more_than_in_one(shares: tuple[float, ...], shift: float) -> None:
    # What the account of a whole vector rests on. In each coordinate the loss of Laplace(1) shifted by s is s or −s
    # with an atom each, and uniform-like between: its exact masses, on a fine grid of the noise, below and above.
    step = 0.02 if len(shares) == 3 else 0.002
    pairs = [_shifted(share * shift, step) for share in shares]
    joint = _product(*pairs)
    one = _shifted(shift, step)
    for gamma in numpy.linspace(0.0, shift, 21):
        exact = max(0.0, 1 - exp((gamma - shift) / 2))
        assert _hockey_stick(one, gamma) == pytest.approx(exact, abs=1e-3)  # the oracle itself; cells of the last digit
        # Cells merge outcomes, so that the discrete divergence is below the true one, by less than a cell's loss does.
        assert _hockey_stick(joint, gamma) <= exact + 1e-12
    assert _hockey_stick(joint, 0.0) > 0.5 * max(0.0, 1 - exp(-shift / 2))  # and it is not small by mistake


def _shifted(shift: float, step: float) -> tuple[Array, Array]:
    """Return the masses of Laplace(1) about 0 and about ``shift``: both tails whole, and the cells between them."""
    # Beyond 0 and beyond the shift the loss is constant: one cell each is exact. About `step` of loss in each other.
    edges = numpy.linspace(0.0, shift, max(2, round(shift / step) + 1))
    first = numpy.concatenate([[0.5], -numpy.diff(0.5 * numpy.exp(-edges)), [0.5 * exp(-shift)]])
    return first, first[::-1].copy()


# Whatever the accountant


MIXES: list[dict[Release, int]] = [
    {GaussianRelease(2.0): 3},
    {LaplaceRelease(3.0): 4},
    {ResponseRelease(0.5, 10): 5},
    {SGD: 50},
    {GaussianRelease(4.0): 3, LaplaceRelease(5.0): 2, ResponseRelease(0.3, 3): 2, SGD: 10},
]


@pytest.mark.parametrize("made", MIXES)
@pytest.mark.parametrize("by", ["rdp", "pld"])
def test_more_releases_and_less_delta_cost_more(made: dict[Release, int], by: Accountant) -> None:
    before = epsilon(made, 1e-5, by=by)
    assert before > 0
    for release in made:
        assert epsilon({**made, release: made[release] + 20}, 1e-5, by=by) > before
    costs = [epsilon(made, least, by=by) for least in (1e-3, 1e-5, 1e-7, 1e-9)]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


@pytest.mark.parametrize("made", MIXES)
def test_distributions_are_no_worse_than_renyi_and_agree_with_delta(made: dict[Release, int]) -> None:
    tight = epsilon(made, 1e-5)
    assert tight <= epsilon(made, 1e-5, by="rdp")
    assert delta(made, tight) == pytest.approx(1e-5, rel=1e-2)  # a step of the grid moves δ by up to a hundredth
    assert delta(made, tight + 0.1) < delta(made, tight) < delta(made, tight - 0.1)


@pytest.mark.parametrize("by", ["rdp", "pld", "prv"])
def test_nothing_costs_nothing_and_the_clear_costs_all(by: Accountant) -> None:
    assert epsilon({}, 1e-5, by=by) == epsilon({SGD: 0, Clear(): 0}, 1e-5, by=by) == 0
    assert epsilon({}, 1e-5, by=by, slack=0.1) == 0
    assert epsilon({Clear(): 1}, 1e-5, by=by) == epsilon({SGD: 1, Clear(): 1}, 1e-5, by=by) == inf


def test_delta_of_nothing_and_of_the_clear() -> None:
    assert delta({}, 1.0) == delta({SGD: 0}, 1.0) == 0
    assert delta({Clear(): 1, SGD: 1}, 1.0) == 1
    assert delta({LaplaceRelease(0.01): 10}, 5.0) <= 1  # a probability, though each part is rounded upwards


@pytest.mark.parametrize("least", [0.0, 1.0, -1e-5, float("nan")])
def test_a_delta_that_is_none(least: float) -> None:
    with pytest.raises(ValueError, match="expected δ between 0 and 1"):
        epsilon({SGD: 1}, least)


@pytest.mark.parametrize("by", ["rdp", "pld"])
@pytest.mark.parametrize(
    "made",
    [
        {ResponseRelease(0.01, 10): 10_000},
        {ResponseRelease(1e-4, 10): 1_000_000},  # each far below the step of the grid
        {LaplaceRelease(1e3): 1_000_000},
        {LaplaceRelease(1e5): 10**10},
    ],
)
def test_many_small_releases_add_up_in_quadrature(made: dict[Release, int], by: Accountant) -> None:
    # They are nearly one Gaussian of mu² = Σ variance of the loss: for Laplace k·ε², for k-ary answers 2·k·ε²/classes.
    ((release, times),) = made.items()
    if isinstance(release, LaplaceRelease):
        mu = sqrt(times) / release.noise_multiplier
    else:
        assert isinstance(release, ResponseRelease)
        mu = sqrt(2 * times / release.classes) * release.epsilon
    nearly = epsilon_of(1e-5, mu)
    # RDP is up to 30 % above the closed form at small ε. The limit's own error is one of 1/√k or so.
    assert nearly * 0.97 < epsilon(made, 1e-5, by=by) < nearly * 1.35


# ε so great that e^−ε is no float


@pytest.mark.parametrize("by", ["rdp", "pld"])
@pytest.mark.parametrize("answer", [30.0, 40.0, 300.0, 800.0, 1e5])
@pytest.mark.parametrize("classes", [2, 10])
def test_an_answer_of_great_epsilon_is_counted(answer: float, classes: int, by: Accountant) -> None:
    # One answer is (ε, δ)-DP for ε + log(1 − δ/truth) and more. RDP is 0.0036 above at its highest order, and the
    # pair of steps that the grid may be coarser than itself is 2·4e-5 of ε.
    found = epsilon({ResponseRelease(answer, classes): 1}, 1e-5, by=by)
    assert answer - 2e-5 <= found <= answer * (1 + 1e-5) + 0.004


@pytest.mark.parametrize("answer", [1.0, 20.0, 36.0, 50.0, 700.0])
def test_the_chances_of_an_answer(answer: float) -> None:
    release = ResponseRelease(answer, 7)
    assert release.truth + 6 * release.other == pytest.approx(1, rel=1e-15)
    assert log(release.truth / release.other) == pytest.approx(answer, rel=1e-12)  # not what rounding of 1 leaves


@pytest.mark.parametrize("by", ["rdp", "pld"])
@pytest.mark.parametrize(
    "made",
    [
        {LaplaceRelease(1e-5): 10},
        {LaplaceRelease(0.5): 100_000},
        {ResponseRelease(2.0, 10): 100_000},
        {GaussianRelease(0.02, 0.5): 100_000},
        {GaussianRelease(0.3, 0.01): 10_000},
        {GaussianRelease(0.01): 10**6, LaplaceRelease(1.0): 1},
        {LaplaceRelease(0.1): 60},  # of ε = 600, still a distribution
    ],
)
def test_a_huge_epsilon_is_finite_and_found_at_once(made: dict[Release, int], by: Accountant) -> None:
    start = time.perf_counter()
    found = epsilon(made, 1e-5, by=by)
    assert time.perf_counter() - start < 10  # a second on a free core
    assert isfinite(found)
    assert found > 100
    pure = sum(
        times / release.noise_multiplier if isinstance(release, LaplaceRelease) else times * release.epsilon
        for release, times in made.items()
        if isinstance(release, LaplaceRelease | ResponseRelease)
    )
    if not any(isinstance(release, GaussianRelease) for release in made):
        assert found <= pure * (1 + 1e-4) + 0.1  # no more than pure ε's own sum, and the grid


# Slack


def test_slack_is_taken_from_delta() -> None:
    made: dict[Release, int] = {GaussianRelease(2.0): 4}  # one of mu = 1
    slack = 1e-8
    # By hand: the least ε with δ(ε) + (1 + e^ε)·slack = δ, of which the left side falls first.
    exact = brentq(lambda at: delta_of(at, 1.0) + (1 + exp(at)) * slack - 1e-5, 0.0, 5.0, xtol=1e-12)
    assert epsilon(made, 1e-5, slack=slack) == pytest.approx(exact, rel=1e-7)  # the iteration stops at 1e-9
    assert epsilon(made, 1e-5, slack=0.0) < exact
    assert epsilon(made, 1e-5, by="rdp", slack=slack) > epsilon(made, 1e-5, by="rdp")


@pytest.mark.parametrize("slack", [5e-6, 1e-6, 0.5])
def test_slack_that_is_more_than_delta_bounds_nothing(slack: float) -> None:
    # (1 + e^ε)·slack is 2·slack at the least; at ε = 4.4, which mu = 1 costs, 82 times as much.
    assert epsilon({GaussianRelease(2.0): 4}, 1e-5, slack=slack) == inf


# Calibration


@pytest.mark.parametrize(
    ("make", "releases", "by"),
    [
        (GaussianRelease, 20, "pld"),
        (GaussianRelease, 20, "rdp"),
        (LaplaceRelease, 5, "pld"),
        (LaplaceRelease, 5, "rdp"),
        (lambda noise: ResponseRelease(1 / noise, 10), 5, "pld"),
        (lambda noise: ResponseRelease(1 / noise, 10), 5, "rdp"),
        (partial(GaussianRelease, sampling=0.05), 100, "rdp"),
        (partial(GaussianRelease, sampling=0.05), 100, "prv"),
    ],
)
def test_calibrated_noise_meets_the_target_and_less_does_not(
    make: Callable[[float], Release], releases: int, by: Accountant
) -> None:
    noise = calibrate(make, epsilon=2.0, delta=1e-5, releases=releases, by=by)
    assert epsilon({make(noise): releases}, 1e-5, by=by) <= 2.0
    assert epsilon({make(noise / 1.01): releases}, 1e-5, by=by) > 2.0


def test_calibrated_gaussian_noise_is_the_closed_form() -> None:
    for target in (0.1, 4.0, 500.0):  # noise multipliers from above 1 to far below it
        noise = calibrate(GaussianRelease, epsilon=target, delta=1e-5, releases=9)
        exact = 3 / mu_of(target, 1e-5)
        assert exact <= noise * (1 + 1e-10) <= exact * (1 + TOLERANCE) * (1 + 1e-10)


def test_calibration_leaves_room_for_what_is_beside_and_for_slack() -> None:
    beside: dict[Release, int] = {GaussianRelease(3.0): 2}
    alone = calibrate(GaussianRelease, epsilon=4.0, delta=1e-5, releases=10)
    noise = calibrate(GaussianRelease, epsilon=4.0, delta=1e-5, releases=10, beside=beside)
    assert noise > alone
    assert beside == {GaussianRelease(3.0): 2}
    mu = mu_of(4.0, 1e-5)
    assert noise == pytest.approx(sqrt(10 / (mu**2 - 2 / 9)), rel=2 * TOLERANCE)
    cautious = calibrate(GaussianRelease, epsilon=4.0, delta=1e-5, releases=10, slack=1e-8)
    assert cautious > alone
    assert epsilon({GaussianRelease(cautious): 10}, 1e-5, slack=1e-8) <= 4.0
    # The same release beside is added to, not replaced.
    same = calibrate(lambda _: GaussianRelease(3.0), epsilon=4.0, delta=1e-5, releases=1, beside=beside)
    assert same <= 1


def test_what_no_noise_meets() -> None:
    for beside, slack in (({Clear(): 1}, 0.0), ({GaussianRelease(0.1): 1}, 0.0), ({}, 1e-5)):
        with pytest.raises(ValueError, match="expected a noise that meets ε=1, δ=1e-05 over 3 releases, got none"):
            calibrate(GaussianRelease, epsilon=1.0, delta=1e-5, releases=3, beside=beside, slack=slack)
    for target, releases in ((inf, 1), (0.0, 1), (1.0, 0)):
        with pytest.raises(ValueError, match="expected a finite ε above 0 and at least one release"):
            calibrate(GaussianRelease, epsilon=target, delta=1e-5, releases=releases)


@pytest.mark.parametrize("value", [0.0, -1.0, inf, float("nan")])
def test_releases_that_are_none(value: float) -> None:
    for make in (GaussianRelease, LaplaceRelease):
        with pytest.raises(ValueError, match=r"expected a finite noise multiplier above 0.*without noise use Clear"):
            make(value)
    with pytest.raises(ValueError, match="expected a finite ε above 0"):
        ResponseRelease(value, 10)
    with pytest.raises(ValueError, match="expected a sampling probability above 0 and of at most 1"):
        GaussianRelease(1.0, 2.0 if value > 0 else value)
    with pytest.raises(ValueError, match="expected at least 2 classes, got 1"):
        ResponseRelease(1.0, 1)
