"""Paradigms side by side: each one trains, what crosses is counted, and what surveys say is held against it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.courses import PARADIGMS, RATES
from experiments.experiment import Options
from experiments.fleet import Fleet, network_seconds
from experiments.paradigm_plot import claims_table, paradigm_table, paradigms
from experiments.paradigms import COMPARISON, Config, tasks
from experiments.record import Leakage, Record
from experiments.summary import summarise
from experiments.training import Training, load_splits
from splitlearn.network import PROFILES, Profile
from splitlearn.train import predict

TOY = Config(paradigms=("fedavg",), clients=4, rounds=1, private=80, auxiliary=40, targets=8, alpha=1.0)
ONE = Options(seeds=(0,))
SPLITS = load_splits("digits", None, sizes=(80, 40, 100))


def fleet(name: str, alpha: float | None = None, rounds: int = 1) -> Fleet:
    training = Training(
        protocol=name, cut="relu2", epochs=rounds, batch_size=16, optimizer="sgd", lr=RATES[name], clients=4
    )
    return Fleet(training, SPLITS, alpha)


def test_each_paradigm_trains_and_its_traffic_is_what_its_entry_says():
    for name, paradigm in PARADIGMS.items():
        own = fleet(name)
        course = paradigm.build(own)
        before = [[w.clone() for w in chain[-1].weights().values()] for chain in course.chains()]
        _, flops = own.cloud.count(course.round)
        after = [list(chain[-1].weights().values()) for chain in course.chains()]
        assert any(
            not torch.equal(a, b)
            for one, other in zip(before, after, strict=True)
            for a, b in zip(one, other, strict=True)
        ), name
        kinds = {kind for way in own.traffic.nbytes.values() for kind, n in way.items() if n}
        sent = "input" if name in ("local_loss", "central") else "activation"  # what asks for no gradient is an input
        assert (sent in kinds) == any(word in paradigm.leaves for word in ("activations", "samples and")), name
        entries = name == "answers"  # which cross as entries of a round
        assert ("weights" in kinds) == (entries or any(word in paradigm.leaves for word in ("weights", "bottoms"))), (
            name
        )
        assert ("input" in kinds) == (name in ("local_loss", "central")), name
        assert ("gradient" in kinds) == (name in ("split", "splitfed_v1", "splitfed_v2")), name
        assert flops >= own.cloud.flops
        assert (own.cloud.flops > 0) == ("cloud" in paradigm.partitioning), name


def test_operations_of_split_training_add_up_to_those_of_the_whole_model():
    whole = fleet("central")
    _, all_of_it = whole.cloud.count(PARADIGMS["central"].build(whole).round)
    halves = fleet("split")
    _, both = halves.cloud.count(PARADIGMS["split"].build(halves).round)
    assert both == all_of_it == whole.cloud.flops
    assert 0 < halves.cloud.flops < both


def test_frames_take_the_time_of_the_network_and_no_more_where_nobody_waits():
    slow = Profile(up=8e6, down=8e6, latency=0.1)
    waits = network_seconds([("up", 1000), ("down", 1000)] * 10, slow)
    assert waits == pytest.approx(10 * 2 * (0.1 + 1052 * 8 / 8e6), rel=1e-6)
    streamed = network_seconds([("up", 1000), ("down", 1000)] * 10, slow, streamed=True)
    assert 0.2 < streamed < 0.4
    assert network_seconds([], slow) == 0
    alone = network_seconds([("down", 1000)], slow)  # nobody waits for word that it has arrived
    assert alone == pytest.approx(0.1 + 1052 * 8 / 8e6)
    assert network_seconds([("down", 500)] * 2, slow, streamed=True) == pytest.approx(alone)
    lan, satellite = (network_seconds([("up", 10_000), ("down", 100)], PROFILES[one]) for one in ("lan", "satellite"))
    assert satellite > 100 * lan


def test_devices_that_are_unlike_hold_fewer_classes():
    even, unlike = (sum(len(y.unique()) for _, y in fleet("fedavg", alpha).shares()) for alpha in (None, 0.1))
    assert unlike < even
    rows = [len(x) for x, _ in fleet("fedavg", 0.1).shares()]
    assert sum(rows) == 80
    assert min(rows) >= 2


def test_a_trial_of_split_learning_says_what_leaks_and_is_the_same_again():
    [task] = tasks(replace(TOY, paradigms=("split",)), ONE)
    first, second = task.call(), task.call()
    assert first.utility == second.utility
    assert first.nbytes == second.nbytes
    found = {leak.attack: leak for leak in first.leakage}
    assert found["sent_labels"].advantage == 1
    assert found["decoder"].advantage > 0.3  # an undefended, shallow bottom of 80 samples
    assert set(found) == {"sent_labels", "decoder", "loss_threshold"}
    assert first.utility["edge_parameters"] == 160 + 4640
    assert {"accuracy", "accuracy_non_iid", "network_seconds_satellite"} <= set(first.utility)
    assert "server" in first.visible


def test_a_trial_of_federated_learning_is_attacked_by_its_updates_and_sends_no_activation():
    [task] = tasks(TOY, ONE)
    done = task.call()
    assert {leak.attack for leak in done.leakage} == {"inverting_gradients", "loss_threshold"}
    assert not any(kind.startswith("activation") for way in done.nbytes.values() for kind in way)
    assert done.utility["cloud_flops"] == 0 < done.utility["edge_flops"]


def test_a_teacher_stands_beside_what_its_public_labels_are_worth_alone():
    [task] = tasks(replace(TOY, paradigms=("teacher",)), ONE)
    done = task.call()
    assert 0 < done.utility["accuracy_public_alone"] < 1
    assert any(note.startswith("accuracy_public_alone") for note in done.notes)
    assert not PARADIGMS["answers"].build(fleet("answers")).baselines
    even, unlike = (
        PARADIGMS["teacher"].build(fleet("teacher", alpha, rounds=30)).baselines["accuracy_public_alone"]()
        for alpha in (None, 0.1)
    )
    x, y = SPLITS.auxiliary.x, SPLITS.auxiliary.y
    assert torch.equal(predict(even, x), predict(unlike, x))  # whatever devices hold
    assert (predict(even, x).argmax(1) == y).double().mean() > 0.7  # of ten classes


def test_names_and_numbers_are_checked_before_any_work():
    with pytest.raises(LookupError, match="fedavgg"):
        tasks(replace(TOY, paradigms=("fedavgg",)), ONE)
    with pytest.raises(ValueError, match="at least one of --paradigms"):
        tasks(replace(TOY, paradigms=()), ONE)
    with pytest.raises(ValueError, match="--clients of 3 or more"):
        tasks(replace(TOY, clients=2), ONE)
    with pytest.raises(ValueError, match="--targets"):
        tasks(replace(TOY, targets=0), ONE)
    with pytest.raises(ValueError, match="--alpha above 0 and finite"):
        tasks(replace(TOY, alpha=float("nan")), ONE)
    with pytest.raises(ValueError, match="raise --private or --alpha, or lower --clients"):
        tasks(replace(TOY, private=6), ONE)
    with pytest.raises(ValueError, match="--rounds of 1 or more"):
        tasks(replace(TOY, rounds=0), ONE)


def test_defaults_have_a_trial_for_each_paradigm_and_seed_and_no_two_alike():
    found = tasks(Config(), Options())
    assert len(found) == len({task.trial for task in found}) == 3 * len(PARADIGMS)
    assert COMPARISON.name == "paradigms"
    assert set(RATES) == set(PARADIGMS)


def record(name: str, seed: int, nbytes: int, lost: float) -> Record:
    leak = Leakage(attack="decoder", family="reconstruction", advantage=0.5, metrics={"mse": 0.1}, baselines={})
    return Record(
        experiment="paradigms", trial=f"{name}{seed}", config={"seed": seed}, command="", status="done", seed=seed,
        data="digits", protocol=name, cut="relu2", protection="none", strength="",
        utility={
            "accuracy": 0.9, "accuracy_non_iid": 0.9 - lost, "messages": 2.0, "edge_flops": 1e6, "cloud_flops": 0.0,
            "edge_parameters": 10.0, **{f"network_seconds_{one}": 1.0 for one in PROFILES},
        },
        leakage=[leak], nbytes={"up": {"weights": nbytes}},
    )  # fmt: skip


def test_what_surveys_say_is_borne_out_contradicted_or_open_by_the_figures(tmp_path: Path):
    records = [
        *(record("fedavg", seed, 100 + seed, 0.1) for seed in range(3)),
        *(record("split", seed, 500, 0.3 + 0.01 * seed) for seed in range(3)),
        *(record("answers", seed, 10, 0.1) for seed in range(3)),
    ]
    points = summarise(records)
    table = claims_table(points)
    assert table is not None
    verdicts = {(row[0].split(":")[0], row[0].rsplit(" ", 1)[-1]): row[-1] for row in table.rows}
    assert verdicts["bytes a round", "split"].startswith("the other way round ")  # which was said of others
    assert verdicts["bytes a round", "answers"] == "as said"
    assert verdicts["accuracy lost to unlike devices", "fedavg"] == "as said"
    assert verdicts["network seconds by satellite", "fedavg"] == "open: no difference"
    swapped = claims_table(summarise([record("answers", s, 500, 0) for s in (0, 1)] + records[:3]))
    assert swapped is not None
    assert [row[-1] for row in swapped.rows if row[0].startswith("bytes")] == ["CONTRADICTED"]
    assert verdicts["leakage of inputs", "split"].startswith("open: no difference ")
    measured = paradigm_table(points)
    assert measured is not None
    assert [row[0] for row in measured.rows] == ["split", "fedavg", "answers"]  # the catalogue's order
    path = tmp_path / "paradigms.png"
    assert paradigms(records, path) == path
    assert path.stat().st_size > 10_000
    assert paradigms([], path) is None
    assert not path.exists()


def test_one_seed_decides_nothing():
    table = claims_table(summarise([record("fedavg", 0, 1, 0.1), record("split", 0, 2, 0.1)]))
    assert table is not None
    assert {row[-1].rstrip(" ¹²") for row in table.rows} == {"open: one seed"}


def test_what_is_not_comparable_is_not_compared():
    def trained(name: str, alpha: float, accuracy: float = 0.9) -> list[Record]:
        found = [record(name, seed, 100, 0.1) for seed in range(2)]
        return [
            one.model_copy(
                update={
                    "config": {**one.config, "alpha": alpha, "training": {"lr": accuracy, "protocol": name}},
                    "utility": {**one.utility, "accuracy": accuracy, "accuracy_non_iid": 0.2 + alpha},
                }
            )
            for one in found
        ]

    records = [*trained("fedavg", 0.1), *trained("fedprox", 0.1), *trained("fedprox", 0.5)]
    table = claims_table(summarise(records))
    assert table is not None
    assert len(table.rows) == 1  # those of one concentration
    measured = paradigm_table(summarise(records))
    assert measured is not None
    assert len({row[0] for row in measured.rows}) == 3
    weak = claims_table(summarise([*trained("fedavg", 0.1), *trained("scaffold", 0.1, 0.5)]))
    assert weak is not None
    assert weak.rows[0][-1].startswith("open: unlike even on even devices")  # it lost less, having had less


def test_the_update_that_is_attacked_is_that_of_the_last_round_alone():
    [task] = tasks(replace(TOY, rounds=2, targets=20), ONE)
    leak = next(leak for leak in task.call().leakage if leak.attack == "inverting_gradients")
    assert len(leak.details["evidence"]["inverting_gradients"]["labels"].split()) == 20  # of 20 samples, once
