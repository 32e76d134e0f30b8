"""Does the planner find what measuring everything finds, and with how many trainings?"""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

from experiments.plan import candidates_of, zoo
from experiments.planner import Bounds, Candidate, Found, Glimpse, Measured, search
from experiments.training import load_splits
from experiments.workbench import GLIMPSED, Settings, Site, Subject, Workbench
from experiments.workers import available_cpus
from splitlearn.cost import Cost
from splitlearn.devices import DEVICES

__all__ = ["planner_figures"]

SITES = tuple(itertools.product(("microcontroller", "raspberry_pi", "phone", "laptop"), ("wifi", "4g", "satellite")))
MINIMISED = ("seconds", "joules", "nbytes", "leakage")
LIMITS = tuple(itertools.product((0.5, 2.0, 5.0), (0.45, 0.6, 0.8, inf)))  # points lost, leakage
DATA = ("digits", "breast_cancer")
SETTINGS = Settings(epochs=8, seeds=(0, 1, 2))


def planner_figures(out: Path | None = None) -> dict[str, float]:
    """Return how often the planner's answer is the best of all candidates, and the share of trainings that it took.

    The digits CNN (4 cuts × 3 compressions × 3 protections), on which the slack of a glimpse was chosen, and the
    perceptron on ``breast_cancer`` (2 × 3 × 3), on which nothing was. Every candidate is glimpsed and measured once,
    over three seeds of eight epochs; then the planner is asked on 12 sites (``questions``: × 4 things to minimise × 12
    pairs of bounds), out of what was measured, and counted by what it asks for: a glimpse is a fifth of a training, a
    measurement one a seed. ``optimum`` is the share of questions answered as measuring everything answers them,
    ``within`` adds those whose plan keeps the bounds and lies within the interval over the seeds of the best one's
    objective. ``share_mean`` and ``share_most`` are the trainings spent, of all, ``share_all`` those of all questions
    together, where nothing is trained twice. With ``out`` the trainings are kept, and a second run goes by them.
    """
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, float] = {}
        for data in DATA:
            figures = _figures(data, (out or Path(folder)) / data)
            found |= {f"{data}_{name}": value for name, value in figures.items()}
        return found


def _figures(data: str, out: Path) -> dict[str, float]:
    subject = Subject(data, partial(load_splits, data, None), zoo)
    site = Site(DEVICES["phone"], DEVICES["server_gpu"], "wifi")
    bench = Workbench(subject, site, SETTINGS, out, available_cpus())
    candidates, _ = candidates_of(
        subject.make(bench.splits, 0), ("weighted",), ("none", "ans4", "ans2"), ("none", "noise:0.05", "nopeek:3")
    )
    glimpses = bench.glimpse(candidates)
    everything = {one.candidate: one for one in bench.measure(candidates)}
    asked = exact = near = planned = 0
    shares: list[float] = []
    seen: set[Candidate] = set()
    trained: set[Candidate] = set()
    for edge, network in SITES:
        there = replace(bench, site=Site(DEVICES[edge], DEVICES["server_gpu"], network))
        costs = there.costs(candidates)
        known = {
            one: replace(done, cost=there.priced(one, done.cost.up_nbytes, done.cost.down_nbytes))
            for one, done in everything.items()
        }
        for minimise, (loss, leakage) in itertools.product(MINIMISED, LIMITS):
            bounds = Bounds(loss=loss, leakage=leakage, memory=DEVICES[edge].memory)
            found = _asked(costs, bounds, minimise, glimpses, known)
            best = _best(list(known.values()), bounds, minimise)
            asked += 1
            planned += best is not None
            exact += _same(found.best, best, minimise)
            near += _same(found.best, best, minimise) or _within(found.best, best, minimise)
            seen |= set(found.glimpses)
            trained |= {one.candidate for one in found.measured}
            shares.append(_spent(len(found.glimpses), len(found.measured)) / _spent(0, len(candidates)))
    return {
        "candidates": float(len(candidates)),
        "questions": float(asked),
        "with_a_plan": planned / asked,
        "optimum": exact / asked,
        "within": near / asked,
        "share_mean": sum(shares) / len(shares),
        "share_most": max(shares),
        "share_all": _spent(len(seen), len(trained)) / _spent(0, len(candidates)),
    }


def _asked(
    costs: dict[Candidate, Cost],
    bounds: Bounds,
    minimise: str,
    glimpses: dict[Candidate, Glimpse],
    known: dict[Candidate, Measured],
) -> Found:
    def glimpse(some: Sequence[Candidate]) -> dict[Candidate, Glimpse]:
        return {one: glimpses[one] for one in some}

    def measure(some: Sequence[Candidate]) -> list[Measured]:
        return [known[one] for one in some]

    return search(costs, bounds, minimise, glimpse=glimpse, measure=measure)


def _best(known: Sequence[Measured], bounds: Bounds, minimise: str) -> Measured | None:
    kept = [one for one in known if one.keeps(bounds)]
    return min(kept, key=lambda one: one.objective(minimise)) if kept else None


def _same(found: Measured | None, best: Measured | None, minimise: str) -> bool:
    if found is None or best is None:
        return found is best
    return found.objective(minimise) == best.objective(minimise)


def _within(found: Measured | None, best: Measured | None, minimise: str) -> bool:
    """Return whether a plan is no worse than the best one's worst seed, where the objective has a spread."""
    if found is None or best is None or minimise != "leakage":
        return False
    return found.leakage.mean <= best.leakage.high


def _spent(glimpses: int, measured: int) -> float:
    return glimpses / GLIMPSED + measured * len(SETTINGS.seeds)
