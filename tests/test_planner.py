"""The planner's search: against measuring everything, by hand, and how many measurements it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from experiments.planner import OBJECTIVES, Bounds, Candidate, Glimpse, Measured, Slack, search
from experiments.summary import Spread
from splitlearn.cost import Cost


def cost(seconds: float, joules: float = 1.0, nbytes: float = 100.0, memory: int = 10) -> Cost:
    return Cost(seconds, 0.0, 0.0, 0.0, joules, nbytes, 0.0, memory, True)


def spread(value: float) -> Spread:
    return Spread(value, 0.0, value, value, 1)


class World:
    """Candidates of which everything is known, and a count of how often they were asked for."""

    def __init__(self, rows: Mapping[Candidate, tuple[Cost, float, float]], glimpsed: float = 0.0):
        self.rows, self.glimpsed, self.asked = rows, glimpsed, []
        self.costs = {one: row[0] for one, row in rows.items()}

    def glimpse(self, candidates: Sequence[Candidate]) -> Mapping[Candidate, Glimpse]:
        return {one: Glimpse(self.rows[one][1] + self.glimpsed, self.rows[one][2]) for one in candidates}

    def measure(self, candidates: Sequence[Candidate]) -> Sequence[Measured]:
        self.asked += candidates
        return [self.of(one) for one in candidates]

    def of(self, one: Candidate) -> Measured:
        own, loss, leakage = self.rows[one]
        return Measured(one, own, spread(loss), spread(leakage))

    def best(self, bounds: Bounds, minimise: str) -> Measured | None:
        kept = [self.of(one) for one in self.rows if self.of(one).keeps(bounds)]
        return min(kept, key=lambda one: one.objective(minimise)) if kept else None


def candidates(number: int) -> list[Candidate]:
    return [Candidate(n + 1, f"layer{n}") for n in range(number)]


def test_the_cheapest_that_keeps_the_bounds_by_hand():
    a, b, c, d = candidates(4)
    world = World({a: (cost(1), 0, 0.9), b: (cost(2), 7, 0.1), c: (cost(3), 0.5, 0.2), d: (cost(4), 0.0, 0.0)})
    found = search(
        world.costs, Bounds(loss=1, leakage=0.3), "seconds", glimpse=world.glimpse, measure=world.measure,
    )  # fmt: skip
    assert found.best is not None
    assert found.best.candidate == c
    assert world.asked == [c]  # a and b are hopeless at a glimpse, d is dearer
    assert found.hopeless == (a, b)
    assert found.glimpses[d] == Glimpse(0.0, 0.0)


def test_a_candidate_beyond_the_bounds_of_cost_or_memory_is_never_looked_at():
    a, b, c = candidates(3)
    world = World({a: (cost(5), 0, 0), b: (cost(1, memory=1000), 0, 0), c: (cost(2), 0, 0)})
    found = search(world.costs, Bounds(seconds=4, memory=500), "joules", glimpse=world.glimpse, measure=world.measure)
    assert found.dear == (a, b)
    assert found.glimpses.keys() == {c}
    assert found.best is not None
    assert found.best.candidate == c


def test_where_nothing_keeps_the_bounds_there_is_no_plan_and_what_was_near_is_measured():
    a, b = candidates(2)
    world = World({a: (cost(1), 2.0, 0.1), b: (cost(2), 50.0, 0.1)})
    found = search(world.costs, Bounds(loss=1), "seconds", glimpse=world.glimpse, measure=world.measure)
    assert found.best is None
    assert [one.candidate for one in found.measured] == [a]
    assert found.hopeless == (b,)
    nothing = search(world.costs, Bounds(seconds=0), "seconds", glimpse=world.glimpse, measure=world.measure)
    assert nothing.best is None
    assert nothing.measured == ()
    assert nothing.dear == (a, b)


@pytest.mark.parametrize("minimise", OBJECTIVES)
@pytest.mark.parametrize("at_once", [1, 3])
def test_it_finds_what_measuring_everything_finds_in_fewer_measurements(minimise, at_once):
    generator = torch.Generator().manual_seed(0)
    spent, in_all = 0, 0
    for _ in range(60):
        rows = {}
        for one in candidates(30):
            seconds, joules, nbytes, loss, leakage = torch.rand(5, generator=generator).tolist()
            rows[one] = (cost(seconds, joules, 1000 * nbytes), 10 * loss, leakage)
        world = World(rows, glimpsed=1.0)  # a short training loses a point more
        loss, leakage, seconds = torch.rand(3, generator=generator).tolist()
        bounds = Bounds(loss=10 * loss, leakage=leakage, seconds=seconds)
        found = search(
            world.costs, bounds, minimise, glimpse=world.glimpse, measure=world.measure, at_once=at_once,
        )  # fmt: skip
        assert found.best == world.best(bounds, minimise)
        spent, in_all = spent + len(world.asked), in_all + len(rows)
    assert spent < in_all / 3


def test_a_glimpse_that_misleads_by_more_than_the_slack_loses_the_best():
    a, b = candidates(2)
    world = World({a: (cost(1), 0.5, 0.1), b: (cost(2), 0.5, 0.1)}, glimpsed=10.0)
    ask = {"glimpse": world.glimpse, "measure": world.measure}
    assert search(world.costs, Bounds(loss=1), "seconds", **ask).best is None
    found = search(world.costs, Bounds(loss=1), "seconds", **ask, slack=Slack(loss=20))
    assert found.best is not None
    assert found.best.candidate == a


def test_doubt_counts_where_the_loss_may_be_great_and_where_the_attack_is_another():
    (a,) = candidates(1)
    world = World({a: (cost(1), 8.0, 0.3)})

    def found(doubt: float, loss: float):
        def glimpse(_: Sequence[Candidate]) -> Mapping[Candidate, Glimpse]:
            return {a: Glimpse(8.0, 0.5, doubt)}

        return search(
            world.costs, Bounds(loss=loss, leakage=0.35), "seconds", glimpse=glimpse, measure=world.measure
        ).best  # fmt: skip

    assert found(0.2, 20) is not None
    assert found(0.2, 9) is None
    assert found(float("inf"), 9) is not None
    assert found(0.0, 20) is None


def test_bytes_that_change_in_training_count_as_measured():
    a, b = candidates(2)
    world = World({a: (cost(1, nbytes=100), 0, 0), b: (cost(2, nbytes=120), 0, 0)})

    def measure(some: Sequence[Candidate]) -> list[Measured]:
        grown = [world.of(one) for one in some]
        return [replace(one, cost=cost(1, nbytes=150)) if one.candidate == a else one for one in grown]

    found = search(world.costs, Bounds(), "nbytes", glimpse=world.glimpse, measure=measure)
    assert found.best is not None
    assert found.best.candidate == b


def test_the_front_is_what_nothing_beats():
    a, b, c, d = candidates(4)
    world = World({a: (cost(1), 1, 0.5), b: (cost(2), 1, 0.6), c: (cost(3), 0, 0.9), d: (cost(1), 1, 0.5)})
    found = search(world.costs, Bounds(loss=-1), "seconds", glimpse=world.glimpse, measure=world.measure)
    assert {one.candidate for one in found.front} == {a, c, d}


def test_the_whole_front_is_measured_where_asked():
    a, b, c, d = candidates(4)
    world = World({a: (cost(1), 0.5, 0.3), b: (cost(2), 0.4, 0.2), c: (cost(3), 50.0, 0.0), d: (cost(4), 0.1, 0.1)})
    found = search(
        world.costs, Bounds(loss=1), "seconds", glimpse=world.glimpse, measure=world.measure, whole_front=True
    )  # fmt: skip
    assert found.best is not None
    assert found.best.candidate == a
    assert [one.candidate for one in found.front] == [a, b, d]
    assert found.hopeless == (c,)


def test_bad_input_is_one_clear_line():
    world = World({})
    with pytest.raises(ValueError, match="expected something to minimise among seconds, joules, nbytes, leakage, loss"):
        search({}, Bounds(), "latency", glimpse=world.glimpse, measure=world.measure)
    with pytest.raises(ValueError, match="at least one measurement at a time, got 0"):
        search({}, Bounds(), "seconds", glimpse=world.glimpse, measure=world.measure, at_once=0)
