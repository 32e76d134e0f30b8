"""The experiments end to end at toy size: every name runs, and every trial can be run again by its command."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from experiments import parity, tradeoff
from experiments.catalogue import ATTACKS, BENCHES, DETECTORS, EXPERIMENTS, PROTECTIONS, PROTOCOLS
from experiments.cli import main
from experiments.experiment import Options
from experiments.parts import Aim, Attack, Protection, Shield
from experiments.runner import Outcome, run
from experiments.store import Store
from experiments.training import ONE_CLIENT, Training, load_splits
from splitlearn.data import DATASETS, Dataset, Splits, split
from splitlearn.guard import Guard
from splitlearn.threat import Grants, Threat, observe
from splitlearn.train import predict

ACTIVATIONS = 800 * 32 * 8 * 8 * 4  # bytes that cross in an epoch of the digits CNN, cut after its second block
TOY = tradeoff.Config(epochs=1, targets=4, attacks=("decoder",), protections=("none",))
ONCE = Options(seeds=(0,))


def quick() -> Attack:
    """The smallest decoder of the family, for three epochs: what is tested is the path, not the attack's strength."""
    real = ATTACKS["decoder"]

    def build(aim: Aim) -> dict[str, Any]:
        return {"decoder-affine": replace(real.build(aim)["decoder-affine"], epochs=3)}

    return replace(real, build=build)


def quickly(call: Callable[[], Outcome]) -> Outcome:
    """Run a trial with the quick decoder, in a worker that knows of no patch of this process."""
    with patch.dict(ATTACKS, decoder=quick()):
        return call()


@pytest.fixture
def quick_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, "decoder", quick())


def test_every_protection_at_every_strength_becomes_a_task() -> None:
    named = {name: one for name, one in PROTECTIONS.items() if "image" in one.inputs}
    config = tradeoff.Config(protections=tuple(named))
    found = {(task.labels["protection"], task.labels["strength"]) for task in tradeoff.tasks(config, ONCE)}
    assert found == {(name, strength) for name, one in named.items() for strength in one.strengths}


@pytest.mark.usefixtures("quick_decoder")
@pytest.mark.filterwarnings("ignore:.*LEAKY")
@pytest.mark.parametrize(
    "protocol",  # planning noise by privacy loss distributions takes seconds, and so do losses on shares
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("he_u_dp", "mpc_2pc", "mpc_vertical") else ())
        for name in PROTOCOLS
    ],
)
def test_every_protocol_trains_and_is_attacked(protocol: str) -> None:
    clients = 1 if protocol in ("unsplit", *ONE_CLIENT) else 2
    encrypted = protocol.startswith("he_") or protocol == "split_ways"
    shared = protocol.startswith("mpc_")
    change: dict[str, Any] = {"cuts": ("relu4",)} if encrypted or shared else {}
    if shared:
        change |= {"optimizer": "sgd", "lr": 0.05, "private": 64}
    if protocol == "mpc_vertical":
        change |= {"cuts": ("flatten",)}  # below which narrower images go through as they are
    (task,) = tradeoff.tasks(replace(TOY, protocols=(protocol,), clients=clients, **change), ONCE)
    outcome = task.call()
    assert 0 <= outcome.utility["accuracy"] <= 1
    if encrypted:
        assert "ciphertext" in outcome.nbytes["up"]
        assert (outcome.epsilon is not None) is (protocol == "he_u_dp")
        assert bool(outcome.accounts) is (protocol == "he_u_dp")
    if shared:
        assert "share" in outcome.nbytes["up"]
        assert outcome.nbytes["between"]["gloo"] > 0
    if not PROTOCOLS[protocol].activations_cross:
        assert outcome.leakage == []
        assert any("no activation crosses" in note for note in outcome.notes)
    else:
        (leak,) = outcome.leakage
        assert leak.advantage > 0.3  # a bottom after one epoch hides little
        assert leak.metrics["mse"] < leak.baselines["mse_mean_image"]
        assert 0 < leak.baselines["mse_class_mean_image"] < leak.baselines["mse_mean_image"]
        assert outcome.nbytes["up"]["activation"] == ACTIVATIONS
        assert outcome.nbytes["down"]["gradient"] >= ACTIVATIONS


@pytest.mark.usefixtures("quick_decoder")
@pytest.mark.parametrize("name", [n for n, one in PROTECTIONS.items() if n != "none" and "image" in one.inputs])
def test_the_strongest_of_each_protection_crosses_the_whole_path(name: str) -> None:
    spec = f"{name}:{PROTECTIONS[name].strengths[-1]}"
    (task,) = tradeoff.tasks(replace(TOY, protections=(spec,)), ONCE)
    outcome = task.call()
    assert outcome.leakage[0].details["best"]
    assert outcome.visible["server"]
    if name == "compression":
        assert outcome.nbytes["up"]["activation"] < 0.1 * ACTIVATIONS


@pytest.mark.parametrize("protocol", [name for name, one in PROTOCOLS.items() if one.activations_cross])
def test_the_encoder_is_what_the_server_reads_to_the_bit(protocol: str) -> None:
    splits = load_splits("digits", None)
    training = Training(protocol=protocol, epochs=1, clients=1 if protocol == "u_shaped" else 2)
    trained = PROTOCOLS[protocol].train(training, splits, PROTECTIONS["compression"].build("int8"))
    assert trained.record is not None
    trained.record.clear()
    predict(trained.chain, trained.victim_x[:20])
    grants = Grants(trained.encoder)
    view = observe(trained.record, threat=Threat(white_box=True), grants=grants)
    assert torch.equal(view.activations(), view.query(trained.victim_x[:20]))


def test_protections_of_what_does_not_cross_are_not_claimed() -> None:
    config = replace(TOY, protocols=("fedavg", "vanilla"), protections=("none", "noise:0.1"))
    found = [(task.labels["protocol"], task.labels["protection"]) for task in tradeoff.tasks(config, ONCE)]
    assert found == [("fedavg", "none"), ("vanilla", "none"), ("vanilla", "noise")]
    with pytest.raises(ValueError, match="no activation crosses under fedavg"):
        tradeoff.tasks(replace(config, protections=("noise:0.1",)), ONCE)


@pytest.mark.usefixtures("quick_decoder")
def test_noise_drawn_anew_is_averaged_away() -> None:
    config = replace(TOY, protections=("noise:0.1",), targets=20, cuts=("relu1",))
    once, often = (
        tradeoff.tasks(replace(config, releases=releases), ONCE)[0].call().leakage[0].metrics["mse"]
        for releases in (1, 16)
    )
    assert often < 0.8 * once


def test_tables_are_attacked_too() -> None:
    after = tuple(name for name, one in ATTACKS.items() if "table" in one.inputs and not one.steps)
    config = replace(TOY, attacks=after, protocols=("vanilla", "vertical"), clients=2)
    for task in tradeoff.tasks(config, Options(data="breast_cancer", seeds=(0,))):
        outcome = task.call()
        assert [leak.attack for leak in outcome.leakage] == list(after)
        assert outcome.images == {}


def test_parity_says_bit_for_bit() -> None:
    config = parity.Config(protocols=("vanilla", "vertical"), epochs=1)
    vanilla, vertical = (task.call() for task in parity.tasks(config, ONCE))
    assert vanilla.utility["weights_difference"] == 0
    assert vanilla.utility["accuracy"] == vanilla.utility["accuracy_unsplit"]
    assert "weights_difference" not in vertical.utility


def test_private_auxiliary_and_test_are_disjoint() -> None:
    splits = load_splits("digits", None)
    parts = [set(part.ids.tolist()) for part in (splits.private, splits.auxiliary, splits.test)]
    assert [len(part) for part in parts] == [800, 600, 397]
    assert len(set.union(*parts)) == 1797


def all_tasks() -> list:
    narrow = replace(
        TOY, protocols=("vanilla", "splitfed_v2"), protections=("noise:0.3", "compression:int8"), clients=3
    )
    return [*tradeoff.tasks(narrow, ONCE), *parity.tasks(parity.Config(epochs=2, protocols=("fedavg",)), ONCE)]


def test_trials_keep_their_hash_in_another_process() -> None:
    code = "from tests.test_experiments import all_tasks; print(*[task.trial for task in all_tasks()])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [task.trial for task in all_tasks()]


def test_each_command_names_the_trial_that_it_reproduces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from experiments import runner

    seen: list[str] = []
    real = runner.run

    def watched(tasks, store, **options):  # type: ignore[no-untyped-def]
        seen.extend(task.trial for task in tasks)
        raise KeyboardInterrupt("enough was seen")

    monkeypatch.setattr(runner, "run", watched)
    assert real is not watched
    for task in all_tasks():
        words = shlex.split(task.command)
        assert words[0] == "splitlearn"
        monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit):
            main()
        assert seen.pop() == task.trial
        assert seen == []


def test_two_seeds_in_two_processes_end_in_a_report(tmp_path: Path) -> None:
    from experiments.report import build

    config = replace(TOY, protections=("none", "compression:int8"))
    tasks = [replace(task, call=partial(quickly, task.call)) for task in tradeoff.tasks(config, Options(seeds=(0, 1)))]
    store = Store(tmp_path)
    summary = run(tasks, store, jobs=2, progress=False)
    assert (summary.done, summary.skipped, summary.failed) == (4, 0, 0)
    again = run(tasks, store, jobs=2, progress=False)
    assert (again.done, again.skipped) == (0, 4)
    page = build(tmp_path).read_text()
    for name in ("results.csv", "tradeoff.png", "reconstructions.png"):
        assert (tmp_path / name).stat().st_size > 500
    assert "splitlearn run tradeoff" in page
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert rows[0] == "trial,seed,data,protocol,cut,protection,strength,attack,metric,value,baseline"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": ("vanila",)}, "did you mean vanilla"),
        ({"attacks": ("decodr",)}, "did you mean decoder"),
        ({"protections": ("noise:much",)}, "expected a noise multiplier"),
        ({"protections": ("nopeek:-1",)}, "expected a finite weight"),
        ({"protections": ("compression:2",)}, r"expected a fraction of entries in \(0, 1\]"),
        ({"cuts": ("conv9",)}, "expected the name of a layer below the cut"),
        ({"targets": 0}, "expected --targets between 1 and 800"),
        ({"optimizer": "lamb"}, "no optimizer is named"),
        ({"targets": 300, "clients": 3}, "expected --targets between 1 and 266, the samples of one client"),
        ({"epochs": 0}, "expected --epochs of 1 or more, got 0"),
        ({"lr": 0.0}, "expected --lr greater than 0"),
        ({"releases": 0}, "expected --releases of 1 or more"),
        ({"protections": ("noise:inf",)}, "expected a noise multiplier, got 'inf'"),
        ({"protections": ("quantised:2.7",)}, "expected bits, a whole number, got '2.7'"),
        ({"protections": ("quantised:inf",)}, "expected bits, a whole number"),
        ({"protections": ("disco:nan",)}, "expected a share to prune, got 'nan'"),
        ({"protections": ("disco:1.5",)}, "a ratio of at least 0 and below 1"),
        ({"protections": ()}, "expected at least one of --protections, got none"),
        ({"auxiliary": 4}, "expected --auxiliary of 16 or more for decoder, got 4"),
        ({"protocols": ("u_shaped",), "attacks": ("urvfl", "fsha", "splitspy")}, "labels that urvfl, splitspy needs?"),
        ({"private": -1}, "expected --private and --auxiliary of 0 or more"),
        ({"private": 1000}, "digits"),
        ({"protocols": ("u_shaped",), "clients": 2}, "u_shaped has one client"),
        ({"protocols": ("splitfed_v2_secure",)}, "expected at least two clients under splitfed_v2_secure"),
        ({"protocols": ("vanilla", "mpc_2pc")}, "protocol mpc_2pc trains shares by SGD .* use --optimizer sgd"),
    ],
)
def test_bad_options_end_before_any_work(change: dict, message: str) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        tradeoff.tasks(replace(TOY, **change), ONCE)


def test_tokens_are_refused_by_what_cannot_read_them_and_trained_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(name: str, data_dir: Path | None, sizes: Any = None) -> Splits:
        x, y = torch.randint(1, 9, (60, 12)), torch.arange(60) % 2
        words = tuple(map(str, range(9)))
        dataset = Dataset("words", x, y, 2, "tokens", torch.arange(60), names=words)
        return split(dataset, private=20, auxiliary=20, test=20)

    monkeypatch.setattr(tradeoff, "load_splits", tokens)
    config = replace(TOY, protections=("none", "nopeek:1", "noise:0.3"))
    message = "work on tokens, .* got attack decoder, protection nopeek; use --attacks '' --protections none,noise:0.3"
    with pytest.raises(ValueError, match=message):
        tradeoff.tasks(config, ONCE)
    for task in tradeoff.tasks(replace(config, attacks=(), protections=("none", "noise:0.3", "patch_shuffle")), ONCE):
        outcome = task.call()
        assert outcome.leakage == []
        assert outcome.utility["accuracy"] >= 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_something_to_do_as_it_is(name: str, request: pytest.FixtureRequest) -> None:
    experiment = EXPERIMENTS[name]
    folder = request.getfixturevalue("real_data") if DATASETS[experiment.data].files else None
    assert experiment.tasks(experiment.config(), Options(data=experiment.data, data_dir=folder, seeds=(0,)))


def test_the_catalogue_describes_itself_in_one_line_each() -> None:
    for listing in (ATTACKS, BENCHES, DETECTORS, EXPERIMENTS, PROTECTIONS, PROTOCOLS):
        for name, entry in listing.items():
            assert entry.summary, name
            assert "\n" not in entry.summary


def test_one_training_is_repeated_to_the_bit() -> None:
    from experiments.parts import Shield
    from experiments.setups import train_splitfed_v2

    splits = load_splits("digits", None)
    training = Training(protocol="splitfed_v2", epochs=1, clients=2)
    first, second = (train_splitfed_v2(training, splits, Shield()).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parity_holds_on_tables_for_every_protocol() -> None:
    for task in parity.tasks(parity.Config(epochs=1), Options(data="breast_cancer", seeds=(0,))):
        utility = task.call().utility
        if task.labels["protocol"] != "vertical":
            assert utility["weights_difference"] == 0, task.title


def test_a_new_protection_is_its_own_file_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Halved(Guard):
        def activation(self, z: torch.Tensor) -> torch.Tensor:
            return z / 2

    line = Protection("activations halved", "", ("",), lambda _: Shield(Halved()))
    monkeypatch.setitem(PROTECTIONS, "halved", line)
    monkeypatch.setattr(sys, "argv", ["splitlearn", "list", "protections"])
    with pytest.raises(SystemExit):
        main()
    assert "activations halved" in capsys.readouterr().out
    config = replace(TOY, protections=("halved",), attacks=("rmle",), targets=2)
    (task,) = tradeoff.tasks(config, ONCE)
    assert task.config["protection"]["guard"] == "Halved()"
    assert task.call().leakage[0].advantage > 0.9  # a scale hides nothing from who knows it


def test_help_names_what_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["splitlearn", "run", "tradeoff", "--help"])
    with pytest.raises(SystemExit):
        main()
    text = capsys.readouterr().out
    for name in (*PROTECTIONS, *ATTACKS, *PROTOCOLS):
        assert name in text, name
