"""What encryption on the cut costs, end to end at toy size: each way against its plain twin; record and picture."""

import shlex
import warnings
from dataclasses import replace
from functools import cache
from math import inf, isfinite
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from experiments import bench_he
from experiments.catalogue import BENCHES, EXPERIMENTS
from experiments.encrypted import WAYS, Setup, encrypted_cut
from experiments.experiment import Options
from experiments.he_overhead import Config, tasks
from experiments.he_plot import he_costs
from experiments.ingredients import PROTOCOLS
from experiments.parts import Shield
from experiments.record import Record
from experiments.report import build
from experiments.runner import Outcome, run
from experiments.store import Store
from experiments.training import Training, load_splits
from privacy.he import FAST
from splitlearn.models import digits_cnn, ecg_cnn
from splitlearn.train import epochs_of, fit

TOY = Config(epochs=2, private=128, presets=("fast",), epsilons=(8.0,), batch_size=32)
ONCE = Options(seeds=(0,))
# What plans noise by privacy loss distributions takes seconds.
NOISED = pytest.param("he_u_dp", marks=pytest.mark.slow)
ENCRYPTED = [NOISED if name == "he_u_dp" else name for name, way in WAYS.items() if way.encrypted]


@cache
def outcome(way: str, epsilon: float = inf) -> Outcome:
    epsilons = () if epsilon == inf else (epsilon,)
    found = tasks(replace(TOY, ways=(way,), epsilons=epsilons), ONCE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return found[-1].call()


def setup(name: str, **change: object) -> Setup:
    splits = load_splits("digits", None, sizes=(128, 600, 397))
    training = Training(protocol=name, cut="relu4", epochs=2, batch_size=32, optimizer="sgd", lr=0.05)
    return replace(Setup(splits, training), **change)  # type: ignore[arg-type]


def trained(name: str, **change: object) -> list[Tensor]:
    """The client's weights after two epochs of a way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the leaky one
        ready = WAYS[name].ready(setup(name, **change))
    fit(epochs_of(ready.step, ready.batches), epochs=2)
    return [parameter.detach().clone() for parameter in ready.stage[0].parameters()]  # type: ignore[index]


# How far errors of ciphertexts carry eight steps of SGD, about ten times what was seen, in parts of the whole way. The
# greatest where weights are encrypted too, at the smaller of the two scales.
@pytest.mark.parametrize(("way", "far"), [("he_u_dp", 1e-2), ("he_encw", 5e-2), ("split_ways", 5e-5)])
def test_without_noise_an_encrypted_way_trains_as_the_plain_one_does(way: str, far: float) -> None:
    plain, other = trained("none"), trained(way, epsilon=inf)
    start = [one.detach() for one in setup("none").parts()[0].parameters()]
    moved = sum(float((a - b).norm() ** 2) for a, b in zip(plain, start, strict=True)) ** 0.5
    apart = sum(float((a - b).norm() ** 2) for a, b in zip(plain, other[: len(plain)], strict=True)) ** 0.5
    assert apart < far * moved
    assert moved > 0.1


@pytest.mark.slow
def test_noise_costs_the_same_encrypted_and_in_the_clear() -> None:
    plain, other = outcome("plain_dp", 8.0), outcome("he_u_dp", 8.0)
    assert plain.accounts == other.accounts
    assert plain.epsilon == other.epsilon
    assert plain.epsilon is not None
    assert 7 < plain.epsilon <= 8
    assert abs(plain.utility["accuracy"] - other.utility["accuracy"]) < 0.02


@pytest.mark.parametrize("way", ["none", "split_ways", "he_encw", NOISED])
def test_the_server_reads_labels_where_gradients_cross_in_the_clear_and_nowhere_else(way: str) -> None:
    (leak,) = outcome(way, 8.0 if way == "he_u_dp" else inf).leakage
    leaky = way in ("none", "split_ways")
    assert leak.family == "label"
    assert leak.metrics["accuracy"] == (1.0 if leaky else leak.baselines["accuracy_majority"])
    assert leak.advantage == (1.0 if leaky else 0.0)
    assert ("why" in leak.details) is not leaky


@pytest.mark.parametrize("way", ENCRYPTED)
def test_a_record_holds_bytes_seconds_and_parameters_of_what_was_encrypted(way: str) -> None:
    found = outcome(way, 8.0 if way == "he_u_dp" else inf)
    assert found.nbytes["up"]["ciphertext"] > 0
    assert found.nbytes["down"]["ciphertext"] > 0
    assert "activation" not in found.nbytes["up"]
    assert {"encrypt", "holder", "decrypt", "test"} <= found.seconds.keys()
    assert ("epoch" in found.seconds) is WAYS[way].trains
    assert any(FAST.in_words() in note for note in found.notes)
    assert any("activations clipped to" in note for note in found.notes)
    assert "LEAKY" in " ".join(found.visible["server"]) or "ciphertexts" in found.visible["server"][0]
    assert (found.epsilon is not None) is (way == "he_u_dp")


def test_noise_switched_off_claims_nothing_and_says_so() -> None:
    found = outcome("he_u_dp")
    assert found.epsilon is None
    assert found.accounts == []
    assert found.leakage == []  # its true steps cross: an attack on gradients alone would be no measure
    assert any("noise and clipping are off" in note for note in found.notes)


def test_a_configuration_has_every_preset_without_noise_and_every_epsilon_at_the_first() -> None:
    config = replace(TOY, presets=("precise", "fast"), epsilons=(1.0, 4.0))
    rows = [(task.labels["protection"], task.labels["strength"]) for task in tasks(config, ONCE)]
    assert rows == [
        ("none", ""), ("plain_dp", "ε 1"), ("plain_dp", "ε 4"), ("split_ways", "precise"), ("split_ways", "fast"),
        ("he_inference", "precise"), ("he_inference", "fast"), ("he_encw", "precise"), ("he_encw", "fast"),
        ("he_u_dp", "precise, noise off"), ("he_u_dp", "fast, noise off"), ("he_u_dp", "precise, ε 1"),
        ("he_u_dp", "precise, ε 4"),
    ]  # fmt: skip
    every = tasks(config, Options(seeds=(0, 1)))
    assert len({task.trial for task in every}) == 2 * len(rows)


def test_the_command_of_a_trial_runs_that_trial_alone() -> None:
    for task in tasks(replace(TOY, epsilons=(1.0, 4.0)), ONCE):
        words = shlex.split(task.command)
        told = {
            name: words[words.index(f"--{name}") + 1]
            for name in ("ways", "presets", "epsilons")
            if f"--{name}" in words
        }
        assert told["ways"] == task.labels["protection"]
        again = replace(
            TOY, ways=(told["ways"],),
            presets=tuple(told["presets"].split(",")) if "presets" in told else Config().presets,
            epsilons=tuple(float(one) for one in told.get("epsilons", "").split(",") if one),
        )  # fmt: skip
        assert [one.trial for one in tasks(again, ONCE)][-1] == task.trial


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ways": ("he",)}, "no way is named 'he'"),
        ({"presets": ("slow",)}, "no preset is named 'slow'"),
        ({"presets": ()}, "expected at least one preset"),
        ({"epsilons": (0.0,)}, "expected --epsilons above 0"),
        ({"clip": 0.0}, "expected --clip above 0"),
        ({"dp_lr": inf}, "expected --dp-lr above 0"),
        ({"cut": "fc2"}, "expected the name of a layer below the cut"),
        ({"ways": ("split_ways",), "cut": "relu2"}, "expected a linear layer last"),
    ],
)
def test_what_cannot_be_run_is_told_of_before_anything_runs(change: dict[str, object], says: str) -> None:
    with pytest.raises((ValueError, LookupError), match=says):
        tasks(replace(TOY, **change), ONCE)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "place"), [(digits_cnn(), "relu4"), (ecg_cnn(), "flatten")])
def test_the_usual_cut_leaves_the_last_weights_to_the_server(model: nn.Sequential, place: str) -> None:
    assert encrypted_cut(model) == place


@pytest.mark.filterwarnings("ignore:.*LEAKY")
@pytest.mark.parametrize("protocol", ["he_encw", "he_inference", "split_ways", NOISED])
def test_a_protocol_on_ciphertexts_has_one_client(protocol: str) -> None:
    splits = load_splits("digits", None, sizes=(64, 600, 397))
    with pytest.raises(ValueError, match=f"protocol {protocol} has one client here, got 2"):
        Training(protocol=protocol, cut="relu4", epochs=1, clients=2)
    done = PROTOCOLS[protocol].train(Training(protocol=protocol, cut="relu4", epochs=1), splits, Shield())
    assert done.nbytes["up"]["ciphertext"] > 0
    assert (done.claim is not None) is (protocol == "he_u_dp")


@pytest.mark.parametrize("epsilons", [(), pytest.param((8.0,), marks=pytest.mark.slow)], ids=["no noise", "noise"])
def test_a_run_ends_in_records_a_picture_and_a_report(epsilons: tuple[float, ...], tmp_path: Path) -> None:
    store = Store(tmp_path)
    ways = ("none", "plain_dp", "he_inference", "he_u_dp", "split_ways")
    every = tasks(replace(TOY, ways=ways, epochs=1, private=64, epsilons=epsilons), ONCE)
    assert run(every, store, jobs=1, progress=False).failed == 0
    page = build(tmp_path).read_text()
    assert "What encryption on the cut costs" in page
    assert (tmp_path / "encryption.png").stat().st_size > 20_000
    records, problems = store.survey()
    assert not problems
    assert len(records) == len(every) == 4 + 2 * len(epsilons)
    assert all(isfinite(record.utility["accuracy"]) for record in records)


def test_records_of_other_experiments_leave_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "encryption.png"
    path.write_bytes(b"old")
    record = Record(
        experiment="tradeoff", trial="0", config={}, command="", status="done", seed=0, data="digits", protocol="",
        cut="", protection="none", strength="",
    )  # fmt: skip
    assert he_costs([record], path) is None
    assert not path.exists()


def test_it_stands_in_the_catalogue() -> None:
    assert EXPERIMENTS["he_overhead"].config is Config
    assert BENCHES["he"].run is bench_he.he_overhead_figures


@pytest.mark.slow
def test_the_bench_names_every_figure() -> None:
    small = {"forward": 1, "backward": 1, "small": 1, "vector": 1}
    with patch.object(bench_he, "REPEATS", small), patch.object(bench_he, "EPOCH_BATCHES", 2):
        figures = bench_he.he_overhead_figures(slow_rounds=1, fast_rounds=1)
    asked = {
        "speedup_over_ckks_tensor", "speedup_over_ckks_vector", "backward_speedup_over_ckks_tensor",
        "small_speedup_over_split_ways", "forward_bytes", "forward_bytes_truncated", "backward_bytes",
        "small_forward_bytes", "rms_fast", "rms_precise", "epoch_bytes", "encw_over_plain_weights", "forward_ms",
        "backward_ms", "small_forward_ms", "encw_forward_ms", "epoch_crypto_s",
    }  # fmt: skip
    assert asked <= figures.keys()
    assert all(isfinite(value) for value in figures.values())
    assert figures["forward_bytes_truncated"] < figures["forward_bytes"]
    assert figures["rms_precise"] < figures["rms_fast"] < 2e-4
