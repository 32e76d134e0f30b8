"""Encrypted products against float64, what crosses and what is refused, and keys that stay where they are made."""

import copy
import gc
import pickle
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import factorial, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from privacy.he.ciphertexts import Ciphertexts, Form, nbytes_each, refuse_key_material
from privacy.he.keys import Keys, within
from privacy.he.layout import FOLDS, Fold, Layout, Real
from privacy.he.parameters import FAST, PRECISE, PRESETS, Parameters
from privacy.he.periodic import encode_periodic
from privacy.he.product import MOST_HALVINGS, Weights, halvings_for, plan, received, replied, sums
from privacy.he.seal import Ring

BOUND = 1.0  # of the activations here
HEADER_NBYTES = 44
# Where the fields of a header lie, in bytes.
FIELDS = {
    "magic": (0, 4), "version": (4, 5), "form": (5, 6), "polynomials": (6, 7), "padding": (7, 8), "parameters": (8, 16),
    "key": (16, 24), "count": (24, 28), "rows": (28, 32), "scale": (32, 40), "checksum": (40, 44),
}  # fmt: skip
NAMES = list(PRESETS)
each_preset = pytest.mark.parametrize("name", NAMES)
each_fold = pytest.mark.parametrize("fold", FOLDS)
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


@cache
def preset(name: str) -> Parameters:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tight's, which test_he_parameters.py holds
        return PRESETS[name]()


@cache
def keys_of(name: str) -> Keys:
    return Keys(preset(name))


def layouts(name: str, fold: Fold, rows: int = 24, inner: int = 40, outer: int = 6) -> st.SearchStrategy[Layout]:
    """Any layout of this fold, of shapes that take milliseconds."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Layout:
        slots, n = preset(name).slots, draw(st.integers(1, rows))
        period = 1 << draw(st.integers(0, (slots // n).bit_length() - 1))
        tile = draw(st.integers(1, min(period, 2 * inner)))
        replicas = draw(st.integers(1, min(period // tile, 2 * outer)))
        return Layout(n, draw(st.integers(1, inner)), draw(st.integers(1, outer)), slots, tile, replicas, fold)

    return drawn()


def numbers(rows: int, inner: int, outer: int, seed: int = 0) -> tuple[Real, Real, Real]:
    """Activations within ±1, and weights as layers start with, uniform within ±1/√inner."""
    random = np.random.default_rng(seed)
    return (
        random.uniform(-BOUND, BOUND, (rows, inner)),
        random.uniform(-1, 1, (inner, outer)) / sqrt(inner),
        random.uniform(-1, 1, outer),
    )


def upload(keys: Keys, layout: Layout, x: Real) -> Tensor:
    return keys.encrypt(layout.pack_rows(x), layout.rows).tensor(keys.ring)


def products(keys: Keys, layout: Layout, x: Real, plain: Any, bias: Any = None) -> list[Any]:
    """The server's products by plaintexts [down][up]."""
    ring = keys.ring
    fresh = Ciphertexts.of(
        upload(keys, layout, x), ring, key=keys.id, form="seeded", polynomials=2, count=layout.chunks * layout.up,
        scale=ring.scale,
    )  # fmt: skip
    return sums(ring, layout, received(ring, fresh), plain, bias)


def taken(keys: Keys, layout: Layout, reply: Tensor, form: Form, polynomials: int = 2) -> Ciphertexts:
    return Ciphertexts.of(
        reply, keys.ring, key=keys.id, form=form, polynomials=polynomials, count=layout.chunks * layout.down,
        scale=keys.ring.reply_scale, halvings=MOST_HALVINGS if polynomials == 2 else 0,
    )  # fmt: skip


def crossed(
    keys: Keys, layout: Layout, x: Real, m: Real, b: Real | None = None, *, truncated: bool = True
) -> tuple[Real, Ciphertexts]:
    """X·M + b by way of both wires, and the reply as the client has it."""
    weights = Weights(keys.ring, layout, m, b, BOUND)
    made = products(keys, layout, x, weights.plain, weights.bias)
    reply = replied(keys.ring, made, keys.id, layout.rows, truncated=truncated).tensor(keys.ring)
    got = taken(keys, layout, reply, "truncated" if truncated else "whole")
    return layout.unpack(keys.decrypt(got)), got


def crossed_encrypted(keys: Keys, layout: Layout, x: Real, grid: Any, truncated: bool) -> Real:
    """X·M where M is encrypted too, [down][up]: X goes up at the weights' scale, and three polynomials come back."""
    ring = keys.ring
    sent = keys.encrypt(layout.pack_rows(x), layout.rows, scale=ring.weight_scale).tensor(ring)
    fresh = Ciphertexts.of(
        sent, ring, key=keys.id, form="seeded", polynomials=2, count=layout.chunks * layout.up, scale=ring.weight_scale
    )
    made = sums(ring, layout, received(ring, fresh), grid)
    reply = replied(ring, made, keys.id, layout.rows, truncated=truncated).tensor(ring)
    return layout.unpack(keys.decrypt(taken(keys, layout, reply, "truncated" if truncated else "whole", 3)))


def encrypted_weights(keys: Keys, layout: Layout, m: Real) -> list[list[Any]]:
    """M as ciphertexts [down][up], at the inputs' scale."""
    ring = keys.ring
    slots = np.tile(layout.periods(m).reshape(-1, layout.period), layout.slots // layout.period)
    sent = keys.encrypt(slots, layout.rows, scale=ring.scale).tensor(ring)
    fresh = Ciphertexts.of(sent, ring, key=keys.id, form="seeded", polynomials=2, count=len(slots), scale=ring.scale)
    flat = received(ring, fresh)
    return [flat[at : at + layout.up] for at in range(0, len(flat), layout.up)]


def rms(error: Real) -> float:
    return float(np.sqrt(np.mean(np.square(error))))


def fresh_error(parameters: Parameters, bits: int) -> float:
    """What encryption at a scale of 2^bits adds to a slot's real part: noise of SEAL (variance 42/4) and rounding."""
    return sqrt(parameters.degree / 2 * (10.5 + 1 / 12)) / 2.0**bits


def expected_error(
    layout: Layout, parameters: Parameters, x: Real, m: Real, *, truncated: bool, encrypted: bool = False,
    halvings: int = 0,
) -> float:  # fmt: skip
    """The standard deviation of one output, from first principles.

    Of encryption, once for each weight; of rounding the weights' 2·period coefficients (or of encrypting them), once
    for each input; of cutting (or of dividing by a prime, which rounds) each polynomial of a reply, times the power of
    a ternary secret that it meets, of which E|s²|² is 2·(2N/3)², once for each slot that is folded.
    """
    degree, components = parameters.degree, 3 if encrypted else 2
    if encrypted:
        inputs, weights = (
            fresh_error(parameters, bits) for bits in (parameters.weight_scale_bits, parameters.scale_bits)
        )
    else:
        inputs = fresh_error(parameters, parameters.scale_bits)
        weights = sqrt(2 * max(2, layout.period) / 24) / 2.0 ** (parameters.weight_scale_bits - halvings)
    variance = inputs**2 * np.square(m).sum(0).mean() + weights**2 * np.square(x).sum(1).mean()
    dropped = parameters.dropped_bits(components) if truncated else (0,) * components
    for power, bits in enumerate(dropped):
        if bits or parameters.rescaled_bits:
            cut = 2.0 ** (bits + halvings - parameters.reply_scale_bits)
            variance += layout.tile * degree / 24 * cut**2 * factorial(power) * (2 * degree / 3) ** power
    return sqrt(variance)


def assert_close(found: Real, exact: Real, std: float) -> None:
    """Errors are of this size: a quarter more for what rows share, and four standard errors of as many as columns."""
    assert rms(found - exact) <= 1.25 * std * (1 + 4 / sqrt(exact.shape[1]))


# Products against float64


@each_preset
@each_fold
def test_encrypted_products_err_as_little_as_their_scales_say(name: str, fold: Fold) -> None:
    keys = keys_of(name)

    @settings(few, max_examples=5 if name == "depth2" else 15)
    @given(layouts(name, fold), st.booleans(), seeds)
    def holds(layout: Layout, truncated: bool, seed: int) -> None:
        x, m, b = numbers(layout.rows, layout.inner, layout.outer, seed)
        found, got = crossed(keys, layout, x, m, b, truncated=truncated)
        assert got.rows == layout.rows
        halvings = halvings_for(keys.ring, layout, m, b, BOUND)
        std = expected_error(layout, keys.parameters, x, m, truncated=truncated, halvings=halvings)
        assert_close(found, x @ m + b, std)

    holds()


@pytest.mark.parametrize(
    ("name", "asked"),
    [("fast", 2e-4), ("precise", 1e-5), ("depth2", 1e-7), ("tight", 5e-5)],
)
@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_the_error_that_was_asked_for(name: str, asked: float, truncated: bool, rows: int) -> None:
    # Of 256 inputs: encryption at 2^22 (fast) makes 0.58 · 3.3e-5 and rounding at 2^20 at most 9.2 · 8.8e-6, where a
    # row's period is all slots; cutting a reply 16 · 5.5e-6 at most. Together 1.2e-4; in precise 2^5 less, up to √2.
    keys = keys_of(name)
    x, m, b = numbers(rows, 256, 10)
    found, _ = crossed(keys, plan(keys.parameters, rows, 256, 10, truncated=truncated), x, m, b, truncated=truncated)
    assert rms(found - (x @ m + b)) <= asked


def test_rows_beyond_the_slots_go_in_chunks() -> None:
    keys = keys_of("fast")
    x, m, b = numbers(keys.parameters.slots + 7, 3, 2)
    for fold in FOLDS:
        layout = Layout(len(x), 3, 2, keys.parameters.slots, 1, 1, fold)
        assert layout.chunks == 2
        found, _ = crossed(keys, layout, x, m, b)
        assert_close(found, x @ m + b, expected_error(layout, FAST, x, m, truncated=True))


@each_preset
def test_products_of_two_ciphertexts(name: str) -> None:
    keys = keys_of(name)

    @settings(few, max_examples=3 if name == "depth2" else 10)
    @given(layouts(name, "up", inner=24, outer=4), st.booleans(), seeds)
    def holds(drawn: Layout, truncated: bool, seed: int) -> None:
        layout = Layout(drawn.rows, drawn.inner, drawn.outer, drawn.slots, drawn.tile, 1, "up")
        x, m, _ = numbers(layout.rows, layout.inner, layout.outer, seed)
        grid = encrypted_weights(keys, layout, m)
        found = crossed_encrypted(keys, layout, x, grid, truncated)
        std = expected_error(layout, keys.parameters, x, m, truncated=truncated, encrypted=True)
        assert_close(found, x @ m, std)
        g = np.random.default_rng(seed).uniform(-1, 1, (layout.rows, layout.outer))
        turned = [list(column) for column in zip(*grid, strict=True)]  # the same ciphertexts, the other way
        back = layout.transposed()
        std = expected_error(back, keys.parameters, g, m.T, truncated=truncated, encrypted=True)
        assert_close(crossed_encrypted(keys, back, g, turned, truncated), g @ m.T, std)

    holds()


@pytest.mark.parametrize("name", ["fast", "precise"])
def test_weights_of_zero(name: str) -> None:
    # One weight of 1 / 2^20 in each slot of a tile stands for all of a column: 64 inputs of 1/2 make 3e-5 of it, with
    # the rest under what is asked of any product.
    keys = keys_of(name)
    x = abs(numbers(8, 256, 10)[0])
    for m in (np.zeros((256, 10)), np.full((256, 10), 1e-12)):
        for b in (None, np.zeros(10)):
            found, _ = crossed(keys, plan(keys.parameters, 8, 256, 10), x, m, b)
            assert rms(found) <= {"fast": 2e-4, "precise": 1e-5}[name]
    some = numbers(8, 256, 10)[1] * (np.arange(10) % 2)  # columns that were pruned
    found, _ = crossed(keys, Layout(8, 256, 10, keys.parameters.slots, 64, 1, "up"), x, some)
    assert rms(found - x @ some) <= {"fast": 2e-4, "precise": 1e-5}[name]


@each_preset
@each_fold
@pytest.mark.parametrize(("tile", "replicas"), [(1, 1), (1, 4), (4, 1), (32, 4)])  # of either encoder
def test_what_stands_for_weights_of_zero_counts_once(name: str, fold: Fold, tile: int, replicas: int) -> None:
    keys = keys_of(name)
    layout = Layout(8, 256, 10, keys.parameters.slots, tile, replicas, fold)
    x = abs(numbers(8, 256, 10)[0])
    assert layout.up > 1
    weights = Weights(keys.ring, layout, np.zeros((256, 10)), None, BOUND)
    assert all(row[0] is not None and not any(row[1:]) for row in weights.plain)
    found, _ = crossed(keys, layout, x, np.zeros((256, 10)), truncated=False)
    # The least weight in one tile of many, which a ciphertext's own error is multiplied by too; depth2 rounds besides.
    rounding = 8 * expected_error(layout, keys.parameters, x * 0, np.zeros((256, 10)), truncated=False)
    assert np.abs(found).max() <= 1.01 * tile * BOUND / 2.0**keys.parameters.weight_scale_bits + rounding


def test_plaintexts_that_round_to_0_are_none() -> None:
    ring = keys_of("fast").ring
    for period in (1, 4, 64, 128):  # by either encoder
        slots = np.zeros((4, period), np.complex128)
        slots[1], slots[2, 0], slots[3] = 0.25, 1.0, 0.4 / ring.weight_scale
        some = [plain is not None for plain in encode_periodic(ring, slots, ring.weight_scale)]
        assert some == [False, True, True, False], period


@each_preset
def test_plaintexts_of_a_period_are_those_that_seal_makes(name: str) -> None:
    ring = keys_of(name).ring

    @few
    @given(st.integers(0, ring.parameters.slots.bit_length() - 1), st.integers(4, 44), seeds)
    def holds(power: int, bits: int, seed: int) -> None:
        period = 1 << power
        random = np.random.default_rng(seed)
        slots = random.normal(size=(2, period)) + 1j * random.normal(size=(2, period))
        bits = min(bits, ring.parameters.prime_bits[0] - 6)
        for plain, one in zip(encode_periodic(ring, slots, 2.0**bits), slots, strict=True):
            whole = np.tile(one, ring.parameters.slots // period)
            theirs = np.array(ring.encoder.decode_complex(ring.encode(whole, 2.0**bits)))
            ours = np.array(ring.encoder.decode_complex(plain))
            # 2·period coefficients, each rounded by half at the most; and decoding in double precision.
            most = max(period, 2) / 2.0**bits + 1e-9
            assert np.abs(ours - whole).max() <= most
            assert np.abs(ours - theirs).max() <= 2 * most

    holds()


# Great weights


def lone(keys: Keys, inner: int = 1) -> Layout:
    """The layout of one weight a slot: what is summed is the same in all slots where all rows are."""
    return Layout(keys.parameters.slots, inner, 1, keys.parameters.slots, 1, 1, "none")


@each_preset
@pytest.mark.parametrize(
    ("times", "halvings"),
    [(0.01, 0), (0.95, 0), (1.05, 1), (1.9, 1), (2.1, 2), (31.0, 5), (62.0, MOST_HALVINGS)],
)
def test_great_weights_halve_their_scale_and_stay_right(name: str, times: float, halvings: int) -> None:
    keys = keys_of(name)
    layout = lone(keys, inner=2)
    great = keys.parameters.range * times
    x = np.random.default_rng(0).choice([-BOUND, BOUND], (layout.rows, 2))
    x[: layout.rows // 2] = BOUND  # the worst case: both weights of a sign with their inputs
    m, b = np.array([[0.25], [0.5]]) * great / BOUND, np.array([0.25]) * great
    assert halvings_for(keys.ring, layout, m, b, BOUND) == halvings
    found, got = crossed(keys, layout, x, m, b)
    assert got.scale * 2**halvings == pytest.approx(keys.ring.reply_scale, rel=1e-12)
    std = expected_error(layout, keys.parameters, x, m, truncated=True, halvings=halvings)
    assert_close(found, x @ m + b, std)


@pytest.mark.parametrize("name", ["fast", "precise"])
def test_great_encrypted_weights_are_shrunk_and_stay_right(name: str) -> None:
    keys = keys_of(name)
    layout = Layout(4, 2, 1, keys.parameters.slots, 1, 1, "up")
    m = np.full((2, 1), 1.8 * keys.parameters.range)
    halvings = halvings_for(keys.ring, layout, m, None, BOUND)
    assert halvings == 2  # |x₁ + i·x₂| is √2 at the most, and so is |1 − i|: sums of 3.6 times the range
    x = np.array([[1.0, 1.0], [1.0, -1.0], [0.25, 0.5], [-1.0, -1.0]])
    shrunk = encrypted_weights(keys, layout, m / 2**halvings)  # at the same scale: no header tells
    found = crossed_encrypted(keys, layout, x, shrunk, truncated=True) * 2**halvings
    # At so great a scale the weights' own error, 4 · 3.3e-5 times two inputs, is nothing beside that of inputs at 2^20
    # (fast), 1e-4 of weights of 64, which is 1.3e-2; all in precise is 2^4 less.
    assert np.abs(found - x @ m).max() < {"fast": 0.06, "precise": 0.006}[name]


def test_weights_beyond_the_most_halvings_are_refused() -> None:
    keys = keys_of("fast")
    assert FAST.range * 2**MOST_HALVINGS == 2048
    limit = r"stay below 20[0-9.]+, the range of fast at the least precision"
    m = np.full((1, 1), 2100.0)
    with pytest.raises(ValueError, match=rf"inputs within ±1 {limit}, got sums of up to 2100, which would wrap"):
        Weights(keys.ring, lone(keys), m, None, BOUND)
    with pytest.raises(ValueError, match=rf"inputs within ±8 {limit}, got sums of up to 1.68e\+04"):
        Weights(keys.ring, lone(keys), m, None, 8.0)
    with pytest.raises(ValueError, match="got sums of up to 4000, which would wrap around; give a smaller bound"):
        Weights(keys.ring, lone(keys), m * 0, np.full(1, 4000.0), BOUND)  # a bias alone


@each_fold
def test_no_input_within_the_bound_passes_the_range(fold: Fold) -> None:
    keys = keys_of("fast")

    @few
    @given(layouts("fast", fold), seeds, st.floats(0.5, 200))
    def holds(layout: Layout, seed: int, great: float) -> None:
        x, m, b = numbers(layout.rows, layout.inner, layout.outer, seed)
        m, b = (m * great, b) if seed % 2 else (m, np.full(layout.outer, great))
        halvings = halvings_for(keys.ring, layout, m, b, BOUND)
        x[0] = BOUND * np.sign(m[:, 0])  # the worst for one output
        x[-1] = BOUND * np.sign(m.sum(1))
        inputs = layout.pack_rows(x).reshape(layout.chunks, layout.up, -1)
        repeated = layout.slots // layout.period
        slots = np.einsum("cus,dus->cds", inputs, np.tile(layout.periods(m), repeated))
        slots = slots + np.tile(layout.bias_periods(b), repeated)
        assert np.abs(slots).max() <= FAST.range * 2**halvings

    holds()


@each_preset
def test_what_the_check_is_for_is_that_ckks_wraps_without_a_word(name: str) -> None:
    keys = keys_of(name)
    layout, ring, most = lone(keys), keys.ring, keys.parameters.range
    x = np.ones((layout.rows, 1))
    for times, comes_back_as in [(0.99, 0.99), (1.01, -0.99), (-1.25, 0.75)]:
        plain = [[ring.encode(np.full(layout.slots, times * most, np.complex128), ring.weight_scale)]]
        made = products(keys, layout, x, plain)
        found = layout.unpack(keys.decrypt(replied(ring, made, keys.id, layout.rows)))  # nothing is raised
        # Encryption of 1 errs by 1e-4 of it at the most, which is folded over nothing.
        assert found == pytest.approx(comes_back_as * most, rel=1e-3)


@each_preset
@pytest.mark.parametrize(("times", "halvings"), [(1, 1), (1 - 2**-10, 0)])
def test_sums_at_the_very_end_of_the_range_do_not_wrap(name: str, times: float, halvings: int) -> None:
    # Half a prime is just below 2^(bits − 1), and noise comes on top: a thousandth of the range is left for both.
    keys = keys_of(name)
    layout = lone(keys)
    m = np.full((1, 1), keys.parameters.range * times / BOUND)
    assert halvings_for(keys.ring, layout, m, None, BOUND) == halvings
    for _ in range(20):  # the noise of encryption decides
        found, _ = crossed(keys, layout, np.full((layout.rows, 1), BOUND), m)
        assert (found > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    keys = keys_of("fast")
    good, bad = np.ones((1, 1)), np.full((1, 1), value)
    for m, b in ((bad, None), (bad, np.ones(1)), (good, bad[0])):
        with pytest.raises(ValueError, match="expected finite weights, got nan or inf; the training has diverged"):
            Weights(keys.ring, lone(keys), m, b, BOUND)


# What crosses


@pytest.mark.parametrize(
    ("name", "seeded", "whole", "truncated", "of_three"),
    [
        ("fast", 12352, 24576, 15360, 25600),
        ("precise", 30784, 61440, 36864, 59392),
        ("depth2", 143424, 122880, 122880, 184320),
        ("tight", 14400, 28672, 17408, 28672),
    ],
)
def test_bytes_are_exact(name: str, seeded: int, whole: int, truncated: int, of_three: int) -> None:
    keys = keys_of(name)
    ring = keys.ring
    assert nbytes_each(ring.parameters, "seeded", 2) == seeded
    assert nbytes_each(ring.parameters, "whole", 2) == whole
    assert nbytes_each(ring.parameters, "whole", 3) == 3 * whole // 2
    assert nbytes_each(ring.parameters, "truncated", 2) == truncated
    assert nbytes_each(ring.parameters, "truncated", 3) == of_three
    x, m, _ = numbers(4, 10, 3)
    layout = Layout(4, 10, 3, keys.parameters.slots, 4, 1, "none")
    assert len(upload(keys, layout, x)) == HEADER_NBYTES + layout.up * seeded
    made = products(keys, layout, x, Weights(ring, layout, m, None, BOUND).plain)
    for is_cut, size in ((False, whole), (True, truncated)):  # whole first: to cut them changes the products
        reply = replied(ring, made, keys.id, 4, truncated=is_cut).tensor(ring)
        assert len(reply) == HEADER_NBYTES + layout.down * size


@pytest.mark.parametrize("name", ["fast", "precise", "tight"])
def test_a_seeded_upload_is_half_of_a_whole_one(name: str) -> None:
    ring = keys_of(name).ring
    assert (
        nbytes_each(ring.parameters, "seeded", 2) - 64 == nbytes_each(ring.parameters, "whole", 2) / 2
    )  # the seed is 64 bytes


@each_preset
def test_polynomials_cross_bit_for_bit(name: str) -> None:
    ring, key = keys_of(name).ring, b"somebody"

    @few
    @given(st.sampled_from(["seeded", "whole", "truncated"]), st.integers(1, 3), st.integers(2, 3), seeds)
    def holds(form: Form, count: int, polynomials: int, seed: int) -> None:
        random, degree = np.random.default_rng(seed), ring.parameters.degree
        primes = ring.primes if form == "seeded" else ring.primes[:1]
        parts = 1 if form == "seeded" else polynomials
        integers = np.stack([random.integers(0, p, (count, parts, degree), np.uint64) for p in primes], 2)
        integers[..., 0], integers[..., -1] = 0, np.array(primes, np.uint64) - np.uint64(1)  # the ends
        tails = tuple(random.bytes(64) for _ in range(count)) if form == "seeded" else ()
        sent = Ciphertexts(form, key, 5, 3.0, integers, tails).tensor(ring)
        assert sent.dtype is torch.uint8
        got = Ciphertexts.of(sent, ring, key=key, form=form, polynomials=polynomials, count=count, scale=3.0)
        assert (got.form, got.key, got.rows, got.scale, got.seeds) == (form, key, 5, 3.0, tails)
        if form != "truncated":
            assert np.array_equal(got.integers, integers)
            return
        assert (got.integers < np.uint64(primes[0])).all()
        moved = np.abs(got.integers.astype(np.int64) - integers.astype(np.int64)).max(axis=(0, 2, 3))
        dropped = ring.parameters.dropped_bits(polynomials)
        for most, bits in zip(moved.tolist(), dropped, strict=True):
            assert most <= (1 << bits) // 2  # the middle of what was cut off
            assert (most > 0) == (bits > 0)

    holds()


@each_preset
def test_coefficients_of_a_cut_reply_are_those_of_the_whole_but_for_their_low_bits(name: str) -> None:
    keys = keys_of(name)
    ring, layout = keys.ring, Layout(2, 6, 2, keys.parameters.slots, 2, 2, "up")
    x, m, _ = numbers(2, 6, 2)
    made = products(keys, layout, x, Weights(ring, layout, m, None, BOUND).plain)
    whole = taken(keys, layout, replied(ring, made, keys.id, 2, truncated=False).tensor(ring), "whole")
    cut = taken(keys, layout, replied(ring, made, keys.id, 2).tensor(ring), "truncated")
    ours, theirs = (one.coefficients(ring).astype(np.int64) for one in (cut, whole))
    assert ours.shape == theirs.shape == (layout.down, 2, keys.parameters.degree)
    for number, bits in enumerate(keys.parameters.dropped_bits(2)):
        assert np.abs(ours - theirs)[:, number].max() <= (1 << bits) // 2


# What is refused

SMALL = Layout(4, 8, 2, FAST.slots, 8, 2, "none")


@cache
def reply_bytes(form: Form = "truncated", seed: int = 0) -> bytes:
    """A reply to the key of ``keys_of("fast")``, of one ciphertext."""
    keys = keys_of("fast")
    x, m, _ = numbers(4, 8, 2, seed)
    made = products(keys, SMALL, x, Weights(keys.ring, SMALL, m, None, BOUND).plain)
    return replied(keys.ring, made, keys.id, 4, truncated=form == "truncated").tensor(keys.ring).numpy().tobytes()


def read(
    raw: bytes, *, ring: Ring | None = None, key: bytes | None = None, form: Form = "truncated", polynomials: int = 2,
    count: int = 1, scale: float | None = None, halvings: int = 0,
) -> Ciphertexts:  # fmt: skip
    keys = keys_of("fast")
    return Ciphertexts.of(
        torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8),
        ring or keys.ring, key=keys.id if key is None else key, form=form, polynomials=polynomials, count=count,
        scale=keys.ring.reply_scale if scale is None else scale, halvings=halvings,
    )  # fmt: skip


def written(raw: bytes, field: str, value: bytes) -> bytes:
    start, end = FIELDS[field]
    assert len(value) == end - start
    return raw[:start] + value + raw[end:]


def rescaled(raw: bytes, times: float) -> bytes:
    (scale,) = struct.unpack("<d", raw[32:40])
    return written(raw, "scale", struct.pack("<d", scale * times))


def flipped(raw: bytes, at: int, mask: int = 0x80) -> bytes:
    return raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :]


def forged(form: Form, polynomial: int, at: int, bits: int) -> Ciphertexts:
    """A reply with some bits of one integer changed, and a checksum that goes with it."""
    reply = read(reply_bytes(form), form=form)
    integers = reply.integers.copy()
    integers[0, polynomial, 0, at] ^= np.uint64(bits)
    sent = replace(reply, integers=integers).tensor(keys_of("fast").ring)
    return read(sent.numpy().tobytes(), form=form)


def test_a_reply_is_read_as_it_was_sent() -> None:
    for form in ("truncated", "whole"):
        assert read(reply_bytes(form), form=form).tensor(keys_of("fast").ring).numpy().tobytes() == reply_bytes(form)


def test_a_scale_that_was_halved_is_read_as_it_is() -> None:
    ring, reply = keys_of("fast").ring, read(reply_bytes())
    for halvings in (1, 2, MOST_HALVINGS):
        halved = replace(reply, scale=ring.reply_scale / 2**halvings).tensor(ring).numpy().tobytes()
        assert read(halved, halvings=halvings).scale == ring.reply_scale / 2**halvings


Change = Callable[[bytes], bytes]
SESSIONS = (
    r"each client needs a session of its own \(holder.session\(name\)\), which opening it again under another key ends$"
)
SCALE = r"expected ciphertexts of scale 4\.398046511e\+12, got "


@pytest.mark.parametrize(
    ("change", "wanted", "message"),
    [
        (bytes, {"key": b"somebody"}, rf"under key 736f6d65626f6479, got [0-9a-f]{{16}}; {SESSIONS}"),
        (
            lambda raw: written(raw, "parameters", PRECISE.digest), {},
            rf"of parameter set {FAST.digest.hex()} \(fast: degree 2048.*\), got {PRECISE.digest.hex()}$",
        ),
        (lambda raw: raw[:-1], {}, r"expected 15360 bytes of ciphertexts, got 15359; they were cut short"),
        (lambda raw: raw[:HEADER_NBYTES], {}, r"expected 15360 bytes of ciphertexts, got 0; they were cut short"),
        (lambda raw: raw + b"\0", {}, r"expected 15360 bytes of ciphertexts, got 15361"),
        (lambda raw: raw[: HEADER_NBYTES - 1], {}, r"in bytes, got something else: torch.uint8 \(43,\)"),
        (lambda raw: b"", {}, r"expected ciphertexts in bytes, got something else: torch.uint8 \(0,\)"),
        (lambda raw: flipped(raw, 0), {}, r"in bytes, got something else: torch.uint8 \(15404,\)"),
        (lambda raw: flipped(raw, HEADER_NBYTES, 1), {}, r"checksum [0-9a-f]{8}, got [0-9a-f]{8}; they changed on"),
        (lambda raw: flipped(raw, len(raw) - 1, 1), {}, r"checksum [0-9a-f]{8}, got [0-9a-f]{8}; they changed on"),
        (bytes, {"form": "whole"}, r"in form whole, got truncated$"),
        (bytes, {"form": "seeded"}, r"in form seeded, got truncated$"),
        (lambda raw: written(raw, "form", b"\x09"), {}, r"in form truncated, got form 9$"),
        (bytes, {"polynomials": 3}, r"expected ciphertexts of polynomials each 3, got 2$"),
        (bytes, {"count": 2}, r"expected ciphertexts in number 2, got 1$"),
        (bytes, {"count": 12}, r"expected ciphertexts in number 12, got 1$"),
        (lambda raw: written(raw, "version", b"\x02"), {}, r"of version 1, got 2; run one release on both ends"),
        (lambda raw: rescaled(raw, 1 + 1e-8), {}, rf"{SCALE}4.398046555e\+12: the scale has drifted"),
        (lambda raw: rescaled(raw, 0.5), {}, rf"{SCALE}2.199023256e\+12: the scale has drifted"),
        (lambda raw: rescaled(raw, 2), {"halvings": 6}, rf"{SCALE}8.796093022e\+12: the scale has drifted"),
        (lambda raw: rescaled(raw, 2**-7), {"halvings": 6}, rf"{SCALE}3.435973837e\+10: the scale has drifted"),
        (lambda raw: rescaled(raw, float("nan")), {"halvings": 6}, rf"{SCALE}nan: the scale has drifted"),
        (lambda raw: rescaled(raw, 0), {"halvings": 6}, rf"{SCALE}0: the scale has drifted"),
        (lambda raw: b"\x5e\xa1" + raw[2:], {}, r"got an object stored by SEAL, which may be a key"),
    ],
)  # fmt: skip
def test_what_is_no_reply_to_this_client(change: Change, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(change(reply_bytes()), **wanted)


def test_a_reply_of_another_parameter_set() -> None:
    ring = keys_of("precise").ring
    message = rf"of parameter set {PRECISE.digest.hex()} \(precise: degree 4096.*\), got {FAST.digest.hex()}$"
    with pytest.raises(ValueError, match=message):
        read(reply_bytes(), ring=ring)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.int64])
def test_bytes_of_another_type(dtype: torch.dtype) -> None:
    sent = torch.frombuffer(bytearray(reply_bytes()), dtype=torch.uint8).to(dtype)
    with pytest.raises(ValueError, match=rf"expected ciphertexts in bytes, got something else: {dtype} \(15404,\)"):
        Ciphertexts.of(sent, keys_of("fast").ring, key=b"", form="whole", polynomials=2, count=1, scale=1.0)


@pytest.mark.parametrize("field", FIELDS)
def test_no_bit_of_a_header_changes_unseen(field: str) -> None:
    accepted = []
    for at in range(*FIELDS[field]):
        for bit in range(8):
            try:
                read(flipped(reply_bytes(), at, 1 << bit), halvings=MOST_HALVINGS)
            except ValueError:
                continue
            accepted.append((at, bit))
    assert accepted == []


def test_the_secret_key_itself_is_refused(tmp_path: Path) -> None:
    keys = Keys(FAST)
    keys._secret.save(str(tmp_path / "key"))
    stored = (tmp_path / "key").read_bytes()
    message = "expected ciphertexts or public parameters, got an object stored by SEAL, which may be a key; secret keys"
    with pytest.raises(ValueError, match=message):
        refuse_key_material(stored)
    with pytest.raises(ValueError, match=message):
        read(stored)
    refuse_key_material(reply_bytes())
    refuse_key_material(b"")


@pytest.mark.parametrize("form", ["whole", "truncated"])
def test_another_keys_ciphertexts_are_seen_by_their_id_and_by_what_they_decrypt_to(form: Form) -> None:
    other = Keys(FAST)
    x, m, _ = numbers(4, 8, 2)
    made = products(other, SMALL, x, Weights(other.ring, SMALL, m, None, BOUND).plain)
    theirs = replied(other.ring, made, other.id, 4, truncated=form == "truncated")
    ours = keys_of("fast")
    with pytest.raises(ValueError, match=rf"under key {ours.id.hex()}, got {other.id.hex()}; {SESSIONS}"):
        read(theirs.tensor(other.ring).numpy().tobytes(), form=form)
    disguised = read(replace(theirs, key=ours.id).tensor(other.ring).numpy().tobytes(), form=form)
    with pytest.raises(ValueError, match=r"expected a decryption within ±32, got [0-9.e+]+: .* or is of another key"):
        ours.decrypt(disguised)


@pytest.mark.parametrize("polynomial", [0, 1])
@pytest.mark.parametrize("at", [0, 1000, 2047])
@pytest.mark.parametrize("bits", [1, 0x40 << 40])
def test_a_change_with_a_checksum_of_its_own_is_far_out_of_range_in_a_whole_reply(
    polynomial: int, at: int, bits: int
) -> None:
    # A number in NTT form that changes at all moves all coefficients, anywhere in the modulus.
    with pytest.raises(ValueError, match=r"expected a decryption within ±32, got [0-9.e+]+: the ciphertext was chang"):
        keys_of("fast").decrypt(forged("whole", polynomial, at, bits))


@pytest.mark.parametrize("at", [0, 1000, 2047])
def test_in_a_cut_reply_a_change_that_meets_the_key_is_out_of_range_if_it_is_great(at: int) -> None:
    keys = keys_of("fast")
    with pytest.raises(ValueError, match="expected a decryption within ±32"):
        keys.decrypt(forged("truncated", 1, at, 0x80 << 40))
    # One coefficient of c₀ meets no key: it moves a slot by half the range at the most, and so is not seen.
    keys.decrypt(forged("truncated", 0, at, 0x40 << 40))


@pytest.mark.parametrize("form", ["whole", "truncated"])
def test_a_forger_who_stays_in_range_is_not_caught(form: Form) -> None:
    # CKKS is malleable: what the holder adds to c₀ is added to the product. No check of ours claims more.
    keys, ring = keys_of("fast"), keys_of("fast").ring
    x, m, _ = numbers(4, 8, 2)
    made = products(keys, SMALL, x, Weights(ring, SMALL, m, None, BOUND).plain)
    for one in made:
        ring.evaluator.add_plain_inplace(one, ring.encode(np.full(FAST.slots, 3.0, np.complex128), ring.reply_scale))
    changed = replied(ring, made, keys.id, 4, truncated=form == "truncated").tensor(ring)
    found = SMALL.unpack(keys.decrypt(taken(keys, SMALL, changed, form)))
    assert found == pytest.approx(x @ m + 3 * SMALL.tile, abs=1e-3)  # the error of a product is a tenth of it


def test_integers_that_are_none_of_the_ring_are_refused() -> None:
    ring = keys_of("fast").ring
    beyond = np.full((2, 1, FAST.degree), ring.primes[0], np.uint64)
    with pytest.raises(ValueError, match=r"expected a ciphertext of fast: degree 2048.*; SEAL refuses it: "):
        ring.from_integers(beyond, ring.scale, ntt=True)
    beyond[:] = ring.primes[0] - 1
    ring.from_integers(beyond, ring.scale, ntt=True)
    with pytest.raises(ValueError, match=r"SEAL refuses it: "):
        ring.from_seed(beyond[0] + np.uint64(1), bytes(64), ring.scale)


# Inputs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bound", [8.0, float("inf")])
def test_inputs_that_are_not_finite(value: float, bound: float) -> None:
    with pytest.raises(ValueError, match="expected finite gradients to encrypt, got nan or inf; the training has div"):
        within(np.array([[0.0, value]]), bound, "gradients")


def test_inputs_out_of_range_are_refused() -> None:
    values = np.array([[8.0, -8.0, 8.5], [-9.25, 0.0, 3.0]], np.float32)
    with pytest.raises(ValueError, match=r"expected activations within ±8, got 9.25 \(2 of 6 out of range\); scale"):
        within(values, 8.0, "activations")
    same = within(values, 9.25, "activations")
    assert same.dtype == np.float64
    assert np.array_equal(same, values)


# Keys


@pytest.mark.parametrize(
    "way",
    [copy.copy, copy.deepcopy, *(lambda keys, p=protocol: pickle.dumps(keys, p) for protocol in range(6))],
    ids=["copy", "deepcopy", *(f"pickle{protocol}" for protocol in range(6))],
)
def test_keys_stay_with_the_client_that_made_them(way: Callable[[Any], Any]) -> None:
    for holding in (Keys(FAST), [Keys(FAST)]):
        if way is copy.copy and isinstance(holding, list):
            continue  # a copy of the list holds the same keys
        with pytest.raises(ValueError, match=r"expected keys to stay with the client that made them, got a copy; make"):
            way(holding)


def test_what_keys_print_is_their_public_id() -> None:
    keys = Keys(FAST)
    assert repr(keys) == str(keys) == f"Keys(fast, id {keys.id.hex()})"
    assert len(keys.id) == 8


def test_no_two_keys_and_no_two_encryptions_are_the_same() -> None:
    one, other = Keys(FAST), Keys(FAST)
    assert one.id != other.id
    slots = np.zeros((2, FAST.slots), np.complex128)
    first, second = one.encrypt(slots, 1), one.encrypt(slots, 1)
    assert len({*first.seeds, *second.seeds}) == 4
    for mine, theirs in ((first.integers[0], first.integers[1]), (first.integers, second.integers)):
        assert (mine == theirs).mean() < 1e-3  # of 48 bits each
    with pytest.raises(ValueError, match="expected a decryption within"):
        other.decrypt(opened(one, first))
    assert np.abs(one.decrypt(opened(one, first))).max() < 1e-3


def opened(keys: Keys, fresh: Ciphertexts) -> Ciphertexts:
    """Fresh ciphertexts as a reply that was multiplied by nothing."""
    ring, ciphertexts = keys.ring, received(keys.ring, fresh)
    for one in ciphertexts:
        while one.coeff_modulus_size() > 1:
            ring.evaluator.mod_switch_to_next_inplace(one)
    integers = np.stack([ring.integers(one) for one in ciphertexts])
    return Ciphertexts("whole", fresh.key, fresh.rows, fresh.scale, integers)


@pytest.mark.parametrize("name", ["fast", "precise", "tight"])
def test_a_fresh_ciphertext_errs_as_the_parameters_say(name: str) -> None:
    # By its noise alone; depth2's is below what mod switching rounds.
    keys = keys_of(name)
    random = np.random.default_rng(0)
    shape = (8, keys.parameters.slots)
    slots = random.uniform(-1, 1, shape) + 1j * random.uniform(-1, 1, shape)
    error = keys.decrypt(opened(keys, keys.encrypt(slots, 8))) - slots
    # SEAL's noise has a variance of 10.5, not of 3.2²; 8,192 slots or more have it to within 2 %.
    assert sqrt(float(np.mean(np.abs(error) ** 2))) == pytest.approx(keys.parameters.fresh_std, rel=0.05)
    for part in (error.real, error.imag):  # and it is centred
        assert abs(part.mean()) < 4 * keys.parameters.fresh_std / sqrt(2 * part.size)


# Memory


def resident_nbytes(status: Path) -> int:
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) << 10


@pytest.mark.slow
@pytest.mark.parametrize("truncated", [True, False])
def test_a_thousand_products_leave_memory_as_it_was(truncated: bool) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc to read resident memory from")
    keys = keys_of("fast")
    layout = plan(keys.parameters, 8, 32, 4)
    x, m, b = numbers(8, 32, 4)
    for number in range(1100):
        if number == 100:  # by now what is cached is
            gc.collect()
            before = resident_nbytes(status)
        crossed(keys, layout, x, m, b, truncated=truncated)
    gc.collect()
    assert resident_nbytes(status) - before < 4 << 20  # one ciphertext lost in each would be 32 MB
