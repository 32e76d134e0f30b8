"""What computing on shares costs, end to end at toy size: each way against its plain twin; record, bench, picture."""

import gc
import shlex
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from math import isfinite
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from torch import Tensor, nn

from experiments import bench_mpc, mpc_overhead
from experiments.catalogue import BENCHES, EXPERIMENTS, PROTOCOLS
from experiments.cost_bars import CLEAR, LEAKY, SEALED
from experiments.encrypted import Setup
from experiments.experiment import Options
from experiments.mpc_overhead import Config, tasks
from experiments.mpc_plot import mpc_costs
from experiments.parts import Shield
from experiments.record import Leakage, Record
from experiments.report import build
from experiments.runner import Outcome, Task, run
from experiments.shares import SHARED_WAYS, train_splitfed_v2_secure
from experiments.store import Store
from experiments.training import ONE_CLIENT, Trained, Training, build_model, load_splits
from privacy.mpc import LAN, SECURITY, WAN, Servers
from splitlearn.data import Splits
from splitlearn.party import Learner
from splitlearn.train import epochs_of, evaluate, fit, predict

TOY = Config(epochs=1, private=64, cut="relu4")  # one linear layer on shares
ONCE = Options(seeds=(0,))
SIZES = (64, 600, 397)
PARTY = "privacy.mpc.process"
INSECURE = "insecure_first_party"
# The loss on shares is a hundred rounds and more a batch.
LOSS_ON_SHARES = pytest.param("mpc_2pc", "ttp", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[Any]]]:
    """The parties' processes that a test starts, of which none may be left when it ends."""
    found: list[subprocess.Popen[Any]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: Any, *arguments: Any, **more: Any):
            super().__init__(command, *arguments, **more)
            if PARTY in command:
                found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    yield found
    assert [process.pid for process in found if process.poll() is None] == []


def only(way: str, provider: str = "ttp", **change: Any) -> Task:
    (task,) = tasks(replace(TOY, ways=(way,), providers=(provider,), **change), ONCE)
    return task


@cache
def outcome(way: str, provider: str = "ttp") -> Outcome:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return only(way, provider).call()


# What is asked for


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ways": ("mpc_2p",)}, "no way is named 'mpc_2p'.*did you mean mpc_2pc"),
        ({"providers": ("tfp",)}, "no provider is named 'tfp'"),
        ({"ways": ()}, "expected at least one way among none, mpc_2pc, .* and one provider, got none"),
        ({"providers": ()}, "expected at least one way among .* and one provider, got none"),
        ({"cut": "relu9"}, "expected the name of a layer below the cut"),
        ({"cut": "fc2"}, "expected the name of a layer below the cut"),
        ({"private": -1}, "expected --private and --auxiliary of 0 or more"),
        ({"epochs": 0}, "expected --epochs of 1 or more, got 0"),
        ({"batch_size": 0}, "expected --batch-size of 1 or more, got 0"),
        ({"lr": 0.0}, "expected --lr greater than 0"),
    ],
)
def test_what_cannot_be_run_is_told_of_before_anything_runs(change: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, LookupError), match=says) as told:
        tasks(replace(TOY, **change), ONCE)
    assert "\n" not in str(told.value)


def test_layers_that_cannot_be_on_shares_are_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = OrderedDict(
        flatten=nn.Flatten(), fc1=nn.Linear(64, 8), bn=nn.BatchNorm1d(8), relu=nn.ReLU(), fc2=nn.Linear(8, 10)
    )
    monkeypatch.setattr(mpc_overhead, "build_model", lambda splits, seed: nn.Sequential(layers))
    with pytest.raises(
        ValueError, match=r"expected layers that can be .* got BatchNorm1d at bn; leave it .* one of these$"
    ):
        tasks(replace(TOY, cut="default"), ONCE)
    assert {task.labels["cut"] for task in tasks(replace(TOY, cut="bn"), ONCE)} == {"bn"}


@pytest.mark.parametrize(("device", "fine"), [("cpu", True), ("auto", True), ("meta", False), ("nonsense", False)])
def test_shares_are_computed_on_the_cpu(device: str, fine: bool) -> None:
    asked = Options(seeds=(0,), device=device)
    if fine:
        assert {task.config["training"]["device"] for task in tasks(TOY, asked)} == {"cpu"}
        return
    with pytest.raises(ValueError, match=rf"^expected [^\n]*, got '?{device}[^\n]*$"):
        tasks(TOY, asked)


def test_tokens_are_refused(tokens: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpc_overhead, "load_splits", lambda *_, **__: tokens)
    with pytest.raises(ValueError, match=r"^expected inputs that are numbers, got digits, which holds tokens$"):
        tasks(TOY, ONCE)


def test_a_configuration_has_every_provider_where_something_is_shared() -> None:
    every = tasks(replace(TOY, providers=("ttp", INSECURE)), Options(seeds=(0, 1)))
    rows = [(task.labels["protection"], task.labels["strength"]) for task in every if task.labels["seed"] == 0]
    assert rows == [
        ("none", ""), ("mpc_2pc", "ttp"), ("mpc_2pc", INSECURE), ("mpc_u_shaped", "ttp"), ("mpc_u_shaped", INSECURE),
        ("mpc_inference", "ttp"), ("mpc_inference", INSECURE), ("he_encw", ""), ("he_inference", ""),
    ]  # fmt: skip
    assert len({task.trial for task in every}) == 2 * len(rows)
    assert all(task.config["training"]["optimizer"] == "sgd" for task in every)
    for task in every:
        assert task.config["insecure_trust_first_party"] is (task.labels["strength"] == INSECURE)


def test_the_usual_cut_is_after_flattening() -> None:
    assert {task.labels["cut"] for task in tasks(replace(TOY, cut="default"), ONCE)} == {"flatten"}
    tabular = tasks(replace(TOY, cut="default", private=0), Options(data="breast_cancer", seeds=(0,)))
    assert {task.labels["cut"] for task in tabular} == {"relu2"}  # a model without one: below the last weights


def test_the_command_of_a_trial_runs_that_trial_alone() -> None:
    for task in tasks(replace(TOY, providers=("ttp", INSECURE)), Options(seeds=(3,))):
        words = shlex.split(task.command)
        assert words[:5] == ["splitlearn", "run", "mpc_overhead", "--data", "digits"]
        told = {words[at].removeprefix("--"): words[at + 1] for at in range(3, len(words), 2)}
        again = replace(
            Config(), ways=(told["ways"],), cut=told["cut"], epochs=int(told["epochs"]), private=int(told["private"]),
            providers=tuple(told["providers"].split(",")) if "providers" in told else Config().providers,
        )  # fmt: skip
        asked = Options(seeds=(int(told["seeds"]),), device=told["device"])
        assert [one.trial for one in tasks(again, asked)] == [task.trial] or not SHARED_WAYS[told["ways"]].shares
        assert task.trial in [one.trial for one in tasks(again, asked)]


# What comes of it


def test_a_run_ends_in_a_record_a_picture_and_a_report(tmp_path: Path) -> None:
    store = Store(tmp_path)
    task = replace(only("mpc_u_shaped"), call=partial(outcome, "mpc_u_shaped", "ttp"))
    assert run([task], store, jobs=1, progress=False).failed == 0
    record = store.load(task.trial)
    assert record is not None
    assert set(record.nbytes["between"]) == {"gloo"}
    assert record.nbytes["between"]["gloo"] > 0
    # Of each sample's activation and outputs there is one share of 8 bytes up, beside a seed, and two come down.
    assert record.nbytes["up"]["share"] == 8 * 64 * (64 + 10)
    assert record.nbytes["down"]["share"] == 2 * 8 * 64 * (64 + 10)
    assert not {"activation", "gradient", "label", "loss"} & (record.nbytes["up"].keys() | record.nbytes["down"].keys())
    assert {
        "epoch", "lan", "wan", "test", "servers_linear", "servers_update", "client_share", "client_servers",
        "client_reveal", "total",
    } == record.seconds.keys()  # fmt: skip
    assert record.seconds["epoch"] < record.seconds["lan"] < record.seconds["wan"]
    assert all(isfinite(spent) and spent >= 0 for spent in record.seconds.values())
    assert set(SECURITY) <= set(record.notes)
    assert not any("INSECURE" in note for note in record.notes)
    assert set(record.visible) == {"server 0", "server 1", "dealer", "client"}
    assert set(SECURITY) <= set(record.visible["server 0"])
    assert 0 <= record.utility["accuracy"] <= 1
    assert record.config["insecure_trust_first_party"] is False
    page = build(tmp_path).read_text()
    assert "What computing on shares costs" in page
    assert (tmp_path / "shares.png").stat().st_size > 20_000


def test_a_modelled_network_adds_its_rounds_and_bytes_to_what_was_measured() -> None:
    found = outcome("none")  # two batches, each one request and one answer
    crossed = sum(sum(kinds.values()) for kinds in found.nbytes.values())
    for network in (LAN, WAN):
        added = found.seconds[network.name.lower()] - found.seconds["epoch"]
        assert added == pytest.approx(network.seconds(4, crossed))
        assert any(f"modelled {network.name}" in note and "4 rounds" in note for note in found.notes)


@pytest.mark.parametrize(("way", "provider"), [("mpc_u_shaped", INSECURE), ("none", "ttp")])
def test_a_server_reads_the_activation_where_it_deals_or_sees_it(
    way: str, provider: str, started: list[subprocess.Popen[Any]]
) -> None:
    (leak,) = outcome(way, provider).leakage
    assert len(started) == (4 if way == "mpc_u_shaped" else 0)  # two parties train, and two are looked into
    assert (leak.attack, leak.family) == ("held_activation", "reconstruction")
    assert leak.advantage > 0.999
    if way == "none":
        assert leak.advantage == 1.0
        return
    assert any("INSECURE" in note for note in outcome(way, provider).notes)
    assert any("INSECURE" in line for line in outcome(way, provider).visible["server 0"])
    assert only(way, provider).config["insecure_trust_first_party"] is True
    assert only(way, provider).config["provider"] == INSECURE


@pytest.mark.parametrize(("way", "provider"), [("mpc_u_shaped", "ttp"), LOSS_ON_SHARES, ("he_encw", "ttp")])
def test_one_server_reads_nothing_of_shares_and_ciphertexts(way: str, provider: str) -> None:
    (leak,) = outcome(way, provider).leakage
    assert leak.advantage == 0.0
    assert ("why" in leak.details) is (way == "he_encw")
    if way != "he_encw":  # something was read, and is worse than no attack
        assert leak.metrics["mse"] > leak.baselines["mse_mean_activation"]


@pytest.mark.parametrize("way", [pytest.param("mpc_inference", marks=pytest.mark.slow), "he_inference"])
def test_of_inference_the_bill_is_that_of_the_test_set(way: str) -> None:
    found = outcome(way)
    assert found.leakage == []
    assert {"test", "test_lan", "test_wan"} <= found.seconds.keys()
    assert not {"epoch", "lan", "wan"} & found.seconds.keys()
    assert found.seconds["test"] < found.seconds["test_lan"] < found.seconds["test_wan"]
    assert any("those of 397 predictions" in note for note in found.notes)
    if way == "mpc_inference":
        assert found.nbytes["up"]["share"] == 8 * 397 * 64
        assert found.nbytes["down"]["share"] == 2 * 8 * 397 * 10
        assert any("between the servers" in note and note.endswith("of 397 predictions") for note in found.notes)


# The same training, on shares


def trained(way: str, servers: Servers) -> tuple[list[float], list[Tensor]]:
    """Losses of six epochs of fifteen steps, and the client's weights after them."""
    splits = load_splits("digits", None, sizes=(240, 600, 397))
    training = Training(protocol=way, cut="relu4", epochs=6, batch_size=16, optimizer="sgd", lr=0.03)
    ready = SHARED_WAYS[way].ready(Setup(splits, training), servers if SHARED_WAYS[way].shares else None)
    losses = fit(epochs_of(ready.step, ready.batches), epochs=training.epochs).losses
    (client, *_) = ready.chain
    assert isinstance(client, Learner)
    weights = [one.detach().clone() for one in client.weights().values()]
    if ready.stage is not None:
        ready.stage.close()
    return losses, weights


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    return sum(float((a - b).norm() ** 2) for a, b in zip(some, others, strict=True)) ** 0.5


# What is left of fixed point grows where training is at its steepest: four times the loss and the weights' distance (in
# parts of the way that they went) that were seen in six runs. With the loss on shares, exp and log are approximated.
@pytest.mark.parametrize(
    ("way", "off"), [("mpc_u_shaped", 0.02), pytest.param("mpc_2pc", 0.05, marks=pytest.mark.slow)]
)
def test_training_on_shares_is_the_plain_one(way: str, off: float, servers: Servers) -> None:
    plain, right = trained("none", servers)
    losses, weights = trained(way, servers)
    start = [one.detach() for one in build_model(load_splits("digits", None), seed=0).parameters()]
    assert plain[0] - plain[-1] > 0.5  # it has learned something
    assert max(abs(a - b) for a, b in zip(plain, losses, strict=True)) < off
    assert distance(weights, right) < 0.2 * distance(start[: len(right)], right)


# The catalogue's protocols


def protocol(name: str, **change: Any) -> tuple[Trained, Splits]:
    splits = load_splits("digits", None, sizes=SIZES)
    clients = 1 if name in ONE_CLIENT else 2
    training = Training(
        protocol=name, cut="flatten" if name == "mpc_vertical" else "relu4", epochs=2, optimizer="sgd", lr=0.05,
        clients=clients,
    )  # fmt: skip
    return PROTOCOLS[name].train(replace(training, **change), splits, Shield()), splits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mpc_2pc", "mpc_u_shaped", "mpc_inference", "mpc_vertical", "splitfed_v2_secure"])
def test_every_protocol_on_shares_trains(name: str) -> None:
    done, splits = protocol(name)
    assert 0 <= evaluate(done.chain, splits.test.x, splits.test.y)["accuracy"] <= 1
    assert set(SECURITY) <= set(done.visible["server 0"])
    assert (done.record is not None) is (name == "splitfed_v2_secure")
    if name != "splitfed_v2_secure":
        assert done.nbytes["between"]["gloo"] > 0
    assert done.nbytes["up"]["share"] > 0
    if name == "mpc_inference":  # it trains in one place, and what crosses are predictions of the test set
        assert done.nbytes["up"]["share"] == 8 * len(splits.test) * 64
        assert done.nbytes["down"]["share"] == 2 * 8 * len(splits.test) * 10
    else:
        first, last = done.losses
        assert last < first
    if name not in ("mpc_vertical", "splitfed_v2_secure"):  # the model that its owner gets is what was trained
        plain = done.model(splits.test.x[:20]).detach()
        torch.testing.assert_close(predict(done.chain, splits.test.x[:20]), plain, atol=1e-3, rtol=1e-3)
    del done  # and with it the servers that answer for its chain
    gc.collect()


def test_secure_aggregation_leaves_the_same_weights() -> None:
    plain, _ = protocol("splitfed_v2")
    secure, _ = protocol("splitfed_v2_secure")
    assert plain.losses == pytest.approx(secure.losses, abs=1e-4)
    for name, weights in plain.model.state_dict().items():
        assert (weights - secure.model.state_dict()[name]).abs().max() < 1e-4, name
    assert "every client's weights after every round" not in secure.visible["fed server"]
    assert set(SECURITY) <= set(secure.visible["server 0"])


def test_secure_aggregation_of_one_client_hides_nothing_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected at least two clients under splitfed_v2_secure, .* got 1; use --cl"):
        protocol("splitfed_v2_secure", clients=1)


@pytest.mark.parametrize("name", ["mpc_2pc", "mpc_u_shaped", "mpc_vertical"])
def test_another_optimizer_than_sgd_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"protocol {name} trains shares by SGD .*, got adam; use --optimizer sgd"):
        Training(protocol=name, clients=1 if name in ONE_CLIENT else 2)


def test_they_stand_in_the_catalogue() -> None:
    assert EXPERIMENTS["mpc_overhead"].config is Config
    assert BENCHES["mpc"].run is bench_mpc.mpc_overhead_figures
    assert PROTOCOLS["splitfed_v2_secure"].train is train_splitfed_v2_secure
    assert Config().ways == tuple(SHARED_WAYS)


@pytest.mark.slow
def test_the_bench_names_every_figure() -> None:
    with patch.object(bench_mpc, "DRAWS", 4):
        figures = bench_mpc.mpc_overhead_figures(rounds=3, samples=64)
    asked = {
        "linear_over_raw_crypten", "linear_bytes", "linear_rounds", "max_error", "linear_ms", "raw_crypten_ms",
        "linear_socket_bytes", "client_bytes", "epoch_s", "epoch_u_shaped_s",
    }  # fmt: skip
    assert asked <= figures.keys()
    assert all(isfinite(value) and value > 0 for value in figures.values() if value is not None)
    assert figures["max_error"] <= 1e-3


# The picture


def made_up(way: str, provider: str = "", leaked: float = 0.0, seed: int = 0, data: str = "digits") -> Record:
    config = {"data": data, "seed": seed, "training": {"epochs": 2}, "way": way, "provider": provider}
    seconds = {"epoch": 2.0 + seed, "lan": 3.0, "wan": 200.0, "test": 1.0}
    if provider:
        seconds |= {"servers_linear": 0.5, "servers_relu": 0.2, "client_servers": 1.5, "client_share": 0.1}
    if not SHARED_WAYS[way].trains:
        seconds = {"test": 1.0, "test_lan": 2.0, "test_wan": 9.0, **({"servers_linear": 0.5} if provider else {})}
    leak = Leakage(
        attack="held_activation", family="reconstruction", advantage=leaked, metrics={"mse": 1.0}, baselines={}
    )
    return Record(
        experiment="mpc_overhead", trial=f"{way}{provider}{seed}{data}", config=config, command="", status="done",
        seed=seed, data=data, protocol="", cut="flatten", protection=way, strength=provider,
        utility={"accuracy": 0.9}, leakage=[leak] if SHARED_WAYS[way].trains else [], seconds=seconds,
        nbytes={"up": {"share": 3_000_000}, "down": {"share": 1_000_000}, "between": {"gloo": 60_000_000}},
    )  # fmt: skip


def colours(path: Path) -> set[str]:
    """Which of the three colours the picture has."""
    picture = torch.as_tensor(imread(path)[..., :3])
    found = {"clear": CLEAR, "leaky": LEAKY, "sealed": SEALED}
    return {
        name for name, one in found.items() if bool(((picture - torch.tensor(to_rgb(one))).abs() < 0.01).all(-1).any())
    }


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_picture_is_orange_where_a_server_reads_activations(seeds: int, tmp_path: Path) -> None:
    path = tmp_path / "shares.png"
    quiet = [
        made_up(way, "ttp" if one.shares else "", 1.0 if way == "none" else 0.0, seed)
        for way, one in SHARED_WAYS.items()
        for seed in range(seeds)
    ]
    assert mpc_costs(quiet, path) == path
    assert colours(path) == {"clear", "sealed"}
    small = imread(path).shape
    loud = [made_up("mpc_u_shaped", INSECURE, 1.0, seed) for seed in range(seeds)]
    elsewhere = [made_up("none", "", 1.0, data="mitbih"), made_up("he_encw", "", data="mitbih")]
    assert mpc_costs([*quiet, *loud, *elsewhere], path) == path
    assert colours(path) == {"clear", "sealed", "leaky"}
    assert imread(path).shape[0] > small[0]  # a row for each data set


def test_records_of_other_experiments_leave_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "shares.png"
    path.write_bytes(b"old")
    record = made_up("none").model_copy(update={"experiment": "tradeoff"})
    assert mpc_costs([record], path) is None
    assert not path.exists()
