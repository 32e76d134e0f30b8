"""Every attack and every detector end to end at toy size, and what is said of an attack that was not trained enough."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import detection, reconstruction, tradeoff
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
