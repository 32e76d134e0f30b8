"""Unlike amounts and unlike devices: every row goes once, sizes are skewed, noise is as large as it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn.data import device_noise, quantities


@settings(max_examples=40, deadline=None)
@given(
    clients=st.integers(1, 12), alpha=st.floats(0.01, 1000.0), seed=st.integers(0, 1000), min_rows=st.integers(1, 10)
)
def test_every_row_goes_to_one_client_and_none_has_too_few(
    clients: int, alpha: float, seed: int, min_rows: int
) -> None:
    parts = quantities(150, clients, alpha, seed, min_rows)
    assert len(parts) == clients
    assert torch.cat(parts).sort().values.tolist() == list(range(150))
    assert min(len(part) for part in parts) >= min_rows
    assert all(part.dtype == torch.int64 and torch.equal(part, part.sort().values) for part in parts)
    again = quantities(150, clients, alpha, seed, min_rows)
    assert all(torch.equal(*pair) for pair in zip(parts, again, strict=True))


def test_a_small_alpha_skews_the_amounts_and_a_large_one_does_not() -> None:
    def largest(alpha: float) -> float:
        """Return the mean share of the rows that the largest of 10 clients has."""
        found = [max(len(part) for part in quantities(2000, 10, alpha, seed)) / 2000 for seed in range(20)]
        return sum(found) / len(found)

    assert largest(0.1) > 0.5
    assert largest(1.0) > 0.2
    assert largest(1e6) == pytest.approx(0.1, abs=0.003)


def test_rows_are_dealt_at_random() -> None:
    first = quantities(1000, 2, 1e6, 0)[0]
    assert float(first.double().mean()) == pytest.approx(499.5, abs=50)  # and not the first half: five deviations
    assert not torch.equal(first, quantities(1000, 2, 1e6, 1)[0])


def test_at_the_least_is_what_all_get_where_there_is_no_more() -> None:
    assert [len(part) for part in quantities(12, 4, 0.05, 0, min_rows=3)] == [3, 3, 3, 3]


@pytest.mark.parametrize("client", [0, 4, 9])
def test_a_devices_noise_has_the_variance_of_its_place(client: int) -> None:
    x = torch.zeros(200, 500, dtype=torch.float64)
    noisy = device_noise(x, client, 10, 0.5, seed=0)
    expected = 0.5 * (client + 1) / 10
    # The variance of 100,000 draws is known to √(2/100,000) = 0.45 % of it: within four deviations.
    assert float(noisy.var()) == pytest.approx(expected, rel=0.018)
    assert abs(float(noisy.mean())) < 4 * (expected / 1e5) ** 0.5
    assert not x.any()


def test_noise_is_of_the_seed_and_of_the_client() -> None:
    x = torch.rand(5, 8)
    noisy = device_noise(x, 1, 3, 0.1, seed=0)
    assert noisy.dtype == x.dtype
    assert torch.equal(noisy, device_noise(x, 1, 3, 0.1, seed=0))
    assert not torch.equal(noisy, device_noise(x, 1, 3, 0.1, seed=1))
    scale = (2 / 3) ** 0.5  # from the second of three to the third
    assert not torch.allclose((noisy - x) / scale, device_noise(x, 2, 3, 0.1, seed=0) - x, atol=1e-3)
    assert torch.equal(device_noise(x, 2, 3, 0.0, seed=0), x)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    quantities(20, 3, 1.0, 0)
    device_noise(torch.rand(3, 3, generator=torch.Generator().manual_seed(0)), 0, 3, 0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantities(10, 4, 1.0, 0, min_rows=3), "at most 10 rows for 4 clients of 3 or more; ask for fewer"),
        (lambda: quantities(10, 0, 1.0, 0), "rows for 0 clients"),
        (lambda: quantities(10, 2, 1.0, 0, min_rows=0), "2 clients of 0 or more"),
        (lambda: quantities(10, 2, 0.0, 0), r"expected alpha above 0, got 0\.0"),
        (lambda: quantities(10, 2, float("nan"), 0), "expected alpha above 0, got nan"),
        (
            lambda: device_noise(torch.zeros(1), 3, 3, 0.1, 0),
            r"a client from 0 to 2 and a level of 0 or more, got 3, 0\.1",
        ),
        (lambda: device_noise(torch.zeros(1), -1, 3, 0.1, 0), "a client from 0 to 2"),
        (lambda: device_noise(torch.zeros(1), 0, 3, -0.1, 0), "a level of 0 or more"),
        (lambda: device_noise(torch.zeros(1), 0, 3, float("nan"), 0), "a level of 0 or more"),
    ],
)
def test_what_cannot_be_is_one_line(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
