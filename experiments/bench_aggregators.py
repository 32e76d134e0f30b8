"""What robust aggregation costs, each rule against what one would write first in torch, paired in the same run."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from defenses.aggregation import NNM, GeometricMedian, Krum, Median, MultiKrum, TrimmedMean
from experiments.environment import forget_peak_memory, peak_memory_bytes
from experiments.timing import Step, median_ratio, paired_seconds

__all__ = ["aggregator_speed"]

MEMBERS, NUMBERS, BAD = 100, 100_000, 20
ROUNDS, NNM_ROUNDS = 7, 2

Aggregate = Callable[[Tensor], Tensor]


def aggregator_speed(
    *,
    members: int = MEMBERS,
    numbers: int = NUMBERS,
    bad: int = BAD,
    rounds: int = ROUNDS,
    nnm_rounds: int = NNM_ROUNDS,
) -> dict[str, Any]:
    """Return how much faster each rule is than its plain torch twin: 100 updates of 100,000 numbers, float64, f = 20.

    ``*_speedup`` is the median over rounds of the ratio of neighbours; ``*_ms`` the rule's own median time,
    ``torch_*_ms`` its twin's. The twins' docstrings say what they are; they get the same rows, and are made sure to
    return the same. ``nnm_peak_gb``: by how much the process grows at most while rows are mixed, the mixed rows
    included and the rows themselves not; ``torch_nnm_peak_gb`` the same of the twin.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(members, numbers, generator=generator, dtype=torch.float64)
    rows[:bad] += 1.0
    f = bad
    pairs: dict[str, tuple[Aggregate, Aggregate, int]] = {
        "median": (Median(), torch_median, rounds),
        "trimmed_mean": (TrimmedMean(f), partial(torch_trimmed_mean, f=f), rounds),
        "krum": (Krum(f), partial(torch_krum, f=f), rounds),
        "multi_krum": (MultiKrum(f), partial(torch_multi_krum, f=f), rounds),
        "geometric_median": (GeometricMedian(), torch_geometric_median, rounds),
        "nnm": (NNM(f), partial(torch_nnm, f=f), nnm_rounds),
    }
    figures: dict[str, Any] = {}
    for name, (ours, theirs, times) in pairs.items():
        if name != "median" or members % 2:  # torch's median of an even number is the lower one
            apart = (ours(rows) - theirs(rows)).norm() / theirs(rows).norm()
            assert apart < 1e-4, f"{name} is {apart:g} off"
        seconds = paired_seconds({"ours": partial(ours, rows), "theirs": partial(theirs, rows)}, times)
        figures[f"{name}_speedup"] = median_ratio(seconds["theirs"], seconds["ours"])
        figures[f"{name}_ms"] = 1000 * statistics.median(seconds["ours"])
        figures[f"torch_{name}_ms"] = 1000 * statistics.median(seconds["theirs"])
    figures["nnm_peak_gb"] = _growth_gb(partial(NNM(f), rows))
    figures["torch_nnm_peak_gb"] = _growth_gb(partial(torch_nnm, rows, f=f))
    figures["threads"] = torch.get_num_threads()
    return figures


def torch_median(rows: Tensor) -> Tensor:
    """Return ``torch.median`` of each column: the lower one of an even number, which is less work."""
    return rows.median(dim=0).values


def torch_trimmed_mean(rows: Tensor, f: int) -> Tensor:
    """Return the mean of the columns, sorted by torch, less their ends."""
    return rows.sort(dim=0).values[f : len(rows) - f].mean(0)


def torch_krum(rows: Tensor, f: int) -> Tensor:
    """Return the row of the best score by ``torch.cdist``, which multiplies matrices itself."""
    return rows[_torch_scores(rows, f).argmin()]


def torch_multi_krum(rows: Tensor, f: int) -> Tensor:
    """Return the mean of the n - f rows with the best scores by ``torch.cdist``."""
    return rows[_torch_scores(rows, f).argsort()[: len(rows) - f]].mean(0)


def torch_geometric_median(rows: Tensor, tolerance: float = 1e-6, steps: int = 1000) -> Tensor:
    """Return the end of Weiszfeld's steps on the rows themselves, from their mean, until one is short."""
    centre = rows.mean(0)
    for _ in range(steps):
        pulls = 1 / (rows - centre).norm(dim=1).clamp(min=1e-12)
        before, centre = centre, pulls @ rows / pulls.sum()
        if (centre - before).norm() <= tolerance * centre.norm():
            break
    return centre


def torch_nnm(rows: Tensor, f: int) -> Tensor:
    """Return the mean of each row's n - f nearest by ``torch.cdist``, one row after the other.

    All at once, ``rows[nearest].mean(1)``, takes [n, n - f, d] numbers: 6.4 GB, and more time as well.
    """
    nearest = torch.cdist(rows, rows).argsort(dim=1)[:, : len(rows) - f]
    return torch.stack([rows[near].mean(0) for near in nearest])


def _torch_scores(rows: Tensor, f: int) -> Tensor:
    return torch.cdist(rows, rows).square().sort(dim=1).values[:, 1 : len(rows) - f - 1].sum(1)


def _growth_gb(step: Step) -> float:
    """Return by how much the process's memory exceeds, while in ``step``, what it was before, in 10⁹ bytes."""
    forget_peak_memory()
    before = peak_memory_bytes()
    step()
    return (peak_memory_bytes() - before) / 1e9
