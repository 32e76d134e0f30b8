"""Traces: the same from a seed, within their bounds, to and from CSV to the digit, and clear on what is no trace."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from splitlearn.traces import (
    COLUMNS,
    FASTEST,
    GENERATORS,
    MOST_LOAD,
    SLOWEST,
    TUNNEL,
    Trace,
    drained,
    load_trace,
    record_load,
    save_trace,
)

ONE = Trace(
    "one", np.array([0.0, 0.5]), np.array([1e6, 2e6]), np.array([3e6, math.inf]), np.array([0.0, 0.1]),
    np.array([1.0, 1.5]), np.array([1.0, 0.9]),
)  # fmt: skip


def same(one: Trace, other: Trace) -> bool:
    return all(np.array_equal(getattr(one, column), getattr(other, column)) for column in COLUMNS)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_seed_makes_one_trace_and_another_seed_another(name: str) -> None:
    made = GENERATORS[name](300, seed=3)
    assert same(made, GENERATORS[name](300, seed=3))
    assert not same(made, GENERATORS[name](300, seed=4))
    assert (made.name, len(made)) == (name, 300)


@pytest.mark.parametrize("name", GENERATORS)
def test_what_is_made_stays_within_its_bounds_and_moves(name: str) -> None:
    for seed in range(5):
        made = GENERATORS[name](1000, seed=seed)
        outside = made.up[made.up != TUNNEL]
        assert outside.min() >= SLOWEST
        assert outside.max() <= FASTEST
        assert made.load.min() >= 1
        assert made.load.max() <= MOST_LOAD
        assert made.battery.min() >= 0.05
        assert made.up.max() > 2 * made.up.min()
        assert made.load.max() > 1.2
        assert np.array_equal(made.down, 3 * made.up)
    assert (GENERATORS[name](1000, seed=0).up == TUNNEL).any() == (name == "commuter")


def test_a_markov_channel_stays_and_visits_all_of_its_states() -> None:
    up = GENERATORS["markov"](20_000, seed=0).up
    state = np.abs(np.log(up[:, None] / np.array([30e6, 8e6, 1.5e6]))).argmin(1)
    shares = np.bincount(state, minlength=3) / len(state)
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.06)  # the chain's stationary law: 800 stays
    assert (state[1:] != state[:-1]).mean() == pytest.approx(1 / 25, abs=0.01)


def test_a_walk_steps_by_a_tenth_and_is_reflected() -> None:
    steps = np.diff(np.log(GENERATORS["walk"](20_000, seed=0).up))
    assert steps.std() == pytest.approx(0.1, rel=0.05)
    up = GENERATORS["walk"](20_000, seed=0).up
    assert np.mean(up > FASTEST / 2) < 0.3  # it does not stick to the bound


def test_days_differ_from_nights() -> None:
    day = GENERATORS["diurnal"](3 * 1440, seed=1)
    windows = day.load.reshape(-1, 60).mean(1)
    assert windows.max() > 2.5 > 1.8 > windows.min()


def test_a_battery_drains_evenly_and_is_charged_when_little_is_left() -> None:
    level = drained(np.arange(0, 100.0), start=0.5, lasts=100)
    assert level[0] == 0.5
    assert level[10] == pytest.approx(0.4)
    assert level[46] == pytest.approx(0.99)  # 0.04 would be left
    with pytest.raises(ValueError, match="expected a start above"):
        drained(np.arange(3.0), start=0.01)


def test_csv_gives_back_every_digit(tmp_path: Path) -> None:
    for trace in (ONE, GENERATORS["commuter"](50, seed=0)):
        path = save_trace(tmp_path / f"{trace.name}.csv", trace)
        again = load_trace(path)
        assert same(again, trace)
        assert again.name == trace.name


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("1,1e6,1e6,0,1", "line 3: expected 6 numbers, got 5"),
        ("1,fast,1e6,0,1,1", "line 3: expected a bandwidth > 0 bit/s, inf for no limit, got up 'fast'"),
        ("1,0,1e6,0,1,1", "line 3: expected a bandwidth > 0"),
        ("1,1e6,nan,0,1,1", "got down nan"),
        ("1,1e6,1e6,-1,1,1", "expected a finite latency ≥ 0 s, got latency -1"),
        ("1,1e6,1e6,0,0.5,1", "expected a finite factor ≥ 1 on the compute time, got load 0.5"),
        ("1,1e6,1e6,0,1,50", "a level from 0 to 1, got battery 50"),
        ("0,1e6,1e6,0,1,1", "expected seconds above 0.0, got 0.0; sort the lines"),
        ("inf,1e6,1e6,0,1,1", "expected finite seconds, got seconds inf"),
        ("", "line 3: expected 6 numbers, got 0"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"{','.join(COLUMNS)}\n0,1e6,1e6,0,1,1\n{line}\n2,1e6,1e6,0,1,1\n")
    with pytest.raises(ValueError, match=told) as caught:
        load_trace(path)
    assert str(caught.value).startswith("bad.csv line 3")


def test_what_is_no_trace_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="found none"):
        load_trace(tmp_path / "none.csv")
    path = tmp_path / "bad.csv"
    for content, told in ((b"", "line 1: expected seconds,up"), (b"a,b\n1,2\n", "got a,b"), (b"\xff\xfe", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=told):
            load_trace(path)
    path.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(ValueError, match="line 2: expected at least one time"):
        load_trace(path)
    with pytest.raises(ValueError, match="one length"):
        replace(ONE, load=np.ones(3))
    with pytest.raises(ValueError, match=r"load 0\.9 at place 1"):
        replace(ONE, load=np.array([1, 0.9]))
    with pytest.raises(ValueError, match="seconds that rise"):
        replace(ONE, seconds=np.zeros(2))
    with pytest.raises(ValueError, match="at least 1 step"):
        GENERATORS["walk"](0, seed=0)


def test_a_trace_is_its_own_and_cannot_be_changed() -> None:
    load = np.array([1.0, 2.0])
    trace = replace(ONE, load=load)
    load[0] = 5
    assert trace.load[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        trace.load[0] = 5


def test_a_recording_is_of_this_machine_and_at_least_1(tmp_path: Path) -> None:
    trace = record_load(0.3, 0.05)
    assert 1 <= len(trace) <= 7
    assert trace.load.min() == 1
    assert np.isinf(trace.up).all()
    assert same(load_trace(save_trace(tmp_path / "machine_load.csv", trace)), trace)
    with pytest.raises(ValueError, match="every ≤ seconds"):
        record_load(1, 2)
