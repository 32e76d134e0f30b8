"""Truncation without wraps: against Python's integers, at the edges of the ring and for every sharing."""

import random

import pytest
import torch
from torch import Tensor

from privacy.mpc import Servers, SharedStage
from privacy.mpc.truncation import MOST_BITS, RANGE_BITS, masks, positive, quotient

EDGES = [0, 1, 2, (1 << 63) - 1, -1, -(1 << 63), 1 << 62, -(1 << 62), (1 << 48) - 1]


def ring(values: list[int]) -> Tensor:
    """Those integers modulo 2^64."""
    return torch.tensor([(v + (1 << 63)) % (1 << 64) - (1 << 63) for v in values], dtype=torch.int64)


def drawn(generator: random.Random, number: int, edges: list[int]) -> Tensor:
    return ring([*edges, *(generator.getrandbits(64) for _ in range(number - len(edges)))])


def truncated(v: Tensor, bits: int, generator: random.Random, edges: list[int]) -> Tensor:
    """What the two shares add up to, all that is random drawn here."""
    number = len(v)
    one, mine, lower, higher = (drawn(generator, number, edges) for _ in range(4))
    mask = drawn(generator, number, edges)
    low, high = masks(mask, bits)
    opened = positive(one, first=True) + mine + positive(v - one, first=False) + (mask - mine)
    first = quotient(opened, lower, higher, bits, first=True)
    return first + quotient(opened, low - lower, high - higher, bits, first=False)


@pytest.mark.parametrize("bits", [1, 16, 31, 40, MOST_BITS])
@pytest.mark.parametrize("most", [1, 1 << 20, 1 << 47, (1 << RANGE_BITS) - 1])
def test_a_quotient_is_a_neighbour_for_every_mask_and_sharing(bits: int, most: int) -> None:
    generator = random.Random(f"{bits} {most}")
    values = [most, -most, 0, *(generator.randint(-most, most) for _ in range(400))]
    for edge in EDGES:
        found = truncated(ring(values), bits, generator, [edge] * len(values)).tolist()
        assert all(0 <= got - (v >> bits) <= 1 for v, got in zip(values, found, strict=True)), edge
    found = truncated(ring(values), bits, generator, EDGES).tolist()
    assert all(0 <= got - (v >> bits) <= 1 for v, got in zip(values, found, strict=True))
    assert all(got == v >> bits for v, got in zip(values, found, strict=True) if v % (1 << bits) == 0)


def test_shares_cut_back_one_by_one_do_wrap() -> None:
    generator = random.Random(1)
    v = torch.full((20_000,), 1 << 54, dtype=torch.int64)  # wrong in about one of 2^9
    one = drawn(generator, len(v), [])
    local = one.div(1 << 16, rounding_mode="trunc") + (v - one).div(1 << 16, rounding_mode="trunc")
    wrong = (local - (1 << 38)).abs() > 1
    assert 10 < int(wrong.sum()) < 100
    assert bool(((local - (1 << 38))[wrong].abs() - (1 << 48)).abs().le(1).all())
    assert bool((truncated(v, 16, generator, []) == 1 << 38).all())


def test_it_is_right_on_average() -> None:
    generator = random.Random(2)
    v = torch.full((20_000,), 3 << 14, dtype=torch.int64)  # three quarters
    found = truncated(v, 16, generator, []).double()
    assert float(found.mean()) == pytest.approx(0.75, abs=0.02)


def test_past_the_range_a_quotient_is_no_neighbour_any_more() -> None:
    generator = random.Random(3)
    v = ring([3 << RANGE_BITS - 1] * 100)
    assert bool((truncated(v, 16, generator, []) - (3 << RANGE_BITS - 17)).abs().gt(1).any())


def test_no_step_moves_a_weight_where_no_gradient_does(servers: Servers) -> None:
    """Products of 2^24: cut back share by share, about one in 2^8 moves a weight by 2^32 times the rate, in range."""
    stage = SharedStage(servers, torch.nn.Linear(1, 2000, bias=False), lr=3e-5)
    before = stage.weights()["weight"]
    stage.forward(torch.full((1, 1), 4096.0))
    stage.backward(torch.full((1, 2000), 4096.0))
    moved = before - stage.weights()["weight"]
    assert float((moved / (4096**2 * 3e-5) - 1).abs().max()) < 1e-4
