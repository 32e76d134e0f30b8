"""A plan, from a model and data of one's own to the recommendation: costs by real frames, records kept, bad input."""

import textwrap
from functools import partial
from math import inf

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from experiments import workbench
from experiments.cli import app
from experiments.plan import FromFile, plan
from experiments.planner import Bounds, Candidate
from experiments.training import load_splits
from experiments.workbench import Settings, Site, Subject, Workbench, shield_of, weighted_places
from splitlearn import Kind, Message, Uniform, cut, encode
from splitlearn.data import Splits, load, split
from splitlearn.devices import DEVICES
from splitlearn.models import cnn28, digits_cnn, ecg_cnn, mlp, resnet18, token_transformer
from splitlearn.network import PROFILES

SHORT = Settings(epochs=2, seeds=(0, 1), targets=20)


def own_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 10)
    )  # fmt: skip


@pytest.fixture(scope="module")
def splits() -> Splits:
    return split(load("digits"), private=200, auxiliary=100, test=200)


@pytest.fixture(scope="module")
def asked(splits, tmp_path_factory):
    """What one plan was asked, but for its bounds: the records are shared, so that each is trained once."""
    return partial(
        plan, own_model, splits, compressions=("none", "int4"), protections=("none", "noise:0.05"), settings=SHORT,
        out=tmp_path_factory.mktemp("plan"), progress=False,
    )  # fmt: skip


def test_a_plan_for_a_model_of_ones_own_says_what_to_do_and_what_leaks(asked):
    answer = asked(bounds=Bounds(loss=60.0))
    assert answer.best is not None
    assert answer.best.candidate == min(answer.costs, key=lambda one: answer.costs[one].seconds)
    assert answer.best.loss.n == 2
    assert 0 <= answer.best.leakage.mean <= 1
    first, *rest = answer.advice
    assert first.startswith(f"Cut after {answer.best.candidate.place}, ")
    assert "60 points of accuracy lost" in first
    text = " ".join(rest)
    for said in (
        "ms on the device",
        "What leaks: ",
        "labels cross in the clear",
        "All on the device, not split",
        "modelled",
    ):
        assert said in text
    assert answer.picture.read_bytes().startswith(b"\x89PNG")
    assert (answer.picture.parent / "plan.txt").read_text().splitlines() == answer.advice
    rows = {row[0] for row in answer.table.rows}
    assert {"all in the cloud", "all on the device", f"{answer.best.candidate.name} *"} <= rows


def test_the_same_question_again_trains_nothing(asked, monkeypatch):
    before = asked(bounds=Bounds(loss=60.0))

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(workbench, "run_trial", refuse)
    monkeypatch.setattr(workbench, "train_unsplit", refuse)
    again = asked(bounds=Bounds(loss=60.0))
    assert again.best == before.best
    assert again.advice == before.advice


def test_where_nothing_keeps_the_bounds_it_says_what_comes_nearest(asked):
    answer = asked(bounds=Bounds(loss=-90.0, leakage=0.0))
    assert answer.best is None
    assert answer.advice[0].startswith("Nothing keeps these bounds: -90 points")
    assert answer.advice[1].startswith("Nearest at a glimpse: ")
    dear = asked(bounds=Bounds(nbytes=1.0))
    assert dear.best is None
    assert dear.found.glimpses == {}
    assert "costs more than the bounds allow" in dear.advice[1]


def test_the_least_leakage_is_what_is_minimised_where_asked(asked):
    answer = asked(bounds=Bounds(loss=inf), minimise="leakage")
    assert answer.best is not None
    assert answer.best.leakage.mean == min(one.leakage.mean for one in answer.found.measured)


def bench(splits: Splits, tmp_path, **site) -> Workbench:
    there = Site(DEVICES["phone"], DEVICES["server_gpu"], "wifi", **site)
    return Workbench(
        Subject("own", lambda: splits, lambda _, seed: own_model()), there, SHORT, tmp_path, progress=False
    )


def test_costs_are_those_of_real_frames_on_the_network_asked(splits, tmp_path):
    own = bench(splits, tmp_path, batch=8)
    one = Candidate(3, "2", "int4")
    bottom, top = cut(own.start.eval(), "2")
    with torch.no_grad():
        z = bottom(splits.test.x[:8])
        reply = encode(Message("predict", {Kind.PREDICTION: top(z)}))
    sent = encode(Message("predict", {Kind.ACTIVATION: z}), Uniform(4))
    cost = own.costs([one])[one]
    assert cost.up_nbytes == len(sent) / 8
    assert abs(cost.down_nbytes - len(reply) / 8) <= 8  # the codec's name stands in it
    wifi = PROFILES["wifi"]
    assert cost.up_seconds == pytest.approx((8 * len(sent) / wifi.up + wifi.latency) / 8)
    cloud, device = own.costs([Candidate(0), Candidate(6)]).values()
    assert cloud.edge_seconds == 0
    assert cloud.up_nbytes > 64 * 4  # the inputs themselves
    assert device.up_nbytes == device.cloud_seconds == 0


def test_training_is_priced_with_labels_up_and_gradients_down(splits, tmp_path):
    own, asks = bench(splits, tmp_path, batch=32, training=True), bench(splits, tmp_path, batch=32)
    one = Candidate(3, "2")
    steps, predictions = own.costs([one])[one], asks.costs([one])[one]
    assert steps.up_nbytes > predictions.up_nbytes + 8  # a label of eight bytes
    assert steps.down_nbytes > 24 * 4
    assert steps.edge_seconds > predictions.edge_seconds


def test_a_device_without_the_memory_takes_no_part(splits, tmp_path):
    own = bench(splits, tmp_path)
    small = Workbench(
        own.subject, Site(DEVICES["microcontroller"], DEVICES["server_gpu"], "wifi"), SHORT, tmp_path, progress=False
    )
    huge = Candidate(3, "2")
    assert small.costs([huge])[huge].edge_memory < DEVICES["microcontroller"].memory
    found = own.plan([huge], Bounds(memory=10.0), "seconds")
    assert found.dear == (huge,)


def test_places_worth_a_cut_lie_below_layers_with_weights():
    assert weighted_places(digits_cnn()) == ["relu1", "pool", "flatten", "relu4"]
    assert weighted_places(cnn28()) == ["block1", "flatten", "relu"]
    assert weighted_places(ecg_cnn()) == ["pool1", "flatten"]
    assert weighted_places(mlp(5)) == ["relu1", "relu2"]
    assert weighted_places(token_transformer(9, 2, 4))[0] == "embed"
    assert "bn" not in weighted_places(resnet18())[:1]


def test_a_candidate_is_one_shield():
    both = shield_of(Candidate(1, "relu1", "ans4", "noise:0.02"))
    assert both.codec is not None
    assert both.codec.name == "ans(int4)"
    assert "ClippedGaussian" in repr(both.guard)
    for compression, protection in (("int8", "compression:int4"), ("learned4", "noise:0.02"), ("narrow0.5", "disco")):
        with pytest.raises(ValueError, match="expected a protection that goes with a compression"):
            shield_of(Candidate(1, "relu1", compression, protection))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"network": "pigeon"}, "no network is named 'pigeon'"),
        ({"edge": "abacus"}, "no device is named 'abacus'"),
        ({"minimise": "money"}, "expected something to minimise among"),
        ({"batch": 0}, "a batch of at least one sample"),
        ({"cuts": ("nowhere",)}, "expected the name of a layer below the cut"),
        ({"compressions": ("int99",)}, "whole bits from 1 to 8"),
        ({"compressions": ("gzip",)}, "a fraction to keep, or one of"),
        ({"protections": ("magic",)}, "no protection is named 'magic'"),
        ({"bounds": Bounds(leakage=-1)}, "a bound on leakage of 0 or more"),
        ({"compressions": ()}, "at least one compression"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_trained(asked, changed, line, monkeypatch):
    monkeypatch.setattr(workbench, "train_unsplit", None)
    with pytest.raises((ValueError, LookupError), match=line) as caught:
        asked(**changed)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_chain_is_refused(splits, tmp_path):
    with pytest.raises(ValueError, match=r"expected an nn\.Sequential, got Linear"):
        plan(lambda: nn.Linear(2, 2), splits, out=tmp_path)
    with pytest.raises(ValueError, match="expected a Python file with a model"):
        FromFile(tmp_path / "none.py", "make")(splits, 0)
    (tmp_path / "model.py").write_text("x = 1\n")
    with pytest.raises(LookupError, match=r"nothing in .* is named 'make'"):
        FromFile(tmp_path / "model.py", "make")(splits, 0)


def test_the_command_plans_for_a_file_and_an_archive_of_ones_own(tmp_path):
    (tmp_path / "my_model.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            def make():
                return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
            """
        )
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", x=x, y=x[:, :3].argmax(1))
    done = CliRunner().invoke(
        app,
        ["plan", "--data", str(tmp_path / "mine.npz"), "--model", f"{tmp_path / 'my_model.py'}:make", "--epochs", "2",
         "--max-loss", "90", "--max-leakage", "1", "--compressions", "none,int4", "--protections", "none",
         "--seeds", "0", "--jobs", "1", "--quiet", "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Cut after 1, " in done.output
    assert (tmp_path / "out" / "report.html").is_file()
    assert "plan.png" in done.output


def test_the_zoo_is_planned_for_where_no_model_is_given(tmp_path):
    load_few = partial(load_splits, "digits", None, sizes=(60, 40, 50))
    answer = plan(
        None, load_few, cuts=("relu4",), compressions=("int8",), protections=("none",), bounds=Bounds(),
        settings=Settings(epochs=1, seeds=(0,), targets=5), out=tmp_path, progress=False,
    )  # fmt: skip
    assert answer.best is not None
    assert answer.best.candidate == Candidate(10, "relu4", "int8")


def test_what_a_layer_computes_tells_models_apart_though_their_layers_read_alike(splits, tmp_path):
    path = tmp_path / "bend.py"
    text = "from torch import nn\nclass Bend(nn.Module):\n    def forward(self, x):\n        return {}\n"
    text += "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Bend(), nn.Linear(8, 10))\n"
    trials = set()
    for body in ("x.relu()", "x.tanh()"):
        path.write_text(text.format(body))
        own = Workbench(
            Subject("own", lambda: splits, FromFile(path, "make")), bench(splits, tmp_path).site, SHORT, tmp_path
        )  # fmt: skip
        trials.add(own._task(Candidate(3, "2"), 0, 1).trial)
    assert len(trials) == 2


def test_a_price_is_one_and_leaves_the_model_as_it_is(tmp_path):
    splits = split(load("digits"), private=60, auxiliary=40, test=60)

    def make(_: Splits, seed: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        )

    settings = Settings(epochs=1, seeds=(0,), targets=5)
    there = Site(DEVICES["phone"], DEVICES["server_gpu"], "wifi")
    own = Workbench(Subject("own", lambda: splits, make), there, settings, tmp_path, progress=False)
    candidates = [
        Candidate(3, "2", compression, protection)
        for compression, protection in (
            ("narrow0.25+ans4", "none"), ("learned4", "none"), ("ans4", "noise:0.05"), ("none", "mid:0.001"),
        )
    ]  # fmt: skip
    before = {name: tensor.clone() for name, tensor in own.start.state_dict().items()}
    state = torch.get_rng_state()
    first, second = own.costs(candidates), own.costs(candidates[::-1])
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in own.start.state_dict().items())
    assert own.glimpse(candidates).keys() == set(candidates)


def test_a_glimpse_bounds_leakage_only_where_its_attack_is_one_of_those_asked(splits, tmp_path):
    own = bench(splits, tmp_path)
    plain, penalised = Candidate(3, "2"), Candidate(3, "2", "none", "nopeek:3")
    assert own._doubt(plain) == 0
    assert 0 < own._doubt(penalised) < 1
    other = Workbench(own.subject, own.site, Settings(attacks=("rmle",)), tmp_path)
    assert other._doubt(plain) == inf


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"batch": 1000}, "a batch of at most the 200 test samples"),
        ({"settings": Settings(attacks=())}, "at least one attack, got none"),
        ({"settings": Settings(attacks=("magic",))}, "no attack is named 'magic'"),
        ({"settings": Settings(attacks=("fsha",))}, "a model of the zoo, and not yours"),
        ({"settings": Settings(attacks=("unsplit",))}, "a model of the zoo, and not yours"),
        ({"settings": Settings(seeds=())}, "at least one seed"),
        ({"settings": Settings(targets=0)}, "one target"),
        ({"bounds": Bounds(loss=float("nan"))}, "bounds that are numbers"),
        ({"compressions": ("update0.1",)}, "a plan has no members"),
        ({"network": PROFILES["wifi"].__class__(up=1e6, down=1e6, latency=0.1)}, "a radio for a network of your own"),
    ],
)
def test_what_cannot_be_asked_ends_before_anything_is_trained(asked, changed, line, monkeypatch):
    monkeypatch.setattr(workbench, "run_trial", None)
    with pytest.raises((ValueError, LookupError), match=line):
        asked(**changed)


def test_a_model_that_does_not_fit_its_data_is_told_so(splits, tmp_path):
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(
        ValueError, match=r"logits \[2, 10\] for two samples, since labels go from 0 to 9, got \(2, 3\)"
    ):
        plan(narrow, splits, out=tmp_path, settings=SHORT)
    with pytest.raises(ValueError, match="expected a model that takes inputs"):
        plan(nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 10)), splits, out=tmp_path, settings=SHORT)
    with pytest.raises(ValueError, match="that a worker process can take"):
        plan(lambda: narrow, splits, out=tmp_path, settings=SHORT, jobs=2)
    with pytest.raises(ValueError, match="a place to cut below a second layer with weights"):
        plan(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), splits, out=tmp_path, settings=SHORT)


def test_a_model_file_may_have_dataclasses_and_neighbours_and_says_what_is_wrong_with_it(splits, tmp_path):
    (tmp_path / "neighbour_of_bend.py").write_text("WIDTH = 5\n")
    (tmp_path / "model.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "from neighbour_of_bend import WIDTH\n@dataclass\nclass Shape:\n    width: int = WIDTH\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, Shape().width), nn.Linear(5, 10))\n"
    )
    assert FromFile(tmp_path / "model.py", "make")(splits, 0)[1].out_features == 5
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"a Python file that runs, got .*broken.py: ZeroDivisionError"):
        FromFile(tmp_path / "broken.py", "make")(splits, 0)
