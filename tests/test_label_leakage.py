"""Every label attack and protection end to end at toy size; what is counted, and the picture by epoch."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import label_leakage
from experiments.catalogue import LABEL_ATTACKS, LABEL_PROTECTIONS
from experiments.experiment import Options
from experiments.label_plot import label_table
from experiments.parts import LabelAim, LabelAttack
from experiments.report import build
from experiments.runner import Outcome, run
from experiments.store import Store
from experiments.summary import summarise
from experiments.training import load_splits

ONCE = Options(seeds=(0,))
TOY = label_leakage.Config(
    seats=("client",), tasks=("rare",), protections=("none",), attacks=("cosine",), attacked=(1, 2), epochs=2,
    private=192, batch_size=64, lr=1e-3,
)  # fmt: skip
QUICK = {"exploit": {"epochs": 2}, "completion": {"steps": 3}, "head": {"steps": 3}}


def quick(name: str) -> LabelAttack:
    real = LABEL_ATTACKS[name]
    return replace(real, build=lambda aim: replace(real.build(aim), **QUICK.get(name, {})))


def outcome_of(config: label_leakage.Config) -> Outcome:
    (task,) = label_leakage.tasks(config, ONCE)
    assert shlex.split(task.command)[:3] == ["splitlearn", "run", "label_leakage"]
    assert "0x" not in str(task.config)
    return task.call()


@pytest.mark.parametrize("name", LABEL_ATTACKS)
@pytest.mark.parametrize("seat", ["client", "server"])
def test_every_attack_is_scored_at_each_epoch(name: str, seat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LABEL_ATTACKS, name, quick(name))
    outcome = outcome_of(replace(TOY, attacks=(name,), seats=(seat,)))
    if seat not in LABEL_ATTACKS[name].seats:
        assert outcome.leakage == []  # the server holds no inputs
        return
    (leak,) = outcome.leakage
    assert leak.family == "label"
    assert len(outcome.traces[name]) == len(outcome.traces[label_leakage.EPOCHS]) == 2
    assert leak.advantage == max(outcome.traces[name])
    assert {"accuracy", "leak_auc"} & set(leak.metrics)
    assert leak.baselines
    knows = outcome.visible[f"attacker ({name})"]
    remembers = LABEL_ATTACKS[name].remembers and seat == "client"
    once = "one release of each sample"
    assert set(LABEL_ATTACKS[name].threat(seat, 1).in_words()) - {once} <= set(knows)
    assert (once in knows) is not remembers
    assert ("how frequent each class is" in knows) is LABEL_ATTACKS[name].shares
    assert ("what crossed in all epochs before, and of which sample" in knows) is remembers


@pytest.mark.parametrize("name", LABEL_PROTECTIONS)
def test_every_protection_trains_and_says_its_strength(name: str) -> None:
    strength = LABEL_PROTECTIONS[name].strengths[0]
    outcome = outcome_of(replace(TOY, protections=(f"{name}:{strength}" if strength else name,)))
    assert 0 <= outcome.utility["accuracy"] <= 1
    assert any(note.startswith("strength: ") for note in outcome.notes) is bool(LABEL_PROTECTIONS[name].unit)
    assert LABEL_PROTECTIONS[name].broken_by in LABEL_ATTACKS


def test_gradients_tell_labels_and_noise_by_class_hides_them_from_the_norm_but_not_from_activations() -> None:
    config = replace(TOY, attacks=("norm", "cosine", "activations"), attacked=(1,), private=0, batch_size=128, lr=3e-4)
    bare = {leak.attack: leak.metrics["leak_auc"] for leak in outcome_of(replace(config, epochs=1)).leakage}
    hidden = {
        leak.attack: leak.metrics["leak_auc"]
        for leak in outcome_of(replace(config, epochs=1, protections=("marvell:4",))).leakage
    }
    assert min(bare.values()) > 0.95
    assert max(hidden["norm"], hidden["cosine"]) < 0.8
    assert hidden["activations"] > 0.95


def test_noise_that_is_drawn_anew_is_averaged_out_and_labels_answered_once_are_not() -> None:
    config = replace(TOY, attacks=("similarity", "averaged"), attacked=(1, 15), epochs=15, private=0, batch_size=128)
    config = replace(config, lr=3e-4)
    marvell = outcome_of(replace(config, protections=("marvell:4",)))
    assert max(marvell.traces["similarity"]) < 0.4
    assert marvell.traces["averaged"][0] < 0.4
    assert marvell.traces["averaged"][1] > 0.7
    assert "what crossed in all epochs before, and of which sample" in marvell.visible["attacker (averaged)"]
    assert max(leak.details["evidence"]["averaged"].get("releases", 0) for leak in marvell.leakage[1:]) == 15
    once = outcome_of(replace(config, protections=("label_dp:1",)))
    assert max(once.traces["averaged"]) < 0.6


def test_ten_classes_by_one_known_sample_each_and_those_are_not_counted() -> None:
    config = replace(TOY, tasks=("classes",), attacks=("similarity", "clustering"), attacked=(1,), private=400)
    leaks = {leak.attack: leak for leak in outcome_of(replace(config, batch_size=128)).leakage}
    assert leaks["similarity"].metrics["accuracy"] > 0.95
    assert leaks["clustering"].metrics["accuracy"] > 0.9
    counted = leaks["similarity"].metrics["accuracy"] * (400 - 10)
    assert counted == pytest.approx(round(counted), abs=1e-6)


def test_tasks_of_two_classes_come_from_ten() -> None:
    splits = load_splits("digits", None)
    for task, share in (("rare", 0.1), ("parity", 0.5)):
        y = label_leakage.relabelled(splits, task).private.y
        assert y.double().mean().item() == pytest.approx(share, abs=0.03)
    assert label_leakage.relabelled(splits, "classes") is splits
    with pytest.raises(ValueError, match="more than two classes"):
        label_leakage.relabelled(label_leakage.relabelled(splits, "rare"), "parity")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hints": 0}, "--hints of 1 or more"),
        ({"attacked": (9,)}, "--attacked epochs from 1 to 2"),
        ({"tasks": ("odd",)}, "no task is named 'odd'"),
        ({"seats": ("owner",)}, "no seat is named 'owner'"),
        ({"hints": 60}, "fewer hints a class than the"),
        ({"batch_size": 1}, "batches of 2 samples or more"),
        ({"protections": ("label_dcor",), "private": 130}, "batches of 4 samples or more"),
        ({"protections": ("max_norm:7",)}, "max_norm without a strength"),
        ({"protections": ("marvell:x",)}, "expected a strength, got 'x'"),
        ({"tasks": ("classes",), "protections": ("marvell",)}, "add --tasks rare"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(wrong: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, LookupError), match=said):
        label_leakage.tasks(replace(TOY, **wrong), ONCE)  # type: ignore[arg-type]


def test_attacks_get_the_hints_that_they_ask_for() -> None:
    assert LABEL_ATTACKS["norm"].threat("client", 3).hints == 0
    assert LABEL_ATTACKS["cosine"].threat("client", 3).hints == 3
    assert LABEL_ATTACKS["completion"].threat("client", 1).own_inputs
    assert LABEL_ATTACKS["similarity"].build(LabelAim(10, 1, 0)).classes == 10


def test_the_report_shows_leakage_by_epoch_beside_utility(tmp_path: Path) -> None:
    found = label_leakage.tasks(replace(TOY, protections=("none", "max_norm")), ONCE)
    assert run(found, Store(tmp_path), jobs=1, progress=False).failed == 0
    page = build(tmp_path).read_text()
    assert (tmp_path / "labels.png").stat().st_size > 10_000
    assert 'id="labels"' in page
    table = label_table(summarise(Store(tmp_path).survey()[0]))
    assert table is not None
    assert [row[1] for row in table.rows] == ["unprotected", "max_norm"]
    assert all(row[4].startswith("1: ") and ", 2: " in row[4] for row in table.rows)


def test_a_trials_identity_holds_the_settings_of_attack_and_protection(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TOY, protections=("mixup:1",), attacks=("completion",))
    (before,) = label_leakage.tasks(config, ONCE)
    assert "alpha=1.0" in str(before.config)
    monkeypatch.setitem(LABEL_ATTACKS, "completion", quick("completion"))
    (after,) = label_leakage.tasks(config, ONCE)
    assert after.trial != before.trial


def test_what_a_fresh_bottom_gets_is_no_leakage() -> None:
    (leak,) = outcome_of(replace(TOY, attacks=("completion",), epochs=1, attacked=(1,), private=0)).leakage
    assert leak.metrics["leak_auc"] > 0.9
    assert leak.baselines["leak_auc_fresh_bottom"] > 0.9
    assert leak.advantage < 0.5


def test_a_trial_is_the_same_twice() -> None:
    torch.manual_seed(1)
    first = outcome_of(replace(TOY, protections=("marvell:4",)))
    torch.manual_seed(2)
    assert outcome_of(replace(TOY, protections=("marvell:4",))).traces == first.traces
