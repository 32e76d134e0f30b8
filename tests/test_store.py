"""The store keeps whole records or none, says what is wrong with a file, and writes one tidy table."""

import csv
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from experiments.record import Leakage, Record, trial_hash
from experiments.store import RESULT_COLUMNS, Store, strength_order, write_atomically


def record(seed=0, status="done", **fields):
    config = {"seed": seed, "noise": fields.get("strength", "")}
    plain = {
        "experiment": "tiny",
        "trial": trial_hash(config),
        "config": config,
        "command": "splitlearn run tiny",
        "status": status,
        "seed": seed,
        "data": "digits",
        "protocol": "vanilla",
        "cut": "relu1",
        "protection": "none",
        "strength": "",
    }
    return Record(**{**plain, **fields})


LEAK = Leakage(
    attack="decoder",
    family="reconstruction",
    advantage=0.75,
    metrics={"mse": 0.01, "psnr": math.inf},
    baselines={"mse_mean_image": 0.07, "mse_class_mean_image": 0.04, "psnr_mean_image": 11.0},
)


def test_a_record_comes_back_as_it_was(tmp_path):
    store = Store(tmp_path)
    kept = record(leakage=[LEAK], utility={"accuracy": 0.5, "auc": math.inf}, epsilon=1.5)
    images = {"original": torch.rand(2, 1, 3, 4), "decoder": torch.rand(3, 4, 1, 2).permute(3, 2, 0, 1)}
    store.save(kept, images)
    assert store.load(kept.trial) == kept
    assert store.records() == [kept]
    assert store.finished(kept.trial)
    loaded = store.images(kept.trial)
    assert set(loaded) == set(images)
    assert all(torch.equal(loaded[name], images[name]) for name in images)
    names = {path.name for path in (tmp_path / "trials" / kept.trial).iterdir()}
    assert names == {"record.json", "images.safetensors"}


def test_what_is_not_there_is_none_and_not_finished(tmp_path):
    store = Store(tmp_path / "nowhere")
    assert store.load("0" * 16) is None
    assert not store.finished("0" * 16)
    assert store.records() == []
    assert store.images("0" * 16) == {}
    assert not (tmp_path / "nowhere").exists()


def test_a_failure_keeps_its_traceback_until_the_trial_is_done(tmp_path):
    store = Store(tmp_path)
    store.save(record(status="failed", error="ValueError: no"), traceback="Traceback …\nValueError: no")
    trial = record().trial
    assert not store.finished(trial)
    assert store.traceback(trial).endswith("ValueError: no")
    store.save(record())
    assert store.finished(trial)
    assert store.traceback(trial) == ""


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 2}', "\x00\xff"])
def test_a_corrupt_record_is_one_line_that_names_file_and_fix(tmp_path, damage):
    store = Store(tmp_path)
    store.save(record(seed=1))
    store.save(record(seed=2))
    path = tmp_path / "trials" / record(seed=1).trial / "record.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"expected a record in .*record\.json.*delete the folder") as error:
        store.records()
    assert "\n" not in str(error.value)
    records, problems = store.survey()
    assert records == [record(seed=2)]
    assert problems == [str(error.value)]


def test_a_record_in_the_wrong_folder_is_refused(tmp_path):
    store = Store(tmp_path)
    store.save(record())
    (tmp_path / "trials" / record().trial).rename(tmp_path / "trials" / "elsewhere")
    with pytest.raises(ValueError, match="rename the folder"):
        store.records()


def test_corrupt_images_are_one_line(tmp_path):
    store = Store(tmp_path)
    store.save(record(), {"original": torch.rand(1, 1, 2, 2)})
    (tmp_path / "trials" / record().trial / "images.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="expected images in"):
        store.images(record().trial)


@pytest.mark.parametrize(
    "images",
    [
        {"decoder": torch.rand(1, 1, 2, 2)},
        {"original": torch.rand(2, 2)},
        {"original": torch.rand(1, 1, 2, 2), "decoder": torch.rand(1, 1, 2, 3)},
    ],
)
def test_images_must_stand_beside_their_originals(tmp_path, images):
    with pytest.raises(ValueError, match="expected images 'original' and one per attack"):
        Store(tmp_path).save(record(), images)
    assert not Store(tmp_path).finished(record().trial)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="expected a folder that can be written") as error:
            Store(root).prepare()
        assert "\n" not in str(error.value)
    Store(tmp_path / "new" / "folder").prepare()
    assert list((tmp_path / "new" / "folder" / "trials").iterdir()) == []


def test_results_have_one_row_per_trial_and_metric(tmp_path):
    store = Store(tmp_path)
    store.save(
        record(
            utility={"accuracy": 0.9},
            leakage=[LEAK],
            nbytes={"up": {"activation": 70, "frame": 5}, "down": {"gradient": 30}},
            seconds={"train": 1.25},
            strength="a,b",
        )
    )
    store.save(record(seed=3, status="failed", error="ValueError: no"))
    with store.write_results().open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == RESULT_COLUMNS
    assert {row["strength"] for row in rows} == {"a,b"}
    figures = {(row["attack"], row["metric"]): (row["value"], row["baseline"]) for row in rows}
    assert len(figures) == len(rows)
    assert figures == {
        ("", "accuracy"): ("0.9", ""),
        ("", "bytes_up"): ("75", ""),
        ("", "bytes_up_activation"): ("70", ""),
        ("", "bytes_up_frame"): ("5", ""),
        ("", "bytes_down"): ("30", ""),
        ("", "bytes_down_gradient"): ("30", ""),
        ("", "bytes_total"): ("105", ""),
        ("", "seconds_train"): ("1.25", ""),
        ("decoder", "advantage"): ("0.75", ""),
        ("decoder", "mse"): ("0.01", "0.04"),
        ("decoder", "psnr"): ("inf", "11.0"),
    }


def test_records_are_sorted_by_strength_as_a_number(tmp_path):
    store = Store(tmp_path)
    for strength in ("10", "0.5", "2"):
        for seed in (1, 0):
            store.save(record(seed, protection="noise", strength=strength))
    store.save(record(0))
    order = [(kept.protection, kept.strength, kept.seed) for kept in store.records()]
    assert order == [("none", "", 0)] + [("noise", s, seed) for s in ("0.5", "2", "10") for seed in (0, 1)]


def test_strengths_with_words_sort_by_their_number():
    strengths = ["k=10 %", "weight", "σ=2", "σ=0.5", "", "1e-3", ".25"]
    assert sorted(strengths, key=strength_order) == ["", "1e-3", ".25", "σ=0.5", "σ=2", "k=10 %", "weight"]


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "a.txt", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import signal
import sys
from pathlib import Path
from experiments.store import write_atomically
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
path = Path(sys.argv[1])
while True:
    for letter in (b"a", b"b"):
        write_atomically(path, letter * 300_000)
"""


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_a_writer_that_is_stopped_in_the_middle_leaves_a_whole_file(tmp_path, blow):
    path = tmp_path / "a.txt"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05)
        writer.send_signal(blow)
        writer.wait(timeout=30)
    finally:
        writer.kill()
        writer.wait()
    content = path.read_bytes()
    assert content in (b"a" * 300_000, b"b" * 300_000)
