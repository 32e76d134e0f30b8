"""Poisoning experiments end to end at toy size: every attack on every protocol, every defense, records and pictures."""

import copy
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from attacks.poisoning import VILLAIN, Backdoor, EdgeCases, MirroredLabels, SmashedNoise
from defenses.aggregation import FoolsGold
from defenses.poisoning import Suspects
from experiments import poisoning
from experiments.bad_members import FEDERATIONS, Federated, Sabotage, Safeguard, _Steady, bad_members, federate
from experiments.catalogue import POISON_ATTACKS, POISON_DEFENSES
from experiments.experiment import Options
from experiments.poison_ingredients import POISONED, Afresh, Filters, Tails
from experiments.poison_plot import poison_table
from experiments.poisoning import _scored
from experiments.report import build
from experiments.rooted import rooted
from experiments.runner import Outcome, run
from experiments.store import Store
from experiments.summary import summarise
from experiments.training import Training, load_splits
from experiments.vertical_poison import train_vertically
from splitlearn.federation import Member
from splitlearn.guard import Guard
from splitlearn.party import Learner
from splitlearn.train import Batches

ONCE = Options(seeds=(0,))
TOY = poisoning.Config(
    protocols=("splitfed_v2",), defenses=("none",), attacks=("sign_flip",), clients=10, bad=(1,), private=160, rounds=1,
    alphas=(100.0,),
)  # fmt: skip
SPLITS = load_splits("digits", None, sizes=(400, 100, 397))


def outcome_of(config: poisoning.Config) -> Outcome:
    (task,) = poisoning.tasks(config, ONCE, name="poisoning")
    assert shlex.split(task.command)[:3] == ["splitlearn", "run", "poisoning"]
    assert "0x" not in str(task.config)
    return task.call()


def trained(protocol: str, *, rounds: int, **also: Sabotage | Safeguard) -> Federated:
    rates = {"splitfed_v2": 0.02}
    training = Training(
        protocol=protocol, cut="relu2", epochs=rounds, batch_size=16, optimizer="sgd", lr=rates.get(protocol, 0.05),
        clients=5, seed=0,
    )  # fmt: skip
    parts = {"sabotage": Sabotage(), "safeguard": Safeguard()} | also
    done = federate(training, SPLITS, alpha=100.0, bad=1, **parts)  # type: ignore[arg-type]
    assert len(done.accuracy) == rounds
    return done


@pytest.mark.parametrize("protocol", POISONED)
def test_every_federation_runs_every_attack_that_has_a_surface_there(protocol: str) -> None:
    fits = tuple(name for name, one in POISON_ATTACKS.items() if protocol in one.protocols)
    outcome = outcome_of(replace(TOY, protocols=(protocol,), attacks=fits))
    assert [leak.attack for leak in outcome.leakage] == list(fits)
    for leak in outcome.leakage:
        assert leak.family == POISON_ATTACKS[leak.attack].goal
        assert ("success" in leak.metrics) is (leak.family == "backdoor")
        assert f"surface: {POISON_ATTACKS[leak.attack].surface}" in outcome.visible[f"attacker ({leak.attack})"]
        assert 0 <= leak.advantage <= 1
        assert len(outcome.traces[f"accuracy ({leak.attack})"]) == 1 or leak.details["stopped"]


@pytest.mark.parametrize(
    ("name", "protocol"), [(name, protocol) for name, one in POISON_DEFENSES.items() for protocol in one.protocols]
)
def test_every_defense_takes_part_in_unequal_rounds_of_every_protocol(name: str, protocol: str) -> None:
    rounds = POISON_DEFENSES[name].least_rounds
    attack = "villain" if protocol == "vertical" else "label_flip"
    config = replace(TOY, defenses=(name,), protocols=(protocol,), attacks=(attack,), alphas=(1.0,), rounds=rounds)
    outcome = outcome_of(config)
    assert len(outcome.traces["accuracy (no attack)"]) == rounds
    assert not [note for note in outcome.notes if "stopped" in note]
    assert (outcome.epsilon is not None) is (name == "private_mean")


@pytest.mark.slow
def test_a_reversed_update_stops_the_mean_and_not_the_trimmed_mean() -> None:
    config = replace(TOY, protocols=("fedavg",), private=800, rounds=14, defenses=("none",), bad=(2,))
    (mean,) = outcome_of(config).leakage
    (trimmed,) = outcome_of(replace(config, defenses=("trimmed_mean",))).leakage
    assert mean.baselines["accuracy_unattacked"] > 0.6
    assert mean.metrics["accuracy"] < 0.3
    assert mean.advantage > 0.5
    assert trimmed.metrics["accuracy"] > mean.metrics["accuracy"] + 0.3


def test_multi_krum_shuts_colluders_out_and_the_record_says_so() -> None:
    config = replace(TOY, protocols=("fedavg",), private=400, rounds=3, defenses=("multi_krum",), bad=(2,))
    (leak,) = outcome_of(config).leakage
    assert leak.metrics["out_of_bad"] == 1.0
    assert leak.metrics["out_of_honest"] == 0.0
    assert leak.details["bad"] == bad_members(10, 2, 0)


@pytest.mark.slow
def test_a_patch_gets_into_the_shared_top_whatever_the_bottoms_are_aggregated_by() -> None:
    config = replace(
        TOY, attacks=("badnets",), defenses=("trimmed_mean",), clients=20, bad=(4,), private=0, rounds=30,
        alphas=(1.0,), cuts=("relu1",),
    )  # fmt: skip
    (leak,) = outcome_of(config).leakage
    assert leak.metrics["accuracy"] > 0.9
    assert leak.metrics["success"] > 0.9
    assert leak.baselines["success_unattacked"] < 0.1


@pytest.mark.parametrize("protocol", ["splitfed_v1", "splitfed_v2", "fedavg"])
def test_without_bad_deeds_an_attack_is_none(protocol: str) -> None:
    nothing = Sabotage(data=lambda number: MirroredLabels(10, share=0.0), guard=lambda number: SmashedNoise(0.0))
    lied = Sabotage(data=lambda number: MirroredLabels(10))
    x = SPLITS.test.x
    clean, same, other = (trained(protocol, rounds=2, sabotage=one).logits(x) for one in (Sabotage(), nothing, lied))
    assert torch.equal(clean, same)
    assert not torch.equal(clean, other)


def test_a_model_that_answers_one_class_is_no_success_of_a_backdoor() -> None:
    class Constant:
        def __init__(self, logits: list[float]):
            self.logits = torch.tensor(logits)

        def predict(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(x), -1)

    sabotage = Sabotage(trigger=lambda x: x)
    y = torch.arange(10) % 4
    clean, collapsed, broken = (
        Federated(None, Constant(logits), [0], 2) for logits in ([0.0, 1, 0, 0], [1.0, 0, 0, 0], [float("nan")] * 4)
    )
    leak = _scored("badnets", sabotage, collapsed, clean, torch.rand(10, 3), y)
    assert leak.metrics["success"] == leak.baselines["success_untriggered"] == 1.0
    assert leak.advantage == 0.0
    leak = _scored("badnets", sabotage, broken, clean, torch.rand(10, 3), y)
    assert leak.metrics == {"accuracy": 0.0, "success": 0.0}


def test_vertical_training_learns_and_a_villain_that_adds_nothing_leaves_it_as_it_is() -> None:
    training = Training(protocol="vertical", epochs=12, batch_size=16, optimizer="sgd", lr=0.05, clients=2, seed=0)

    def done(**settings: float) -> Federated:
        villain = {"villain": lambda known: VILLAIN(known=known, **settings)} if settings else {}
        return train_vertically(training, SPLITS, sabotage=Sabotage(**villain), safeguard=Safeguard())  # type: ignore[arg-type]

    honest, idle, real = done(), done(swaps=0, beta=0.0), done(beta=3.0, ratio=1.0, share=1.0)
    x = SPLITS.test.x
    assert honest.accuracy[-1] > 0.8
    assert torch.equal(honest.logits(x), idle.logits(x))
    assert not torch.equal(honest.logits(x), real.logits(x))
    assert real.trigger is not None
    assert idle.trigger is not None
    z = torch.zeros(2, 64)
    assert not idle.trigger(z).any()
    assert real.trigger(z)[:, :32].any()
    assert not real.trigger(z)[:, 32:].any()


def test_edge_cases_are_scored_on_the_tail_of_their_class() -> None:
    class First:
        def predict(self, x: torch.Tensor) -> torch.Tensor:  # class 0 where the input is large
            return torch.stack([x[:, 0], torch.full_like(x[:, 0], 5.0)], 1)

    cases = EdgeCases(source=1, target=0, share=0.25)
    x, y = torch.tensor([[0.0], [1.0], [1.0], [1.0], [9.0]]), torch.tensor([0, 1, 1, 1, 1])
    model = Federated(None, First(), [0], 2)
    leak = _scored("edge_cases", Sabotage(tail=cases), model, model, x, y)
    assert leak.metrics["success"] == 1.0  # the one of four that is furthest from the mean
    assert leak.baselines["success_untriggered"] == 0.25


def test_who_has_none_of_the_class_trains_as_it_should() -> None:
    tails, x = Tails(EdgeCases(source=1, target=0, share=0.5)), torch.tensor([[0.0], [4.0]])
    assert tails(x, torch.tensor([2, 2]))[1].tolist() == [2, 2]
    assert tails(x, torch.tensor([1, 2]))[1].tolist() == [0, 2]


def test_the_servers_own_update_is_one_pass_from_the_start_and_moves_nothing_else() -> None:
    torch.manual_seed(0)
    below, above = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8)), torch.nn.Linear(8, 10)
    parts = [Learner("bottom", below), Learner("server", above)]
    root = SPLITS.auxiliary
    training = Training(batch_size=100, optimizer="sgd", lr=0.1, seed=0)
    bottoms, tops = rooted(parts, training, root)
    before = [copy.deepcopy(part.weights()) for part in parts]
    for aggregate, place in ((bottoms, 0), (tops, 1)):
        stages = copy.deepcopy([below, above])
        start = {name: tensor + 0.1 for name, tensor in before[place].items()}
        stages[place].load_state_dict(start)
        loss = torch.nn.functional.cross_entropy(stages[1](stages[0](root.x)), root.y)
        gradients = torch.autograd.grad(loss, list(stages[place].parameters()))
        alone = {name: start[name] - 0.1 * g for name, g in zip(start, gradients, strict=True)}
        found = aggregate([alone, {name: 2 * start[name] - alone[name] for name in start}], [1, 1], start)
        assert all(torch.allclose(found[name], alone[name], atol=1e-6) for name in start)  # the other goes against it
    for part, was in zip(parts, before, strict=True):
        assert all(torch.equal(part.weights()[name], was[name]) for name in was)


def test_a_filter_says_how_right_it_is_by_sample_and_by_member() -> None:
    config = replace(
        TOY, attacks=("label_flip", "smashed_noise"), defenses=("graph",), private=400, rounds=13, bad=(2,)
    )
    flip, noise = outcome_of(config).leakage
    for leak in (flip, noise):
        assert {"flagged_poison", "flagged_honest", "out_of_bad", "out_of_honest"} <= set(leak.metrics)
        assert leak.baselines["out_unattacked"] == 0.0
    assert flip.metrics["flagged_poison"] > 0.8 > 0.2 > flip.metrics["flagged_honest"]
    assert (flip.metrics["out_of_bad"], flip.metrics["out_of_honest"]) == (1.0, 0.0)


@pytest.mark.parametrize("protocol", ["splitfed_v1", "splitfed_v2"])
def test_a_filter_that_flags_nobody_is_none_and_rates_are_of_the_samples_that_were_poisoned(protocol: str) -> None:
    def flagging(label: int) -> Filters:
        return Filters(lambda z, y: Suspects(torch.zeros(len(y)), y == label), rounds=1)

    patch = Sabotage(data=lambda number: Backdoor(target=0, share=0.5))
    plain, idle = (
        trained(protocol, rounds=2, sabotage=patch, safeguard=Safeguard(seats=s)) for s in (None, flagging(99))
    )
    assert torch.equal(plain.logits(SPLITS.test.x), idle.logits(SPLITS.test.x))
    assert idle.out == [[]]
    done = trained(protocol, rounds=2, sabotage=patch, safeguard=Safeguard(seats=flagging(0)))
    assert done.flagged is not None
    assert done.flagged.tpr == 1.0  # all that carry the patch are sent as 0
    honest = (SPLITS.private.y == 0).double().mean().item()
    assert done.flagged.fpr == pytest.approx(honest, abs=0.03)


def test_a_root_that_diverges_trusts_nobody_and_the_training_says_why_it_ended() -> None:
    training = Training(
        protocol="fedavg", cut="relu2", epochs=2, batch_size=16, optimizer="sgd", lr=1e12, clients=5, seed=0
    )
    done = federate(training, SPLITS, alpha=100.0, bad=1, sabotage=Sabotage(), safeguard=Safeguard(root=True))
    assert done.stopped.startswith("stopped in round 1")


def test_only_a_shared_top_is_trained_more_slowly_where_it_is_not_clipped() -> None:
    rates = {}
    for protocol, defense in product(("splitfed_v1", "splitfed_v2"), ("trimmed_mean", "trimmed_mean_clip")):
        (task,) = poisoning.tasks(replace(TOY, protocols=(protocol,), defenses=(defense,)), ONCE, name="poisoning")
        rates[protocol, defense] = task.config["training"]["lr"]
    assert list(rates.values()) == [0.05, 0.05, 0.02, 0.03]


@pytest.mark.slow
def test_neural_cleanse_finds_the_triggers_class_of_a_backdoored_model_alone() -> None:
    config = replace(
        TOY, attacks=("badnets",), defenses=("cleanse",), clients=20, bad=(4,), private=0, rounds=12, alphas=(1.0,),
        cuts=("relu1",),
    )  # fmt: skip
    (leak,) = outcome_of(config).leakage
    assert leak.metrics["success"] > 0.8
    assert (leak.metrics["flagged_target"], leak.metrics["flagged_others"]) == (1.0, 0.0)
    assert (leak.baselines["flagged_target_unattacked"], leak.baselines["flagged_others_unattacked"]) == (0.0, 0.0)


def test_a_bad_server_does_not_defend_itself() -> None:
    made: list[Learner] = []

    def bad(server: Learner, x: torch.Tensor, y: torch.Tensor) -> Learner:
        made.append(server)
        return server

    trained("splitfed_v2", rounds=1, sabotage=Sabotage(server=bad), safeguard=Safeguard(clip=1.0))
    assert isinstance(made[0].optimizer, torch.optim.SGD)


def test_who_knows_a_rule_that_remembers_does_not_move_it() -> None:
    rule, rows = FoolsGold(), torch.randn(5, 4, dtype=torch.float64)
    once, again = Afresh(rule)(rows), Afresh(rule)(rows)
    assert torch.equal(once, again)
    assert not rule.history


@pytest.mark.parametrize("protocol", FEDERATIONS)
def test_every_federation_learns(protocol: str) -> None:
    assert trained(protocol, rounds=16).accuracy[-1] > 0.6


def test_bad_members_are_drawn_by_the_seed() -> None:
    assert bad_members(20, 4, 0) == bad_members(20, 4, 0) != bad_members(20, 4, 1)
    assert len(set(bad_members(20, 4, 2))) == 4
    assert bad_members(20, 4, 2) == sorted(bad_members(20, 4, 2))


def test_a_member_whose_numbers_are_not_finite_stops_nobody_else() -> None:
    class Infinite(Guard):
        def activation(self, z: torch.Tensor) -> torch.Tensor:
            return z * torch.inf

    training = Training(
        protocol="splitfed_v2", cut="relu2", epochs=2, batch_size=16, optimizer="sgd", lr=0.02, clients=5, seed=0
    )
    sabotage = Sabotage(guard=lambda number: Infinite())
    done = federate(training, SPLITS, alpha=100.0, bad=1, sabotage=sabotage, safeguard=Safeguard())
    assert done.lost == 2
    assert len(done.accuracy) == 2
    assert not done.stopped
    apart = replace(training, protocol="splitfed_v3")
    done = federate(apart, SPLITS, alpha=100.0, bad=1, sabotage=sabotage, safeguard=Safeguard())
    assert (done.lost, len(done.accuracy), done.stopped) == (2, 2, "")


def test_who_is_put_back_has_its_momentum_of_before() -> None:
    stage = torch.nn.Linear(2, 2)
    learner = Learner("c", stage, torch.optim.SGD(stage.parameters(), 0.1, momentum=0.9))
    x, y = torch.randn(8, 2), torch.arange(8) % 2
    learner.learn(x, y)
    before = copy.deepcopy(learner.state_dict())
    batches = [(x, y), (torch.full((8, 2), torch.inf), y)]  # a step, and then the end
    member = _Steady(Member(learner, None, batches), Batches(x, y, batch_size=8))
    start = learner.weights()
    weights, count = member.round(start)
    assert (member.lost, count) == (1, 8)
    assert all(torch.equal(weights[name], start[name]) for name in start)
    found = learner.state_dict()
    assert all(torch.equal(found["stage"][name], before["stage"][name]) for name in start)
    for number, kept in before["optimizer"]["state"].items():
        assert torch.equal(found["optimizer"]["state"][number]["momentum_buffer"], kept["momentum_buffer"])


def test_where_nobody_is_finite_the_training_ends_and_says_so() -> None:
    training = Training(
        protocol="fedavg", cut="relu2", epochs=3, batch_size=16, optimizer="sgd", lr=1e12, clients=5, seed=0
    )
    done = federate(training, SPLITS, alpha=100.0, bad=1, sabotage=Sabotage(), safeguard=Safeguard())
    assert done.stopped.startswith("stopped in round")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bad": (10,)}, "--bad members from 1 to 9 of 10, got 10"),
        ({"attacks": ()}, "at least one attack"),
        ({"rounds": -1}, "--rounds of 0"),
        ({"auxiliary": 0}, "--auxiliary of 1"),
        ({"clients": 1}, "--clients of 2 or more"),
        ({"alphas": (0.0,)}, "alpha above 0"),
        ({"clients": 100}, "expected at most 1 rows a client"),
        ({"defenses": ("witnesses",), "clients": 8}, "at least 10 clients for witnesses"),
        ({"defenses": ("witnesses",), "rounds": 5}, "at least 13 rounds for witnesses"),
        ({"attacks": ("signflip",)}, "did you mean sign_flip"),
        ({"defenses": ("krumm",)}, "did you mean krum"),
        ({"protocols": ("vanilla",)}, "no protocol is named 'vanilla'"),
        ({"protocols": ("fedavg",), "attacks": ("misa",)}, "attacks and defenses have a surface"),
        ({"defenses": ("bulyan",), "bad": (4,)}, "at least 19 clients for bulyan against 4 bad ones"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(wrong: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, LookupError), match=said):
        poisoning.tasks(replace(TOY, **wrong), ONCE, name="poisoning")  # type: ignore[arg-type]


def test_a_trial_is_the_same_twice_and_its_identity_holds_the_settings() -> None:
    config = replace(TOY, attacks=("sign_flip", "smashed_noise"))
    torch.manual_seed(1)
    first = outcome_of(config)
    torch.manual_seed(2)
    assert outcome_of(config).traces == first.traces
    (task,) = poisoning.tasks(config, ONCE, name="poisoning")
    assert "scale=5.0" in str(task.config["attacks"])
    (other,) = poisoning.tasks(replace(config, defenses=("trimmed_mean",)), ONCE, name="poisoning")
    assert "TrimmedMean(f=1)" in str(other.config["defense"])
    (seated,) = poisoning.tasks(replace(config, defenses=("witnesses",), rounds=14), ONCE, name="poisoning")
    assert "tolerance=0.2, rounds=12" in str(seated.config["defense"])


def test_the_report_shows_the_worst_attack_and_each_seed(tmp_path: Path) -> None:
    config = replace(TOY, attacks=("sign_flip", "badnets"), defenses=("none", "multi_krum"))
    found = poisoning.tasks(config, Options(seeds=(0, 1)), name="poisoning")
    assert run(found, Store(tmp_path), jobs=1, progress=False).failed == 0
    page = build(tmp_path).read_text()
    for picture in ("poisoning.png", "backdoor.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    assert 'id="poisoning"' in page
    table = poison_table(summarise(Store(tmp_path).survey()[0]))
    assert table is not None
    assert len(table.rows) == 4
    assert all(len(row[5].split()) == 2 for row in table.rows)  # a figure a seed
