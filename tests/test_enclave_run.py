"""The enclave as a protocol and as an experiment, at toy size: vanilla to the bit, records, table and picture."""

import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from experiments.enclave import EXIT, HOSTS, Config, Way, tasks
from experiments.enclave_plot import enclave_leaks, enclave_table
from experiments.experiment import Options
from experiments.ingredients import PROTOCOLS
from experiments.parts import Shield
from experiments.runner import Outcome, run
from experiments.setups import train_enclave, train_vanilla
from experiments.store import Store
from experiments.summary import summarise
from experiments.training import Training, load_splits
from splitlearn.codecs import Padded
from splitlearn.enclave import ENCLAVES, LEFT_OUT, SEALING_NBYTES

ONCE = Options(seeds=(0,))
TOY = Config(codecs=("int8",), epochs=4, private=240, auxiliary=240, targets=240, lr=3e-3)
TINY = replace(TOY, epochs=1, private=64, auxiliary=40, targets=30)


@cache  # a trial is the same twice: see below
def outcome_of(config: Config, seed: int = 0) -> Outcome:
    (task,) = tasks(config, Options(seeds=(seed,)))
    assert shlex.split(task.command)[:3] == ["splitlearn", "run", "enclave"]
    return task.call()


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("codec", ["none", "ans4:64"])
def test_the_protocol_is_vanilla_to_the_bit_and_28_bytes_more_a_frame(clients: int, codec: str) -> None:
    splits, shield = load_splits("digits", None, sizes=(96, 16, 50)), Way.of(codec).shield()
    training = Training(epochs=1, clients=clients)
    plain = train_vanilla(training, splits, shield)
    inside = train_enclave(replace(training, protocol="enclave"), splits, shield)
    ours, theirs = inside.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert inside.losses == plain.losses
    frames = 96 // 32 if clients == 1 else 2 * 2 + clients  # two batches each, and a bottom to and from each
    for way in ("up", "down"):
        assert inside.nbytes[way] == {"ciphertext": sum(plain.nbytes[way].values()) + SEALING_NBYTES * frames}


def test_what_is_visible_says_what_is_assumed_and_nothing_is_there_to_attack() -> None:
    trained = train_enclave(
        Training(protocol="enclave", epochs=1), load_splits("digits", None, sizes=(32, 16, 8)), Shield()
    )
    assert trained.record is None
    assert not PROTOCOLS["enclave"].activations_cross
    assert "modelled" in PROTOCOLS["enclave"].summary
    assert LEFT_OUT in trained.visible["host"]
    assert any("remote attestation" in line for line in trained.visible["host"])
    assert all(line.endswith("trusted by assumption") for line in trained.visible["enclave"])


def test_frames_of_one_size_leak_nothing_and_their_bytes_are_these() -> None:
    outcome = outcome_of(TOY)
    (leak,) = outcome.leakage
    assert (leak.attack, leak.family, leak.advantage) == ("sizes", "label", 0)
    assert leak.metrics["accuracy"] == leak.baselines["accuracy_majority"]
    found = outcome.utility
    assert found["sizes_seen"] == 1
    payload = 32 * 8 * 8 + 2 * 4 + 10 * 4 + 2 * SEALING_NBYTES  # levels, their range, logits
    assert payload < found["sample_bytes"] < payload + 1000  # two headers
    assert outcome.nbytes.keys() == {"up", "down"}


def test_entropy_coded_frames_leak_and_padded_ones_do_not() -> None:
    bare, whole = (outcome_of(replace(TOY, codecs=(name,))) for name in ("ans8", "ans8:4096"))
    assert bare.leakage[0].advantage > 0.05
    assert whole.leakage[0].advantage == 0
    assert whole.utility["sizes_seen"] == 1
    assert bare.utility["sizes_seen"] > 10
    assert whole.utility["sample_bytes"] > bare.utility["sample_bytes"]
    assert whole.utility["accuracy"] == bare.utility["accuracy"]  # lossless


def test_what_leaves_sends_nothing_and_is_seen_to() -> None:
    outcome = outcome_of(replace(TOY, codecs=(f"int8{EXIT}",)))
    found, plain = outcome.utility, outcome_of(TOY).utility
    assert 0 < found["share_left"] < 1
    assert found["sizes_seen"] == 2
    assert found["sample_bytes"] == pytest.approx((1 - found["share_left"]) * plain["sample_bytes"])
    assert found["seconds_sgx"] < plain["seconds_sgx"]
    assert any("leaves at the exit" in note for note in outcome.notes)


def test_modelled_seconds_are_the_devices_times_the_slowdown() -> None:
    outcome = outcome_of(TOY)
    found = outcome.utility
    for name, host in HOSTS.items():
        if name in ENCLAVES:  # this model fits every enclave
            plain = "plain_gpu" if host == "server_gpu" else "plain"
            assert found[f"server_seconds_{name}"] == pytest.approx(
                ENCLAVES[name].slowdown * found[f"server_seconds_{plain}"]
            )
            assert found[f"seconds_{name}"] > found[f"seconds_{plain}"]
            assert any(ENCLAVES[name].source in note and note.startswith("modelled") for note in outcome.notes)
    network = 8 * SEALING_NBYTES / 100e6 * 2  # both ways over wifi
    added = found["seconds_sgx"] - found["seconds_plain"]
    assert added == pytest.approx(found["server_seconds_sgx"] - found["server_seconds_plain"] + network)


def test_a_trial_is_the_same_twice_whatever_torch_drew_before() -> None:
    config = replace(TINY, codecs=("ans8",))
    torch.manual_seed(1)
    first = outcome_of(config)
    torch.manual_seed(2)
    again = outcome_of.__wrapped__(config)
    assert (again.utility, again.leakage) == (first.utility, first.leakage)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"codecs": ()}, "--codecs"),
        ({"codecs": ("int9",)}, "bits from 1 to 8"),
        ({"codecs": ("none:64",)}, "a codec and bytes"),
        ({"codecs": ("ans4:0",)}, "bytes of 1 or more"),
        ({"codecs": ("ans4:much",)}, "a whole number"),
        ({"codecs": ("aware4:64",)}, "packs nothing"),
        ({"targets": 1000}, "--targets between 1 and 397"),
        ({"auxiliary": 8}, "--auxiliary of 16 or more"),
        ({"cuts": ("nowhere",)}, "nowhere"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_any_work(wrong: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, LookupError), match=said) as caught:
        tasks(replace(TOY, **wrong), ONCE)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_names_say_how_samples_cross() -> None:
    way = Way.of(f"ans4:256{EXIT}")
    assert (way.codec, way.multiple, way.leaves, way.name) == ("ans4", 256, True, f"ans4{EXIT}")
    codec = way.shield().codec
    assert isinstance(codec, Padded)
    assert codec.name == "padded256(ans(int4))"
    assert Way.of("none").shield().codec is None
    trials = {task.trial for task in tasks(replace(TOY, codecs=("none", "ans4", "ans4:1", f"ans4{EXIT}")), ONCE)}
    assert len(trials) == 4


def test_a_run_ends_in_a_table_and_a_picture(tmp_path: Path) -> None:
    store = Store(tmp_path)
    config = replace(TINY, codecs=("int8", "ans8", "ans8:4096"))
    assert run(tasks(config, ONCE), store, jobs=1, progress=False).failed == 0
    records, problems = store.survey()
    assert not problems
    assert {record.protocol for record in records} == {"enclave"}
    points = summarise(records)
    full, brief = enclave_table(points), enclave_table(points, brief=True)
    assert full is not None
    assert brief is not None
    assert "MODELLED" in full.caption
    assert "page faults" in brief.caption
    assert {row[1] for row in full.rows} == {row[0] for row in brief.rows} == {"int8", "ans8", "ans8 to 4096 B"}
    assert all(len(row) == len(full.columns) for row in full.rows)
    picture = enclave_leaks(records, tmp_path / "enclave.png")
    assert picture is not None
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert enclave_leaks([], picture) is None
    assert not picture.exists()
    assert enclave_table([]) is None
