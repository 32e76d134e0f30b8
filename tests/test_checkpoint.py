"""Checkpoints: every value comes back, every damaged byte is found, and no file is ever half written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from splitlearn.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from splitlearn.party import Learner

TREE = {
    "tensors": [
        torch.randn(3, 2).double(), torch.tensor(7), torch.zeros(0, 4), torch.tensor([True, False]),
        torch.randn(4).bfloat16(), torch.arange(6).reshape(2, 3).T, torch.randn(4, 4)[::2, ::2][:0],
    ],
    "numbers": (1, -2.5, 1e-300, float("inf"), 2**80, True, False, None),
    "text": "Zürich \n \"'\U0001f600",
    1: {"keys": "of any kind"}, (1, "a"): [], None: {}, 0.5: ((),),
}  # fmt: skip


def assert_same(one: object, other: object) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other)
        for mine, yours in zip(one, other, strict=True):
            assert_same(mine, yours)
    else:
        assert one == other


def test_every_kind_of_value_comes_back(tmp_path):
    path = tmp_path / "deep" / "below" / "a.ckpt"
    save_checkpoint(path, TREE)
    assert_same(load_checkpoint(path), TREE)
    for bare in (None, 3, "x", torch.ones(2), [], {}):
        save_checkpoint(path, bare)
        assert_same(load_checkpoint(path), bare)


def test_tensors_that_share_memory_come_back_apart(tmp_path):
    weight = nn.Parameter(torch.ones(2))
    save_checkpoint(tmp_path / "a", {"one": weight, "other": weight, "part": weight[:1]})
    back = load_checkpoint(tmp_path / "a")
    back["one"].zero_()
    assert back["other"].tolist() == [1, 1]
    assert back["part"].tolist() == [1]


def test_a_resumed_learner_goes_on_to_the_same_bits(tmp_path):
    def learner() -> Learner:
        torch.manual_seed(3)
        stage = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        return Learner("server", stage, torch.optim.Adam(stage.parameters(), lr=0.01), seed=5)

    x, y = torch.randn(6, 4), torch.arange(6) % 3
    one, other = learner(), learner()
    for _ in range(3):
        one.learn(x, y)
    save_checkpoint(tmp_path / "a", one.state_dict())
    other.load_state_dict(load_checkpoint(tmp_path / "a"))
    for _ in range(3):
        assert torch.equal(one.learn(x, y)[0], other.learn(x, y)[0])
    assert_same(one.weights(), other.weights())


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", torch.float32, {"a": [lambda: 0]}])
def test_anything_else_is_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match="a checkpoint holds tensors and plain values, got"):
        save_checkpoint(tmp_path / "a", value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.ckpt"
    save_checkpoint(path, {"w": torch.randn(3, 2), "lr": 0.1, "y": torch.tensor([True, False])})
    return path


def test_every_flipped_byte_is_found(small):
    whole = small.read_bytes()
    for at, byte in enumerate(whole):
        bits = range(8) if at >= len(whole) - 26 else [at % 8]  # the tensors are the last 26 bytes
        for bit in bits:
            small.write_bytes(whole[:at] + bytes([byte ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=f"{small.name} is ") as caught:
                load_checkpoint(small)
            assert caught.type is ValueError


def test_every_truncation_and_every_surplus_is_found(small):
    whole = small.read_bytes()
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is cut short or not a checkpoint"):
            load_checkpoint(small)
    small.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is cut short or not a checkpoint"):
        load_checkpoint(small)


def test_a_flipped_byte_of_a_tensor_is_named_as_damage(small):
    whole = bytearray(small.read_bytes())
    whole[-5] ^= 1
    small.write_bytes(whole)
    with pytest.raises(ValueError, match=r"is damaged: expected checksum [0-9a-f]{8}, got [0-9a-f]{8}; delete it"):
        load_checkpoint(small)


def test_a_changed_shape_is_damage_too(small):
    whole = small.read_bytes()
    assert whole.count(b'"shape":[3,2]') == 1
    small.write_bytes(whole.replace(b'"shape":[3,2]', b'"shape":[2,3]'))
    with pytest.raises(ValueError, match="is damaged: expected checksum"):
        load_checkpoint(small)


def test_no_file_and_a_strange_file_are_told_apart(tmp_path):
    with pytest.raises(LookupError, match=r"expected a checkpoint at .*, found none"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(LookupError, match="found none"):
        load_checkpoint(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "strange")
    with pytest.raises(ValueError, match="not a checkpoint of this toolkit"):
        load_checkpoint(tmp_path / "strange")
    torch.save({"w": torch.ones(2)}, tmp_path / "pickled")
    with pytest.raises(ValueError, match="is cut short or not a checkpoint"):
        load_checkpoint(tmp_path / "pickled")


def test_a_newly_written_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_the_permissions_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace", "pathlib.Path.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(broken, fails)
    with pytest.raises((ValueError, KeyboardInterrupt)) as caught:
        write_atomically(path, b"new")
    if isinstance(error, OSError):
        assert "cannot be written (No space left on device); free space" in str(caught.value)
    else:
        assert caught.type is KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "a", Path("/proc/none/a"), tmp_path):
        with pytest.raises(ValueError, match=r"cannot be written .*choose another folder"):
            write_atomically(path, b"")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


WRITER = """
import sys
from pathlib import Path
import torch
from splitlearn.checkpoint import save_checkpoint
while True:
    for value in (0.0, 1.0):
        save_checkpoint(Path(sys.argv[1]), torch.full((500_000,), value))
"""


def test_a_writer_killed_in_the_middle_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "a"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for _ in range(20):  # a reader beside it never sees a half-written one
            assert load_checkpoint(path).unique().numel() == 1
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(timeout=30) == -signal.SIGKILL
    finally:
        writer.kill()
        writer.wait()
    assert load_checkpoint(path).unique().numel() == 1
