"""Traces: how a device's network, load and battery change over time; made from a seed, recorded, or read from CSV."""

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from splitlearn.checkpoint import write_atomically

__all__ = [
    "GENERATORS", "Trace", "commuter", "diurnal", "drained", "load_trace", "markov", "record_load", "save_trace",
    "walk",
]  # fmt: skip

Series = NDArray[np.float64]

COLUMNS = ("seconds", "up", "down", "latency", "load", "battery")
SLOWEST, FASTEST = 0.5e6, 60e6  # bit/s up, between which generated bandwidths stay outside tunnels
TUNNEL = 0.1e6  # bit/s that are left in a tunnel
DOWN = 3.0  # times as fast down as up, as in the profile "4g"
MOST_LOAD = 8.0  # times as long as on an idle device, where generated loads end
LEAST_BATTERY = 0.05  # at which a device is charged again
DAY = 86_400.0  # seconds
PRODUCT = 192  # rows of the square matrices whose product is timed
REPEATS = 20  # products a measurement

RANGES: dict[str, tuple[Callable[[Series], NDArray[np.bool_]], str]] = {
    "seconds": (np.isfinite, "finite seconds"),
    "up": (lambda values: values > 0, "a bandwidth > 0 bit/s, inf for no limit"),
    "down": (lambda values: values > 0, "a bandwidth > 0 bit/s, inf for no limit"),
    "latency": (lambda values: (values >= 0) & np.isfinite(values), "a finite latency ≥ 0 s"),
    "load": (lambda values: (values >= 1) & np.isfinite(values), "a finite factor ≥ 1 on the compute time"),
    "battery": (lambda values: (values >= 0) & (values <= 1), "a level from 0 to 1"),
}


@dataclass(frozen=True, eq=False)
class Trace:
    """A device's state at ``seconds`` [T], which rise; every other series [T] holds from then to the next.

    ``up`` and ``down`` are bandwidths in bit/s (inf: no limit), ``latency`` one way in seconds, ``load`` the factor ≥ 1
    on the device's compute time, ``battery`` the charge in [0, 1]. Raises ``ValueError`` for what is no such thing.
    """

    name: str
    seconds: Series
    up: Series
    down: Series
    latency: Series
    load: Series
    battery: Series

    def __post_init__(self) -> None:
        for column in COLUMNS:
            values = np.array(getattr(self, column), dtype=np.float64)  # its own, which nobody else changes
            values.setflags(write=False)
            object.__setattr__(self, column, values)
            if values.ndim != 1 or len(values) != len(self.seconds) or not len(values):
                raise ValueError(
                    f"expected series of one length, at least 1, got {column} of shape {values.shape} beside "
                    f"{len(self.seconds)} times; give one value a time"
                )
            fits, wanted = RANGES[column]
            wrong = np.flatnonzero(~fits(values))
            if len(wrong):
                raise ValueError(f"expected {wanted}, got {column} {values[wrong[0]]} at place {wrong[0]}; mend it")
        late = np.flatnonzero(np.diff(self.seconds) <= 0)
        if len(late):
            raise ValueError(f"expected seconds that rise, got {self.seconds[late[0] + 1]} at place {late[0] + 1}")

    def __len__(self) -> int:
        """Return the number of times, T."""
        return len(self.seconds)


def markov(steps: int, *, seed: int, every: float = 1.0) -> Trace:
    """Return a channel that is good, fair or bad, and changes between neighbours by chance (a Markov chain).

    Gilbert (1960) and Elliott (1963) have two states, of which packets are lost in one; deviations: three states, which
    set the bandwidth (30, 8 and 1.5 Mbit/s up, spread log-normally by 20 %), and stays of 25 steps on average.
    """
    random = _random("markov", seed, steps, every)
    rates, stay = np.array([30e6, 8e6, 1.5e6]), 1 - 1 / 25
    state, up = int(random.integers(3)), np.empty(steps)
    for step in range(steps):
        if random.random() >= stay:
            state = 1 if state != 1 else 2 * int(random.integers(2))
        up[step] = rates[state] * math.exp(random.normal(0, 0.2))
    return _trace("markov", random, up, np.full(steps, 0.025), _busy(random, steps), every)


def walk(steps: int, *, seed: int, every: float = 1.0) -> Trace:
    """Return a bandwidth whose logarithm walks at random (10 % a step), reflected at 0.5 and 60 Mbit/s up."""
    random = _random("walk", seed, steps, every)
    low, high = math.log(SLOWEST), math.log(FASTEST)
    free = random.uniform(0, high - low) + np.cumsum(random.normal(0, 0.1, steps))
    folded = np.abs((free + (high - low)) % (2 * (high - low)) - (high - low))  # a free walk, mirrored at both ends
    return _trace("walk", random, np.exp(low + folded), np.full(steps, 0.025), _busy(random, steps), every)


def commuter(steps: int, *, seed: int, every: float = 1.0) -> Trace:
    """Return a ride by train: a new cell every 40 s or so, with a gap of 2 s, and tunnels that leave 0.1 Mbit/s.

    A cell gives 2 to 40 Mbit/s up, log-uniformly, and varies by 15 %. A tunnel comes every 200 s or so and takes 10 to
    40 s. Times are in steps of ``every`` seconds. Our own figures, of no one measured line.
    """
    random = _random("commuter", seed, steps, every)
    up, latency = np.empty(steps), np.empty(steps)
    cell, gap, tunnel = _cell(random), 0, 0
    for step in range(steps):
        if tunnel == 0 and random.random() < every / 200:
            tunnel = max(1, round(random.uniform(10, 40) / every))
        if random.random() < every / 40:
            cell, gap = _cell(random), max(1, round(2 / every))
        varied = cell * math.exp(random.normal(0, 0.15))
        up[step] = TUNNEL if tunnel else max(SLOWEST, 0.2 * varied) if gap else varied
        latency[step] = 0.1 if tunnel or gap else 0.03
        gap, tunnel = max(0, gap - 1), max(0, tunnel - 1)
    return _trace("commuter", random, up, latency, _busy(random, steps), every)


def diurnal(steps: int, *, seed: int, every: float = 60.0) -> Trace:
    """Return days of use: the load is high by day, with bursts of other apps; the network is slowest in the evening."""
    random = _random("diurnal", seed, steps, every)
    hours = (random.uniform(0, 24) + np.arange(steps) * every / 3600) % 24
    by_day = np.clip(np.sin((hours - 7) / 15 * np.pi), 0, None)  # from 7 to 22
    by_night = np.exp(-(((hours - 20) / 2.5) ** 2))
    bursts = _stays(random, steps, length=8, share=0.2) * random.uniform(1, 3)
    load = 1 + 2.5 * by_day * np.exp(random.normal(0, 0.1, steps)) + bursts
    up = 25e6 * (1 - 0.85 * by_night) * np.exp(_smooth(random, steps, keep=0.95, spread=0.3))
    latency = 0.02 + 0.04 * by_night
    return _trace("diurnal", random, up, latency, load, every)


GENERATORS: dict[str, Callable[..., Trace]] = {
    "markov": markov,
    "walk": walk,
    "commuter": commuter,
    "diurnal": diurnal,
}


def drained(seconds: Series, *, start: float = 1.0, lasts: float = 4 * 3600) -> Series:
    """Return the charge [T] of a battery that lasts so many seconds, and is full again when 5 % are left."""
    if not (LEAST_BATTERY < start <= 1 and lasts > 0):
        raise ValueError(
            f"expected a start above {LEAST_BATTERY} up to 1 and seconds > 0 that it lasts, got {start} and {lasts}"
        )
    used = (1 - start) + (seconds - seconds[0]) / lasts
    return 1 - used % (1 - LEAST_BATTERY)


def save_trace(path: Path, trace: Trace) -> Path:
    """Write the trace as CSV, a line a time, to the last digit; return ``path``. The name is the file's."""
    rows = zip(*(getattr(trace, column).tolist() for column in COLUMNS), strict=True)
    lines = [",".join(COLUMNS), *(",".join(map(repr, row)) for row in rows)]
    return write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def load_trace(path: Path) -> Trace:
    """Return the trace that ``save_trace`` wrote, or another CSV with these columns.

    Raises ``LookupError`` where there is no file, ``ValueError`` that names the line for what cannot be read.
    """
    if not path.is_file():
        raise LookupError(f"expected a trace at {path}, found none; write one with save_trace")
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"expected {path} to be CSV in UTF-8, got something else ({error})") from error
    if not lines or tuple(lines[0]) != COLUMNS:
        got = ",".join(lines[0]) if lines else "an empty file"
        raise ValueError(f"{path.name} line 1: expected {','.join(COLUMNS)}, got {got}; name the columns so")
    if len(lines) == 1:
        raise ValueError(f"{path.name} line 2: expected at least one time, got the end of the file; record some")
    rows: list[list[float]] = []
    for number, cells in enumerate(lines[1:], start=2):
        where = f"{path.name} line {number}"
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{where}: expected {len(COLUMNS)} numbers, got {len(cells)}; give {','.join(COLUMNS)}")
        row = []
        for column, cell in zip(COLUMNS, cells, strict=True):
            fits, wanted = RANGES[column]
            try:
                value = float(cell)
            except ValueError:
                raise ValueError(f"{where}: expected {wanted}, got {column} {cell!r}; mend the line") from None
            if not fits(np.array([value]))[0]:
                raise ValueError(f"{where}: expected {wanted}, got {column} {cell}; mend the line")
            row.append(value)
        if rows and row[0] <= rows[-1][0]:
            raise ValueError(f"{where}: expected seconds above {rows[-1][0]}, got {row[0]}; sort the lines")
        rows.append(row)
    return Trace(path.stem, *np.array(rows).T)


def record_load(seconds: float, every: float) -> Trace:
    """Return how much slower than at its best this machine computed, measured every so many seconds for ``seconds``.

    What is timed are 20 products of two float32 matrices [192, 192]; the load is that time over the least that was
    seen, so that 1 is this machine at its quickest meanwhile, not idle. Network and battery are not measured: no limit,
    no latency, full.
    """
    if not (0 < every <= seconds < math.inf):
        raise ValueError(f"expected 0 < every ≤ seconds, both finite, got every {every} of {seconds} seconds")
    matrix = torch.rand(PRODUCT, PRODUCT, generator=torch.Generator().manual_seed(0))
    _timed(matrix)  # the first one pays for what torch sets up
    start, times, taken = time.perf_counter(), [], []
    while (now := time.perf_counter() - start) < seconds:
        times.append(now)
        taken.append(_timed(matrix))
        time.sleep(max(0.0, start + len(times) * every - time.perf_counter()))
    size, load = len(times), np.array(taken) / min(taken)
    return Trace(
        "machine_load", np.array(times), np.full(size, np.inf), np.full(size, np.inf), np.zeros(size), load,
        np.ones(size),
    )  # fmt: skip


def _timed(matrix: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS):
        torch.mm(matrix, matrix)
    return time.perf_counter() - start


def _random(name: str, seed: int, steps: int, every: float) -> np.random.Generator:
    if steps < 1 or not (0 < every < math.inf):
        raise ValueError(f"expected at least 1 step of finite seconds > 0, got {steps} of {every}")
    if seed < 0:
        raise ValueError(f"expected a seed of 0 or more, got {seed}")
    return np.random.default_rng([seed, *name.encode()])


def _trace(
    name: str, random: np.random.Generator, up: Series, latency: Series, load: Series, every: float
) -> Trace:  # fmt: skip
    """Return the trace of what was drawn, its bandwidth and load kept within bounds, on a battery that drains."""
    seconds = np.arange(len(up), dtype=np.float64) * np.float64(every)
    up = np.where(up <= TUNNEL, up, np.clip(up, SLOWEST, FASTEST))
    battery = drained(seconds, start=random.uniform(0.3, 1), lasts=len(up) * every * random.uniform(0.8, 2))
    return Trace(name, seconds, up, DOWN * up, latency, np.clip(load, 1, MOST_LOAD), battery)


def _cell(random: np.random.Generator) -> float:
    return math.exp(random.uniform(math.log(2e6), math.log(40e6)))


def _busy(random: np.random.Generator, steps: int) -> Series:
    """Return a device's load: near 1, with spells of 30 steps or so, a quarter of the time, at 2 to 5."""
    spells = _stays(random, steps, length=30, share=0.25)
    return 1 + spells * random.uniform(1, 4) + np.abs(_smooth(random, steps, keep=0.8, spread=0.15))


def _stays(random: np.random.Generator, steps: int, *, length: float, share: float) -> Series:
    """Return 0 and 1 [steps] by a Markov chain that is at 1 a ``share`` of the time, ``length`` steps at once."""
    leave, enter = 1 / length, share / ((1 - share) * length)
    now, found = float(random.random() < share), np.empty(steps)
    for step in range(steps):
        if random.random() < (leave if now else enter):
            now = 1 - now
        found[step] = now
    return found


def _smooth(random: np.random.Generator, steps: int, *, keep: float, spread: float) -> Series:
    """Return noise [steps] of standard deviation ``spread`` of which each step keeps a part (autoregressive)."""
    noise = random.normal(0, spread * math.sqrt(1 - keep**2), steps)
    now, found = random.normal(0, spread), np.empty(steps)
    for step in range(steps):
        now = keep * now + noise[step]
        found[step] = now
    return found
