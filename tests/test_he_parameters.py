"""Parameter sets: security by the standard's tables, range, what may be left out, and what tells sets apart."""

import warnings
from dataclasses import astuple, replace
from math import log2, sqrt
from typing import Any

import numpy as np
import pytest

from privacy.he.ciphertexts import Ciphertexts
from privacy.he.keys import Keys
from privacy.he.layout import Layout
from privacy.he.parameters import DEPTH2, FAST, GUIDELINES_2024, PRECISE, PRESETS, STANDARD, Parameters, tight
from privacy.he.product import Weights, received, replied, sums
from privacy.he.seal import Ring

DEGREES = [1024, 2048, 4096, 8192, 16384, 32768]


def unwarned(name: str) -> Parameters:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PRESETS[name]()


def test_presets_are_made_by_name() -> None:
    assert list(PRESETS) == ["fast", "precise", "depth2", "tight"]
    assert all(unwarned(name).name == name for name in PRESETS)
    assert (PRESETS["fast"](), PRESETS["precise"](), PRESETS["depth2"]()) == (FAST, PRECISE, DEPTH2)


@pytest.mark.parametrize(
    ("name", "slots", "modulus", "rescaled", "reply", "most", "security", "dropped"),
    [
        ("fast", 1024, 48, 0, 42, 32.0, 128, ((20, 16), (20, 16, 8))),
        ("precise", 2048, 58, 0, 52, 32.0, 256, ((26, 18), (26, 18, 14))),
        ("depth2", 4096, 200, 40, 40, 2.0**19, 128, ((0, 0), (0, 0, 0))),
        ("tight", 1024, 54, 0, 46, 128.0, 128, ((22, 18), (22, 18, 10))),
    ],
)
def test_what_a_preset_has(
    name: str, slots: int, modulus: int, rescaled: int, reply: int, most: float, security: int, dropped: Any
) -> None:
    one = unwarned(name)
    assert (one.slots, one.modulus_bits, one.rescaled_bits) == (slots, modulus, rescaled)
    assert (one.reply_scale_bits, one.range, one.security_bits) == (reply, most, security)
    assert (one.dropped_bits(2), one.dropped_bits(3)) == dropped


# Security


@pytest.mark.parametrize("level", [128, 192, 256])
@pytest.mark.parametrize("degree", DEGREES)
def test_limits_are_those_of_seal(level: int, degree: int) -> None:
    api = Ring(FAST).api
    assert api.CoeffModulus.MaxBitCount(degree, getattr(api.SEC_LEVEL_TYPE, f"TC{level}")) == STANDARD[level][degree]
    assert sorted(STANDARD[level]) == sorted(GUIDELINES_2024) == DEGREES


def test_the_guidelines_of_2024_are_never_above_the_standard() -> None:
    assert all(GUIDELINES_2024[degree] <= STANDARD[128][degree] for degree in DEGREES)


def several(degree: int, bits: int) -> tuple[int, ...]:
    """Primes of 20 to 60 bits that add up to so many."""
    count = -(-bits // 60)
    return tuple(bits // count + (number < bits % count) for number in range(count))


@pytest.mark.parametrize("degree", DEGREES)
def test_a_set_is_refused_one_bit_beyond_the_limit(degree: int) -> None:
    limit = STANDARD[128][degree]
    primes = several(degree, limit + 1)
    assert sum(primes) == limit + 1
    with pytest.raises(
        ValueError,
        match=rf"expected at most {limit} bits of modulus at degree {degree}, SEAL's limit for 128 bits of security "
        rf"\(2024 guidelines: {GUIDELINES_2024[degree]}\), got {limit + 1}; take smaller primes or a greater degree",
    ):
        Parameters("too great", degree, primes, 20, 20)


@pytest.mark.parametrize("degree", [2048, 4096, 8192, 16384, 32768])
def test_a_set_at_the_limit_of_the_guidelines_is_quiet_and_one_above_it_warns(degree: int) -> None:
    figure = GUIDELINES_2024[degree]
    Parameters("at", degree, several(degree, figure), 10, 10)  # a warning is an error here
    for bits in (figure + 1, STANDARD[128][degree]):
        with pytest.warns(
            UserWarning, match=rf"^above: {bits} bits of modulus .* above the {figure} of the guidelines"
        ):
            Parameters("above", degree, several(degree, bits), 10, 10)


def test_the_tight_set_warns_of_the_stricter_figure() -> None:
    with pytest.warns(
        UserWarning, match=r"^tight: 54 bits .* at degree 2048 .* above the 53 of the guidelines of 2024"
    ):
        made = tight()
    assert made.modulus_bits == STANDARD[128][2048] == 54
    with pytest.warns(UserWarning, match="above the 53 of the guidelines"):
        PRESETS["tight"]()


@pytest.mark.parametrize(
    ("degree", "primes", "level"),
    [
        (4096, (58,), 256),
        (4096, (59,), 192),
        (4096, (38, 37), 192),
        (4096, (38, 38), 128),
        (8192, (59, 59), 256),
        (8192, (60, 59), 192),
        (8192, (60, 40, 52), 192),
        (8192, (60, 40, 53), 128),
        (2048, (37,), 192),
        (2048, (38,), 128),
    ],
)
def test_the_level_is_by_the_whole_modulus(degree: int, primes: tuple[int, ...], level: int) -> None:
    assert Parameters("one", degree, primes, 14, 14).security_bits == level


@pytest.mark.parametrize("name", PRESETS)
def test_seal_takes_each_preset_at_128_bits(name: str) -> None:
    one = unwarned(name)
    ring = Ring(one)
    assert [prime.bit_length() for prime in ring.primes] == list(one.prime_bits[: len(ring.primes)])
    assert ring.reply_scale == pytest.approx(2.0**one.reply_scale_bits, rel=1e-5)  # a prime is about a power of 2


# What is no set


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1000, (27,), 10, 10), "expected a degree among 1024, 2048, 4096, 8192, 16384, 32768, got 1000"),
        ((65536, (60,), 20, 20), "expected a degree among .*, got 65536"),
        ((2048, (), 20, 20), r"expected primes of 20 to 60 bits, which SEAL has, got \(\)"),
        ((4096, (61,), 20, 20), r"expected primes of 20 to 60 bits, which SEAL has, got \(61,\)"),
        ((4096, (40, 19), 20, 10), r"expected primes of 20 to 60 bits, which SEAL has, got \(40, 19\)"),
        ((2048, (48,), 9, 20), r"expected scales of 10 bits or more .* got 2\^9 and 2\^20 under primes of \(48,\)"),
        ((2048, (48,), 20, 9), r"expected scales of 10 bits or more .* got 2\^20 and 2\^9 under"),
        ((2048, (48,), 24, 24), r"leaves room for values of 1 below the modulus, got 2\^24 and 2\^24 under primes of"),
        ((8192, (40, 20, 40), 30, 30), r"got 2\^30 and 2\^30 under primes of \(40, 20, 40\) bits"),
    ],
)
def test_sets_that_are_none(values: tuple[int, tuple[int, ...], int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parameters("none", *values)


def test_numbers_of_numpy_become_whole_ones() -> None:
    kinds = np.int64, np.int32, np.uint8
    one = Parameters("fast", np.int64(2048), (np.int32(48),), np.uint8(22), np.int64(20))  # type: ignore[arg-type]
    assert one == FAST
    assert one.digest == FAST.digest
    numbers = [one.degree, *one.prime_bits, one.scale_bits, one.weight_scale_bits]
    assert {type(number) for number in numbers} == {int}
    assert not any(isinstance(number, kinds) for number in numbers)
    assert Parameters("list", 2048, [48], 22, 20).prime_bits == (48,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"degree": 2048.0}, {"degree": "2048"}, {"degree": None}, {"prime_bits": (48.0,)}, {"prime_bits": "48"},
        {"scale_bits": 22.0}, {"weight_scale_bits": np.float64(20)}, {"scale_bits": [22]},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_are_not_whole_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected whole numbers as parameters of encryption, got"):
        replace(FAST, **change)


@pytest.mark.parametrize("wrong", ["fast", None, 2048, Parameters])
def test_keys_take_parameters_and_no_name(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected Parameters, such as FAST or PRECISE, got"):
        Keys(wrong)


@pytest.mark.parametrize("name", PRESETS)
def test_bounds_leave_two_digits_beside_either_error(name: str) -> None:
    one = unwarned(name)
    low, high = one.bounds
    assert low == pytest.approx(100 * one.fresh_std)
    # A weight rounded to its scale, for each of 64 inputs at the bound: a hundredth of a product of 1 at the most.
    rounding = sqrt(64 / 12) / 2.0**one.weight_scale_bits
    assert rounding * high < 0.01 < 10 * rounding * high
    assert low < 1 < 32 < high
    assert FAST.bounds == pytest.approx((0.00345, 3277), rel=1e-2)


def test_a_product_of_1_just_has_room() -> None:
    assert Parameters("just", 2048, (48,), 24, 23).range == 1.0


def test_primes_that_there_are_too_few_of() -> None:
    few = Parameters("few", 32768, (20,) * 12, 10, 10)  # which are 1 modulo 65536
    with pytest.raises(ValueError, match="few: degree 32768"):
        Ring(few)


# What tells sets apart


@pytest.mark.parametrize(
    "change",
    [
        {"degree": 4096}, {"prime_bits": (47,)}, {"prime_bits": (24, 24), "scale_bits": 11, "weight_scale_bits": 11},
        {"scale_bits": 21}, {"weight_scale_bits": 19}, {"scale_bits": 20, "weight_scale_bits": 22},
    ],
    ids=str,
)  # fmt: skip
def test_a_digest_is_of_all_but_the_name(change: dict[str, Any]) -> None:
    assert len(FAST.digest) == 8
    assert replace(FAST, **change).digest != FAST.digest
    assert replace(FAST, name="other").digest == FAST.digest
    assert Parameters(*astuple(FAST)).digest == FAST.digest
    assert FAST.digest.hex() == "3ee8d59dd33f1647"  # which crosses: another release must find the same


def test_digests_differ() -> None:
    assert len({unwarned(name).digest for name in PRESETS}) == len(PRESETS)


def test_a_set_in_words() -> None:
    assert FAST.in_words() == (
        "fast: degree 2048, modulus of 48 bits [48]; at least 128 bits of security by SEAL's table (at 128: 54 by "
        "SEAL, 53 by eprint 2024/463); scales 2^22 and 2^20, sums under 32"
    )
    assert "modulus of 200 bits [60, 40, 40, 60]" in DEPTH2.in_words()
    assert "(at 128: 218 by SEAL, 214 by eprint 2024/463)" in DEPTH2.in_words()
    assert "at least 256 bits of security by SEAL's table (at 128: 109 by SEAL, 106 by" in PRECISE.in_words()


# What a reply may leave out


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("components", [2, 3])
def test_as_many_bits_are_left_out_as_may_be(name: str, components: int) -> None:
    one = unwarned(name)
    for power, dropped in enumerate(one.dropped_bits(components)):
        # Both are 2^bits · √(N/12) in a slot: of a weight's rounding below its scale, and of what is cut below the
        # reply's, times the norm of the secret's power, √(2N/3) each.
        moved = 2.0**dropped * sqrt(2 * one.degree / 3) ** power / 2.0**one.reply_scale_bits
        assert dropped == 0 or moved <= 1 / 2.0**one.weight_scale_bits
        assert 16 * moved > 1 / 2.0**one.weight_scale_bits  # four bits more would be too many
        assert dropped == 0 or (one.prime_bits[0] - dropped) % 4 == 0


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_left_out_moves_a_slot_by_less_than_is_claimed(name: str) -> None:
    keys = Keys(unwarned(name))
    one, ring = keys.parameters, keys.ring
    layout = Layout(one.slots, 2, 4, one.slots, 1, 1, "none")
    random = np.random.default_rng(0)
    x, m = random.uniform(-1, 1, (one.slots, 2)), random.uniform(-1, 1, (2, 4))
    inputs = received(ring, keys.encrypt(layout.pack_rows(x), one.slots))
    made = sums(ring, layout, inputs, Weights(ring, layout, m, None, 1.0).plain)
    whole, cut = (
        keys.decrypt(
            Ciphertexts.of(
                replied(ring, made, keys.id, one.slots, truncated=truncated).tensor(ring), ring, key=keys.id,
                form="truncated" if truncated else "whole", polynomials=2, count=4, scale=ring.reply_scale,
            )
        )
        for truncated in (False, True)  # to cut them changes the products
    )  # fmt: skip
    moved = sqrt(float(np.mean(np.abs(cut - whole) ** 2)))
    each = sqrt(one.degree / 12) / 2.0**one.weight_scale_bits  # a rounded weight's, all coefficients rounded
    assert moved <= sqrt(2) * each  # two polynomials are cut
    secret = sqrt(2 * one.degree / 3)
    claimed = [2.0**bits * secret**power * (bits > 0) for power, bits in enumerate(one.dropped_bits(2))]
    unit = sqrt(one.degree / 12) / 2.0**one.reply_scale_bits
    # 4,096 slots or more, of one secret, whose norm is within 2 % of its mean; depth2 loses nothing but by decoding.
    assert moved == pytest.approx(unit * sqrt(sum(part**2 for part in claimed)), rel=0.1, abs=1e-9)


def test_the_range_is_that_of_the_modulus_over_the_scale() -> None:
    for name in PRESETS:
        one = unwarned(name)
        assert one.range == 2.0 ** (one.prime_bits[0] - 1) / 2.0**one.reply_scale_bits
        ring = Ring(one)
        assert one.range == pytest.approx(ring.primes[0] / 2 / ring.reply_scale, rel=1e-5)
    assert replace(FAST, weight_scale_bits=19).range == 2 * FAST.range
    assert replace(FAST, scale_bits=21).range == 2 * FAST.range
    assert log2(replace(FAST, prime_bits=(50,)).range) == log2(FAST.range) + 2


@pytest.mark.parametrize("name", PRESETS)
def test_the_noise_is_that_of_the_tables(name: str) -> None:
    one = unwarned(name)
    assert one.fresh_std * 2.0**one.scale_bits == pytest.approx(3.2 * sqrt(one.degree))
