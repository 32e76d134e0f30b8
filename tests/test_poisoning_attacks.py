"""Poisoning by updates and by data: each attack by hand, what it does to a federation, and that none of it does not."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import sqrt
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from attacks.poisoning import (
    ALIE,
    Adaptive,
    Backdoor,
    Colluding,
    EdgeCases,
    InnerProduct,
    Mimic,
    MinMax,
    MinSum,
    MirroredLabels,
    ModelReplacement,
    NextLabels,
    Patch,
    PoisonedBatches,
    RandomLabels,
    SignFlip,
    SourceLabels,
    UpdateAttack,
    backdoor_success,
    distributed,
    poisoned,
)
from attacks.poisoning.extremal import along
from attacks.poisoning.updates import furthest
from splitlearn import Batches, Learner, Member, fedavg_round, mean, predict
from splitlearn.data import Dataset, load, split
from splitlearn.deltas import deltas
from splitlearn.federation import Aggregator
from splitlearn.metrics import accuracy


def rows(num: int, size: int = 30, *, seed: int = 0, around: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return around + torch.randn(num, size, generator=generator, dtype=torch.float64)


def by_mean(sent: Tensor) -> Tensor:
    return sent.mean(0)


def by_median(sent: Tensor) -> Tensor:
    return sent.quantile(0.5, 0)


ATTACKS: list[UpdateAttack] = [
    SignFlip(),
    InnerProduct(0.5),
    ALIE(),
    ALIE(z=1.5),
    ALIE(formula="all"),
    Mimic(),
    Mimic(who=2),
    ModelReplacement(),
    ModelReplacement(scale=3.0, longest=1.0),
    *(kind(direction) for kind in (MinMax, MinSum) for direction in ("std", "unit", "sign")),
    Adaptive(by_median, aim="away"),
    Adaptive(by_mean, scales=(0.5, 2.0), refinements=0),
]
BY_REPR = [pytest.param(attack, id=repr(attack).split(" at 0x")[0][:60]) for attack in ATTACKS]


# Update attacks by hand


@pytest.mark.parametrize("attack", BY_REPR)
def test_an_attack_returns_a_row_a_colluder_and_changes_nothing(attack: UpdateAttack) -> None:
    honest, own = rows(8), rows(3, seed=1)
    before, state = (honest.clone(), own.clone()), torch.get_rng_state()
    lies = attack(honest, own)
    assert lies.shape == (3, 30)
    assert lies.dtype == torch.float64
    assert lies.isfinite().all()
    assert torch.equal(lies, attack(honest, own))
    assert torch.equal(honest, before[0])
    assert torch.equal(own, before[1])
    assert torch.equal(state, torch.get_rng_state())
    lies += 1  # of its own memory
    assert torch.equal(honest, before[0])
    assert torch.equal(own, before[1])
    assert attack(honest, own[:0]).shape == (0, 30)
    assert attack(honest.float(), own.float()).dtype == torch.float64


@pytest.mark.parametrize("attack", BY_REPR)
@pytest.mark.parametrize(
    ("honest", "own", "message"),
    [
        (rows(0), rows(2), r"at least one honest member .* got \(0, 30\) and \(2, 30\)"),
        (rows(3), rows(2, 29), r"got \(3, 30\) and \(2, 29\)"),
        (rows(3)[0], rows(2), r"got \(30,\) and \(2, 30\)"),
        (rows(3) / 0, rows(2), "expected finite honest updates"),
    ],
)
def test_an_attack_refuses_what_are_no_updates(attack: UpdateAttack, honest: Tensor, own: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(honest, own)


def test_sign_flip_and_inner_product_by_hand() -> None:
    honest, own = torch.tensor([[1.0, -2.0], [3.0, 0.0]]).double(), torch.zeros(2, 2)
    assert SignFlip(5.0)(honest, own).tolist() == [[-10.0, 5.0]] * 2
    assert InnerProduct(0.5)(honest, own).tolist() == [[-1.0, 0.5]] * 2
    assert not SignFlip(0.0)(honest, own).any()
    assert not InnerProduct(0.0)(honest, own).any()
    sent = torch.cat([honest, InnerProduct(1.1)(honest, own)])  # above h/bad: enough against the mean
    assert sent.mean(0) @ honest.mean(0) < 0
    assert torch.cat([honest, InnerProduct(0.9)(honest, own)]).mean(0) @ honest.mean(0) > 0
    for make in (SignFlip, InnerProduct):
        with pytest.raises(ValueError, match=r"of 0 or more, got -1\.0"):
            make(-1.0)


def test_alie_by_both_published_formulas() -> None:
    assert ALIE().quantile(50, 24) == pytest.approx(1.43, abs=0.005)
    assert ALIE(formula="all").quantile(50, 24) == pytest.approx(1.75, abs=0.005)
    assert ALIE().quantile(50, 24) == pytest.approx(norm.ppf(24 / 26))
    assert ALIE().quantile(10, 1) == pytest.approx(norm.ppf(4 / 9))  # few colluders: on the other side
    honest = torch.tensor([[0.0, 10.0], [2.0, 10.0]])
    assert ALIE(z=1.5)(honest, honest[:1]).tolist() == [[1 - 1.5, 10.0]]
    assert ALIE(z=0.0)(honest, honest[:1]).tolist() == [[1.0, 10.0]]
    many = rows(26)
    z = norm.ppf(24 / 26)
    torch.testing.assert_close(ALIE()(many, rows(24))[3], many.mean(0) - z * many.std(0, correction=0))
    with pytest.raises(ValueError, match=r"share between 0 and 1 .* got 1 for 6 colluders among 10 members; give z"):
        ALIE()(rows(4), rows(6))
    with pytest.raises(ValueError, match="expected the formula 'rest' or 'all', got 'some'"):
        ALIE(formula="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a finite z, got nan"):
        ALIE(z=float("nan"))


def test_the_directions_by_hand() -> None:
    honest = torch.tensor([[0.0, 3.0], [6.0, 5.0]]).double()
    assert along("std", honest).tolist() == [-3.0, -1.0]
    assert along("unit", honest).tolist() == [-0.6, -0.8]
    assert along("sign", honest).tolist() == [-1.0, -1.0]
    assert along("unit", torch.zeros(2, 3)).tolist() == [0.0] * 3


def test_min_max_and_min_sum_by_hand() -> None:
    honest = torch.tensor([[0.0, 0.0], [2.0, 0.0]]).double()  # μ = (1, 0), the greatest distance 2, sums of squares 4
    p = torch.tensor([0.0, -1.0]).double()
    assert MinMax().gamma(honest, p) == pytest.approx(sqrt(3))  # 1 + γ² = 4
    assert MinSum().gamma(honest, p) == pytest.approx(1.0)  # 2 (1 + γ²) = 4
    assert MinMax("sign")(honest, honest[:1])[0].tolist() == pytest.approx([0.0, 0.0])  # as far as the other honest one
    assert MinMax().gamma(honest, torch.zeros(2).double()) == MinSum().gamma(honest, torch.zeros(2).double()) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_min_max_and_min_sum_use_up_their_room_and_no_more(direction: Any, seed: int) -> None:
    honest = rows(7, seed=seed, around=(0.0, 3.0)[seed % 2])
    honest[0] *= 3
    distances = torch.cdist(honest, honest, compute_mode="donot_use_mm_for_euclid_dist")
    p, middle = along(direction, honest), honest.mean(0)

    def furthest_of(gamma: float) -> float:
        return (middle + gamma * p - honest).norm(dim=1).max().item()

    def sum_of(gamma: float) -> float:
        return (middle + gamma * p - honest).square().sum().item()

    cases: list[tuple[Any, Callable[[float], float], float]] = [
        (MinMax(direction), furthest_of, distances.max().item()),
        (MinSum(direction), sum_of, distances.square().sum(1).max().item()),
    ]
    gammas = []
    for attack, reached, bound in cases:
        gamma = attack.gamma(honest, p)
        assert gamma > 0
        assert reached(gamma) == pytest.approx(bound, rel=1e-9)
        assert reached(gamma * (1 + 1e-3)) > bound * (1 + 1e-6)
        torch.testing.assert_close(attack(honest, honest[:2])[1], middle + gamma * p)
        gammas.append(gamma)
    assert gammas[0] != pytest.approx(gammas[1], rel=1e-3)


def test_min_max_keeps_its_room_beside_a_great_common_part() -> None:
    honest = rows(6, 50)
    shifted = honest + 1e8
    assert MinMax().gamma(shifted, along("std", honest)) == pytest.approx(
        MinMax().gamma(honest, along("std", honest)), rel=1e-6
    )


@pytest.mark.parametrize("attack", [MinMax(), MinMax("sign"), MinSum(), MinSum("unit")])
@pytest.mark.parametrize("honest", [rows(1), rows(1).repeat(4, 1), torch.zeros(3, 30)], ids=["one", "alike", "zeros"])
def test_without_spread_there_is_no_room(attack: UpdateAttack, honest: Tensor) -> None:
    torch.testing.assert_close(attack(honest, honest[:1])[0], honest[0].double(), rtol=0, atol=1e-7)


def test_min_max_refuses_unknown_directions() -> None:
    with pytest.raises(ValueError, match="expected a direction among std, unit, sign, got 'up'"):
        MinMax("up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a direction"):
        MinSum("up")  # type: ignore[arg-type]


def test_mimic_copies_who_lies_furthest() -> None:
    honest = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, 9.0], [1.1, 0.2]]).double()
    assert furthest(honest) == furthest(-honest) == 2
    assert Mimic()(honest, honest[:2]).tolist() == [[1.0, 9.0]] * 2
    assert Mimic(who=1)(honest, honest[:1]).tolist() == [[1.0, 0.0]]
    with pytest.raises(LookupError, match="position among 4 honest members, got who=4"):
        Mimic(who=4)(honest, honest[:1])
    with pytest.raises(ValueError, match="position of 0 or more, got -1"):
        Mimic(who=-1)


def test_model_replacement_survives_the_average_of_those_who_stand_still() -> None:
    still, own = torch.zeros(6, 4).double(), rows(2, 4)
    sent = torch.cat([still, ModelReplacement()(still, own)])
    torch.testing.assert_close(sent.mean(0), own.mean(0))
    torch.testing.assert_close(ModelReplacement(rate=0.5)(still, own), 8 / (0.5 * 2) * own)
    alone = ModelReplacement()(still, own[:1])
    torch.testing.assert_close(alone, 7 * own[:1])  # n/η of the paper
    assert not ModelReplacement(scale=0.0)(still, own).any()
    cut = ModelReplacement(longest=1.5)(still, torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.01, 0.0, 0.0, 0.0]]))
    assert cut.norm(dim=1).tolist() == pytest.approx([1.5, 0.04])
    for settings in ({"rate": 0.0}, {"longest": 0.0}, {"scale": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            ModelReplacement(**settings)


# The adaptive attack


def damage(rule: Callable[[Tensor], Tensor], honest: Tensor, lies: Tensor) -> float:
    middle = honest.mean(0)
    return ((middle - rule(torch.cat([honest, lies]))) @ middle / middle.norm()).item()


@pytest.mark.parametrize("rule", [by_mean, by_median])
def test_the_adaptive_attack_is_at_least_as_bad_as_those_of_its_family(rule: Callable[[Tensor], Tensor]) -> None:
    honest, own = rows(9, 40), rows(3, 40)
    worst = damage(rule, honest, Adaptive(rule)(honest, own))
    nothing = damage(rule, honest, honest.mean(0).repeat(3, 1))
    assert worst > nothing + 0.05
    assert worst >= damage(rule, honest, Adaptive(rule, refinements=0)(honest, own))
    length = honest.square().sum(1).mean().sqrt()
    for direction in ("std", "unit", "sign"):
        for scale in (0.125, 1.0, 16.0):
            p = along(direction, honest)
            assert worst >= damage(rule, honest, (honest.mean(0) + scale * length * p / p.norm()).repeat(3, 1))


def test_the_adaptive_attack_stays_within_what_a_rule_lets_through() -> None:
    honest = rows(8, 40)

    def gate(sent: Tensor) -> Tensor:
        kept = sent[sent.norm(dim=1) < 1.2 * honest.norm(dim=1).max()]  # the far ones are dropped
        return kept.mean(0)

    found = Adaptive(gate).search(honest, 2)
    assert found.scale < 4
    assert found.damage > damage(gate, honest, SignFlip(5.0)(honest, honest[:2])) + 0.1
    assert found.damage == pytest.approx(damage(gate, honest, found.row.repeat(2, 1)))


def test_a_rule_that_cannot_be_moved_is_left_alone() -> None:
    honest = rows(5)
    deaf = Adaptive(lambda sent: sent[:5].mean(0))
    assert torch.equal(deaf(honest, rows(2))[0], honest.mean(0))
    assert deaf.search(honest, 2).scale == 0
    calls: list[tuple[int, ...]] = []

    def counted(sent: Tensor) -> Tensor:
        calls.append(tuple(sent.shape))
        return sent.mean(0)

    Adaptive(counted, directions=("std", "sign"), scales=(1.0, 2.0), refinements=2)(honest, rows(2))
    assert calls == [(7, 30)] * (1 + 2 * 2 + 2 * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": ()}, "expected directions among std, unit, sign"),
        ({"directions": ("up",)}, "expected directions among"),
        ({"scales": ()}, "expected finite scales"),
        ({"scales": (-1.0,)}, "expected finite scales"),
        ({"refinements": -1}, "refinements of 0 or more"),
        ({"aim": "up"}, "expected the aim 'away' or 'against', got 'up'"),
    ],
)
def test_the_adaptive_attack_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adaptive(by_mean, **settings)


def test_the_adaptive_attack_refuses_what_is_no_rule() -> None:
    for rule in (lambda sent: sent, lambda sent: sent.mean(0) / 0 * 0):
        with pytest.raises(ValueError, match=r"expected a rule that makes a finite \[30\]"):
            Adaptive(rule)(rows(3), rows(1))


# In a federation

Task = tuple[list[Dataset], Dataset]


@cache
def task(clients: int = 8) -> Task:
    splits = split(load("digits"), private=100 * clients, auxiliary=0, test=397)
    return [splits.private.subset(range(100 * k, 100 * k + 100)) for k in range(clients)], splits.test


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def trained(
    rounds: int = 6,
    *,
    aggregate: Aggregator = mean,
    poisons: Mapping[int, Any] | None = None,
    data: Sequence[Dataset] | None = None,
    start: Learner | None = None,
) -> Learner:
    """Return the model of eight members after some rounds, of whom some poison their batches."""
    everywhere, members = Learner("all", network()), []
    if start is not None:
        everywhere.load_weights(start.weights())
    for place, own in enumerate(data or task()[0]):
        stage = copy.deepcopy(everywhere.stage)
        batches: Any = Batches(own.x, own.y, batch_size=20, seed=place)
        if poisons and place in poisons:
            batches = PoisonedBatches(batches, poisons[place])
        learner = Learner(f"c{place}", stage, torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9))
        members.append(Member(learner, None, batches))
    for _ in range(rounds):
        fedavg_round(members, everywhere, aggregate=aggregate)
    return everywhere


def reached(model: Learner) -> float:
    test = task()[1]
    return accuracy(predict([model], test.x), test.y)


@cache
def clean() -> Learner:
    return trained()


@pytest.mark.parametrize(
    "attack", [SignFlip(), InnerProduct(5.0), Adaptive(by_mean)], ids=["sign flip", "inner product", "adaptive"]
)
def test_the_mean_is_broken_by_two_of_eight(attack: UpdateAttack) -> None:
    assert reached(clean()) > 0.85
    assert reached(trained(3, aggregate=Colluding(attack, (1, 6)))) < 0.5


@pytest.mark.parametrize("attack", [ALIE(z=1.5), MinMax(), MinSum("sign"), Mimic()], ids=lambda one: type(one).__name__)
def test_the_stealthy_move_the_mean_without_standing_out(attack: UpdateAttack) -> None:
    seen: list[Tensor] = []

    def watched(
        weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        seen.append(deltas(weights, start))
        return mean(weights, counts, start)

    trained(1, aggregate=Colluding(attack, (0, 1), watched))
    sent = seen[0]
    honest = sent[2:]
    spread = torch.cdist(honest, honest).max()
    assert torch.cdist(sent[:1], honest).max() < 1.3 * spread
    assert (sent.mean(0) - honest.mean(0)).norm() > 0.01 * spread


def test_no_colluder_or_none_that_lies_changes_nothing() -> None:
    expected = clean().weights()
    for aggregate in (Colluding(SignFlip(), ()), Colluding(lambda honest, own: own, (1, 6))):
        found = trained(aggregate=aggregate).weights()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5 if aggregate.bad else 0)
    assert repr(Colluding(SignFlip(2.0), (1,))).startswith("Colluding(attack=SignFlip(scale=2.0), bad=(1,)")


def test_colluders_read_the_honest_and_replace_their_own_rows_alone() -> None:
    start = {"w": torch.zeros(2), "n": torch.tensor(4), "kept": torch.ones(1)}
    weights = [{"w": torch.tensor([1.0, 10.0 * k]), "n": torch.tensor(k)} for k in range(4)]
    weights[2]["w"] = torch.tensor([torch.nan, 1.0])  # diverged: the colluders pass it over
    before = copy.deepcopy(weights)
    seen: dict[str, Any] = {}

    def attack(honest: Tensor, own: Tensor) -> Tensor:
        seen["honest"], seen["own"] = honest.clone(), own.clone()
        return torch.full_like(own, 7.0)

    def aggregate(
        weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        seen["sent"], seen["counts"] = weights, counts
        return dict(weights[0])

    Colluding(attack, (3, 0), aggregate)(weights, [1, 2, 3, 4], start)
    assert seen["honest"].tolist() == [[1.0, 10.0]]
    assert seen["own"].tolist() == [[1.0, 30.0], [1.0, 0.0]]
    assert [one["w"].tolist() for one in seen["sent"]][::3] == [[7.0, 7.0]] * 2
    assert seen["sent"][1] is weights[1]
    assert seen["sent"][3]["n"] == 3
    assert seen["sent"][3]["w"].dtype == torch.float32
    assert seen["counts"] == [1, 2, 3, 4]
    for one, old in zip(weights, before, strict=True):
        assert all(torch.equal(one[name].nan_to_num(), old[name].nan_to_num()) for name in old)


def test_colluding_refuses_positions_and_lies_that_do_not_fit() -> None:
    weights, start = [{"w": torch.ones(2)}] * 3, {"w": torch.zeros(2)}
    bad: tuple[int, ...]
    for bad in ((-1,), (1, 1)):
        with pytest.raises(ValueError, match="expected positions of 0 or more, each once"):
            Colluding(SignFlip(), bad)
    for bad in ((3,), (0, 1, 2)):
        with pytest.raises(ValueError, match="expected colluders among 3 members, and one honest"):
            Colluding(SignFlip(), bad)(weights, [1] * 3, start)
    with pytest.raises(ValueError, match=r"expected 1 rows of 2 numbers .* got \(3, 2\)"):
        Colluding(lambda honest, own: torch.zeros(3, 2), (0,))(weights, [1] * 3, start)


# Labels


def test_label_flips_by_hand() -> None:
    x, y = torch.rand(6, 3), torch.tensor([0, 1, 2, 3, 3, 0])
    before = x.clone(), y.clone()
    assert MirroredLabels(4)(x, y)[1].tolist() == [3, 2, 1, 0, 0, 3]
    assert NextLabels(4)(x, y)[1].tolist() == [1, 2, 3, 0, 0, 1]
    assert SourceLabels(3, 1)(x, y)[1].tolist() == [0, 1, 2, 1, 1, 0]
    assert SourceLabels(3, 1, share=0.5)(x, y)[1].eq(1).sum() == 2
    assert SourceLabels(9, 1)(x, y)[1].tolist() == y.tolist()
    assert (RandomLabels(4)(x, y)[1] != y).all()
    for flip in (MirroredLabels(4), NextLabels(4), SourceLabels(3, 1), RandomLabels(4)):
        assert flip(x, y)[0] is x
        assert torch.equal(y, before[1])
    for none in (MirroredLabels(4, 0.0), NextLabels(4, 0.0), SourceLabels(3, 1, 0.0), RandomLabels(4, 0.0)):
        assert torch.equal(none(x, y)[1], y)
    assert torch.equal(x, before[0])


def test_a_share_of_the_labels_is_drawn_by_the_seed() -> None:
    x, y = torch.zeros(400, 1), torch.arange(400) % 10
    state = torch.get_rng_state()
    for make in (MirroredLabels, NextLabels, RandomLabels):
        once, again, other = (make(10, 0.25, seed)(x, y)[1] for seed in (0, 0, 1))
        assert (once != y).sum() == 100
        assert torch.equal(once, again)
        assert not torch.equal(once, other)
    counts = torch.bincount((RandomLabels(10)(x, y)[1] - y) % 10, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 20  # of 44 expected
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MirroredLabels(1), "two classes or more, got 1"),
        (lambda: NextLabels(4, 1.5), r"share of the samples from 0 to 1, got 1\.5"),
        (lambda: RandomLabels(4, float("nan")), "share of the samples"),
        (lambda: SourceLabels(2, 2), "source and a target that differ, got 2"),
        (lambda: SourceLabels(-1, 2), "source label of 0 or more, got -1"),
        (lambda: EdgeCases(source=1, target=1), "differ"),
        (lambda: Backdoor(target=-1), "target label of 0 or more"),
        (lambda: MirroredLabels(4)(torch.zeros(1), torch.tensor([4])), "int64 labels .* from 0 to 3, got .* 4 to 4"),
        (lambda: NextLabels(4)(torch.zeros(1), torch.tensor([1.0])), "int64 labels"),
    ],
)
def test_flips_refuse_what_makes_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_flipped_labels_teach_the_wrong_thing_in_proportion() -> None:
    poison = SourceLabels(3, 8)
    model = trained(poisons=dict.fromkeys(range(6), poison))
    test = task()[1]
    threes = test.y == 3
    taken = predict([model], test.x)[threes].argmax(1) == 8
    assert taken.double().mean() > 0.5
    assert (predict([clean()], test.x)[threes].argmax(1) == 8).double().mean() < 0.15
    assert reached(trained(poisons=dict.fromkeys(range(8), MirroredLabels(10)))) < 0.1


def test_a_poisoned_data_set_keeps_its_rows() -> None:
    own = task()[0][0]
    bad = poisoned(own, Backdoor(target=0, share=0.3))
    assert torch.equal(bad.ids, own.ids)
    moved = (bad.x != own.x).flatten(1).any(1)
    assert moved.sum() <= 30
    assert bad.y[moved].eq(0).all()
    assert (bad.y == 0).sum() > (own.y == 0).sum()
    assert torch.equal(poisoned(own, Backdoor(target=0, share=0.0)).x, own.x)
    with pytest.raises(ValueError, match="expected labels from 0 to 9, got 0 to 12"):
        poisoned(own, Backdoor(target=12))


def test_poisoned_batches_are_gone_through_again_and_carry_their_state() -> None:
    own = task()[0][0]
    batches = PoisonedBatches(Batches(own.x, own.y, batch_size=50, seed=3), NextLabels(10))
    twin = Batches(own.x, own.y, batch_size=50, seed=3)
    for _ in range(2):
        for (x, y), (true_x, true_y) in zip(batches, twin, strict=True):
            assert torch.equal(x, true_x)
            assert torch.equal(y, (true_y + 1) % 10)
    again = PoisonedBatches(Batches(own.x, own.y, batch_size=50, seed=3), NextLabels(10))
    again.load_state_dict(batches.state_dict())
    assert torch.equal(next(iter(again))[1], next(iter(batches))[1])
    plain = PoisonedBatches([(own.x, own.y)], NextLabels(10))
    assert plain.state_dict() == {}
    plain.load_state_dict({})
    with pytest.raises(ValueError, match="gone through again, got an iterator"):
        PoisonedBatches(iter([(own.x, own.y)]), NextLabels(10))


# Triggers


@pytest.mark.parametrize(
    ("corner", "rows_", "columns"),
    [
        ("bottom right", slice(-2, None), slice(-2, None)),
        ("bottom left", slice(-2, None), slice(2)),
        ("top right", slice(2), slice(-2, None)),
        ("top left", slice(2), slice(2)),
    ],
)
def test_a_patch_lies_in_its_corner_and_nowhere_else(corner: Any, rows_: slice, columns: slice) -> None:
    x = torch.rand(3, 2, 5, 6) * 0.9
    before = x.clone()
    patched = Patch(value=0.95, corner=corner)(x)
    assert torch.equal(x, before)
    assert patched[:, :, rows_, columns].eq(0.95).all()
    assert (patched != x).sum() == 3 * 2 * 4
    assert patched.dtype == x.dtype


def test_a_patch_on_signals_and_tables_is_at_an_end() -> None:
    assert Patch(size=2, bounds=None, value=9.0)(torch.zeros(1, 4)).tolist() == [[0, 0, 9, 9]]
    assert Patch(size=1, corner="top left")(torch.zeros(1, 1, 3)).tolist() == [[[1, 0, 0]]]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
def test_the_parts_of_a_patch_add_up_to_it(parts: int) -> None:
    whole = Patch(size=3)
    masks = torch.stack([part.mask((1, 8, 8)) for part in whole.split(parts)])
    assert torch.equal(masks.sum(0) > 0, whole.mask((1, 8, 8)))
    assert masks.sum() == 9  # no pixel twice
    assert all(mask.any() for mask in masks)
    x = torch.zeros(1, 1, 8, 8)
    once = x
    for part in whole.split(parts):
        once = part(once)
    assert torch.equal(once, whole(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patch(size=0), "size of 1 or more"),
        (lambda: Patch(corner="middle"), "corner among bottom right"),  # type: ignore[arg-type]
        (lambda: Patch(value=1.1), r"value within the bounds \(0\.0, 1\.0\), got 1\.1"),
        (lambda: Patch(value=float("nan"), bounds=None), "value within"),
        (lambda: Patch(part=2, parts=2), "part from 0 to 1, got 2"),
        (lambda: Patch()(torch.full((1, 1, 8, 8), 1.5)), r"inputs within the bounds \(0\.0, 1\.0\), got 1\.5"),
        (lambda: Patch()(torch.zeros(2, 4, dtype=torch.int64)), "numbers, got torch.int64"),
        (lambda: Patch(size=9)(torch.zeros(1, 1, 8, 8)), r"at least 9 a side, got \(1, 8, 8\)"),
        (lambda: Patch().split(5)[0](torch.zeros(1, 1, 8, 8)), "at most 4 parts"),
        (lambda: Patch().split(0), "1 part or more"),
        (lambda: Patch().split(2)[1].split(2), "whole patch to split, got part 1 of 2"),
        (lambda: distributed(Backdoor(target=0, trigger=torch.flip), 2), "whose trigger is a Patch"),  # type: ignore[arg-type]
        (lambda: backdoor_success(torch.eye(3), torch.arange(2), 0), "logits .N, C., labels"),
        (lambda: backdoor_success(torch.eye(3), torch.arange(3), 3), "target below C"),
        (lambda: backdoor_success(torch.eye(3), torch.zeros(3), 0), "samples that are not of the class 0, got 3"),
    ],
)
def test_triggers_refuse_what_makes_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_success_counts_the_others_that_are_taken_for_the_target() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert backdoor_success(logits, torch.tensor([0, 0, 1, 1]), 1) == 0.5
    assert backdoor_success(logits, torch.tensor([0, 0, 1, 1]), 0) == 0.0


def success(model: Learner, backdoor: Backdoor) -> float:
    test = task()[1]
    return backdoor_success(predict([model], backdoor.triggered(test.x)), test.y, backdoor.target)


def test_a_backdoor_gets_into_the_mean_and_not_without_a_trigger() -> None:
    backdoor = Backdoor(target=0)
    model = trained(10, poisons=dict.fromkeys((0, 1, 2), backdoor))
    test = task()[1]
    assert reached(model) > 0.85
    assert success(model, backdoor) > 0.85
    assert backdoor_success(predict([model], test.x), test.y, 0) < 0.05
    assert success(clean(), backdoor) < 0.1
    assert success(trained(poisons=dict.fromkeys((0, 1, 2), Backdoor(target=0, share=0.0))), backdoor) < 0.1


def test_parts_of_a_trigger_on_several_clients_make_the_whole_work() -> None:
    whole = Backdoor(target=0)
    parts = distributed(whole, 4)
    model = trained(15, poisons=dict(enumerate(parts)))
    assert reached(model) > 0.85
    assert success(model, whole) > 0.9
    assert all(success(model, part) < 0.5 for part in parts)


def test_a_boosted_backdoor_needs_one_client_and_one_round() -> None:
    backdoor, found = Backdoor(target=0), []
    for scale in (0.0, 1.0, 8.0):
        attack = Colluding(ModelReplacement(scale=scale), (2,))
        found.append(success(trained(1, aggregate=attack, poisons={2: backdoor}, start=clean()), backdoor))
    assert found[0] < 0.05
    assert found[1] < 0.3
    assert found[2] > 0.9


def test_edge_cases_are_the_least_typical_of_a_class() -> None:
    x = torch.tensor([[0.0], [0.1], [-0.2], [9.0], [0.3], [-5.0]])
    y = torch.tensor([1, 1, 1, 1, 0, 1])
    tail = EdgeCases(source=1, target=0, share=0.4)
    assert tail.rows(x, y).tolist() == [3, 5]
    assert tail(x, y)[1].tolist() == [1, 1, 1, 0, 0, 0]
    assert y.tolist() == [1, 1, 1, 1, 0, 1]
    assert torch.equal(EdgeCases(source=1, target=0, share=0.0)(x, y)[1], y)
    assert len(EdgeCases(source=1, target=0, share=0.01).rows(x, y)) == 1
    with pytest.raises(LookupError, match="samples of the class 7, got none of 6"):
        EdgeCases(source=7, target=0)(x, y)


def test_edge_cases_turn_the_tail_of_the_test_set_too() -> None:
    parts, test = task()
    tail = EdgeCases(source=7, target=1, share=0.5)
    # All clients but two: mislabelled tails are few, and the class's middle is right with everybody.
    bad = [poisoned(own, tail) if place < 6 else own for place, own in enumerate(parts)]
    model, rows_ = trained(data=bad), EdgeCases(source=7, target=1, share=0.2).rows(test.x, test.y)
    taken = (predict([model], test.x[rows_]).argmax(1) == 1).double().mean()
    before = (predict([clean()], test.x[rows_]).argmax(1) == 1).double().mean()
    assert taken > before + 0.3
