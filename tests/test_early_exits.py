"""Early exits end to end at toy size: what leaves, what it costs, what still leaks, records, table and picture."""

import math
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from experiments.early_exits import RULES, SWEEP, Config, crossing_leakage, tasks
from experiments.early_exits_plot import early_exits, exits_table
from experiments.experiment import Options
from experiments.runner import Outcome, run
from experiments.store import Store
from experiments.summary import summarise

ONCE = Options(seeds=(0,))
TOY = Config(
    cuts=("relu1",), rules=("confidence",), max_loss=0.05, epochs=7, exit_epochs=8, side=3, private=240,
    auxiliary=300, lr=3e-3, attacks=(), targets=4,
)  # fmt: skip


@cache  # a trial is the same twice: see below
def outcome_of(config: Config, seed: int = 0) -> Outcome:
    (task,) = tasks(config, Options(seeds=(seed,)))
    assert shlex.split(task.command)[:3] == ["splitlearn", "run", "early_exits"]
    return task.call()


@pytest.mark.parametrize("rule", RULES)
def test_a_cascade_is_worth_what_its_parts_are(rule: str) -> None:
    found = outcome_of(replace(TOY, rules=(rule,))).utility
    assert found["accuracy_lost"] == pytest.approx(found["accuracy_split"] - found["accuracy"])
    assert 0 < found["share_left"] < 1
    bottom, head, top = 2 * 8 * 8 * 16 * 9, 2 * 16 * 3 * 3 * 10, 2 * (64 * 32 * 144 + 16 * 64 * 288 + 1024 * 64 + 640)
    assert found["edge_flops"] == bottom + head
    assert found["cloud_flops"] == pytest.approx(top * (1 - found["share_left"]))
    assert found["edge_flops_share"] == pytest.approx((bottom + head) / (bottom + top))
    assert found["flops_share"] == pytest.approx((found["edge_flops"] + found["cloud_flops"]) / (bottom + top))
    payload = (1 - found["share_left"]) * (16 * 8 * 8 + 10) * 4
    assert payload < found["sample_bytes"] < payload + 40
    assert found["sample_bytes"] < found["sample_bytes_of_split"]


def test_plain_split_is_the_reference_of_the_same_training() -> None:
    split, cascade = outcome_of(replace(TOY, rules=("none",))), outcome_of(TOY)
    assert split.utility["accuracy"] == cascade.utility["accuracy_split"]
    assert split.utility["sample_bytes"] == cascade.utility["sample_bytes_of_split"]
    assert (
        split.utility["sample_bytes_of_input"] < split.utility["sample_bytes"]
    )  # an image is less than its activation
    assert (split.utility["share_left"], split.utility["flops_share"]) == (0.0, 1.0)
    assert split.nbytes == cascade.nbytes  # of the training
    assert not split.traces


def test_the_sweep_runs_from_split_to_the_edge_alone_and_meets_what_was_measured() -> None:
    outcome = outcome_of(TOY)
    curve, found = outcome.traces[SWEEP], outcome.utility
    assert len(curve) == 101
    assert curve[0] == pytest.approx(found["accuracy_split"])
    assert curve[-1] == pytest.approx(found["accuracy_edge"])
    percent = 100 * found["share_left"]
    near = curve[math.floor(percent)], curve[math.ceil(percent)]
    assert min(near) - 0.015 <= found["accuracy"] <= max(near) + 0.015  # at most 4 of 397 samples between two places


def test_a_bound_lets_fewer_leave_and_none_where_none_can_be_told() -> None:
    bold, careful = outcome_of(replace(TOY, delta=0.0)), outcome_of(TOY)
    assert careful.utility["share_left"] <= bold.utility["share_left"]
    none = outcome_of(replace(TOY, max_loss=0.001))
    assert none.utility["share_left"] == 0
    assert none.utility["accuracy"] == none.utility["accuracy_split"]
    assert any("no sample leaves" in note for note in none.notes)
    everything = outcome_of(replace(TOY, max_loss=1.0, attacks=("rmle",)))
    assert everything.utility["accuracy"] == everything.utility["accuracy_edge"]
    assert everything.utility["sample_bytes"] == 0
    assert any("nothing crosses" in note for note in everything.notes)
    assert [leak.attack for leak in everything.leakage] == ["crossing"]
    assert everything.leakage[0].advantage == 0


def test_attacks_read_the_test_samples_that_cross() -> None:
    outcome = outcome_of(replace(TOY, attacks=("rmle",)))
    assert {leak.attack: leak.family for leak in outcome.leakage} == {"crossing": "label", "rmle": "reconstruction"}
    assert outcome.images["original"].shape == (4, 1, 8, 8)
    (said,) = (note for note in outcome.notes if note.startswith("attacked: 4 of the"))
    crossed = int(said.split()[4])
    assert crossed == round(397 * (1 - outcome.utility["share_left"]))


def test_what_crossing_tells_by_hand() -> None:
    y = torch.tensor([0, 0, 1, 1])
    told = crossing_leakage(y == 1, y, y == 1, y, 2)  # class 1 crosses, class 0 does not
    assert told.advantage == 1
    assert told.metrics == pytest.approx({"accuracy": 1.0, "mutual_information": math.log(2)})
    assert told.baselines == {"accuracy_majority": 0.5, "mutual_information_independent": 1 / 8}
    nothing = crossing_leakage(torch.tensor([True, False] * 2), y, torch.tensor([True, False] * 2), y, 2)
    assert nothing.advantage == 0
    assert nothing.metrics == pytest.approx({"accuracy": 0.5, "mutual_information": 0.0})
    lopsided = torch.tensor([0, 1, 1, 1])
    unseen = crossing_leakage(torch.zeros(4, dtype=torch.bool), lopsided, torch.ones(4, dtype=torch.bool), y, 2)
    assert unseen.metrics["accuracy"] == 0.5  # none crossed when it was learned: the most frequent of all is guessed


def test_a_trial_is_the_same_twice_whatever_torch_drew_before() -> None:
    torch.manual_seed(1)
    first = outcome_of(TOY)
    torch.manual_seed(2)
    again = outcome_of.__wrapped__(TOY)
    assert (again.utility, again.traces) == (first.utility, first.traces)
    assert outcome_of(TOY, seed=1).traces != first.traces


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rules": ("confidense",)}, "did you mean confidence"),
        ({"rules": ()}, "at least one of --rules"),
        ({"cuts": ()}, "at least one of --cuts"),
        ({"cuts": ("relu9",)}, "got 'relu9'"),
        ({"max_loss": 1.5}, "--max-loss in"),
        ({"delta": 1.0}, "--delta from 0 to below 1"),
        ({"side": 0}, "--side of 1"),
        ({"at_once": 0}, "--at-once of 1"),
        ({"exit_epochs": 0}, "--exit-epochs of 1"),
        ({"targets": 0}, "--targets of 1"),
        ({"epochs": 0}, "--epochs of 1"),
        ({"attacks": ("decoda",)}, "did you mean"),
        ({"attacks": ("fsha",)}, "expected attacks on what image inputs send at inference, got fsha"),
        ({"attacks": ("decoder",), "auxiliary": 3}, "--auxiliary of 16 or more"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(wrong: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, LookupError), match=said):
        tasks(replace(TOY, **wrong), ONCE)  # type: ignore[arg-type]


def test_table_and_picture_show_each_rule_at_each_cut(tmp_path: Path) -> None:
    config = replace(TOY, cuts=("relu1", "relu2"), rules=("none", "confidence"), epochs=2, exit_epochs=2, private=100)
    store = Store(tmp_path)
    assert run(tasks(config, ONCE), store, jobs=1, progress=False).failed == 0
    records, _ = store.survey()
    picture = early_exits(records, tmp_path / "early_exits.png")
    assert picture is not None
    assert picture.stat().st_size > 10_000
    table = exits_table(summarise(records))
    assert table is not None
    assert [row[1:3] for row in table.rows] == [("split", "1"), ("confidence 0.05", "1")] * 2
    assert {len(row) for row in table.rows} == {len(table.columns)}
    brief = exits_table(summarise(records), brief=True)
    assert brief is not None
    assert brief.columns == table.columns
    assert early_exits([record for record in records if record.protection == "none"], picture) is None
    assert not picture.exists()
    assert exits_table([]) is None
