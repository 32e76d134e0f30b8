"""Layouts of an encrypted product, in plaintext: every one computes X·M + b, and the one chosen costs least."""

from dataclasses import astuple, replace
from math import ceil
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from privacy.he.ciphertexts import nbytes_each
from privacy.he.layout import FOLDS, Complex, Cost, Fold, Layout, Real, cheapest
from privacy.he.parameters import DEPTH2, FAST, PRECISE, Parameters
from privacy.he.product import LINK, costs, plan

SLOTS = [8, 16, 32, 64]
# float64 alone: sums of at most 50 products of order 1.
EXACT = 1e-9
steady = settings(max_examples=200, deadline=None, derandomize=True, database=None)
each_fold = pytest.mark.parametrize("fold", FOLDS)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def layouts(draw: st.DrawFn, fold: Fold, replicated: bool = True) -> Layout:
    """Any layout of this fold, of rows that fit, that fill the slots, and that go in chunks."""
    slots = draw(st.sampled_from(SLOTS))
    rows = draw(st.integers(1, slots) | st.integers(1, 3 * slots) | st.integers(1, 4))
    inner, outer = draw(st.integers(1, 50)), draw(st.integers(1, 20))
    height = ceil(rows / ceil(rows / slots))
    period = 1 << draw(st.integers(0, (slots // height).bit_length() - 1))
    tile = draw(st.integers(1, period))
    replicas = draw(st.integers(1, period // tile)) if replicated else 1
    return Layout(rows, inner, outer, slots, tile, replicas, fold)


def numbers(layout: Layout, seed: int) -> tuple[Real, Real, Real]:
    """X, M and b of a layout's shape."""
    random = np.random.default_rng(seed)
    return (
        random.normal(size=(layout.rows, layout.inner)),
        random.normal(size=(layout.inner, layout.outer)),
        random.normal(size=layout.outer),
    )


def everywhere(periods: Complex, layout: Layout) -> Complex:
    """The slots of one row [..., period], repeated over all slots."""
    return np.concatenate([periods] * (layout.slots // layout.period), axis=-1)


def served(layout: Layout, rows: Complex, weights: Complex, bias: Complex | None = None) -> Complex:
    """What the server does: slots [chunks · up, slots] times weights [down, up, period], summed over the tiles."""
    inputs = rows.reshape(layout.chunks, layout.up, layout.slots)
    replies = np.einsum("cus,dus->cds", inputs, everywhere(weights, layout))
    if bias is not None:
        replies = replies + everywhere(bias, layout)
    return replies.reshape(-1, layout.slots)


# Any layout


@each_fold
def test_every_layout_computes_the_product(fold: Fold) -> None:
    @steady
    @given(layouts(fold), seeds)
    def holds(layout: Layout, seed: int) -> None:
        x, m, b = numbers(layout, seed)
        up, weights, bias = layout.pack_rows(x), layout.periods(m), layout.bias_periods(b)
        assert up.shape == (layout.chunks * layout.up, layout.slots)
        assert weights.shape == (layout.down, layout.up, layout.period)
        assert bias.shape == (layout.down, layout.period)
        assert layout.products == layout.chunks * layout.up * layout.down
        assert np.abs(layout.unpack(served(layout, up, weights)) - x @ m).max() < EXACT
        assert np.abs(layout.unpack(served(layout, up, weights, bias)) - (x @ m + b)).max() < EXACT

    holds()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 1, 1, 8, 1, 1, "none"),
        Layout(9, 5, 3, 8, 1, 1, "up"),  # two chunks of five rows, of which the last is none
        Layout(8, 5, 3, 8, 1, 1, "down"),  # rows fill the slots
        Layout(25, 7, 5, 8, 1, 1, "down"),  # four chunks of seven
        Layout(2, 7, 5, 32, 3, 4, "none"),  # neither is a multiple: of 7 by 3, of 5 by 4
        Layout(2, 7, 5, 32, 3, 4, "up"),
        Layout(2, 7, 5, 32, 3, 4, "down"),
        Layout(1, 2, 2, 64, 8, 8, "up"),  # tile and replicas beyond what there is
        Layout(3, 1, 1, 64, 2, 7, "down"),
    ],
    ids=lambda one: f"{one.rows}x{one.inner}x{one.outer}-{one.fold}",
)
def test_edges_of_the_packing(layout: Layout) -> None:
    x, m, b = numbers(layout, 1)
    replies = served(layout, layout.pack_rows(x), layout.periods(m), layout.bias_periods(b))
    assert np.abs(layout.unpack(replies) - (x @ m + b)).max() < EXACT


@each_fold
def test_slots_that_are_not_used_hold_nothing_and_count_for_nothing(fold: Fold) -> None:
    @steady
    @given(layouts(fold), seeds)
    def holds(layout: Layout, seed: int) -> None:
        used = np.zeros((layout.slots // layout.period, layout.period), bool)
        used[: layout.height, : layout.tile * layout.replicas] = True
        x, m, b = numbers(layout, seed)
        rows = layout.pack_rows(x)
        assert not rows[:, ~used.ravel()].any()
        replies = served(layout, rows, layout.periods(m), layout.bias_periods(b))
        replies[:, ~used.ravel()] = 1e6  # what noise, and a bias for rows that are none, would leave there
        assert np.abs(layout.unpack(replies) - (x @ m + b)).max() < EXACT

    holds()


@each_fold
def test_each_number_goes_up_once_a_replica(fold: Fold) -> None:
    @steady
    @given(layouts(fold))
    def holds(layout: Layout) -> None:
        x = np.arange(1.0, 1 + layout.rows * layout.inner).reshape(layout.rows, layout.inner)
        slots = layout.pack_rows(x)
        sent = np.concatenate([slots.real.ravel(), slots.imag.ravel()])
        assert sorted(sent[sent > 0]) == sorted(np.repeat(x, layout.replicas))

    holds()


@steady
@given(layouts("down"), seeds)
def test_a_conjugate_layout_computes_the_same(layout: Layout, seed: int) -> None:
    other = replace(layout, conjugate=True)
    x, m, b = numbers(layout, seed)
    weights = other.periods(m)
    assert np.array_equal(weights, layout.periods(m).conj())
    replies = served(other, other.pack_rows(x), weights, other.bias_periods(b))
    assert np.abs(other.unpack(replies) - (x @ m + b)).max() < EXACT


@steady
@given(layouts("up", replicated=False), seeds)
def test_weights_serve_the_transposed_product_as_they_are_packed(layout: Layout, seed: int) -> None:
    back = layout.transposed()
    _, m, _ = numbers(layout, seed)
    weights = layout.periods(m)
    assert np.array_equal(back.periods(m.T), weights.swapaxes(0, 1))  # bit for bit: no second packing
    assert (back.up, back.down, back.chunks, back.period) == (layout.down, layout.up, layout.chunks, layout.period)
    g = np.random.default_rng(seed).normal(size=(layout.rows, layout.outer))
    replies = served(back, back.pack_rows(g), weights.swapaxes(0, 1))
    assert np.abs(back.unpack(replies) - g @ m.T).max() < EXACT


@pytest.mark.parametrize(("fold", "replicas"), [("none", 1), ("down", 1), ("up", 2)])
def test_only_an_up_layout_without_replicas_is_transposed(fold: Fold, replicas: int) -> None:
    with pytest.raises(AssertionError):
        Layout(2, 4, 4, 16, 2, replicas, fold).transposed()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 1, 1, 8, 1, 1), "expected at least one row, input and output, got 0, 1, 1"),
        ((1, 0, 1, 8, 1, 1), "expected at least one row, input and output, got 1, 0, 1"),
        ((1, 1, -1, 8, 1, 1), "expected at least one row, input and output, got 1, 1, -1"),
        ((2, 1, 1, 8, 0, 1), "expected a tile and replicas of 1 or more, .*fits 8 slots 2 times, got 0 and 1"),
        ((2, 1, 1, 8, 1, 0), "fits 8 slots 2 times, got 1 and 0"),
        ((2, 1, 1, 8, 5, 1), "fits 8 slots 2 times, got 5 and 1"),
        ((9, 1, 1, 8, 2, 1), "fits 8 slots 5 times, got 2 and 1"),  # nine rows go in two chunks of five
        ((2, 1, 1, 8, 2, 3), "fits 8 slots 2 times, got 2 and 3"),
        ((3, 1, 1, 16, 5, 1), "fits 16 slots 3 times, got 5 and 1"),  # 5 fits, and 8, its period, does not
    ],
)
def test_layouts_that_are_none(shape: tuple[int, int, int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(*shape, "none")


def test_a_fold_that_is_none() -> None:
    fold: Any = "both"
    with pytest.raises(ValueError, match="expected a fold among none, up, down, got 'both'"):
        Layout(1, 1, 1, 8, 1, 1, fold)


# The layout that is chosen


def counted(layout: Layout, cost: Cost) -> float:
    """What a layout costs, by the arrays that it makes."""
    sent, _ = layout.pack_rows(np.zeros((layout.rows, layout.inner))).shape
    down, up, _ = layout.periods(np.zeros((layout.inner, layout.outer))).shape
    chunks = sent // up
    assert chunks * up == sent
    return sent * cost.up + chunks * down * cost.down + chunks * down * up * cost.product


def least(rows: int, inner: int, outer: int, slots: int, cost: Cost) -> float:
    """The least that any layout costs, whatever its tile, replicas and fold, each row's slots a power of 2."""
    height = ceil(rows / ceil(rows / slots))
    room = max(power for power in (1, 2, 4, 8, 16, 32, 64) if power * height <= slots)
    return min(
        counted(Layout(rows, inner, outer, slots, tile, replicas, fold), cost)
        for fold in FOLDS
        for tile in range(1, room + 1)
        for replicas in range(1, room // tile + 1)
    )


COSTS = {
    "like FAST": Cost(1.4e-3, 1.5e-3, 8e-5),
    "up free": Cost(0.0, 1.0, 0.01),
    "down free": Cost(1.0, 0.0, 0.01),
    "product free": Cost(1.0, 1.0, 0.0),
    "product alone": Cost(0.0, 0.0, 1.0),
    "up alone": Cost(1.0, 0.0, 0.0),
    "down alone": Cost(0.0, 1.0, 0.0),
    "products dear": Cost(1.0, 2.0, 50.0),
    "up dear": Cost(1000.0, 1.0, 1.0),
}


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_no_layout_costs_less_than_the_cheapest(cost: Cost) -> None:
    @settings(steady, max_examples=60)
    @given(st.sampled_from(SLOTS), st.integers(1, 80), st.integers(1, 60), st.integers(1, 30))
    def holds(slots: int, rows: int, inner: int, outer: int) -> None:
        assume(rows <= 2 * slots)
        chosen = cheapest(rows, inner, outer, slots, cost)
        assert (chosen.rows, chosen.inner, chosen.outer, chosen.slots) == (rows, inner, outer, slots)
        found = counted(chosen, cost)
        assert found == pytest.approx(cost.of(chosen), rel=1e-12)  # sums in another order
        assert found == pytest.approx(least(rows, inner, outer, slots, cost), rel=1e-12)

    holds()


@steady
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 16), st.integers(1, 20), st.integers(1, 12))
def test_no_layout_costs_less_at_any_cost(
    up: float, down: float, product: float, rows: int, inner: int, outer: int
) -> None:
    cost = Cost(up, down, product)
    assert counted(cheapest(rows, inner, outer, 8, cost), cost) == pytest.approx(
        least(rows, inner, outer, 8, cost), rel=1e-12
    )


@steady
@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 12))
def test_of_layouts_that_cost_the_same_one_of_the_least_period_is_taken(rows: int, inner: int, outer: int) -> None:
    cost = COSTS["like FAST"]
    chosen = cheapest(rows, inner, outer, 32, cost)
    for tile in range(1, chosen.period // 2 + 1):  # a longer period makes plaintexts dearer, which no cost counts
        for replicas in range(1, chosen.period // 2 // tile + 1):
            assert counted(replace(chosen, tile=tile, replicas=replicas), cost) > counted(chosen, cost) * (1 + 1e-12)


def test_the_choice_follows_the_dearer_direction() -> None:
    assert cheapest(8, 64, 64, 64, COSTS["up alone"]).fold == "up"
    assert cheapest(8, 64, 64, 64, COSTS["down alone"]).fold == "down"
    assert cheapest(8, 64, 64, 64, COSTS["down alone"]).replicas == 8  # all that fit


# What both sides reckon with

each_preset = pytest.mark.parametrize("parameters", [FAST, PRECISE, DEPTH2], ids=lambda one: one.name)


@each_preset
@pytest.mark.parametrize("truncated", [True, False])
def test_both_sides_plan_the_same(parameters: Parameters, truncated: bool) -> None:
    told = Parameters("as told", *astuple(parameters)[1:])  # the other side's own, by the numbers that cross
    assert costs(parameters, truncated) == costs(told, truncated)
    for rows, inner, outer in [(1, 1, 1), (8, 256, 10), (32, 10, 256), (parameters.slots + 1, 3, 70)]:
        ours = plan(parameters, rows, inner, outer, truncated=truncated)
        assert ours == plan(told, rows, inner, outer, truncated=truncated)
        assert ours == cheapest(rows, inner, outer, parameters.slots, costs(parameters, truncated))


@each_preset
def test_what_is_left_out_of_a_reply_is_not_paid_for(parameters: Parameters) -> None:
    whole, truncated = costs(parameters, False), costs(parameters, True)
    saved = nbytes_each(parameters, "whole", 2) - nbytes_each(parameters, "truncated", 2)
    assert whole.down - truncated.down == pytest.approx(saved / LINK, rel=1e-9, abs=1e-15)
    assert (whole.up, whole.product) == (truncated.up, truncated.product)
    assert whole.up > nbytes_each(parameters, "seeded", 2) / LINK  # encryption takes time too
