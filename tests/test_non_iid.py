"""Unlike members end to end at toy size: shares, every method, who equals whom, records and the picture."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from experiments.experiment import Options
from experiments.non_iid import Config, tasks
from experiments.report import build
from experiments.runner import Outcome, run
from experiments.skewed import Share, shares_of, skew_of
from experiments.store import Store
from experiments.training import Training, build_model, load_splits
from experiments.unlike import METHODS, Plan, accuracy, advance
from splitlearn.party import Learner

ONCE = Options(seeds=(0,))
TOY = Config(
    methods=("fedavg",), skews=("label:1",), clients=3, rounds=2, local_epochs=1, batch_size=16, private=90, lr=0.05,
    tune_epochs=1,
)  # fmt: skip
SPLITS = load_splits("digits", None)


def outcome_of(config: Config, seed: int = 0) -> Outcome:
    (task,) = tasks(config, Options(seeds=(seed,)))
    assert shlex.split(task.command)[:3] == ["splitlearn", "run", "non_iid"]
    return task.call()


def shares(spec: str, clients: int = 10, seed: int = 0) -> list[Share]:
    return shares_of(skew_of(spec), SPLITS.private, SPLITS.test, clients, seed)


def plan_of() -> Plan:
    training = Training(protocol="", epochs=2, batch_size=16, optimizer="sgd", lr=0.05, clients=3)
    return Plan(training, build_model(SPLITS, seed=0), shared="relu3")


def same(one: Learner, other: Learner) -> bool:
    return all(torch.equal(own, other.weights()[name]) for name, own in one.weights().items())


def mix(y: torch.Tensor) -> torch.Tensor:
    return torch.bincount(y, minlength=10).double() / len(y)


def unlikeness(found: list[Share]) -> float:
    """Return how far members' class shares are from those of all, on average: 0 is alike, near 1 apart."""
    whole = mix(torch.cat([share.y for share in found]))
    return sum(((mix(share.y) - whole).abs().sum() / 2).item() for share in found) / len(found)


@pytest.mark.parametrize("spec", ["iid", "label:100", "label:0.1", "quantity:0.5", "feature:0.5"])
def test_each_sample_is_with_one_member_and_shares_are_fixed_by_the_seed(spec: str) -> None:
    found, again, other = shares(spec), shares(spec), shares(spec, seed=1)
    assert sum(len(share.y) for share in found) == len(SPLITS.private)
    assert torch.equal(mix(torch.cat([share.y for share in found])), mix(SPLITS.private.y))
    for one, same in zip(found, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(same).values(), strict=True))
    assert not all(torch.equal(a.judged_y, b.judged_y) for a, b in zip(found, other, strict=True))


def test_a_small_alpha_makes_classes_unlike_and_a_large_one_does_not() -> None:
    small, large = unlikeness(shares("label:0.1")), unlikeness(shares("label:100"))
    assert large < 0.15 < 0.5 < small


def test_members_are_judged_on_their_own_mix_of_classes() -> None:
    for share in shares("label:0.1", clients=5):
        own, judged = mix(share.y), mix(share.judged_y)
        assert not bool(judged[own == 0].any())
        assert (own - judged).abs().sum().item() / 2 < 0.2  # 200 draws of a few classes


def test_only_the_noise_of_its_own_device_is_on_what_a_member_is_judged_on() -> None:
    plain, noisy = shares("iid"), shares("feature:0.5")
    spreads = [(b.judged_x - a.judged_x).var().item() for a, b in zip(plain, noisy, strict=True)]
    assert spreads == sorted(spreads)
    assert spreads[-1] == pytest.approx(0.5, rel=0.1)
    own = [(b.x - a.x).var().item() for a, b in zip(plain, noisy, strict=True)]
    assert own == pytest.approx(spreads, rel=0.2)


def test_amounts_are_skewed_by_a_quantity_skew_alone() -> None:
    alike, skewed = ([len(share.y) for share in shares(spec)] for spec in ("iid", "quantity:0.5"))
    assert max(alike) - min(alike) <= 1
    assert max(skewed) > 2 * (len(SPLITS.private) / 10)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_says_what_crossed_and_who_saw_it(method: str) -> None:
    outcome = outcome_of(replace(TOY, methods=(method,)))
    assert ("accuracy" in outcome.utility) is (method not in ("local", "fedper"))
    assert 0 <= outcome.utility["accuracy_personal"] <= 1
    personal = outcome.traces["accuracy of each member"]
    assert sum(personal) / 3 == pytest.approx(outcome.utility["accuracy_personal"])
    assert bool(outcome.nbytes) is (method != "local")
    assert outcome.visible
    assert any("classes a member" in note for note in outcome.notes)
    assert set(outcome.seconds) == {"train", "evaluate"}
    if method not in ("local", "fedper"):
        assert outcome.traces["accuracy after each round"][-1] == outcome.utility["accuracy"]
        assert len(outcome.traces["accuracy after each round"]) == TOY.rounds
    kinds = set(outcome.nbytes.get("up", {}))
    assert ("activation" in kinds) is (method in ("splitfed_v1", "splitfed_v1_prox", "unlike_cuts"))


def test_wherever_members_cut_plain_averages_are_those_of_fedavg() -> None:
    config = replace(TOY, cuts=("relu1", "relu2"), skews=("quantity:0.5",))
    whole, split, unlike = (outcome_of(replace(config, methods=(m,))) for m in ("fedavg", "splitfed_v1", "unlike_cuts"))
    assert whole.utility == split.utility == unlike.utility
    assert whole.traces == split.traces == unlike.traces
    assert whole.nbytes["down"]["weights"] > split.nbytes["down"]["weights"]


def test_without_pull_fedprox_is_fedavg() -> None:
    plain = outcome_of(TOY)
    assert outcome_of(replace(TOY, methods=("fedprox",), mu=0.0)).utility == plain.utility
    (task,) = tasks(TOY, ONCE)
    assert "mu" not in task.config  # of fedavg: another --mu is no other trial


def test_who_tunes_has_the_same_global_model_and_models_of_its_own() -> None:
    config = replace(TOY, rounds=8, lr=0.2, local_epochs=2)
    plain, tuned = outcome_of(config), outcome_of(replace(config, methods=("fedavg_tuned",), tune_epochs=10))
    assert tuned.utility["accuracy"] == plain.utility["accuracy"]
    assert tuned.utility["accuracy_personal"] > plain.utility["accuracy_personal"]
    assert tuned.nbytes == plain.nbytes


def test_heads_stay_at_home_and_do_not_cross() -> None:
    shared, all_of_it = outcome_of(replace(TOY, methods=("fedper",))), outcome_of(TOY)
    head = (64 * 10 + 10) * 4 * TOY.clients * TOY.rounds
    assert all_of_it.nbytes["up"]["weights"] - shared.nbytes["up"]["weights"] == head


def test_a_controls_bytes_are_those_of_the_weights() -> None:
    scaffold, plain = outcome_of(replace(TOY, methods=("scaffold",))), outcome_of(TOY)
    assert scaffold.nbytes["up"]["weights"] == 2 * plain.nbytes["up"]["weights"]


def test_who_is_away_is_left_out_and_costs_nothing() -> None:
    all_there, some = outcome_of(TOY), outcome_of(replace(TOY, absent=0.5, rounds=4))
    (said,) = (note for note in some.notes if note.startswith("members were away"))
    missed = int(said.split()[3])
    assert 0 < missed < 12
    a_round = all_there.nbytes["up"]["weights"] // (TOY.clients * TOY.rounds)
    assert some.nbytes["up"]["weights"] == a_round * (12 - missed)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_diverges_at_once_ends_with_the_model_that_it_began_with(method: str) -> None:
    outcome = outcome_of(replace(TOY, methods=(method,), lr=1e12))
    (said,) = (note for note in outcome.notes if note.startswith("stopped in round 1"))
    assert "finite" in said
    assert outcome.traces.get("accuracy after each round", []) == []
    splits = load_splits("digits", None, sizes=(TOY.private, 600, 397))
    model = [Learner("model", build_model(splits, seed=0))]
    begun = [
        accuracy(model, share.judged_x, share.judged_y)
        for share in shares_of(skew_of("label:1"), splits.private, splits.test, TOY.clients, 0)
    ]
    assert outcome.traces["accuracy of each member"] == begun
    if "accuracy" in outcome.utility:
        assert outcome.utility["accuracy"] == accuracy(model, splits.test.x, splits.test.y)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "local"])
def test_a_training_that_diverges_later_ends_with_the_last_good_model(method: str) -> None:
    config = replace(TOY, methods=(method,), skews=("iid",), lr=1e3)
    stopped, one = outcome_of(replace(config, rounds=4)), outcome_of(replace(config, rounds=1))
    assert any(note.startswith("stopped in round 2") for note in stopped.notes)
    assert not any(note.startswith("stopped in round") for note in one.notes)
    assert stopped.utility == one.utility
    assert stopped.traces == one.traces


def test_a_member_that_diverges_alone_stops_nobody_else() -> None:
    plan, found = plan_of(), shares("iid", clients=3)
    bad = [*found[:2], replace(found[2], x=found[2].x * torch.nan)]
    plain, done = (METHODS["local"].train(plan, own, lambda chain: 0.0) for own in (found, bad))
    assert [note[:18] for note in done.stopped] == ["stopped in round 1", "stopped while tune"]
    for place in range(2):
        assert same(done.own[place][0], plain.own[place][0])
    assert same(done.own[2][0], Learner("model", plan.model))


def test_heads_of_a_round_that_failed_are_not_kept_with_the_body_of_the_round_before() -> None:
    found = shares("iid", clients=3)
    bad = [*found[:2], replace(found[2], x=found[2].x * torch.nan)]  # after the others have trained their heads
    heads, whole = (METHODS[name].train(plan_of(), bad, lambda chain: 0.0) for name in ("fedper", "fedavg_tuned"))
    for own, other in zip(heads.own, whole.own, strict=True):  # all were tuned from what all began with
        assert same(own[0], other[0])


def test_a_step_that_leaves_no_finite_answers_is_taken_back_and_other_errors_are_raised() -> None:
    party, x = Learner("one", torch.nn.Linear(2, 3)), torch.ones(4, 2)
    before, seconds = party.weights(), {"train": 1.0}
    broken = {name: weights * torch.inf for name, weights in before.items()}
    said = advance(lambda: party.load_weights(broken), [[party]], [x], seconds)
    assert said.startswith("one: expected finite logits")
    assert all(torch.equal(now, before[name]) for name, now in party.weights().items())
    assert seconds["train"] > 1.0
    assert seconds["evaluate"] > 0.0
    with pytest.raises(ValueError, match="weights of its own stage"):
        advance(lambda: party.load_weights({}), [[party]], [x], seconds)


def test_a_model_without_numbers_answers_no_class() -> None:
    stage = torch.nn.Linear(2, 3)
    torch.nn.init.constant_(stage.weight, torch.nan)
    assert accuracy([Learner("one", stage)], torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)) == 0.0


@pytest.mark.parametrize("judged_on", ["test", "auxiliary"])
def test_shares_are_checked_on_what_models_are_judged_on(
    judged_on: Literal["test", "auxiliary"], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TOY, judged_on=judged_on)
    (task,) = tasks(config, ONCE)
    (said,) = (note for note in task.call().notes if note.startswith("accuracy_personal"))
    assert f"on {judged_on} samples" in said
    poor = getattr(SPLITS, judged_on).subset(torch.empty(0, dtype=torch.int64))
    monkeypatch.setattr("experiments.non_iid.load_splits", lambda *args, **_: replace(SPLITS, **{judged_on: poor}))
    with pytest.raises(ValueError, match="samples to judge client 0 on"):
        tasks(config, ONCE)


def test_a_trial_is_the_same_twice_whatever_torch_drew_before() -> None:
    config = replace(TOY, methods=("scaffold",), absent=0.3)
    torch.manual_seed(1)
    first = outcome_of(config)
    torch.manual_seed(2)
    again = outcome_of(config)
    assert (again.utility, again.traces, again.nbytes) == (first.utility, first.traces, first.nbytes)
    assert outcome_of(config, seed=1).traces != first.traces


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"methods": ("fedporx",)}, "did you mean fedprox"),
        ({"methods": ()}, "at least one of --methods"),
        ({"skews": ("labels:1",)}, "expected --skews such as"),
        ({"skews": ("label",)}, "a level above 0, got 'label'"),
        ({"skews": ("label:0",)}, "a level above 0"),
        ({"skews": ("iid:1",)}, "expected --skews such as iid"),
        ({"skews": ("label:x",)}, "got 'label:x'"),
        ({"clients": 1}, "--clients of 2 or more"),
        ({"clients": 60}, "got 90 for all of them; raise --private, or lower --clients"),
        ({"private": 5}, "2 samples or more for each of 3 clients, got 5 for all of them; raise --private"),
        ({"private": 6, "skews": ("label:0.01",)}, "got label:0.01, which leaves .* raise its level or --private"),
        ({"rounds": 0}, "--rounds of 1 or more"),
        ({"local_epochs": 0}, "--local-epochs of 1"),
        ({"tune_epochs": 0}, "--tune-epochs of 1"),
        ({"absent": 1.0}, "--absent from 0 to below 1"),
        ({"mu": -1.0}, "--mu of 0 or more"),
        ({"lr": -1.0}, "--lr of 0"),
        ({"cut": "relu9"}, "got 'relu9'"),
        ({"cuts": ("relu9",)}, "got 'relu9'"),
        ({"shared": "fc2"}, "--shared among"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(wrong: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, LookupError), match=said):
        tasks(replace(TOY, **wrong), ONCE)  # type: ignore[arg-type]


def test_the_report_shows_each_method_under_each_skew(tmp_path: Path) -> None:
    config = replace(TOY, methods=("local", "fedavg"), skews=("iid", "label:0.1"), rounds=1)
    assert run(tasks(config, Options(seeds=(0, 1))), Store(tmp_path), jobs=1, progress=False).failed == 0
    page = build(tmp_path).read_text()
    assert (tmp_path / "non_iid.png").stat().st_size > 10_000
    assert 'id="non_iid"' in page
    assert "accuracy personal" in page
    records, _ = Store(tmp_path).survey()
    assert {(record.protocol, record.strength) for record in records} == {
        (method, skew) for method in ("local", "fedavg") for skew in ("iid", "label:0.1")
    }
