"""Rules as a federation's aggregators: who is screened, whose part is how large, and what comes out of a round."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from defenses.aggregation import (
    FLAME,
    NNM,
    Bulyan,
    CentredClipping,
    DnC,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    Mixed,
    MultiKrum,
    Robust,
    Rooted,
    Rule,
    TrimmedMean,
)
from splitlearn import Learner
from splitlearn.federation import Aggregator, fedavg_round, mean
from splitlearn.members import Weights

START = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "n": torch.tensor(7), "b": torch.tensor([0.5])}


def moved(*by: float, n: int = 8) -> Weights:
    w, b = torch.tensor(by[:4]).view(2, 2), torch.tensor(by[4:])
    return {"w": START["w"] + w, "n": torch.tensor(n), "b": START["b"] + b}


def crowd(count: int, seed: int = 0) -> list[Weights]:
    generator = torch.Generator().manual_seed(seed)
    return [moved(*(1 + 0.1 * torch.randn(5, generator=generator)).tolist()) for _ in range(count)]


def test_what_comes_out_is_the_start_moved_by_the_rule() -> None:
    sent = [
        moved(0, 0, 0, 0, 0),
        moved(1, 2, 3, 4, 5),
        moved(2, 2, 2, 2, 2),
        moved(9, 9, 9, 9, 9),
        moved(1, 1, 1, 1, 9),
    ]
    before = [{name: tensor.clone() for name, tensor in own.items()} for own in sent]
    robust = Robust(Median())
    aggregator: Aggregator = robust
    found = aggregator(sent, [1, 1, 1, 1, 1], START)
    assert found["w"].tolist() == [[2, 4], [5, 6]]
    assert found["b"].tolist() == [5.5]
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in START.items()}
    assert list(found) == list(START)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(sent, before, strict=True) for name in START)
    assert robust.last is not None
    assert robust.last.shares is None


def test_sample_counts_do_not_weigh_and_members_without_samples_are_left_out() -> None:
    sent = [moved(1, 1, 1, 1, 1), moved(3, 3, 3, 3, 3), moved(math.nan, 0, 0, 0, 0), moved(5, 5, 5, 5, 5)]
    robust = Robust(Mean())
    found = robust(sent, [1, 1000, 0, 0], START)
    assert found["b"].tolist() == [2.5]
    assert mean(sent, [1, 1000, 0, 0])["b"].item() == pytest.approx(3.498, abs=1e-3)
    assert robust.last is not None
    assert robust.last.idle == (2, 3)
    assert robust.last.screened == ()  # it has no samples: nobody looked
    assert robust.last.shares is not None
    assert robust.last.shares.tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "make",
    [Mean, Median, lambda: TrimmedMean(1), lambda: Krum(1), lambda: MultiKrum(1), lambda: Bulyan(1), GeometricMedian,
     CentredClipping, lambda: DnC(1), FLAME, FoolsGold, lambda: FLTrust(torch.ones(5)), lambda: Mixed(NNM(1), Krum(1))],
)  # fmt: skip
def test_members_that_send_what_is_not_finite_are_screened(make: Callable[[], Rule], bad: float) -> None:
    good = crowd(7)
    sent = [moved(bad, 0, 0, 0, 0), *good[:3], moved(0, 0, 0, 0, bad), *good[3:]]
    robust = Robust(make())
    found = robust(sent, [3] * 9, START)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert robust.screened == 2
    assert robust.last is not None
    assert robust.last.screened == (0, 4)
    if robust.last.shares is not None:
        assert robust.last.shares.shape == (9,)
        assert robust.last.shares[[0, 4]].tolist() == [0, 0]
    alone = Robust(make())(good, [3] * 7, START)
    assert all(torch.equal(found[name], alone[name]) for name in found)


def test_a_float64_update_too_large_for_distances_is_screened_and_calls_add_up() -> None:
    start = {"w": torch.zeros(2, dtype=torch.float64)}
    sent = [{"w": torch.full((2,), value, dtype=torch.float64)} for value in (1.0, 1e200, 2.0, 3.0, 1e160)]
    robust = Robust(Median())
    for calls in (1, 2):
        assert robust(sent, [1] * 5, start)["w"].tolist() == [2, 2]
        assert robust.screened == 2 * calls


def test_too_few_left_is_told() -> None:
    sent = [*crowd(6), moved(math.nan, 0, 0, 0, 0)]
    robust = Robust(Krum(2))
    message = (
        r"at least 7 members with finite updates for Krum\(f=2\), got 6 of 7 \(1 screened as not finite\); lower f"
    )
    with pytest.raises(ValueError, match=message):
        robust(sent, [1] * 7, START)
    with pytest.raises(ValueError, match="got 0 of 1 "):
        Robust(lambda rows: rows[0])(sent[-1:], [1], START)
    with pytest.raises(
        ValueError, match=r"at least 5 members .* for Mixed\(mixer=NNM\(f=2\), rule=Median\(\)\), got 4"
    ):
        Robust(Mixed(NNM(2), Median()))(crowd(4), [1] * 4, START)
    for counts in ([1, 1], [0] * 7, [-1] + [1] * 6):
        with pytest.raises(ValueError, match="members with some samples"):
            robust(sent, counts, START)
    with pytest.raises(ValueError, match="same entries"):
        robust([{"w": START["w"]}, START], [1, 1], START)


def test_foolsgold_s_history_is_of_positions() -> None:
    robust = Robust(FoolsGold())
    robust(crowd(4), [1] * 4, START)
    robust(crowd(4, seed=1), [1] * 4, START)
    with pytest.raises(ValueError, match=r"at \[0, 1, 2, 3\] in every call, got \[1, 2, 3\] \(1 screened"):
        robust([moved(math.nan, 0, 0, 0, 0), *crowd(3)], [1] * 4, START)
    # As many, but others: their histories would be mixed up.
    nested = Robust(Mixed(NNM(1), FoolsGold()))
    nested(crowd(4), [0, 1, 1, 1], START)
    with pytest.raises(ValueError, match=r"expected those at \[1, 2, 3\] in every call, got \[0, 1, 2\]"):
        nested(crowd(4), [1, 1, 1, 0], START)


def test_detection_can_be_scored_by_the_shares() -> None:
    sent = [*crowd(8), moved(-5, -5, -5, -5, -5), moved(math.inf, 0, 0, 0, 0), moved(-6, -5, -5, -5, -5)]
    robust = Robust(MultiKrum(2))
    robust(sent, [1] * 11, START)
    assert robust.last is not None
    assert robust.last.shares is not None
    assert (robust.last.shares == 0).nonzero().flatten().tolist() == [8, 9, 10]
    assert robust.last.screened == (9,)


def test_integers_are_the_members_median_and_entries_kept_by_members_stay_out() -> None:
    sent = [moved(1, 1, 1, 1, 1, n=n) for n in (-10_000, 8, 9, 10, 2**40)]
    assert Robust(Mean())(sent, [1] * 5, START)["n"].item() == 9
    flags = [{"w": START["w"], "f": torch.tensor([True, bool(k)])} for k in (1, 0, 0)]
    assert Robust(Mean())(flags, [1] * 3, {**START, "f": torch.tensor([True, True])})["f"].tolist() == [True, False]
    found = Robust(Mean())([{"b": own["b"]} for own in sent], [1] * 5, START)
    assert list(found) == ["b"]


def test_any_callable_is_a_rule() -> None:
    seen = []

    def first(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows[0]

    found = Robust(first)([moved(math.nan, 0, 0, 0, 0), moved(1, 2, 3, 4, 5), moved(0, 0, 0, 0, 0)], [1, 1, 1], START)
    assert found["b"].tolist() == [5.5]
    assert seen[0].dtype == torch.float64
    assert seen[0].shape == (2, 5)


def test_fltrust_s_row_is_trained_from_each_round_s_start() -> None:
    starts = []

    def train(start: Mapping[str, Tensor]) -> Weights:
        starts.append({name: tensor.clone() for name, tensor in start.items()})
        start["w"].fill_(77)  # what it does to its copy is its own business
        return moved(1, 1, 1, 1, 1)

    sent = [moved(2, 2, 2, 2, 2), moved(-1, -1, -1, -1, -1), moved(0.5, 0.5, 0.5, 0.5, 0.5)]
    robust = Robust(Rooted(train))
    before = {name: tensor.clone() for name, tensor in START.items()}
    found = robust(sent, [1, 1, 1], START)
    assert all(torch.equal(START[name], before[name]) for name in START)
    assert all(torch.equal(starts[0][name], START[name]) for name in START)
    assert torch.allclose(found["w"], START["w"] + 1)
    assert robust.last is not None
    assert robust.last.shares is not None
    assert robust.last.shares.tolist() == pytest.approx([0.25, 0, 1])  # (½, 0, ½), rescaled by ½ and 2
    row = torch.ones(5, dtype=torch.float64)
    again = Robust(Rooted(lambda start: row))(sent, [1, 1, 1], START)
    assert torch.equal(again["w"], found["w"])
    kept = Robust(Rooted(train))([{"b": own["b"]} for own in sent], [1, 1, 1], START)  # members keep w
    assert kept["b"].item() == pytest.approx(1.5)
    with pytest.raises(ValueError, match="got none for b; train the same stage"):
        Robust(Rooted(lambda start: {"w": start["w"]}))(sent, [1, 1, 1], START)


def test_distances_between_weights_in_float32_choose_wrongly_where_deltas_choose_right() -> None:
    """Weights of about 100, updates of about .001: in float32 their products round by more than updates differ."""
    generator = torch.Generator().manual_seed(0)
    start = {"w": 100 * torch.rand(2000, generator=generator)}
    honest = [{"w": start["w"] + 1e-3 * torch.randn(2000, generator=generator)} for _ in range(8)]
    bad = [{"w": start["w"] + 3e-3 * torch.randn(2000, generator=generator)} for _ in range(3)]
    sent = [*bad, *honest]
    robust = Robust(MultiKrum(3))
    robust(sent, [1] * 11, start)
    assert robust.last is not None
    assert robust.last.shares is not None
    assert robust.last.shares.nonzero().flatten().tolist() == list(range(3, 11))

    rows = torch.stack([own["w"] for own in sent])
    squares = rows.square().sum(1)
    distances = (squares[:, None] + squares[None, :] - 2 * rows @ rows.T).clamp(min=0).fill_diagonal_(0)
    naive = distances.sort(dim=1).values[:, 1:7].sum(1).argsort()[:8]
    assert set(naive.tolist()) & {0, 1, 2}


class Sender:
    """A member that moves all weights by so much, whatever it is sent."""

    def __init__(self, name: str, by: float):
        self.name, self.by = name, by

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        return {name: tensor + self.by for name, tensor in weights.items()}, 10


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(1), MultiKrum(1), GeometricMedian(), FLAME()], ids=str)
def test_a_round_withstands_a_member_that_a_mean_does_not(rule: Callable[[Tensor], Tensor]) -> None:
    members = [Sender(f"c{number}", by) for number, by in enumerate((0.9, 1.0, 1.1, 1.2, -1e6, math.nan))]
    for aggregate, low, high in ((Robust(rule), 0.9, 1.2), (mean, -math.inf, -1e4)):
        model = Learner("fed", nn.Linear(3, 2))
        start = model.weights()
        fedavg_round(members if aggregate is not mean else members[:-1], model, aggregate=aggregate)
        by = model.weights()["weight"] - start["weight"]
        assert (by >= low - 1e-5).all()
        assert (by <= high + 1e-5).all()
