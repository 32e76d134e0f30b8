"""The readers: IDX, CIFAR-10, npz, CSV and text, on small files and on corrupt, truncated and hostile ones."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from splitlearn.data import Schema, Tokenizer, load_cifar10, load_csv, load_idx, load_lines, load_npz
from splitlearn.data.archives import load_mitbih, load_orl_faces, read_npz
from splitlearn.data.cifar import read_batch

RNG = np.random.default_rng(0)

# IDX


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx(folder: Path, n: int, *, prefix: str = "", packed: bool = False) -> tuple[Path, Path, np.ndarray]:
    pixels = RNG.integers(0, 256, (n, 5, 4), dtype=np.uint8)
    images, labels = folder / f"{prefix}images", folder / f"{prefix}labels"
    for path, array in ((images, pixels), (labels, np.arange(n, dtype=np.uint8) % 3)):
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return images, labels, pixels


@pytest.mark.parametrize("packed", [False, True])
def test_idx_holds_the_pixels_that_were_written(tmp_path: Path, packed: bool) -> None:
    images, labels, pixels = write_idx(tmp_path, 9, packed=packed)
    test_images, test_labels, held = write_idx(tmp_path, 4, prefix="test-", packed=packed)
    data = load_idx(images, labels, test_images=test_images, test_labels=test_labels)
    assert tuple(data.x.shape) == (13, 1, 5, 4)
    assert np.array_equal((data.x[:, 0] * 255).round().byte().numpy(), np.concatenate([pixels, held]))
    assert data.y.tolist() == [0, 1, 2] * 3 + [0, 1, 2, 0]
    assert (data.num_train, data.num_classes, data.kind) == (9, 3, "image")


IDX_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "got nothing"),
    "magic": (lambda raw: b"\x00\x00\x0d\x03" + raw[4:], "begins 00000803, got 00000d03"),
    "dimensions": (lambda raw: b"\x00\x00\x08\x01" + raw[4:], "images and labels are not exchanged"),
    "header": (lambda raw: raw[:9], "begins 00000803"),
    "truncated": (lambda raw: raw[:-1], "expected 180 bytes for shape"),
    "longer": (lambda raw: raw + b"x", "got more"),
    "forged": (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "cannot hold them"),
    "truncated gzip": (lambda raw: gzip.compress(raw)[:-20], "truncated or corrupt gzip"),
    "wrong sum": (lambda raw: gzip.compress(raw)[:-8] + b"\0" * 8, "truncated or corrupt gzip"),
    "garbled gzip": (lambda raw: gzip.compress(raw)[:12] + b"\xff" * 40, "truncated or corrupt gzip"),
    "not deflate": (lambda raw: b"\x1f\x8b\x07" + raw, "truncated or corrupt gzip"),
}


@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_damaged_idx_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    images, labels, _ = write_idx(tmp_path, 9)
    spoil, message = IDX_DAMAGE[damage]
    images.write_bytes(spoil(images.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load_idx(images, labels)
    assert str(images) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_idx_files_that_do_not_belong_together(tmp_path: Path) -> None:
    images, labels, _ = write_idx(tmp_path, 9)
    _, other, _ = write_idx(tmp_path, 8, prefix="other-")
    with pytest.raises(ValueError, match="expected a label for each image, got 9"):
        load_idx(images, other)
    with pytest.raises(ValueError, match="got one of them"):
        load_idx(images, labels, test_images=images)
    wide = tmp_path / "wide"
    wide.write_bytes(idx(np.zeros((9, 2, 2), np.uint8)))
    with pytest.raises(ValueError, match=r"expected images of \(5, 4\)"):
        load_idx(images, labels, test_images=wide, test_labels=labels)
    with pytest.raises(LookupError, match="expected a data file at"):
        load_idx(tmp_path / "none", labels)


# CIFAR-10


def batch(n: int, first: int = 0) -> dict[bytes, object]:
    pixels = np.random.default_rng(first).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"batch_label": b"toy", b"labels": [(first + row) % 10 for row in range(n)], b"data": pixels}


def python2_pickle(n: int) -> tuple[bytes, np.ndarray]:
    """Return a batch in the very opcodes of the official files, which Python 2's cPickle wrote, and its pixels."""
    pixels = RNG.integers(0, 256, (n, 3072), dtype=np.uint8)
    raw = b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x03toyq\x03U\x06labelsq\x04]q\x05("
    raw += b"".join(b"K" + bytes([row % 10]) for row in range(n)) + b"e"
    raw += b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\n"
    raw += b"(K\x01K" + bytes([n]) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x0bU\x02u1K\x00K\x01\x87Rq\x0c"
    raw += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + pixels.nbytes.to_bytes(4, "little")
    return raw + pixels.tobytes() + b"tb" + b"u.", pixels


def archive(folder: Path, batches: dict[str, bytes]) -> Path:
    path = folder / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_cifar_batches_of_any_pickle_protocol(protocol: int) -> None:
    wanted = batch(3)
    if protocol < 5:
        x, y = read_batch(pickle.dumps(wanted, protocol=protocol), "here")
        assert np.array_equal(x.numpy().reshape(3, 3072), wanted[b"data"])  # type: ignore[arg-type]
        assert y.tolist() == wanted[b"labels"]
    else:  # numpy writes protocol 5 by another function, which no official batch names
        with pytest.raises(ValueError, match="which is refused"):
            read_batch(pickle.dumps(wanted, protocol=protocol), "here")


def test_a_cifar_batch_as_python_2_wrote_it_agrees_with_pickle() -> None:
    raw, pixels = python2_pickle(5)
    x, y = read_batch(raw, "here")
    assert np.array_equal(x.numpy().reshape(5, 3072), pixels)
    assert y.tolist() == [0, 1, 2, 3, 4]


def test_the_cifar_archive_in_its_order_whatever_the_order_of_its_members(tmp_path: Path) -> None:
    parts = {name: batch(2, place) for place, name in enumerate(BATCHES)}
    raw = {name: pickle.dumps(parts[name], protocol=2) for name in reversed(BATCHES)}
    data = load_cifar10(archive(tmp_path, {"batches.meta": b"not read", **raw}))
    assert (len(data), data.num_train, data.num_classes) == (12, 10, 10)
    assert data.y.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    expected = np.concatenate([np.asarray(parts[name][b"data"]) for name in BATCHES]).reshape(12, 3, 32, 32)
    assert np.array_equal((data.x * 255).round().byte().numpy(), expected)


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    hostile = {**batch(1), b"extra": Evil(Path.touch, witness)}
    pickle.loads(pickle.dumps(hostile))
    assert witness.exists()  # the payload works where nothing is restricted
    witness.unlink()
    parts = {name: pickle.dumps(batch(1), protocol=2) for name in BATCHES}
    path = archive(tmp_path, {**parts, "data_batch_3": pickle.dumps(hostile, protocol=2)})
    with pytest.raises(ValueError, match=r"data_batch_3: not a CIFAR-10 batch \(it names .*, which is refused\)"):
        load_cifar10(path)
    assert not witness.exists()


@pytest.mark.parametrize("function", [eval, exec, print, getattr, np.load, np.zeros, bytearray])
def test_every_other_name_is_refused(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="which is refused"):
        read_batch(pickle.dumps(Evil(function, "1"), protocol=2), "here")


def test_not_even_numpys_reconstruction_runs() -> None:
    huge = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x8a\x06\0\0\0\0\0\x10\x85U\x01b\x87R."
    with pytest.raises(ValueError, match="expected an array b'data'"):  # 2^44 bytes, were it numpy
        read_batch(huge, "here")
    memo = b"\x80\x02]r\xff\xff\xff\x7f."  # a place in the memo that would take 32 GB
    with pytest.raises(ValueError, match="place 2147483647 in the memo"):
        read_batch(memo, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"labels": [0]}, "expected an array b'data'"),
        ({**batch(2), b"labels": [0]}, "expected 1 rows of 3072"),
        ({**batch(2), b"labels": [0, 10]}, "expected labels from 0 to 9"),
        ({**batch(2), b"labels": ["0", "1"]}, "expected labels from 0 to 9"),
        ({**batch(2), b"data": np.zeros((2, 3072), np.float32)}, "got f4 of shape"),
        ({**batch(2), b"data": np.array([object()])}, "not a CIFAR-10 batch"),
        ([1, 2], "expected an array b'data'"),
    ],
)
def test_other_content_than_a_cifar_batch(content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_batch(pickle.dumps(content, protocol=2), "here")


def test_a_damaged_cifar_archive(tmp_path: Path) -> None:
    parts = {name: pickle.dumps(batch(2), protocol=2) for name in BATCHES}
    path = archive(tmp_path, {name: raw for name, raw in parts.items() if name != "test_batch"})
    with pytest.raises(ValueError, match="cifar-10-batches-py/test_batch missing"):
        load_cifar10(path)
    path = archive(tmp_path, parts)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive at all", whole[:500] + b"\0" * 500 + whole[1000:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="fetch the file again"):
            load_cifar10(path)
    with pytest.raises(LookupError, match="expected a data file at"):
        load_cifar10(tmp_path / "none")
    with pytest.raises(ValueError, match="not a CIFAR-10 batch"):
        read_batch(parts["test_batch"][:-7], "here")


# npz


def test_npz_of_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "toy.npz"
    y = np.array([0, 1, 2], np.uint8)
    pixels = RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    np.savez_compressed(path, x=pixels, y=y, groups=np.array([7, 7, 8]), num_train=np.array(2))
    data = load_npz(path, kind="image")
    assert torch.equal(data.x, torch.from_numpy(pixels).unsqueeze(1).float() / 255)
    assert (data.name, data.num_train, data.num_classes) == ("toy", 2, 3)
    assert data.groups is not None
    assert data.groups.tolist() == [7, 7, 8]
    np.savez(path, x=np.asfortranarray(RNG.normal(size=(3, 6)).astype(">f8")), y=y)
    assert tuple(load_npz(path, kind="signal").x.shape) == (3, 1, 6)
    with np.load(path) as arrays:
        assert torch.equal(load_npz(path, kind="table").x, torch.from_numpy(arrays["x"].astype(np.float32)))
    np.savez(path, x=np.array([[1, 2], [3, 0], [4, 0]], np.int16), y=y)
    assert load_npz(path, kind="tokens", name="words").x.tolist() == [[1, 2], [3, 0], [4, 0]]


def test_npz_that_must_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "toy.npz"
    witness = tmp_path / "witness"
    np.savez(path, x=np.array([Evil(Path.touch, witness)], dtype=object), y=np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="pickled objects are refused"):
        load_npz(path, kind="table")
    assert not witness.exists()
    np.savez(path, x=np.zeros((2, 2)), y=np.zeros(2))
    with pytest.raises(ValueError, match="expected y as integers, got float64"):
        load_npz(path, kind="table")
    np.savez(path, x=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="expected the arrays x, y, y missing"):
        load_npz(path, kind="table")
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable archive"):
            load_npz(path, kind="table")
    with pytest.raises(LookupError, match="expected a data file at"):
        load_npz(tmp_path / "none.npz", kind="table")


def test_a_forged_npz_size_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "toy.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 44,)})
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("x.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(ValueError, match="x promises shape"):
        read_npz(path, "x")
    content = bytearray(path.read_bytes())
    sizes = content.rindex(b"PK\x01\x02") + 24  # the uncompressed size in the central directory
    content[sizes : sizes + 4] = (1 << 31).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot hold"):
        read_npz(path, "x")


def test_mitbih_beats_are_millivolts_of_the_window(tmp_path: Path) -> None:
    path = tmp_path / "beats.npz"
    counts = RNG.integers(0, 2048, (6, 256)).astype(np.int16)
    record = np.array([100, 100, 203, 203, 203, 119], np.int16)
    arrays = {"y": np.array([0, 1, 2, 3, 4, 0], np.uint8), "record": record, "adc_zero": 1024, "adc_gain": 200.0}
    np.savez(path, x=counts, **arrays)
    data = load_mitbih(path)
    assert torch.equal(data.x[:, 0], torch.from_numpy(((counts[:, 64:192] - 1024) / 200).astype(np.float32)))
    assert (data.kind, data.num_classes) == ("signal", 5)
    assert data.groups is not None
    assert data.groups.tolist() == record.tolist()
    assert tuple(load_mitbih(path, first=0, last=256).x.shape) == (6, 1, 256)
    with pytest.raises(ValueError, match="expected a window inside beats"):
        load_mitbih(path, first=200, last=300)


def test_orl_faces(tmp_path: Path) -> None:
    path = tmp_path / "faces.npz"
    pixels = RNG.integers(0, 256, (4, 6, 5), dtype=np.uint8)
    np.savez(path, x=pixels, y=np.array([0, 0, 39, 39], np.uint8))
    data = load_orl_faces(path)
    assert torch.equal((data.x[:, 0] * 255).round().byte(), torch.from_numpy(pixels))
    assert (data.num_classes, data.y.tolist()) == (40, [0, 0, 39, 39])
    np.savez(path, x=pixels.astype(np.float32), y=np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="expected faces as uint8"):
        load_orl_faces(path)


# CSV

SCHEMA = Schema(target="sick", classes={"no": 0, "yes": 1}, numeric=("age",), categorical=("town",), group="who")
ROWS = 'age,town,unused,sick,who\n40,"Köln",1,no,ann\n50,Ulm,2,yes,bob\n60,"Köln",3,yes,ann\n'


def test_csv_numbers_one_hot_groups_and_names(tmp_path: Path) -> None:
    path = tmp_path / "people.csv.gz"
    path.write_bytes(gzip.compress(ROWS.encode()))
    data = load_csv(path, SCHEMA)
    assert data.x.tolist() == [[40, 1, 0], [50, 0, 1], [60, 1, 0]]
    assert data.names == ("age", "town=Köln", "town=Ulm")
    assert (data.name, data.y.tolist(), data.num_train) == ("people", [0, 1, 1], None)
    assert data.groups is not None
    assert data.groups.tolist() == [0, 1, 0]


def test_csv_categories_come_from_the_training_rows(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text(ROWS, encoding="utf-8")
    test.write_text("who,sick,town,age,unused\neve,no,Bonn,30,9\r\neve,yes,Ulm,31,9\r\n", encoding="utf-8")
    data = load_csv(train, SCHEMA, test=test)
    assert data.num_train == 3
    assert data.names == load_csv(train, SCHEMA).names
    assert data.x[3:].tolist() == [[30, 0, 0], [31, 0, 1]]


def test_csv_without_header_with_comments_and_another_separator(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("|made by hand\n1; a; no\n\n|more\n2; b; yes.\n")
    schema = Schema("t", {"no": 0, "yes.": 1}, ("n",), ("c",), separator=";", header=("n", "c", "t"), comment="|")
    assert load_csv(path, schema).x.tolist() == [[1, 1, 0], [2, 0, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected the columns age, town, sick, who, got an empty file"),
        ("age;town;sick;who\n1;2;3;4\n", "expected the columns age, town, sick, who, got age;town;sick;who"),
        ("age,town,sick,who\n", "expected rows below the header"),
        (ROWS + "1,2\n", "line 5: expected 5 cells, got 2"),
        (ROWS + "old,Ulm,1,no,eve\n", "line 5: expected a finite number in column 'age', got 'old'"),
        (ROWS + "nan,Ulm,1,no,eve\n", "line 5: expected a finite number in column 'age', got 'nan'"),
        (ROWS + "1,Ulm,1,maybe,eve\n", "line 5: expected 'sick' among no, yes, got 'maybe'"),
        (ROWS + '1,"Ulm,1,maybe,eve\n', "not a CSV line"),
        (ROWS.encode("latin-1"), "convert the file to UTF-8"),
    ],
)
def test_bad_csv_names_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "people.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as caught:
        load_csv(path, SCHEMA)
    assert str(path) in str(caught.value)


def test_bad_schemas() -> None:
    with pytest.raises(ValueError, match="expected numeric or categorical columns"):
        Schema("y", {"a": 0})
    with pytest.raises(ValueError, match=r"got \[0, 2\]"):
        Schema("y", {"a": 0, "b": 2}, ("n",))


# text


def test_tokens_are_ranked_by_the_training_corpus(tmp_path: Path) -> None:
    train, test = tmp_path / "train.tsv", tmp_path / "test.tsv"
    train.write_text("the cat sat on the mat\t1\r\nThe dog\t0\n\n")
    test.write_text("the bird sat\t1\n")
    data = load_lines(train, label="last", test=test, length=4, num_words=100)
    assert data.names is not None
    assert data.names == ("<pad>", "<unk>", "the", "cat", "dog", "mat", "on", "sat")
    assert data.x.tolist() == [[2, 3, 7, 6], [2, 4, 0, 0], [2, 1, 7, 0]]
    assert (data.y.tolist(), data.num_train, data.num_classes) == ([1, 0, 1], 2, 2)
    assert Tokenizer(data.names, 4).decode(data.x[2:]) == ["the <unk> sat"]


def test_the_vocabulary_is_capped_and_an_unknown_word_in_brackets_is_no_special_token() -> None:
    tokenizer = Tokenizer.fit(["a a a b b c", "<pad> d"], num_words=4, length=3)
    assert tokenizer.words == ("<pad>", "<unk>", "a", "b")
    assert tokenizer.encode(["c b a", "<pad>"]).tolist() == [[1, 3, 2], [1, 0, 0]]
    with pytest.raises(ValueError, match="expected num_words of at least 3"):
        Tokenizer.fit(["a"], num_words=2, length=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected lines of a label and a sentence, got none"),
        ("0 fine\nnone here\n", "line 2: expected a sentence with its label first"),
        ("0\n", "line 1"),
        ("-1 word\n", "line 1"),
        ("² word\n", "line 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "lines.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_lines(path, label="first", separator=" ")


def test_test_labels_beyond_the_training_ones_are_out_of_range(tmp_path: Path) -> None:
    train, test = tmp_path / "train", tmp_path / "test"
    train.write_text("0 a\n1 b\n")
    test.write_text("2 c\n")
    with pytest.raises(ValueError, match="expected labels from 0 to 1, got 0 to 2"):
        load_lines(train, label="first", separator=" ", test=test)
