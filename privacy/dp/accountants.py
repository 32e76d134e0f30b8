"""Accountants: the ε of all releases of one account together, by Rényi DP or by privacy loss distributions.

- ``rdp``: Rényi DP (Mironov 2017, arXiv:1702.07476), converted as in Balle et al. 2020 (arXiv:1905.09982, theorem
  21). Fast; an upper bound.
- ``pld``: privacy loss distributions (Sommer, Meiser and Mohammadi 2019; Google's dp-accounting), rounded upwards: an
  upper bound, tight to the grid; Rényi DP's where that is less, over 700, or of over 10 million releases. Gaussian
  releases without sampling alone are in closed form (see ``analytic``).
- ``prv``: privacy random variables (Gopi, Lee and Wutschitz 2021, arXiv:2106.02848; Opacus), for subsampled Gaussians
  alone; the upper end of its stated error.

GDP's central limit is an approximation and no bound; it is not here. A composition is adaptive: each release may
depend on all before it.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from math import exp, expm1, inf, isfinite, log, log1p, sqrt
from typing import Any, Literal
from warnings import catch_warnings, filterwarnings

import numpy
from numpy.typing import NDArray
from scipy.special import logsumexp

from privacy.dp.analytic import delta_of, epsilon_of
from privacy.dp.releases import Clear, GaussianRelease, LaplaceRelease, Release, Releases, ResponseRelease
from privacy.extra import load

__all__ = ["Accountant", "calibrate", "delta", "epsilon"]

Accountant = Literal["rdp", "pld", "prv"]

# Low ones for the large ε of many local releases, high ones for small ε.
ORDERS = numpy.array(
    [1 + n / 1000 for n in (1, 2, 5, 10, 20, 30, 50, 70)]
    + [1 + n / 10 for n in range(1, 100)]
    + [*range(11, 64), 80, 96, 128, 192, 256, 512, 1024]
)
FINEST_GRID = 1e-4  # of privacy loss, dp-accounting's default
LARGEST_EXPONENT = 700.0  # e to a greater ε is no float: Rényi DP's bound has to do
LARGEST_GRID_POINTS = 400_000  # a coarser grid where ε is large keeps a distribution at about as many points
MOST_COMPOSED = 10**7  # of one release, in a distribution: dp-accounting takes for ever over more
TOLERANCE = 1e-4  # relative, on the safe side, of a calibrated noise multiplier


def epsilon(releases: Releases, delta: float, *, by: Accountant = "pld", slack: float = 0.0) -> float:
    """Return an ε for which all ``releases`` together are (ε, ``delta``)-DP; 0 for none, infinite with a ``Clear``.

    ``slack`` is the probability that the run was not the one that is accounted for (a Poisson batch over its
    capacity): (1 + e^ε)·slack of ``delta`` is spent on it; infinite where that is more than there is.
    """
    _check_delta(delta)
    made = {release: times for release, times in releases.items() if times}
    if not made:
        return 0.0
    if any(isinstance(release, Clear) for release in made):
        return inf
    found, left, pure = -1.0, delta, _pure(made)
    while True:  # upwards to the fixed point of ε = ε(δ − (1 + e^ε)·slack)
        before, found = found, max(found, min(pure, _EPSILON[by](made, left)))
        if not isfinite(found) or slack == 0 or found - before <= 1e-9 * (1 + found):
            return found
        left = delta - (1 + exp(min(found, 700))) * slack
        if left <= 0:
            return inf


def delta(releases: Releases, epsilon: float) -> float:
    """Return a δ for which all ``releases`` together are (``epsilon``, δ)-DP, by privacy loss distributions."""
    made = {release: times for release, times in releases.items() if times}
    if any(isinstance(release, Clear) for release in made):
        return 1.0
    gaussian, others = _gathered(made)
    if not others:
        return delta_of(epsilon, gaussian)
    grid = max(FINEST_GRID, 4 * _by_rdp(made, 1e-6) / LARGEST_GRID_POINTS)
    return min(1.0, float(_composed(made, grid).get_delta_for_epsilon(epsilon)))


def calibrate(
    make: Callable[[float], Release],
    *,
    epsilon: float,
    delta: float,
    releases: int = 1,
    beside: Releases | None = None,
    by: Accountant = "pld",
    slack: float = 0.0,
) -> float:
    """Return the least noise for which ``releases`` of ``make(noise)``, and those ``beside``, are (ε, δ)-DP.

    Which noise meets ε = 4 over 20 epochs: ``calibrate(GaussianRelease, epsilon=4, delta=1e-5, releases=20)``. For
    DP-SGD ``make`` is ``partial(GaussianRelease, sampling=q)``; for randomised response, which has no noise
    multiplier, ``lambda noise: ResponseRelease(1 / noise, classes)``. More noise must give less ε. At most 0.01 % above
    the least one. ``ValueError`` where no noise does, since what is ``beside`` spends it all.
    """
    if not (isfinite(epsilon) and epsilon > 0) or releases < 1:
        raise ValueError(f"expected a finite ε above 0 and at least one release, got {epsilon} and {releases}")

    def meets(noise: float) -> bool:
        made = dict(beside or {})
        release = make(noise)
        made[release] = made.get(release, 0) + releases
        return _epsilon(made, delta, by=by, slack=slack) <= epsilon

    low, high = 1.0, 1.0
    while not meets(high):
        low, high = high, 2 * high
        if high > 1e7:
            raise ValueError(
                f"expected a noise that meets ε={epsilon:g}, δ={delta:g} over {releases} releases, got none up to 1e7; "
                f"{'what was spent before leaves nothing: ' if beside else ''}raise the budget, or release less often"
            )
    while low >= high:
        low = low / 2
        if low < 1e-4:
            return high
        if meets(low):
            high = low
    while high / low - 1 > TOLERANCE:
        middle = sqrt(low * high)
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def _pure(made: Releases) -> float:
    """Return the ε at δ = 0 by basic composition, which no other bound may exceed; infinite with Gaussian noise."""
    total = 0.0
    for release, times in made.items():
        match release:
            case LaplaceRelease(noise_multiplier):
                total += times / noise_multiplier
            case ResponseRelease(epsilon, _):
                total += times * epsilon
            case _:
                return inf
    return total


def _by_rdp(made: Releases, delta: float) -> float:
    rdp = sum(times * _rdp(release) for release, times in made.items())
    # Balle et al. 2020, theorem 21; nothing of it can be below 0.
    bounds = rdp + numpy.log1p(-1 / ORDERS) - (log(delta) + numpy.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(numpy.nanmin(bounds)))


def _by_pld(made: Releases, delta: float) -> float:
    gaussian, others = _gathered(made)
    if not others:
        return epsilon_of(delta, gaussian)
    # The grid follows what Rényi DP says of the size: a tight distribution of ε in the hundreds would take minutes.
    roughly = _by_rdp(made, delta)
    if roughly > LARGEST_EXPONENT or max(others.values()) > MOST_COMPOSED:
        return roughly
    found = _composed(made, max(FINEST_GRID, 4 * roughly / LARGEST_GRID_POINTS)).get_epsilon_for_delta(delta)
    # Both bound it from above. Rounded upwards each, many releases below the grid's step add up to more than RDP's.
    return min(roughly, float(found))


def _by_prv(made: Releases, delta: float) -> float:
    if other := [release for release in made if not isinstance(release, GaussianRelease)]:
        raise ValueError(f"expected Gaussian releases alone for by='prv', got {other[0]}; use by='pld', which mixes")
    accountant = load("opacus.accountants").PRVAccountant()
    accountant.history = [
        (release.noise_multiplier, release.sampling, times)
        for release, times in made.items()
        if isinstance(release, GaussianRelease)
    ]
    with catch_warnings(), numpy.errstate(divide="ignore"):  # log(0), where a release has no sampling
        filterwarnings("ignore", message="Optimal order is the largest alpha")  # of a domain that is then wide enough
        return float(accountant.get_epsilon(delta))


_EPSILON: dict[str, Callable[[Releases, float], float]] = {"rdp": _by_rdp, "pld": _by_pld, "prv": _by_prv}
_epsilon = epsilon  # under a name that no parameter hides


def _gathered(made: Releases) -> tuple[float, dict[Release, int]]:
    """Return the mu of all Gaussian releases without sampling as one, and the other releases."""
    square, others = 0.0, {}
    for release, times in made.items():
        if isinstance(release, GaussianRelease) and release.sampling == 1:
            square += times / release.noise_multiplier**2
        else:
            others[release] = times
    return sqrt(square), others


def _composed(made: Releases, grid: float) -> Any:
    """Return the privacy loss distribution of all releases, rounded upwards to the grid."""
    gaussian, others = _gathered(made)
    parts = [_pld(release, grid).self_compose(times) for release, times in others.items()]
    if gaussian:
        parts.append(_pld(GaussianRelease(1 / gaussian), grid))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.compose(part)
    return whole


@lru_cache(maxsize=256)
def _pld(release: Release, grid: float) -> Any:
    """Return the distribution of one release: both directions, where they differ."""
    made = load("dp_accounting.pld.privacy_loss_distribution")
    match release:
        case GaussianRelease(noise_multiplier, sampling):
            build = partial(made.from_gaussian_mechanism, noise_multiplier, sampling_prob=sampling)
        case LaplaceRelease(noise_multiplier):
            build = partial(made.from_laplace_mechanism, noise_multiplier)
        case ResponseRelease(_, classes):
            build = partial(made.from_randomized_response, release.other * classes, classes)
        case _:
            raise ValueError(f"expected a release with a distribution, got {release}")
    return build(value_discretization_interval=grid)


@lru_cache(maxsize=1024)
def _rdp(release: Release) -> NDArray[numpy.float64]:
    """Return the Rényi divergence of one release at each of ``ORDERS``, the greater one of both directions."""
    match release:
        case GaussianRelease(noise_multiplier, sampling) if sampling == 1:
            return ORDERS / (2 * noise_multiplier**2)  # Mironov 2017, proposition 7
        case GaussianRelease(noise_multiplier, sampling):
            compute = load("opacus.accountants.analysis.rdp").compute_rdp
            found = compute(q=sampling, noise_multiplier=noise_multiplier, steps=1, orders=list(ORDERS))
            return numpy.asarray(found, dtype=numpy.float64)
        case LaplaceRelease(noise_multiplier):  # Mironov 2017, proposition 6
            return numpy.array([_laplace_rdp(1 / noise_multiplier, order) for order in ORDERS])
        case ResponseRelease(epsilon, _):
            # Of p = (truth, other, other, …) from q = (other, truth, other, …): the rest of the answers cancel.
            return numpy.array([_response_rdp(release, order) for order in ORDERS]).clip(max=epsilon)
    raise ValueError(f"expected a release with a Rényi divergence, got {release}")


def _laplace_rdp(epsilon: float, order: float) -> float:
    # log[a/(2a−1)·e^(ε(a−1)) + (a−1)/(2a−1)·e^(−ε·a)] / (a−1), with the greater exponent taken out.
    share = (order - 1) / (2 * order - 1)
    return epsilon + log1p(share * expm1(epsilon * (1 - 2 * order))) / (order - 1)


def _response_rdp(release: ResponseRelease, order: float) -> float:
    truth = log(release.truth)
    other = truth - release.epsilon  # also where e^(−ε) is no float
    terms = [order * truth + (1 - order) * other, order * other + (1 - order) * truth]
    if release.classes > 2:
        terms.append(log(release.classes - 2) + other)
    return float(logsumexp(terms)) / (order - 1)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"expected δ between 0 and 1, got {delta}; well below one over the number of samples")
