"""Rules on updates: by hand, against slow twins straight from the definitions, and what all of them must keep."""

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from defenses.aggregation import (
    FLAME,
    NNM,
    Bucketing,
    Bulyan,
    CentredClipping,
    DnC,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    Mixed,
    MultiKrum,
    Points,
    Rule,
    TrimmedMean,
)
from experiments.bench_aggregators import aggregator_speed
from splitlearn.deltas import squared_distances

Array = NDArray[np.float64]
Make = Callable[[], Rule]

F = 2  # of 11 rows: as many as Bulyan takes
BY_POSITION: dict[str, Make] = {  # what is the same wherever the rows are
    "mean": Mean,
    "median": Median,
    "trimmed": lambda: TrimmedMean(F),
    "krum": lambda: Krum(F),
    "multi_krum": lambda: MultiKrum(F),
    "multi_krum_3": lambda: MultiKrum(F, keep=3),
    "bulyan": lambda: Bulyan(F),
    "geometric": GeometricMedian,
    "clipping": CentredClipping,
    "clipping_radius": lambda: CentredClipping(radius=2.0, steps=2),
    "dnc": lambda: DnC(F),
    "dnc_rounds": lambda: DnC(F, rounds=3, drop=0.5, coordinates=3, seed=5),
    "nnm_trimmed": lambda: Mixed(NNM(F), TrimmedMean(F)),
    "nnm_twice": lambda: Mixed(NNM(F), Mixed(NNM(F), GeometricMedian())),
}
BY_DIRECTION: dict[str, Make] = {  # what depends on where the start is
    "fltrust": lambda: FLTrust(torch.ones(5, dtype=torch.float64)),
    "flame": FLAME,
    "foolsgold": FoolsGold,
}
ALL = BY_POSITION | BY_DIRECTION


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def drawn(seed: int, n: int = 11, d: int = 5) -> Tensor:
    """Rows around a common move, with some spread in size and direction."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return rows * (0.5 + torch.rand(n, 1, generator=generator, dtype=torch.float64)) + 0.7


# ---- by hand


LINE = column(0, 1, 2.5, 100, 1.2)
SQUARE = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [10, 10]], dtype=torch.float64)
HEAP = torch.tensor([[0, 0], [0, 1], [1, 0], [10, 10]], dtype=torch.float64)
FERMAT = torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.float64)
ROOTED = torch.tensor([[2, 0], [0, 3], [1, 1], [-1, 0]], dtype=torch.float64)
FAN = torch.tensor(
    [[r * math.cos(math.radians(a)), r * math.sin(math.radians(a))] for r, a in ((1, 0), (2, 10), (3, 25), (4, 180))],
    dtype=torch.float64,
)
SYBILS = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.float64)

BY_HAND: list[tuple[Rule, Tensor, list[float]]] = [
    (Mean(), SQUARE, [2.4, 2.4]),
    (Median(), SQUARE, [1, 1]),
    (Median(), SQUARE[:4], [0.5, 0.5]),
    (TrimmedMean(1), SQUARE, [2 / 3, 2 / 3]),
    (TrimmedMean(2), SQUARE, [1, 1]),
    (TrimmedMean(0), SQUARE, [2.4, 2.4]),
    (Krum(1), LINE, [1]),  # .2² + 1² to its two nearest; 1.2 has .2² + 1.2²
    (MultiKrum(1, keep=2), LINE, [1.1]),
    (MultiKrum(1), LINE, [1.175]),  # all but 100
    # Takes 2.1, 3.3, 1, 4.6 and 6, in this order; nearest to the median 3.3 are 2.1 and 4.6.
    (Bulyan(1), column(0, 1, 2.1, 3.3, 4.6, 6, 100), [10 / 3]),
    (GeometricMedian(), FERMAT, [(3 - math.sqrt(3)) / 6] * 2),  # the sides are seen at 120°
    (GeometricMedian(), column(0, 1, 2, 30, 400), [2]),  # on a line it is the median
    (GeometricMedian(), column(5, 5, 5, -2, 7), [5]),
    (CentredClipping(radius=2, steps=1), column(0, 1, 2, 3, 100), [1.8]),  # 1 + (-1 + 0 + 1 + 2 + 2) / 5
    (CentredClipping(steps=1), column(0, 1, 2, 3, 100), [1.4]),  # the median distance to 1 is 1
    (DnC(1), HEAP, [1 / 3, 1 / 3]),
    (FLTrust(torch.tensor([1.0, 0])), ROOTED, [1.5 / (1 + math.sqrt(0.5)), 0.5 / (1 + math.sqrt(0.5))]),
    # The one at 180° is out; norms 1, 2 and 3 of the others, clipped to 2.5, the median of all four.
    (FLAME(), FAN, ((FAN[0] + FAN[1] + FAN[2] * 2.5 / 3) / 3).tolist()),
    (FoolsGold(), SYBILS, [0, 1]),
    (Mixed(NNM(1), Median()), column(0, 1, 5), [0.5]),  # .5, .5, 3
]


@pytest.mark.parametrize(
    ("rule", "rows", "expected"),
    [pytest.param(*row, id=f"{type(row[0]).__name__}-{at}") for at, row in enumerate(BY_HAND)],
)
def test_by_hand(rule: Rule, rows: Tensor, expected: list[float]) -> None:
    found = rule(rows)
    assert found.dtype == torch.float64
    # The geometric median ends within a millionth of the scale; all others are sums of a few numbers.
    assert found.tolist() == pytest.approx(expected, abs=2e-6 if isinstance(rule, GeometricMedian) else 1e-12)


def test_mixers_by_hand() -> None:
    assert NNM(1)(column(0, 1, 5)).tolist() == [[0.5], [0.5], [3]]
    buckets = Bucketing(2)(column(1, 2, 4, 8, 16)).flatten().tolist()
    assert len(buckets) == 3
    alone = buckets.pop()  # the last bucket has one row
    assert alone in (1, 2, 4, 8, 16)
    assert 2 * sum(buckets) + alone == 31


def test_shares_say_who_counts() -> None:
    def shares(rule: Rule, rows: Tensor) -> list[float]:
        found = rule.verdict(Points(rows)).shares
        assert found is not None
        return found.tolist()

    assert shares(Krum(1), LINE) == [0, 1, 0, 0, 0]
    assert shares(MultiKrum(1), LINE) == [0.25, 0.25, 0.25, 0, 0.25]
    assert shares(DnC(1), HEAP) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert shares(Bulyan(1), column(0, 1, 2.1, 3.3, 4.6, 6, 100)) == pytest.approx([0] + [0.2] * 5 + [0])
    assert shares(FLAME(), FAN) == pytest.approx([1 / 3, 1 / 3, 2.5 / 9, 0])
    assert shares(FoolsGold(), SYBILS) == [0, 0, 1]
    assert Median().verdict(Points(LINE)).shares is None
    # Of mixed rows: those of who was mixed into the chosen one. 0, 1 and 1.2 all become their mean.
    assert shares(Mixed(NNM(2), Krum(1)), LINE) == pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 3])


# ---- slow twins, from the definitions


def slow_distance(a: Array, b: Array) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def slow_krum_order(rows: Array, f: int, among: list[int]) -> list[int]:
    scores = {}
    for i in among:
        others = sorted(slow_distance(rows[i], rows[j]) for j in among if j != i)
        scores[i] = sum(others[: max(1, len(among) - f - 2)]), sum(others)
    return sorted(among, key=lambda i: scores[i])


def slow_krum(rows: Array, f: int) -> Array:
    return rows[slow_krum_order(rows, f, list(range(len(rows))))[0]]


def slow_multi_krum(rows: Array, f: int, keep: int) -> Array:
    return np.mean([rows[i] for i in slow_krum_order(rows, f, list(range(len(rows))))[:keep]], axis=0)


def slow_bulyan(rows: Array, f: int) -> Array:
    left, taken = list(range(len(rows))), []
    while len(taken) < len(rows) - 2 * f:
        best = slow_krum_order(rows, f, left)[0]
        taken.append(best)
        left.remove(best)
    result = []
    for numbers in rows[taken].T:
        median = statistics.median(numbers)
        result.append(statistics.fmean(sorted(numbers, key=lambda x: (abs(x - median), x))[: len(taken) - 2 * f]))
    return np.array(result)


def slow_trimmed_mean(rows: Array, f: int) -> Array:
    return np.array([statistics.fmean(sorted(numbers)[f : len(rows) - f]) for numbers in rows.T])


def slow_median(rows: Array) -> Array:
    return np.array([statistics.median(numbers) for numbers in rows.T])


def slow_geometric_median(rows: Array) -> Array:
    """Weiszfeld on the rows, from the mean, for very long."""
    centre = rows.mean(0)
    for _ in range(5_000):
        weights = 1 / np.maximum(1e-12, np.linalg.norm(rows - centre, axis=1))
        centre = weights @ rows / weights.sum()
    return np.asarray(centre)


def slow_clipping(rows: Array, radius: float | None, steps: int) -> Array:
    near = [sum(sorted(slow_distance(a, b) for b in rows)[: len(rows) // 2 + 1]) for a in rows]
    v = rows[int(np.argmin(near))]
    for _ in range(steps):
        lengths = [math.sqrt(slow_distance(row, v)) for row in rows]
        tau = statistics.median_low(lengths) if radius is None else radius
        clipped = [
            (row - v) * (min(1.0, tau / length) if length else 1.0) for row, length in zip(rows, lengths, strict=True)
        ]
        v = v + np.mean(clipped, axis=0)
    return v


def slow_nnm(rows: Array, f: int) -> Array:
    nearest = [sorted(range(len(rows)), key=lambda j: slow_distance(row, rows[j]))[: len(rows) - f] for row in rows]
    return np.array([rows[near].mean(0) for near in nearest])


def slow_dnc(rows: Array, f: int) -> Array:
    centred = rows - rows.mean(0)
    direction = np.linalg.svd(centred)[2][0]
    scores = (centred @ direction) ** 2
    return rows[np.argsort(scores)[: len(rows) - f]].mean(0)


def slow_fltrust(rows: Array, own: Array) -> Array:
    total, trusts = np.zeros_like(own), 0.0
    for row in rows:
        trust = max(0.0, float(row @ own) / (np.linalg.norm(row) * np.linalg.norm(own)))
        total, trusts = total + trust * row * np.linalg.norm(own) / np.linalg.norm(row), trusts + trust
    return total / trusts


def slow_flame(rows: Array) -> Array:
    """Join the two nearest groups, by their nearest members, until one has more than half: that is the cluster."""
    n = len(rows)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    groups = [{i} for i in range(n)]
    while max(len(group) for group in groups) <= n // 2:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        a, b = min(pairs, key=lambda p: min(1 - unit[i] @ unit[j] for i in groups[p[0]] for j in groups[p[1]]))
        groups[b] |= groups.pop(a)
    admitted = sorted(max(groups, key=len))
    norms = np.linalg.norm(rows, axis=1)
    bound = statistics.median(norms)
    return np.mean([rows[i] * min(1.0, bound / norms[i]) for i in admitted], axis=0)


def slow_foolsgold(history: Array, rows: Array) -> Array:
    n = len(rows)
    cosine = [[float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) for b in history] for a in history]
    v = [max(cosine[i][j] for j in range(n) if j != i) for i in range(n)]
    alpha = []
    for i in range(n):
        shrunk = [cosine[i][j] * (v[i] / v[j] if v[j] > v[i] else 1) for j in range(n) if j != i]
        alpha.append(min(1.0, max(0.0, 1 - max(shrunk))))
    alpha = [a / max(alpha) for a in alpha]
    rates = [1.0 if a == 1 else 0.0 if a == 0 else min(1.0, max(0.0, math.log(a / (1 - a)) + 0.5)) for a in alpha]
    return sum(a * row for a, row in zip(rates, rows, strict=True)) / sum(rates)  # type: ignore[no-any-return]


TWINS: list[tuple[str, Make, Callable[[Array], Array]]] = [
    ("median", Median, slow_median),
    ("trimmed", lambda: TrimmedMean(F), lambda x: slow_trimmed_mean(x, F)),
    ("krum", lambda: Krum(F), lambda x: slow_krum(x, F)),
    ("krum_0", lambda: Krum(0), lambda x: slow_krum(x, 0)),
    ("multi_krum", lambda: MultiKrum(F), lambda x: slow_multi_krum(x, F, len(x) - F)),
    ("multi_krum_3", lambda: MultiKrum(F, keep=3), lambda x: slow_multi_krum(x, F, 3)),
    ("bulyan", lambda: Bulyan(F), lambda x: slow_bulyan(x, F)),
    ("bulyan_1", lambda: Bulyan(1), lambda x: slow_bulyan(x, 1)),
    ("clipping", CentredClipping, lambda x: slow_clipping(x, None, 5)),
    ("clipping_radius", lambda: CentredClipping(0.8, 3), lambda x: slow_clipping(x, 0.8, 3)),
    ("dnc", lambda: DnC(F), lambda x: slow_dnc(x, F)),
    ("fltrust", lambda: FLTrust(torch.arange(-1.0, 4.0)), lambda x: slow_fltrust(x, np.arange(-1.0, 4.0))),
    ("flame", FLAME, slow_flame),
    ("foolsgold", FoolsGold, lambda x: slow_foolsgold(x, x)),
    ("nnm_krum", lambda: Mixed(NNM(F), Krum(F)), lambda x: slow_krum(slow_nnm(x, F), F)),
    ("nnm_median", lambda: Mixed(NNM(F), Median()), lambda x: slow_median(slow_nnm(x, F))),
    ("nnm_nnm_multi_krum", lambda: Mixed(NNM(F), Mixed(NNM(1), MultiKrum(F))),
     lambda x: slow_multi_krum(slow_nnm(slow_nnm(x, F), 1), F, len(x) - F)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "slow"), [pytest.param(*rest, id=name) for name, *rest in TWINS])
@pytest.mark.parametrize("n", [11, 14])
def test_each_rule_is_its_definition(make: Make, slow: Callable[[Array], Array], n: int) -> None:
    for seed in range(8):
        rows = drawn(seed, n=n)
        # Sums in another order, of numbers of about 1.
        assert make()(rows).numpy() == pytest.approx(slow(rows.numpy()), abs=1e-10), seed


def test_the_geometric_median_is_its_definition() -> None:
    for seed in range(3):
        rows = drawn(seed)
        assert GeometricMedian()(rows).numpy() == pytest.approx(slow_geometric_median(rows.numpy()), abs=5e-6)


def test_foolsgold_remembers() -> None:
    rule, history = FoolsGold(), np.zeros((11, 5))
    for seed in range(3):
        rows = drawn(seed)
        history = history + rows.numpy()
        assert rule(rows).numpy() == pytest.approx(slow_foolsgold(history, rows.numpy()), abs=1e-10)
    assert not torch.allclose(rule(drawn(3)), FoolsGold()(drawn(3)))
    rule.forget()
    assert torch.equal(rule(drawn(3)), FoolsGold()(drawn(3)))
    with pytest.raises(ValueError, match=r"updates \(11, 5\) of the members that its history is of.*got \(10, 5\)"):
        rule(drawn(3)[1:])


RECORDED_ROWS = torch.tensor(
    [[3, -1, 2], [4, 1, 5], [2, 6, 5], [3, 5, -8], [9, 7, 9], [3, 2, 3], [8, 4, 6], [2, 6, 4], [3, 3, 8], [-30, 27, 95],
     [0, 2, 8]], dtype=torch.float64,
)  # fmt: skip

# Of the slow twins above, once, but for the geometric median: scipy's Nelder-Mead on the sum of distances.
RECORDED: list[tuple[Make, list[float]]] = [
    (Median, [3.0, 4.0, 5.0]),
    (lambda: TrimmedMean(2), [2.857143, 4.0, 5.571429]),
    (lambda: Krum(2), [4.0, 1.0, 5.0]),
    (lambda: MultiKrum(2), [3.777778, 3.333333, 5.555556]),
    (lambda: Bulyan(2), [2.666667, 2.333333, 4.666667]),
    (GeometricMedian, [3.195722, 3.369945, 5.327863]),
    (CentredClipping, [3.303779, 3.437304, 5.417267]),
    (lambda: DnC(2), [3.777778, 3.333333, 5.555556]),
    (lambda: FLTrust(torch.ones(3)), [0.747415, 0.671963, 1.196604]),
    (FLAME, [2.652794, 2.417914, 5.796838]),
    (FoolsGold, [3.0, 5.0, -8.0]),
    (lambda: Mixed(NNM(2), Krum(2)), [3.777778, 3.333333, 5.555556]),
    (lambda: Mixed(NNM(2), TrimmedMean(2)), [3.68254, 3.333333, 5.555556]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), RECORDED, ids=[str(make())[:40] for make, _ in RECORDED])
def test_recorded_values(make: Make, expected: list[float]) -> None:
    assert make()(RECORDED_ROWS).tolist() == pytest.approx(expected, abs=2e-5)


# ---- what all of them keep


seeds = st.integers(0, 10_000)
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
placeless = pytest.mark.parametrize("make", BY_POSITION.values(), ids=BY_POSITION)


@every
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_the_rows_order_makes_no_difference(make: Make, seed: int) -> None:
    rows = drawn(seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    one, other = make().verdict(Points(rows)), make().verdict(Points(rows[order]))
    assert torch.allclose(one.delta, other.delta, atol=1e-5)  # the geometric median may end a step earlier
    assert (one.shares is None) == (other.shares is None)
    if one.shares is not None and other.shares is not None:
        assert torch.allclose(one.shares[order], other.shares, atol=1e-5)


@placeless
@settings(max_examples=20, deadline=None)
@given(seed=seeds, shift=st.floats(-100, 100))
def test_all_rows_moved_move_the_result(make: Make, seed: int, shift: float) -> None:
    rows = drawn(seed)
    move = shift * torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0], dtype=torch.float64)
    assert torch.allclose(make()(rows + move), make()(rows) + move, atol=1e-5)


@pytest.mark.parametrize("make", [make for name, make in ALL.items() if "radius" not in name])
@settings(max_examples=20, deadline=None)
@given(seed=seeds, scale=st.sampled_from([1e-9, 1e-3, 1e6]))
def test_the_rows_scale_is_the_result_s(make: Make, seed: int, scale: float) -> None:
    """Nothing in a rule is relative to 1: not a smoothing, not a tolerance. FLTrust's length is its reference's."""
    rows = drawn(seed)
    by = 1.0 if isinstance(make(), FLTrust) else scale
    assert torch.allclose(make()(rows * scale), make()(rows) * by, atol=1e-5 * by)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_mixed_rows_follow_the_order_of_the_rows(seed: int) -> None:
    rows = drawn(seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(NNM(F)(rows[order]), NNM(F)(rows)[order], atol=1e-12)
    assert torch.allclose(NNM(F)(rows + 50), NNM(F)(rows) + 50, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, n=st.integers(1, 12), size=st.integers(1, 5))
def test_buckets_hold_each_row_once(seed: int, n: int, size: int) -> None:
    mixer, points = Bucketing(size, seed=seed), Points(drawn(seed, n=n))
    mixing = mixer.matrix(points)
    assert mixing.shape == (math.ceil(n / size), n)
    assert ((mixing > 0).sum(0) == 1).all()
    assert torch.allclose(mixing.sum(1), torch.ones(len(mixing), dtype=torch.float64))
    again = Bucketing(size, seed=seed)
    assert torch.equal(again.matrix(points), mixing)
    if 1 < size < n and n > 8:  # 280 ways and more
        assert any(not torch.equal(mixer.matrix(points), mixing) for _ in range(5))


@pytest.mark.parametrize("rule", [Krum(F), MultiKrum(F), GeometricMedian(), CentredClipping()], ids=str)
def test_a_rule_by_distances_on_mixed_rows_is_that_on_rows_that_were_made(rule: Rule) -> None:
    rows = drawn(3)
    assert torch.allclose(Mixed(NNM(F), rule)(rows), rule(NNM(F)(rows)), atol=1e-6)
    points = Points(rows)
    mixed = points.mixed(NNM(F).matrix(points))
    assert torch.allclose(mixed.squared_distances, torch.cdist(NNM(F)(rows), NNM(F)(rows)) ** 2, atol=1e-12)
    assert "rows" not in mixed.__dict__


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_read_and_not_written(make: Make, dtype: torch.dtype) -> None:
    rows = drawn(1).to(dtype)
    before = rows.clone()
    found = make()(rows)
    assert torch.equal(rows, before)
    assert found.dtype == dtype
    assert found.shape == (5,)
    strided = torch.stack([before, before + 1], dim=2)[:, :, 0].T.contiguous().T  # columns in memory
    assert torch.allclose(make()(strided), found, atol=1e-5)
    assert torch.equal(strided, before)
    with_gradient = rows.clone().requires_grad_()
    assert not make()(with_gradient).requires_grad


@pytest.mark.parametrize("mixer", [NNM(F), Bucketing(2)], ids=["nnm", "bucketing"])
def test_mixers_do_not_write_either(mixer: NNM | Bucketing) -> None:
    rows = drawn(1)
    before = rows.clone()
    mixer(rows)
    assert torch.equal(rows, before)


def test_few_rows_of_many_numbers_cross_the_blocks() -> None:
    """Blocks of coordinates: the last one is not whole."""
    rows = drawn(0, n=7, d=5000)
    assert Median()(rows).numpy() == pytest.approx(np.median(rows.numpy(), axis=0), abs=1e-12)
    assert TrimmedMean(2)(rows).numpy() == pytest.approx(np.sort(rows.numpy(), axis=0)[2:5].mean(0), abs=1e-12)
    assert torch.allclose(Points(rows).squared_distances, torch.cdist(rows, rows) ** 2, atol=1e-8)


# ---- what they withstand


WITHSTAND: dict[str, Make] = {
    name: make for name, make in BY_POSITION.items() if not name.startswith(("mean", "dnc"))
} | {
    "bucketing": lambda: Mixed(Bucketing(2, seed=3), Median()),
    "nnm_krum": lambda: Mixed(
        NNM(F), Krum(F)
    ),  # not above: mixed rows coincide, and groups of as many have equal scores
}


@pytest.mark.parametrize("make", WITHSTAND.values(), ids=WITHSTAND)
@pytest.mark.parametrize("together", [True, False])
@settings(max_examples=15, deadline=None)
@given(seed=seeds, far=st.sampled_from([10.0, 1e3, 1e8, 1e100]))
def test_bad_rows_however_far_leave_the_result_near_honest_ones(
    make: Make, together: bool, seed: int, far: float
) -> None:
    rows = drawn(seed)
    honest = rows[F:]
    reach = (honest - honest.mean(0)).norm(dim=1).max()
    generator = torch.Generator().manual_seed(seed)
    away = torch.randn(1 if together else F, 5, generator=generator, dtype=torch.float64)
    rows[:F] += far * away
    # A coordinate at a time the corners of the honest box count, √5 farther; otherwise 2(1 - α)/(1 - 2α) is 2.6.
    assert (make()(rows) - honest.mean(0)).norm() <= 3 * reach
    if far > 1e3:
        assert (Mean()(rows) - honest.mean(0)).norm() > 100 * reach


@pytest.mark.parametrize(
    "make", [Median, GeometricMedian, CentredClipping, lambda: TrimmedMean(5), lambda: Mixed(NNM(5), Median())]
)
@pytest.mark.parametrize("far", [1e2, 1e12])
def test_five_of_eleven_bad_rows_are_withstood_by_those_that_claim_a_half(make: Make, far: float) -> None:
    rows = drawn(4)
    honest = rows[5:].clone()
    rows[:5] = far
    reach = (honest - honest.mean(0)).norm(dim=1).max()
    assert (make()(rows) - honest.mean(0)).norm() <= 12 * reach  # 2(1 - α)/(1 - 2α) for α = 5/11


@pytest.mark.parametrize("far", [1e2, 1e12])
def test_those_without_a_breakdown_point_withstand_what_they_say(far: float) -> None:
    rows = drawn(5)
    honest, reach = rows[F:].clone(), (rows[F:] - rows[F:].mean(0)).norm(dim=1).max()
    rows[:F] = far * torch.tensor([1.0, 1, -1, 1, 1], dtype=torch.float64)  # one direction
    assert (DnC(F)(rows) - honest.mean(0)).norm() <= reach
    own = torch.ones(5, dtype=torch.float64)
    assert FLTrust(own)(rows).norm() <= own.norm() * (1 + 1e-12)
    rows[:F] = -far
    shares = FLAME().verdict(Points(rows)).shares
    assert shares is not None
    assert shares[:F].tolist() == [0, 0]
    assert FLAME()(rows).norm() <= honest.norm(dim=1).max()
    alike = FoolsGold().verdict(Points(rows)).shares
    assert alike is not None
    assert alike[:F].tolist() == [0, 0]
    assert alike.sum() == pytest.approx(1)


def test_one_row_very_far_does_not_hide_others() -> None:
    """Rows less their mean are all far where one is, and distances among them lost; not those less the middle one."""
    rows = drawn(6, n=11, d=50)
    rows[0] = 1e12
    rows[1:4] += 4 * torch.randn(3, 50, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    exact = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    assert torch.allclose(Points(rows).squared_distances[1:, 1:], exact[1:, 1:], rtol=1e-9)
    centred = rows - rows.mean(0)
    assert not torch.allclose(squared_distances(centred @ centred.T)[1:, 1:], exact[1:, 1:], rtol=0.5)
    shares = MultiKrum(4).verdict(Points(rows)).shares
    assert shares is not None
    assert shares.nonzero().flatten().tolist() == list(range(4, 11))


# ---- what does not fit


LIMITS: list[tuple[Rule, int, str]] = [
    (TrimmedMean(2), 5, r"TrimmedMean: expected n ≥ 2f \+ 1 rows, at least 5 with f = 2, got 4"),
    (Krum(2), 7, r"Krum: expected n ≥ 2f \+ 3 rows, at least 7 with f = 2, got 6; lower f, or ask more members"),
    (MultiKrum(2), 7, r"MultiKrum: expected n ≥ 2f \+ 3 and n ≥ keep \+ f rows, at least 7 with f = 2, got 6"),
    (MultiKrum(1, keep=8), 9, r"n ≥ keep \+ f rows, at least 9 with f = 1, got 8"),
    (Bulyan(2), 11, r"Bulyan: expected n ≥ 4f \+ 3 rows, at least 11 with f = 2, got 10"),
    (Mixed(NNM(2), Median()), 5, r"NNM: expected n ≥ 2f \+ 1 rows, at least 5 with f = 2, got 4"),
    (Mixed(NNM(2), Krum(2)), 7, r"Krum: expected n ≥ 2f \+ 3"),
    (Mixed(Bucketing(2), Krum(1)), 9, r"Krum: expected n ≥ 2f \+ 3 rows, at least 5 with f = 1, got 4"),
    (DnC(2), 5, r"DnC: expected n ≥ 2f \+ 1 and n ≥ rounds·⌈drop·f⌉ \+ 1 rows, at least 5.*got 4"),
    (DnC(2, rounds=3, drop=1.2), 10, r"at least 10 with f = 2, rounds = 3 and drop = 1.2, got 9"),
    (FLAME(), 3, "FLAME: expected n ≥ 3 rows, got 2"),
    (FoolsGold(), 2, "FoolsGold: expected n ≥ 2 rows, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "least", "message"), LIMITS, ids=lambda value: type(value).__name__)
def test_too_few_rows_for_f(rule: Rule, least: int, message: str) -> None:
    assert rule.least == least
    assert rule(drawn(0, n=least)).isfinite().all()
    with pytest.raises(ValueError, match=message):
        rule(drawn(0, n=least - 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimmedMean(-1), "TrimmedMean: expected f, the number of bad rows to withstand, of 0 or more, got -1"),
        (lambda: Krum(1.5), "Krum: expected f.*got 1.5"),  # type: ignore[arg-type]
        (lambda: Bulyan(True), "Bulyan: expected f.*got True"),
        (lambda: NNM(-2), "NNM: expected f.*got -2"),
        (lambda: MultiKrum(1, keep=0), "at least one row to keep, got 0"),
        (lambda: GeometricMedian(smoothing=0), "smoothing and tolerance between 0 and 1.*got 0"),
        (lambda: CentredClipping(radius=0), "finite radius above 0.*got 5 and 0"),
        (lambda: Bucketing(0), "buckets of at least one row, got 0"),
        (lambda: DnC(1, rounds=0), "at least one round and one coordinate"),
        (lambda: FLAME(noise=math.nan), "finite noise of 0 or more, got nan"),
        (lambda: FLTrust(torch.tensor([math.nan])), "a finite row"),
        (lambda: FLTrust(torch.ones(2, 2)), r"a finite row \[d\] of the server's own, got \(2, 2\)"),
        (lambda: FoolsGold(confidence=0), "finite confidence above 0, got 0"),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@every
def test_rows_that_are_no_updates(make: Make) -> None:
    for bad in (math.nan, math.inf, -math.inf, 1e200):
        rows = drawn(0)
        rows[3, 2] = bad
        with pytest.raises(ValueError, match=r"finite updates.*rows \[3\]; put Robust around"):
            make()(rows)
    with pytest.raises(ValueError, match=r"expected updates \[members, numbers\].*got torch.float64 \(5,\)"):
        make()(drawn(0)[0])
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        make()(drawn(0).long())


def test_fltrust_needs_a_row_as_long() -> None:
    with pytest.raises(ValueError, match="as long as the server's, of 3 numbers, got 5"):
        FLTrust(torch.ones(3))(drawn(0))


# ---- nobody, nothing, noise


def test_where_nobody_is_trusted_nothing_moves() -> None:
    rows = drawn(0).abs()
    assert FLTrust(-torch.ones(5))(rows).tolist() == [0] * 5
    assert FLTrust(torch.zeros(5))(rows).tolist() == [0] * 5
    assert FoolsGold()(rows[:1].repeat(4, 1)).tolist() == [0] * 5


@every
def test_rows_all_alike_and_rows_of_zeros(make: Make) -> None:
    if isinstance(make(), FoolsGold):
        return  # takes them for sybils, see above
    alike = drawn(0)[:1].abs().repeat(11, 1)
    expected = alike[0] if not isinstance(make(), FLTrust) else alike[0] * math.sqrt(5) / alike[0].norm()
    assert torch.allclose(make()(alike), expected, atol=1e-12)
    assert make()(torch.zeros(11, 5, dtype=torch.float64)).tolist() == [0] * 5


def test_flame_s_noise_has_its_size_and_seed() -> None:
    rows = drawn(0, n=11, d=20_000)
    plain, bound = FLAME()(rows), float(rows.norm(dim=1).median())
    rule = FLAME(noise=0.01, seed=4)
    noise = rule(rows) - plain
    assert noise.std().item() == pytest.approx(0.01 * bound, rel=0.03)  # ± .5 % of 20,000 numbers
    assert not torch.equal(rule(rows) - plain, noise)
    assert torch.equal(FLAME(noise=0.01, seed=4)(rows) - plain, noise)


def test_dnc_draws_other_coordinates_each_time() -> None:
    """One bad row is bad in one coordinate of 40: it is found when that one is looked at."""
    rows = drawn(0, n=9, d=40)
    rows[2, 7] = 1000.0
    rule = DnC(1, coordinates=10)
    found = [bool(shares[2] == 0) for _ in range(40) if (shares := rule.verdict(Points(rows)).shares) is not None]
    assert 3 <= sum(found) <= 25  # 10 of 40, and by chance
    again = DnC(1, coordinates=10)
    assert found == [bool(s[2] == 0) for _ in range(40) if (s := again.verdict(Points(rows)).shares) is not None]
    state = torch.get_rng_state()
    rule(rows), FLAME(noise=1.0)(rows), Bucketing(2)(rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_geometric_median_ends_where_the_sum_of_distances_is_least() -> None:
    for seed in range(10):
        rows = drawn(seed, n=12, d=3)
        found = GeometricMedian()(rows)
        least = (rows - found).norm(dim=1).sum()
        generator = torch.Generator().manual_seed(seed)
        for size in (1.0, 0.1, 1e-3):
            near = found + size * torch.randn(50, 3, generator=generator, dtype=torch.float64)
            assert (torch.cdist(near, rows).sum(1) > least - 1e-9).all()


def test_the_bench_names_every_figure() -> None:
    figures = aggregator_speed(members=13, numbers=700, bad=2, rounds=1, nnm_rounds=1)
    for name in ("median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "nnm"):
        assert figures[f"{name}_speedup"] > 0
        assert figures[f"{name}_ms"] > 0
    assert 0 <= figures["nnm_peak_gb"] < 0.5
