"""FedBuff: what it is equal to, staleness and weights by hand, the virtual clock, and members that are lost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import pytest
import torch
from torch import Tensor

from defenses.aggregation import Median, Robust
from splitlearn import Learner, Member, fedavg_round
from splitlearn.paradigms import Absent, Buffered, fedbuff, polynomial

from .toy import Lost, data, learner, model, plain, point, same

SIZES = ((4, 6), (8,), (2, 3, 2))


def members() -> list[Member]:
    return [Member(learner(f"c{n}", model(), momentum=0.9), None, data(n, SIZES[n])) for n in range(3)]


@dataclass
class Moves:
    """A member that moves the one weight of a ``point`` by a number."""

    name: str
    by: float
    samples: int = 1

    def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        return {name: w + self.by for name, w in weights.items()}, self.samples


def test_all_at_one_pace_and_a_buffer_of_all_is_fedavg_bit_for_bit() -> None:
    here, there = Learner("all", model()), Learner("all", model())
    plainly = members()
    updates = fedbuff(members(), here, buffer=3, updates=4, delay=lambda name, number: 0.1)
    for number, done in enumerate(updates, 1):
        assert dict(done.counts) == fedavg_round(plainly, there).counts
        assert done.seconds == pytest.approx(0.1 * number)
        assert (done.staleness, done.dropped) == ((0, 0, 0), ())
        assert same(here.weights(), there.weights())
    assert number == 4
    assert not same(here.weights(), model().state_dict())


def test_staleness_and_weights_by_hand() -> None:
    fleet, everywhere = [Moves("fast", 1.0), Moves("slow", 10.0)], point("all", 1.0, lr=0.1)
    pace = {"fast": 1.0, "slow": 2.5}
    updates = fedbuff(fleet, everywhere, buffer=1, updates=6, delay=lambda name, number: pace[name])
    w, found = 0.0, []
    for done in updates:
        (name, _), (old,) = done.counts[0], done.staleness
        w += (1.0 if name == "fast" else 10.0) / math.sqrt(1 + old)
        assert everywhere.weights()["weight"].item() == pytest.approx(w, rel=0, abs=1e-12)
        found.append((done.seconds, name, old))
    # slow's first began before fast's two; fast's third when there were two of the three updates that it came after
    expected = [(1, "fast", 0), (2, "fast", 0), (2.5, "slow", 2), (3, "fast", 1), (4, "fast", 0), (5, "fast", 0)]
    assert found == expected


def test_a_buffer_is_a_mean_by_samples_of_discounted_moves() -> None:
    fleet, everywhere = [Moves("a", 1.0, 3), Moves("b", 10.0, 1)], point("all", 1.0, lr=0.1)
    pace = {"a": 1.0, "b": 3.5}
    updates = fedbuff(
        fleet, everywhere, buffer=2, updates=2, delay=lambda name, number: pace[name], weight=lambda old: 0.5**old
    )
    first = next(updates)  # a twice, at 1 and at 2: both began with nothing
    assert first == Buffered(2.0, (("a", 3), ("a", 3)), (0, 0))
    assert everywhere.weights()["weight"].item() == 1.0
    second = next(updates)  # a at 3, b at 3.5, which began an update ago
    assert second == Buffered(3.5, (("a", 3), ("b", 1)), (0, 1))
    assert everywhere.weights()["weight"].item() == pytest.approx(1.0 + 0.75 * 1.0 + 0.25 * 0.5 * 10.0, abs=1e-12)
    assert list(updates) == []


def test_polynomial_by_hand() -> None:
    assert [polynomial(old) for old in (0, 3, 8, 99)] == pytest.approx([1.0, 0.5, 1 / 3, 0.1], abs=1e-15)


def test_what_arrives_at_once_is_taken_in_in_the_members_order() -> None:
    fleet, everywhere = [Moves("b", 1.0), Moves("a", 2.0), Moves("c", 4.0)], point("all", 1.0, lr=0.1)
    found = list(
        fedbuff(fleet, everywhere, buffer=2, updates=3, delay=lambda name, number: 1.0, weight=lambda old: 1.0)
    )
    assert [tuple(name for name, _ in done.counts) for done in found] == [("b", "a"), ("c", "b"), ("a", "c")]
    assert [done.staleness for done in found] == [(0, 0), (1, 0), (1, 1)]  # b's answer made an update while a waited
    assert [done.seconds for done in found] == [1.0, 2.0, 2.0]


def test_after_each_update_the_model_is_of_that_update() -> None:
    fleet, everywhere = [Moves("a", 1.0), Moves("b", 2.0)], point("all", 1.0, lr=0.1)
    updates = fedbuff(fleet, everywhere, buffer=1, updates=3, delay=lambda name, number: 1.0, weight=lambda old: 1.0)
    assert [everywhere.weights()["weight"].item() for _ in updates] == [1.0, 3.0, 4.0]  # two of them at one instant


def test_the_clock_never_goes_back_and_nobody_overtakes() -> None:
    draws = torch.Generator().manual_seed(0)
    took: dict[str, list[float]] = {}

    def delay(name: str, number: int) -> float:
        assert number == len(took.setdefault(name, []))  # the n-th training, each asked for once
        took[name].append(float(torch.rand((), generator=draws)) + 0.01)
        return took[name][-1]

    fleet = [Moves(f"c{n}", 1.0) for n in range(5)]
    done = list(fedbuff(fleet, point("all", 1.0, lr=0.1), buffer=3, updates=40, delay=delay))
    assert len(done) == 40
    assert all(one.seconds <= other.seconds for one, other in pairwise(done))
    ends = sorted((sum(own[: n + 1]), name) for name, own in took.items() for n in range(len(own)))
    answered = [name for one in done for name, _ in one.counts]
    assert answered == [name for _, name in ends][:120]


def test_the_same_training_with_other_orders_of_the_same_answers_is_repeated() -> None:
    def run() -> dict[str, Tensor]:
        pace, everywhere = {"c0": 1.0, "c1": 1.7, "c2": 0.6}, Learner("all", model())
        for _ in fedbuff(members(), everywhere, buffer=2, updates=5, delay=lambda name, number: pace[name]):
            pass
        return everywhere.weights()

    assert same(run(), run())


def test_who_is_lost_is_named_and_starts_again() -> None:
    fleet = [Moves("a", 1.0), Absent(Moves("b", 10.0), 0.5, 1)]
    done = list(fedbuff(fleet, point("all", 1.0, lr=0.1), buffer=2, updates=30, delay=lambda name, number: 1.0))
    lost = sum(one.dropped.count("b") for one in done)
    answers = sum(name == "b" for one in done for name, _ in one.counts)
    assert lost > 5
    assert answers > 5
    assert not any("a" in one.dropped for one in done)
    alone = [Lost("b"), Moves("a", 1.0)]
    for one in fedbuff(alone, point("all", 1.0, lr=0.1), buffer=2, updates=5, delay=lambda name, number: 1.0):
        assert one.counts == (("a", 1), ("a", 1))
        assert one.dropped == ("b", "b")


def test_a_fleet_that_is_lost_for_good_is_an_error_and_no_wait() -> None:
    everywhere = point("all", 1.0, lr=0.1)
    with pytest.raises(ValueError, match="expected members that answer, 201 in a row were lost"):
        next(fedbuff([Lost("a"), Lost("b")], everywhere, buffer=1, updates=1, delay=lambda name, number: 1.0))
    assert everywhere.weights()["weight"].item() == 0.0


def test_a_robust_aggregator_withstands_one_that_lies() -> None:
    def honest(counts: Sequence[float]) -> list[Moves]:
        return [Moves(f"c{n}", by) for n, by in enumerate(counts)]

    fleet, everywhere = honest([1.0, 1.2, 1.1, 1e9]), point("all", 1.0, lr=0.1)
    updates = fedbuff(
        fleet, everywhere, buffer=4, updates=3, delay=lambda name, number: 1.0, aggregate=Robust(Median())
    )
    assert [done.staleness for done in updates] == [(0, 0, 0, 0)] * 3
    assert everywhere.weights()["weight"].item() == pytest.approx(3 * 1.15, abs=1e-9)


def test_it_goes_on_for_as_long_as_it_is_asked() -> None:
    fleet = [Moves("a", 1.0), Moves("b", 1.0)]
    updates = fedbuff(fleet, point("all", 1.0, lr=0.1), buffer=1, updates=10**9, delay=lambda name, number: 1.0)
    assert [done.seconds for done in islice(updates, 4)] == [1.0, 1.0, 2.0, 2.0]


def test_integers_and_local_entries_stay_whole() -> None:
    local = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    fleet = [Member(learner(f"c{n}", model()), None, data(n), local=local) for n in range(2)]
    everywhere = Learner("all", model())
    pace = {"c0": 1.0, "c1": 2.5}
    list(fedbuff(fleet, everywhere, buffer=1, updates=4, delay=lambda name, number: pace[name]))
    after, start = everywhere.weights(), model().state_dict()
    assert all(torch.equal(after[name], start[name]) for name in local)
    assert not torch.equal(after["0.weight"], start["0.weight"])
    counting = [Member(learner(f"c{n}", model()), None, data(n)) for n in range(2)]
    list(fedbuff(counting, everywhere, buffer=1, updates=4, delay=lambda name, number: pace[name]))
    assert everywhere.weights()["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buffer": 0}, "a buffer of 1 answer or more and 1 update or more, got 0 and 1"),
        ({"updates": 0}, "a buffer of 1 answer or more and 1 update or more, got 1 and 0"),
        ({"delay": lambda name, number: 0.0}, r"a delay above 0 seconds, got 0\.0 for c0"),
        ({"delay": lambda name, number: float("nan")}, "a delay above 0 seconds, got nan for c0"),
        ({"delay": lambda name, number: float("inf")}, "a delay above 0 seconds, got inf for c0"),
        ({"members": []}, "each of a name of its own, got none"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, object], message: str) -> None:
    def delay(name: str, number: int) -> float:
        return 1.0

    fleet = [Member(learner("c0", plain()), None, data(0))]
    chosen: dict[str, Callable] = {"members": fleet, "buffer": 1, "updates": 1, "delay": delay, **settings}
    with pytest.raises(ValueError, match=message):
        next(fedbuff(chosen.pop("members"), Learner("all", plain()), **chosen))
