"""The grid's rows end to end at toy size: what each server really sees, and the picture."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import protection_grid
from experiments.catalogue import ATTACKS
from experiments.experiment import Options
from experiments.grid_rows import ROWS
from experiments.parts import Aim
from experiments.record import Leakage
from experiments.report import build
from experiments.runner import run
from experiments.store import Store

ONCE = Options(seeds=(0,))
TOY = protection_grid.Config(targets=8, epochs=1, private=128, rows=("none",))
QUICK: dict[str, dict[str, Any]] = {"rmle": {"iterations": 3}, "decoder": {"epochs": 2}}
CLEAR = ["none", "int8", "gaussian_noise:1", "nopeek:1", "dp_activations:64"]
SEALED = ["he_u_dp:8", "he_encw", "mpc_2pc"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str) -> Any:
        real = ATTACKS[name]

        def make(aim: Aim) -> Mapping[str, Any]:
            return {member: replace(one, **QUICK[name]) for member, one in list(real.build(aim).items())[:1]}

        return replace(real, build=make)

    for name in QUICK:
        monkeypatch.setitem(ATTACKS, name, made(name))


def leaks_of(row: str) -> dict[str, Leakage]:
    (task,) = protection_grid.tasks(replace(TOY, rows=(row,)), ONCE)
    outcome = task.call()
    assert outcome.nbytes
    assert outcome.seconds["epoch"] > 0
    assert outcome.visible
    assert 0 <= outcome.utility["accuracy"] <= 1
    assert {leak.family for leak in outcome.leakage} == {"reconstruction", "label", "membership"}
    assert (outcome.epsilon is not None) is row.startswith(("dp_", "he_u_dp"))
    return {leak.attack: leak for leak in outcome.leakage}


@pytest.mark.parametrize("row", CLEAR)
def test_in_the_clear_labels_are_read_off_the_wire(row: str) -> None:
    leaks = leaks_of(row)
    assert {"rmle", "decoder", "loss_threshold"} < set(leaks)
    label = leaks.get("clear_gradient") or leaks["sent_labels"]
    assert label.advantage == 1


@pytest.mark.slow
@pytest.mark.parametrize("row", ["dp_sgd:4", *SEALED])
def test_what_is_sealed_is_attacked_as_the_server_holds_it(row: str) -> None:
    leaks = leaks_of(row)
    if row in SEALED:
        assert leaks["clear_gradient"].advantage == 0
        assert leaks["clear_gradient"].details["why"]
        assert leaks["decoder"].advantage < 0.05


def test_every_row_has_a_summary_and_strengths_that_are_checked() -> None:
    for name, row in ROWS.items():
        assert row.summary, name
        assert row.strengths, name
    with pytest.raises(LookupError, match="no row is named 'rot13'"):
        protection_grid.tasks(replace(TOY, rows=("rot13",)), ONCE)
    for wrong, said in (("none:3", "without a strength, got '3'"), ("nopeek:x", "expected a strength, got 'x'")):
        with pytest.raises(ValueError, match=said):
            protection_grid.tasks(replace(TOY, rows=(wrong,)), ONCE)
    with pytest.raises(ValueError, match="use --cut relu4"):
        protection_grid.tasks(replace(TOY, cut="flatten"), ONCE)
    with pytest.raises(ValueError, match="--targets between 1 and 128"):
        protection_grid.tasks(replace(TOY, targets=0), ONCE)


def test_the_report_holds_the_whole_picture(tmp_path: Path) -> None:
    found = protection_grid.tasks(replace(TOY, rows=("none", "gaussian_noise:4")), ONCE)
    assert run(found, Store(tmp_path), jobs=1, progress=False).failed == 0
    page = build(tmp_path).read_text()
    assert (tmp_path / "protection_grid.png").stat().st_size > 20_000
    assert 'id="protection_grid"' in page
