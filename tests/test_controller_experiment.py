"""The controller experiment at toy size: arms are real, costs are the cost model's, and what is held out stays so."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.arms import BATTERY, CODECS, LATENCY, LOAD, UP, arms_of, contexts_of, costs_of, switching
from experiments.controller import (
    ARMS,
    POLICIES,
    RECORDED,
    RECORDING,
    SHOWN,
    TRACES,
    Config,
    _trace,
    tasks,
)
from experiments.controller_plot import controller, controller_table
from experiments.experiment import Options
from experiments.runner import run
from experiments.store import Store
from experiments.summary import summarise
from experiments.training import build_model, load_splits
from splitlearn.codecs import through
from splitlearn.cost import count, split_cost
from splitlearn.cut import cut
from splitlearn.devices import DEVICES, RADIOS
from splitlearn.network import PROFILES, Profile
from splitlearn.traces import GENERATORS, load_trace

TOY = Config(generators=("markov",), images=8, steps=40, training_traces=2, held_out=2, epochs=1, tolerance=1.0)
SPLITS = load_splits("digits", None)
MODEL = build_model(SPLITS, seed=0).eval()
X, Y, REQUEST = SPLITS.auxiliary.x[:60], SPLITS.auxiliary.y[:60], SPLITS.auxiliary.x[:8]
LAYERS = count(MODEL, REQUEST)
PHONE, SERVER = DEVICES["phone"], DEVICES["server_gpu"]
FOUND, DROPPED = arms_of(MODEL, LAYERS, X, Y, REQUEST, edge=PHONE, cloud=SERVER, tolerance=1.0)


def test_arms_are_within_the_bound_fit_and_are_none_better_than_another() -> None:
    arms, dropped = FOUND, DROPPED
    assert [arm.at for arm in arms] == sorted(arm.at for arm in arms)
    sizes = [arm.up_nbytes for arm in arms]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes) >= 3
    for arm in arms:
        bottom, top = cut(MODEL, arm.cut)
        codec = CODECS[arm.codec]
        with torch.no_grad():
            z = bottom(X)
            right = (top(z if codec is None else through(codec, z)).argmax(1) == Y).double().mean().item()
        assert arm.accuracy == right
    assert any(line.startswith("arms that are beaten") for line in dropped)
    small = replace(PHONE, memory=60_000)
    fitting, said = arms_of(MODEL, LAYERS, X, Y, REQUEST, edge=small, cloud=SERVER, tolerance=1.0)
    assert 0 < len(fitting) < len(arms)
    assert any(line.startswith("arms that do not fit the device") for line in said)
    with pytest.raises(ValueError, match="got none; take another device"):
        arms_of(MODEL, LAYERS, X, Y, REQUEST, edge=replace(PHONE, memory=10), cloud=SERVER, tolerance=1.0)


def test_a_deeper_arm_is_kept_where_the_cloud_is_slower_than_the_device() -> None:
    arms, _ = arms_of(MODEL, LAYERS, X, Y, REQUEST, edge=SERVER, cloud=PHONE, tolerance=1.0)
    trace = GENERATORS["walk"](50, seed=0)
    costs = costs_of(trace, LAYERS, arms, edge=SERVER, cloud=PHONE, radio=RADIOS["lan"], joule_price=0.0)
    best = arms[int(costs[trace.load.argmin()].argmin())]
    assert best.at == len(MODEL) - 1  # sends what the layer below it sends, and computes more here
    assert best.at not in {arm.at for arm in FOUND}


def test_places_that_cut_refuses_are_no_arms_and_are_named() -> None:
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 9), torch.nn.ReLU(inplace=True), torch.nn.Linear(9, 10)
    ).eval()
    arms, dropped = arms_of(model, count(model, REQUEST), X, Y, REQUEST, edge=PHONE, cloud=SERVER, tolerance=1.0)
    assert 2 not in {arm.at for arm in arms}
    assert "arms that cannot be cut: 1" in dropped


def test_costs_are_those_of_the_cost_model_on_a_slower_device_and_the_traces_network() -> None:
    arms = FOUND
    trace, radio = GENERATORS["commuter"](60, seed=0), RADIOS["wifi"]
    costs = costs_of(trace, LAYERS, arms, edge=PHONE, cloud=SERVER, radio=radio, joule_price=0.2)
    for time in (0, 7, 59):
        load = trace.load[time]
        slower = replace(
            PHONE, convolution=PHONE.convolution / load, linear=PHONE.linear / load, moved=PHONE.moved / load,
            overhead=PHONE.overhead * load,
        )  # fmt: skip
        network = Profile(up=trace.up[time], down=trace.down[time], latency=trace.latency[time])
        for number, arm in enumerate(arms):
            cost = split_cost(
                LAYERS, arm.at, edge=slower, cloud=SERVER, network=network, up_nbytes=arm.up_nbytes,
                down_nbytes=arm.down_nbytes, radio=radio,
            )  # fmt: skip
            price = 0.2 / max(trace.battery[time], 0.1)
            assert costs[time, number] == pytest.approx(cost.seconds + price * cost.joules, rel=1e-9)


def test_contexts_are_those_of_the_request_before() -> None:
    trace = GENERATORS["walk"](50, seed=0)
    seen = contexts_of(trace, "wifi", noise=0.0, seed=0)
    assert np.array_equal(seen[1:, UP], trace.up[:-1])
    assert np.array_equal(seen[1:, LOAD], trace.load[:-1])
    assert seen[0].tolist() == [100e6, 100e6, 0.003, 1.0, 1.0]
    noisy = contexts_of(trace, "wifi", noise=0.1, seed=0)
    assert np.log(noisy[:, :BATTERY] / seen[:, :BATTERY]).std() == pytest.approx(0.1, rel=0.2)
    assert np.array_equal(noisy[:, BATTERY], seen[:, BATTERY])
    assert (noisy[:, LATENCY] > 0).all()
    later = replace(trace, up=np.r_[trace.up[:20], trace.up[20:] * 2])
    assert np.array_equal(contexts_of(later, "wifi", noise=0.1, seed=0)[:21], noisy[:21])


def test_a_change_of_cut_costs_the_weights_that_move() -> None:
    arms = FOUND
    switch = switching(LAYERS, arms, "4g")
    first, last = arms[0], arms[-1]
    nbytes = sum(p.numel() * 4 for layer in list(MODEL)[first.at : last.at] for p in layer.parameters())
    assert switch[0, -1] == pytest.approx(0.025 + 8 * nbytes / 30e6)
    assert switch[-1, 0] == pytest.approx(0.025 + 8 * nbytes / 10e6)
    assert not switch.diagonal().any()


def test_what_is_held_out_is_of_other_seeds_and_of_the_recordings_other_half() -> None:
    recorded = load_trace(RECORDING).load
    assert len(recorded) >= 600
    assert recorded.max() > 2  # the machine was busy
    half = len(recorded) // 2
    config = replace(TOY, steps=2 * half)  # of which there are half as many
    training, unseen = (_trace(RECORDED, config, 3, held_out=held_out) for held_out in (False, True))
    assert np.array_equal(np.sort(training.load), np.sort(recorded[:half]))
    assert np.array_equal(np.sort(unseen.load), np.sort(recorded[half:]))
    assert training.name == RECORDED
    assert np.diff(training.seconds) == pytest.approx(0.25)  # as it was recorded
    assert len(_trace(RECORDED, TOY, 3, held_out=False)) == TOY.steps


def test_a_trial_on_the_recording_says_how_much_of_it_there_is() -> None:
    (task,) = tasks(replace(TOY, generators=(RECORDED,), steps=600), Options(seeds=(0,)))
    outcome = task.call()
    (said,) = (note for note in outcome.notes if note.startswith("load: one recorded series"))
    assert "; 480 requests a trace of 600 asked for; " in said
    assert len(outcome.traces["load"]) == 480


def test_a_trial_is_another_on_another_radio_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def described() -> dict[str, object]:
        (task,) = tasks(TOY, Options(seeds=(0,)))
        return task.config

    before = described()
    monkeypatch.setitem(RADIOS, "wifi", replace(RADIOS["wifi"], base=9.0))
    radio = described()
    monkeypatch.setitem(PROFILES, "wifi", replace(PROFILES["wifi"], latency=0.5))
    assert before != radio != described()


def test_a_trial_plays_all_policies_and_is_the_same_twice() -> None:
    (task,) = tasks(TOY, Options(seeds=(0,)))
    assert shlex.split(task.command)[:3] == ["splitlearn", "run", "controller"]
    outcome = task.call()
    ratios = {name: value for name, value in outcome.utility.items() if name.startswith("ratio_")}
    assert set(ratios) == {f"ratio_{name}" for name in (*POLICIES, "best_fixed")}
    assert min(ratios.values()) >= 1 - 1e-12
    assert ratios["ratio_best_fixed"] <= ratios["ratio_fixed"] + 1e-12
    assert outcome.utility["switches_oracle"] >= 0
    assert outcome.nbytes["up"]["activation"] > 0
    assert outcome.notes[0].startswith(ARMS)
    number = len(outcome.notes[0].split(", "))
    for name in SHOWN:
        assert len(outcome.traces[f"arm of {name}"]) == TOY.steps
        assert set(outcome.traces[f"arm of {name}"]) <= set(range(number))
    torch.manual_seed(5)
    again = task.call()
    assert (again.utility, again.traces, again.notes) == (outcome.utility, outcome.traces, outcome.notes)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"generators": ("markow",)}, "did you mean markov"),
        ({"generators": ()}, "at least one of --generators"),
        ({"edge": "phones"}, "did you mean phone"),
        ({"network": "wi-fi"}, "wifi"),
        ({"images": 0}, "--images of 1 or more"),
        ({"steps": 1}, "--steps of 2 or more"),
        ({"training_traces": 1}, "--training-traces of 2"),
        ({"held_out": 0}, "--held-out of 1"),
        ({"noise": -1.0}, "--noise of 0 or more"),
        ({"noise": 3.5}, "--noise of 3 or less"),
        ({"edge": "microcontroller", "images": 256}, "a request's activations, .* bytes, got microcontroller with"),
        ({"joule_price": float("inf")}, "--joule-price of 0 or more"),
        ({"bandwidth": 0.0}, "--bandwidth above 0"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(wrong: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, LookupError), match=said):
        tasks(replace(TOY, **wrong), Options(seeds=(0,)))  # type: ignore[arg-type]


def test_records_are_drawn_and_tabled(tmp_path: Path) -> None:
    config = replace(TOY, generators=("walk", RECORDED))
    assert list(TRACES) == ["markov", "walk", "commuter", "diurnal", RECORDED]
    assert run(tasks(config, Options(seeds=(0,))), Store(tmp_path), jobs=1, progress=False).failed == 0
    records, _ = Store(tmp_path).survey()
    drawn = controller(records, tmp_path / "controller.png")
    assert drawn is not None
    assert drawn.stat().st_size > 10_000
    table = controller_table(summarise(records))
    assert table is not None
    assert table.columns == ("policy", "walk", RECORDED)
    assert [row[0] for row in table.rows][-2:] == ["bandit", "oracle"]
    assert controller([], tmp_path / "controller.png") is None
    assert not (tmp_path / "controller.png").exists()
    assert controller_table([]) is None
