"""Compressions by name, in training: what each sends, what it saves, and what goes with what."""

import copy

import pytest
import torch
from torch import nn

from experiments import attribute, membership
from experiments.compressed import compressed
from experiments.compression import COMPRESSION, Config
from experiments.compression_plot import compression_curves, compression_table
from experiments.experiment import Options
from experiments.ingredients import PROTECTIONS, PROTOCOLS
from experiments.runner import run
from experiments.store import Store
from experiments.summary import summarise
from experiments.training import Training, load_splits
from splitlearn.quantisation import LearnedQuantiser, Pointwise
from splitlearn.train import predict


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("float16", "float16"), ("int8", "int8"), ("int3", "int3"), ("ans4", "ans(int4)"), ("zstd2", "zstd3(int2)"),
        ("0.1", "top0.1"), ("random0.25", "random0.25s0"), ("narrow0.5+ans4", "ans(int4)"), ("aware4+int8", "int8"),
        ("learned3", "perkind(ans(palette3):activation,int8:gradient)"),
    ],
)  # fmt: skip
def test_each_name_is_a_codec(name, codec):
    assert compressed(name).codec.name == codec


def test_a_name_may_bring_layers_and_rounded_weights():
    both = compressed("narrow0.25+learned4")
    assert [type(one) for one in both.layers(16)] == [Pointwise, LearnedQuantiser]
    assert both.layers(16)[0].out_features == 4
    assert both.above(16).in_features == 4
    assert compressed("aware4+int8").weight_bits == 4


def test_layers_fit_a_bottom_with_norms_whose_statistics_stay():
    bottom = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    before = copy.deepcopy(bottom.state_dict())
    own = compressed("narrow0.25")
    x = torch.rand(1, 6)  # one value a channel, of which a norm in training makes nothing
    below, above = own.shaped(bottom, x), own.raised(nn.Identity(), bottom, x)
    assert above(below(torch.rand(5, 6))).shape == (5, 8)
    bottom.load_state_dict(before)
    own.shaped(bottom, torch.rand(1, 6))
    assert all(torch.equal(one, before[name]) for name, one in bottom.state_dict().items())
    assert bottom.training


@pytest.mark.parametrize("protocol", ["vanilla", "u_shaped", "enclave", "vertical"])
def test_a_shield_trains_alike_twice_with_a_codec_that_counts(protocol):
    splits = load_splits("digits", None, sizes=(64, 32, 32))
    shield = compressed("random0.3")
    training = Training(protocol=protocol, epochs=1, clients=1 if protocol != "vertical" else 2)
    once, again = (PROTOCOLS[protocol].train(training, splits, shield) for _ in range(2))
    assert all(
        torch.equal(one, other)
        for one, other in zip(once.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    assert once.losses == again.losses
    x = splits.test.x
    first = once.encoder(x)
    predict(again.chain, x)  # what crosses moves no draw of an encoder
    again.encoder(x)
    assert torch.equal(once.encoder(x), again.encoder(x))
    assert not torch.equal(first, once.encoder(x))  # which draws anew at each call
    assert shield.codec.state_dict() == {"packed": {}}


@pytest.mark.parametrize("experiment", [membership, attribute])
def test_what_packs_updates_is_refused_where_none_are_sent(experiment, tmp_path):
    config = experiment.Config(protections=("none", "compression:int8+update0.1"))
    line = r"vanilla sends no updates, got compression:int8\+update0.1; drop it, or run .* with splitfed_v1, split"
    with pytest.raises(ValueError, match=line):
        experiment.tasks(config, Options(seeds=(0,), out=tmp_path))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("int9", "whole bits from 1 to 8"), ("int2.5", "expected whole bits, got 'int2.5'"),
        ("gzip", "a fraction to keep"), ("learned12", "from 1 to 8"), ("update", "a fraction to keep"),
        ("int4+int8", "expected one codec, got two"), ("narrow2", "between 0 and 1, got 'narrow2'"),
        ("updatenarrow0.5", "expected a codec after update"), ("1.5", r"in \(0, 1\]"),
        ("aware1", "weights of 2 to 8 bits"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_in_a_line(name, line):
    with pytest.raises(ValueError, match=line):
        compressed(name)


def records(tmp_path, config: Config, **more):
    options = Options(seeds=(0,), out=tmp_path, **more)
    tasks = COMPRESSION.tasks(config, options)
    store = Store(tmp_path)
    summary = run(tasks, store, jobs=1, progress=False)
    assert summary.failed == 0
    return [store.load(task.trial) for task in tasks]


def test_the_experiment_measures_rate_and_accuracy_of_each(tmp_path):
    names = ("none", "int8", "int4", "ans2", "learned3", "narrow0.25", "aware4+int8", "0.1", "random0.1")
    specs = tuple(name if name == "none" else f"compression:{name}" for name in names)
    small = Config(protections=specs, attacks=(), private=100, auxiliary=50, epochs=1)
    found = {record.strength: record for record in records(tmp_path, small)}
    bits = {strength: record.utility["bits_per_entry"] for strength, record in found.items()}
    assert bits[""] == pytest.approx(32, abs=0.1)
    assert bits["int8"] == pytest.approx(8, abs=0.2)
    assert bits["int4"] == pytest.approx(4, abs=0.2)
    assert bits["narrow0.25"] == pytest.approx(8, abs=0.2)
    assert bits["ans2"] < 2.1
    assert bits["learned3"] < 3.1
    assert bits["0.1"] == pytest.approx(0.1 * (32 + 16), abs=0.2)
    assert bits["random0.1"] == pytest.approx(3.2, abs=0.2)
    assert found["int4"].utility["times_smaller"] == pytest.approx(32 / bits["int4"], rel=0.01)
    table = compression_table(summarise(found.values()))
    assert len(table.rows) == len(names)
    picture = compression_curves(list(found.values()), tmp_path / "compression.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_updates_are_packed_with_error_feedback_where_members_send_some(tmp_path):
    small = Config(
        protocols=("fedavg", "splitfed_v2"), protections=("none", "compression:update0.1", "compression:updateint8"),
        attacks=(), private=100, auxiliary=50, epochs=2, clients=2,
    )  # fmt: skip
    found = {(record.protocol, record.strength): record for record in records(tmp_path, small)}
    for protocol in ("fedavg", "splitfed_v2"):
        assert found[protocol, "update0.1"].utility["bits_per_entry"] == pytest.approx(4.8, abs=0.5)  # a value, a place
        assert found[protocol, "updateint8"].utility["bits_per_entry"] == pytest.approx(
            8, abs=0.8
        )  # ranges of few entries
        sent = found[protocol, "updateint8"].nbytes
        assert "update" in sent["up"]
        assert "weights" in sent["down"]
    with pytest.raises(ValueError, match="expected protocols whose members send updates, splitfed_v1"):
        COMPRESSION.tasks(Config(protections=("compression:update0.1",)), Options(out=tmp_path))


def test_compression_is_one_protection_among_the_others():
    assert PROTECTIONS["compression"].strengths == ("int8", "0.1", "0.02")
    assert "narrowF" in PROTECTIONS["compression"].unit
