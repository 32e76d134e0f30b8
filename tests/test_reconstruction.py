"""Every attack and every detector end to end at toy size, and what is said of an attack that was not trained enough."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from defenses.detectors import SplitGuard
from experiments import detection, reconstruction, tradeoff, updates
from experiments.catalogue import ATTACKS, DETECTORS, EXPERIMENTS, PROTECTIONS
from experiments.detection_plot import detection_table
from experiments.experiment import Options
from experiments.parts import Aim, Attack, Shield
from experiments.record import Leakage
from experiments.report import build
from experiments.runner import run
from experiments.scoring import aim_of
from experiments.store import Store
from experiments.summary import summarise
from experiments.tables import leakage_tables
from experiments.training import Training, load_splits
from experiments.updates import UPDATE_ATTACKS

ONCE = Options(seeds=(0,))
TOY = reconstruction.Attacks(
    cuts=("relu1",), epochs=1, targets=4, private=64, auxiliary=64, update_attacks=(), batch_size=16
)
# Settings by which each is quick: what is tested is the path, not the attack's strength.
QUICK: dict[str, dict[str, Any]] = {
    "rmle": {"iterations": 3}, "decoder": {"epochs": 1}, "shadow": {"epochs": 1, "shadows": 1},
    "unsplit": {"rounds": 1, "clones": 1}, "fora": {"steps": 3}, "pcat": {"epochs": 1}, "urvfl": {"pretraining": 2},
}  # fmt: skip
AFTER = [name for name, one in ATTACKS.items() if not one.steps]
INSIDE = [name for name, one in ATTACKS.items() if one.steps]


def quick(name: str) -> Attack:
    real = ATTACKS[name]

    def make(aim: Aim) -> Mapping[str, Any]:
        members = dict(list(real.build(aim).items())[:1])
        return {member: replace(one, **QUICK.get(name, {})) for member, one in members.items()}

    return replace(real, build=make, steps=4 if real.steps else 0)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_ends_in_a_score_and_says_what_it_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, name, quick(name))
    (task,) = reconstruction.attack_tasks(replace(TOY, attacks=(name,)), ONCE)
    outcome = task.call()
    (leak,) = outcome.leakage
    assert leak.attack == name
    assert leak.metrics["mse"] > 0
    assert "evidence" in leak.details
    assert outcome.visible[f"attacker ({name})"] == ATTACKS[name].in_words
    assert set(outcome.images) == {"original", name}
    assert any("lies" in line for line in ATTACKS[name].in_words) is ATTACKS[name].active
    assert shlex.split(task.command)[:3] == ["splitlearn", "run", "reconstruction_attacks"]


@pytest.mark.parametrize("name", ["sdar", "fsha"])
def test_an_attack_takes_part_in_the_u_shape_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, name, quick(name))
    (task,) = reconstruction.attack_tasks(replace(TOY, attacks=(name,), protocols=("u_shaped",)), ONCE)
    assert task.call().leakage[0].attack == name


def test_the_same_trial_has_the_same_hash_in_another_process() -> None:
    for task in reconstruction.attack_tasks(replace(TOY, attacks=tuple(ATTACKS)), ONCE):
        assert "0x" not in str(task.config)


def test_a_setting_that_decides_the_result_is_part_of_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    after = replace(TOY, attacks=("sdar",), update_attacks=("dlg", "bottom_gradient"))
    watched = detection.Config(detectors=("splitguard", "splitout"), servers=("honest", "fsha"), targets=4)

    def trials() -> list[str]:
        return [task.trial for task in (*reconstruction.attack_tasks(after, ONCE), *detection.tasks(watched, ONCE))]

    def changed(listing: dict[str, Any], name: str, **change: Any) -> list[int]:
        with monkeypatch.context() as patch:
            patch.setitem(listing, name, replace(listing[name], **change))
            return [place for place, (a, b) in enumerate(zip(before, trials(), strict=True)) if a != b]

    before = trials()  # sdar, fedavg, splitfed_v1; splitguard and splitout, each beside honest and fsha
    assert before == trials()
    fsha, dlg = ATTACKS["fsha"], UPDATE_ATTACKS["dlg"]
    assert changed(ATTACKS, "sdar", steps=1501) == [0]
    assert changed(ATTACKS, "sdar", threat=replace(ATTACKS["sdar"].threat, queries=True)) == [0]
    gentler = {"build": lambda aim: {"fsha": replace(fsha.build(aim)["fsha"], gradient_scale=0.5)}}
    assert changed(ATTACKS, "fsha", **gentler) == [4, 6]
    assert changed(ATTACKS, "fsha", steps=7) == [4, 6]
    longer = {"build": lambda model, aim: replace(dlg.build(model, aim), iterations=7)}
    assert changed(UPDATE_ATTACKS, "dlg", **longer) == [1]
    assert changed(UPDATE_ATTACKS, "dlg", net="cnn") == [1]
    assert changed(UPDATE_ATTACKS, "dlg", summary="in other words") == []
    assert changed(DETECTORS, "splitguard", kind=Sooner) == [3, 4]
    assert changed(DETECTORS, "splitout", given=replace(DETECTORS["splitout"].given, part=2)) == [5, 6]  # type: ignore[type-var]
    monkeypatch.setattr(updates, "HIDDEN", 33)
    assert [a == b for a, b in zip(before, trials(), strict=True)] == [True, False, *[True] * 5]


class Sooner(SplitGuard):
    def __init__(self, learner: Any, *, num_classes: int, start: int = 5, seed: int | None = None):
        super().__init__(learner, num_classes=num_classes, start=start, seed=seed)


def test_the_fed_server_is_given_the_deepest_cut_that_there_is() -> None:
    config = replace(TOY, attacks=(), update_attacks=("bottom_gradient",), update_targets=1, private=0, auxiliary=0)
    (task,) = reconstruction.attack_tasks(config, Options(data="breast_cancer", seeds=(0,)))
    (leak,) = task.call().leakage
    assert leak.attack == "bottom_gradient"


def test_nothing_to_do_is_said() -> None:
    with pytest.raises(ValueError, match="expected at least one attack, got none: nothing to do"):
        reconstruction.attack_tasks(replace(TOY, attacks=()), ONCE)


def test_the_record_says_how_long_the_victim_trained_under_an_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, "sdar", replace(quick("sdar"), steps=6))
    (task,) = reconstruction.attack_tasks(replace(TOY, attacks=("sdar",)), ONCE)
    note = "sdar: the victim trained 8 steps (2 epochs) under it; utility is that of 1 epoch"
    assert note in task.call().notes


def test_depths_are_the_first_three_blocks_and_updates_have_trials_of_their_own() -> None:
    config = reconstruction.Attacks(attacks=("decoder",), targets=4)
    found = [(task.labels["protocol"], task.labels["cut"]) for task in reconstruction.attack_tasks(config, ONCE)]
    assert found == [
        ("vanilla", "relu1"), ("vanilla", "relu2"), ("vanilla", "relu3"), ("fedavg", ""), ("splitfed_v1", "relu3"),
    ]  # fmt: skip


def test_nobody_takes_the_place_of_a_server_of_several_clients() -> None:
    for change in ({"clients": 2}, {"protocols": ("splitfed_v2",)}):
        with pytest.raises(ValueError, match="one client whose server fsha can replace, of vanilla, u_shaped"):
            tradeoff.tasks(replace(tradeoff.Config(targets=4, attacks=("fsha",)), **change), ONCE)  # type: ignore[arg-type]


def test_updates_give_labels_and_inputs_away() -> None:
    config = replace(TOY, attacks=(), update_attacks=("analytic", "dlg", "idlg", "update_labels"), update_targets=2)
    (task,) = reconstruction.attack_tasks(config, ONCE)
    outcome = task.call()
    reached = {leak.attack: leak.metrics.get("mse", leak.metrics.get("accuracy")) for leak in outcome.leakage}
    assert reached["analytic"] < 1e-20
    assert reached["dlg"] < 1e-10
    assert reached["idlg"] < 1e-10
    assert reached["update_labels"] == 1
    for wrong, says in (
        ({"update_attacks": ("dgl",)}, "no attack is named"),
        ({"update_targets": 0}, "update-targets"),
    ):
        with pytest.raises((LookupError, ValueError), match=says):
            reconstruction.attack_tasks(replace(config, **wrong), ONCE)  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_update_attack_is_better_than_who_saw_nothing() -> None:
    config = replace(TOY, attacks=(), update_attacks=tuple(UPDATE_ATTACKS), update_targets=2)
    leaks = [leak for task in reconstruction.attack_tasks(config, ONCE) for leak in task.call().leakage]
    assert sorted(leak.attack for leak in leaks) == sorted(UPDATE_ATTACKS)
    assert all(leak.advantage > 0.5 for leak in leaks)


def test_an_attack_worse_than_who_saw_nothing_is_called_undertrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, "unsplit", quick("unsplit"))
    (task,) = reconstruction.attack_tasks(replace(TOY, attacks=("unsplit",)), ONCE)
    outcome = task.call()
    assert outcome.leakage[0].details["undertrained"]
    assert outcome.leakage[0].advantage == 0
    assert any("unsplit is UNDERTRAINED" in note and "do not read it as a defense" in note for note in outcome.notes)


def test_who_knows_the_architecture_knows_the_protection() -> None:
    splits = load_splits("digits", None)
    aim = aim_of(splits, 0, cut_at="relu2", shield=PROTECTIONS["quantised"].build("1"))
    assert aim.stage is not None
    z = aim.stage()(splits.private.x[:1])
    assert len(z.unique()) <= 2
    plain = aim_of(splits, 0, cut_at="relu2").stage
    assert plain is not None
    assert len(plain()(splits.private.x[:1]).unique()) > 2
    packed = aim_of(splits, 0, cut_at="relu2", shield=PROTECTIONS["compression"].build("0.1")).stage()
    x = splits.private.x[:1].clone().requires_grad_()
    z = packed(x)
    assert 0 < int((z != 0).sum()) <= 0.1 * z.numel() + 1
    assert torch.autograd.grad(z.sum(), x)[0].any()


def test_a_shield_brings_layers_of_its_own() -> None:
    shield = PROTECTIONS["disco"].build("0.5")
    x = torch.rand(2, 1, 4, 4)
    bottom = torch.nn.Conv2d(1, 6, 3)
    assert Shield().shaped(bottom, x[:1]) is bottom
    sent = shield.shaped(bottom, x[:1])(x)
    assert ((sent.flatten(2).abs().sum(2) == 0).sum(1) == 3).all()


# Detection


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("server", ["honest", "fsha"])
def test_every_detector_watches_every_server(detector: str, server: str) -> None:
    config = detection.Config(
        detectors=(detector,), servers=(server,), epochs=2, private=320, auxiliary=64, targets=4, batch_size=16
    )
    (task,) = detection.tasks(config, ONCE)
    outcome = task.call()
    assert outcome.traces["scores"]
    assert len(outcome.traces["suspicion"]) == len(outcome.traces["scores"])
    assert [leak.attack for leak in outcome.leakage] == ([] if server == "honest" else ["fsha"])
    assert any(detector in note for note in outcome.notes)


def test_too_few_batches_are_no_silence(tmp_path: Path) -> None:
    config = detection.Config(
        detectors=("scrutinizer",), servers=("honest",), epochs=1, private=64, targets=4, batch_size=16
    )
    store = Store(tmp_path)
    run(detection.tasks(config, ONCE), store, jobs=1)
    (record,) = store.records()
    assert record.traces["ready"] == [0.0]
    assert any("could not speak: 4 scores are too few for Average(count=10), in 4 batches" in n for n in record.notes)
    table = detection_table(summarise([record]))
    assert table is not None
    assert table.rows[0][3:5] == ("0 of 0, 1 with too few batches", "too few batches")
    page = build(tmp_path).read_text()
    assert "A detector keeps nothing secret" in page
    assert not (tmp_path / "tradeoff.png").exists()


@pytest.mark.slow
def test_the_scrutinizer_tells_honest_from_hijacked_and_the_report_says_so(tmp_path: Path) -> None:
    config = detection.Config(detectors=("scrutinizer",), servers=("honest", "fsha"), epochs=3, targets=4)
    store = Store(tmp_path)
    run(detection.tasks(config, Options(seeds=(0, 1))), store, jobs=1)
    page = build(tmp_path).read_text()
    assert (tmp_path / "detection.png").exists()
    assert "Does the client notice?" in page
    table = detection_table(summarise(store.records()))
    assert table is not None
    rows = {row[2]: row for row in table.rows}
    assert rows["honest"][3] == "0 of 2"
    assert rows["fsha"][3] == "2 of 2"
    assert float(rows["fsha"][5]) > 0.95


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"detectors": ("splitgard",)}, "no detector is named 'splitgard'"),
        ({"servers": ("decoder",)}, "no server is named 'decoder'"),
        ({"detectors": ()}, "expected at least one of --detectors, got none: nothing to do"),
        ({"servers": ()}, "expected at least one of --servers, got none: nothing to do"),
        ({"private": 3, "targets": 3}, "expected --private of 4 or more for splitout, got 3"),
        ({"auxiliary": 15}, "expected --auxiliary of 16 or more for fsha, .*got 15"),
        ({"targets": 0}, "--targets between 1 and"),
        ({"cut": "relu9"}, "expected the name of a layer"),
    ],
)
def test_what_cannot_be_watched_is_told_of_before_anything_runs(change: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, LookupError), match=says):
        detection.tasks(replace(detection.Config(), **change), ONCE)


def test_the_leakage_table_tells_how_far_an_attack_came() -> None:
    def leak(**details: Any) -> Leakage:
        return Leakage(
            attack="a", family="reconstruction", advantage=0.0, metrics={"mse": 1.0}, baselines={}, details=details
        )

    assert leak(undertrained=True).standing == "UNDERTRAINED"
    assert leak(best="m", evidence={"m": {"converged": 1.0}}).standing == "converged"
    assert leak(best="m", evidence={"m": {"converged": 0.0}}).standing == "still improving"
    assert leak().standing == ""
    assert leakage_tables([]) == []


def test_the_three_experiments_are_in_the_catalogue() -> None:
    assert {"reconstruction_attacks", "defense_tournament", "detection"} <= set(EXPERIMENTS)
    assert Training().cut == "relu2"
