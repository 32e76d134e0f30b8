"""Calibration: the fit gets back the constants that made the times, and measuring leaves the process as it was."""

from dataclasses import replace
from random import Random

import pytest
import torch

from splitlearn.calibration import Stage, calibrate, fit, fitted, stages, timed
from splitlearn.cost import compute_seconds, seconds_per, units
from splitlearn.devices import DEVICES

TRUE = {"flops": 2e-11, "moved": 1e-10, "operations": 5e-6}
UNSURE = {  # a machine whose kinds of work differ
    "linear flops": 0.5,
    "pooling moved": 8.0,
    "convolution operations": 12.0,
    "training convolution flops": 1.5,
    "training linear operations": 3.0,
    "call": 2.0,
    "training call": 9.0,
}


@pytest.fixture(scope="module")
def trials() -> list[Stage]:
    return stages(3, num=80)


def rows(num: int) -> list[dict[str, float]]:
    random = Random(0)
    return [
        {"flops": 10 ** random.uniform(5, 9), "moved": 10 ** random.uniform(4, 7), "operations": random.randint(1, 9)}
        for _ in range(num)
    ]


def test_the_fit_gets_back_the_constants_of_exact_times() -> None:
    features = rows(30)
    found = fit(features, [sum(TRUE[name] * amount for name, amount in row.items()) for row in features])
    assert found == pytest.approx(TRUE, rel=1e-6)


def test_the_fit_withstands_noise_and_a_few_shapes_that_are_far_off() -> None:
    features, random = rows(200), Random(1)
    seconds = [sum(TRUE[name] * amount for name, amount in row.items()) for row in features]
    noisy = [value * random.uniform(0.95, 1.05) * (4 if not number % 20 else 1) for number, value in enumerate(seconds)]
    found = fit(features, noisy)
    for name, value in TRUE.items():  # within the noise, though one in twenty takes four times as long
        assert found[name] == pytest.approx(value, rel=0.05)


def test_a_cost_is_never_negative_and_what_costs_nothing_is_none() -> None:
    features = [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 3.0}]
    found = fit(features, [2.0, 3.9, 1.0])
    assert found["b"] == 0
    assert found["a"] > 0


@pytest.mark.parametrize(
    ("features", "seconds", "said"),
    [
        ([], [], "expected a time for each set of features, got 0 and 0"),
        ([{"a": 1.0}], [1.0, 2.0], "expected a time for each set of features, got 1 and 2"),
        ([{"a": 1.0}], [0.0], "expected seconds > 0, got 0.0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(features: list[dict[str, float]], seconds: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(features, seconds)


def test_a_device_is_got_back_from_the_times_that_it_would_take(trials: list[Stage]) -> None:
    there = replace(DEVICES["laptop"], factors=UNSURE)
    seconds = [
        (compute_seconds(stage.layers, there), compute_seconds(stage.layers, there, training=True)) for stage in trials
    ]
    here = fitted(trials, seconds, like=DEVICES["phone"])
    assert not here.modelled
    assert here.watts == DEVICES["phone"].watts
    assert "watts not measured but those of phone" in here.source
    for stage, (forward, step) in zip(trials, seconds, strict=True):
        assert compute_seconds(stage.layers, here) == pytest.approx(forward, rel=0.02)
        assert compute_seconds(stage.layers, here, training=True) == pytest.approx(step, rel=0.02)
    for unit in ("convolution flops", "linear flops", "pooling moved", "training convolution flops"):
        assert seconds_per(unit, here) == pytest.approx(seconds_per(unit, there), rel=0.05)


def test_times_that_tell_nothing_are_refused(trials: list[Stage]) -> None:
    with pytest.raises(RuntimeError, match=r"could not tell the cost of .*linear.*; measure again"):
        fitted(trials, [(1.0, 1.0)] * len(trials), like=DEVICES["laptop"])


def test_stages_are_those_of_the_seed_of_every_kind_and_draw_nothing_of_others(trials: list[Stage]) -> None:
    state = torch.get_rng_state()
    again = stages(3, num=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert [stage.layers for stage in again] == [stage.layers for stage in trials[:20]]
    assert stages(4, num=5)[0].layers != again[0].layers
    kinds = {kernel.kind for stage in trials for layer in stage.layers for kernel in layer.kernels}
    assert kinds >= {"convolution", "narrow convolution", "linear", "pooling", "lookup", "normalisation", "random"}
    assert any(stage.below for stage in trials)
    assert any(not stage.below for stage in trials)


def test_timing_is_of_each_stage_and_leaves_threads_random_numbers_and_weights(trials: list[Stage]) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    weights = [weight.clone() for stage in trials[:6] for weight in stage.model.parameters()]
    seconds = timed(trials[:6], rounds=1, repeats=1)
    assert len(seconds) == 6
    assert all(forward > 0 and step > 0 for forward, step in seconds)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert all(map(torch.equal, weights, [weight for stage in trials[:6] for weight in stage.model.parameters()]))
    assert all(seconds > 0 for pair in timed(trials[:2], threads=2, rounds=1, repeats=1) for seconds in pair)
    assert torch.get_num_threads() == threads


def test_stages_above_others_count_the_gradient_of_their_input(trials: list[Stage]) -> None:
    stage = next(stage for stage in trials if stage.below and stage.layers[0].flops["convolution"])
    first = stage.layers[:1]
    flops = sum(first[0].flops.values())
    work = units(first, training=True)
    assert sum(amount for unit, amount in work.items() if unit.endswith("flops")) == 3 * flops


@pytest.mark.slow
def test_this_machine_is_measured() -> None:
    here = calibrate()
    assert not here.modelled
    assert here.name == "this machine"
    assert here.source.startswith("measured:")
    assert 1e8 < here.convolution < 1e14
    assert 1e8 < here.linear < 1e14
    assert 1e7 < here.moved < 1e13
    assert 1e-8 < here.overhead < 1e-2
