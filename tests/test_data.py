"""Data sets, their disjoint parts, their standardisation, their partitions, and the catalogue."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitlearn.data import (
    DATASETS,
    Dataset,
    Splits,
    by_group,
    dirichlet,
    iid,
    load,
    shards,
    split,
    standardise,
    vertical,
)

REAL = Path(os.environ.get("SPLITLEARN_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def table(n: int = 60, *, num_train: int | None = None, groups: Tensor | None = None, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator) * torch.tensor([1.0, 100.0, 1e-3]) + 5
    y = torch.arange(n) % 4
    return Dataset("toy", x, y, 4, "table", torch.arange(n), num_train, groups)


# Dataset


def test_a_subset_keeps_ids_groups_and_the_official_border() -> None:
    data = table(10, num_train=6, groups=torch.arange(10) // 2)
    once = data.subset([9, 3, 5])
    twice = once.subset(torch.tensor([2, 0]))
    assert twice.ids.tolist() == [5, 9]
    assert torch.equal(twice.x, data.x[[5, 9]])
    assert torch.equal(twice.y, data.y[[5, 9]])
    assert twice.groups is not None
    assert twice.groups.tolist() == [2, 4]
    assert twice.num_train == 6
    assert len(twice) == 2


@pytest.mark.parametrize("rows", [[10], [-1]])
def test_a_subset_out_of_range_is_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="expected rows from 0 to 9"):
        table(10).subset(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.full((10,), 4)}, "expected labels from 0 to 3, got 4 to 4"),
        ({"y": torch.full((10,), -1)}, "expected labels from 0 to 3, got -1 to -1"),
        ({"y": torch.zeros(9, dtype=torch.int64)}, r"expected labels as int64 \[10\]"),
        ({"y": torch.zeros(10)}, r"expected labels as int64 \[10\], got torch.float32"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, "expected groups as int64"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "expected ids as int64"),
        ({"kind": "sound"}, "expected a kind among image, signal, table, tokens, got 'sound'"),
        ({"kind": "image"}, r"as float32 \[N, C, H, W\], got torch.float32 of shape \(10, 3\)"),
        ({"x": torch.full((10, 3), torch.nan)}, "expected finite values"),
        ({"x": torch.full((10, 3), torch.inf)}, "expected finite values"),
        ({"x": torch.zeros(10, 3, dtype=torch.float16)}, "got torch.float16"),
        ({"kind": "tokens", "x": torch.full((10, 3), -1)}, "tokens of at least 0"),
        ({"kind": "image", "x": torch.full((10, 1, 2, 2), 1.5)}, r"expected values in \[0, 1\], got 1.5 to 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(table(10), **change)  # type: ignore[arg-type]


def test_its_text_is_short() -> None:
    assert repr(table(10)) == "Dataset(toy: 10 table rows (3,), 4 classes)"


# split


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(0, 5), st.sampled_from([None, 40]))
def test_parts_are_disjoint_and_of_their_sizes(
    private: int, auxiliary: int, test: int, seed: int, num_train: int | None
) -> None:
    data = table(60, num_train=num_train)
    splits = split(data, private=private, auxiliary=auxiliary, test=test, seed=seed)
    ids = [part.ids.tolist() for part in (splits.private, splits.auxiliary, splits.test)]
    assert [len(part) for part in ids] == [private, auxiliary, test]
    assert len({number for part in ids for number in part}) == private + auxiliary + test
    if num_train is not None:
        assert all(number < num_train for number in ids[0] + ids[1])
        assert all(number >= num_train for number in ids[2])
    assert torch.equal(splits.test.x, data.x[splits.test.ids])


def test_the_seed_fixes_a_split_and_another_one_changes_it() -> None:
    def ids(seed: int) -> list[int]:
        return split(table(), private=20, auxiliary=20, test=20, seed=seed).private.ids.tolist()

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


@pytest.mark.parametrize("num_train", [None, 40])
def test_the_test_part_does_not_depend_on_the_others(num_train: int | None) -> None:
    data = table(60, num_train=num_train)
    small = split(data, private=5, auxiliary=0, test=10)
    large = split(data, private=20, auxiliary=20, test=10)
    assert torch.equal(small.test.ids, large.test.ids)


def test_a_split_of_a_subset_respects_the_official_border() -> None:
    shuffled = table(60, num_train=40).subset(torch.arange(59, -1, -1))
    splits = split(shuffled, private=20, auxiliary=20, test=20)
    assert int(splits.private.ids.max()) < 40
    assert int(splits.test.ids.min()) >= 40


@pytest.mark.parametrize(
    ("data", "sizes", "message"),
    [
        (table(60), (40, 20, 1), "expected at most 60 rows for all parts, got 61"),
        (table(60, num_train=40), (40, 1, 5), "expected at most 40 rows for private and auxiliary, got 41"),
        (table(60, num_train=40), (4, 1, 21), "expected at most 20 rows for the official test set, got 21"),
        (table(60), (-1, 1, 1), "expected sizes of at least 0, got private=-1"),
    ],
)
def test_more_rows_than_there_are_is_one_clear_error(data: Dataset, sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(data, private=sizes[0], auxiliary=sizes[1], test=sizes[2])


def test_splits_that_share_rows_are_refused() -> None:
    data = table(30)
    parts = data.subset(range(10)), data.subset(range(10, 20)), data.subset(range(18, 30))
    with pytest.raises(ValueError, match="got 2 rows of auxiliary in test too"):
        Splits(*parts)


def test_by_group_no_group_is_in_two_parts() -> None:
    groups = torch.randint(0, 12, (240,), generator=torch.Generator().manual_seed(0))
    splits = split(table(240, groups=groups), private=80, auxiliary=50, test=40, seed=3, by_group=True)
    parts = [splits.private, splits.auxiliary, splits.test]
    assert [len(part) for part in parts] == [80, 50, 40]
    seen = [set(part.groups.tolist()) for part in parts if part.groups is not None]
    assert len(seen) == 3
    assert sum(len(groups) for groups in seen) == len(set().union(*seen))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (table(60), "expected a data set with groups"),
        (table(60, groups=torch.arange(60) // 30, num_train=30), "expected no official test set"),
        (table(60, groups=torch.arange(60) // 30), "whole groups are dealt"),
    ],
)
def test_by_group_says_why_it_cannot(data: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(data, private=20, auxiliary=20, test=20, by_group=True)


# standardise


def test_standardise_fits_on_the_private_part_alone() -> None:
    data = table(60)
    splits = split(data, private=30, auxiliary=15, test=15)
    scaled = standardise(splits)
    x = splits.private.x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    for before, after in [(splits.private, scaled.private), (splits.test, scaled.test)]:
        torch.testing.assert_close(after.x.double(), (before.x.double() - mean) / std, atol=1e-5, rtol=1e-5)
    shifted = replace(splits, test=replace(splits.test, x=splits.test.x + 1000))
    assert torch.equal(standardise(shifted).private.x, scaled.private.x)
    assert torch.equal(standardise(shifted).auxiliary.x, scaled.auxiliary.x)


def test_standardise_leaves_one_hot_columns_and_centres_constant_ones() -> None:
    data = table(60)
    x = data.x.clone()
    x[:, 0] = (torch.arange(60) % 2).float()
    x[:, 1] = 7.3
    scaled = standardise(split(replace(data, x=x), private=30, auxiliary=15, test=15))
    assert torch.equal(scaled.private.x[:, 0], x[scaled.private.ids, 0])
    assert scaled.test.x[:, 1].abs().max() < 1e-6


def test_standardise_refuses_images_and_an_empty_private_part() -> None:
    image = Dataset("i", torch.rand(9, 1, 2, 2), torch.zeros(9, dtype=torch.int64), 2, "image", torch.arange(9))
    with pytest.raises(ValueError, match="expected a table, got kind image"):
        standardise(split(image, private=3, auxiliary=3, test=3))
    with pytest.raises(ValueError, match="expected private rows"):
        standardise(split(table(9), private=0, auxiliary=3, test=3))


# partitions

LABELS = torch.arange(200) % 10
GROUPS = torch.randint(0, 15, (200,), generator=torch.Generator().manual_seed(0))
PARTITIONS = {
    "iid": lambda clients, seed: iid(200, clients, seed),
    "dirichlet": lambda clients, seed: dirichlet(LABELS, clients, 0.5, seed),
    "shards": lambda clients, seed: shards(LABELS, clients, 2, seed),
    "by_group": lambda clients, seed: by_group(GROUPS, clients, seed),
}


@pytest.mark.parametrize("name", PARTITIONS)
@settings(max_examples=15, deadline=None)
@given(clients=st.integers(1, 10), seed=st.integers(0, 100))
def test_a_partition_gives_every_row_to_one_client(name: str, clients: int, seed: int) -> None:
    parts = PARTITIONS[name](clients, seed)
    assert len(parts) == clients
    assert min(len(part) for part in parts) >= 1
    assert torch.cat(parts).sort().values.tolist() == list(range(200))
    assert all(part.dtype == torch.int64 for part in parts)
    again = PARTITIONS[name](clients, seed)
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("name", PARTITIONS)
def test_another_seed_is_another_partition(name: str) -> None:
    one, other = PARTITIONS[name](4, 0), PARTITIONS[name](4, 1)
    assert any(a.tolist() != b.tolist() for a, b in zip(one, other, strict=True))


def test_iid_sizes_are_within_one() -> None:
    sizes = [len(part) for part in iid(103, 10, 0)]
    assert max(sizes) - min(sizes) == 1


def test_dirichlet_goes_from_skewed_to_even() -> None:
    def skew(alpha: float) -> float:
        """Return the mean share of a client's most frequent label."""
        y = torch.arange(5000) % 10
        shares = [y[part].bincount(minlength=10).max() / len(part) for part in dirichlet(y, 5, alpha, seed=0)]
        return float(torch.stack(shares).mean())

    assert skew(0.05) > 0.3
    assert skew(1e6) == pytest.approx(0.1, abs=0.005)  # 100 rows of 1,000 a label, within rounding


def test_shards_give_few_labels() -> None:
    parts = shards(LABELS, 5, 2, seed=0)  # ten shards of 20 rows, a label each
    assert all(len(LABELS[part].unique()) <= 2 for part in parts)
    assert [len(part) for part in parts] == [40] * 5


def test_by_group_keeps_groups_whole() -> None:
    owners = [set(GROUPS[part].tolist()) for part in by_group(GROUPS, 4, seed=0)]
    assert sum(len(owner) for owner in owners) == len(set().union(*owners)) == len(GROUPS.unique())


def test_vertical_covers_the_columns_in_order() -> None:
    assert [part.tolist() for part in vertical(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid(3, 4, 0), "expected 1 to 3 clients for 3 rows, got 4"),
        (lambda: iid(3, 0, 0), "expected 1 to 3 clients"),
        (lambda: vertical(3, 4), "for 3 columns, got 4"),
        (lambda: by_group(torch.zeros(9), 2, 0), "for 1 groups, got 2"),
        (lambda: shards(LABELS, 10, 21, 0), "expected 1 to 20 shards"),
        (lambda: dirichlet(LABELS, 4, 0.0, 0), "expected alpha above 0"),
        (lambda: dirichlet(LABELS, 4, 1.0, 0, min_rows=51), "expected at most 50 rows a client"),
        (lambda: dirichlet(LABELS, 10, 0.01, 0, min_rows=15, retries=3), "4 draws with alpha=0.01"),
    ],
)
def test_impossible_partitions_say_so(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


# catalogue

EXPECTED = {  # rows, shape of one, rows of class 1: the published counts
    "digits": (1797, (1, 8, 8), 182),
    "breast_cancer": (569, (30,), 357),
    "mnist": (70000, (1, 28, 28), 7877),
    "fashion_mnist": (70000, (1, 28, 28), 7000),
    "cifar10": (60000, (3, 32, 32), 6000),
    "mitbih": (43885, (1, 128), 4613),
    "orl_faces": (400, (1, 112, 92), 10),
    "adult": (48842, (108,), 11687),
    "bank": (45211, (51,), 5289),
    "credit": (30000, (33,), 6636),
    "sst2": (8741, (48,), 3610 + 909),
    "trec": (5952, (24,), 1250 + 94),
}


def is_here(name: str) -> bool:
    """Say whether the data set is embedded, or its files lie beside the project."""
    paths = [REAL / file.path for file in DATASETS[name].files]
    return all(path.is_file() or path.with_name(f"{path.name}.gz").is_file() for path in paths)


def test_digits() -> None:
    data = load("digits")
    assert tuple(data.x.shape) == (1797, 1, 8, 8)
    assert (float(data.x.min()), float(data.x.max())) == (0.0, 1.0)
    assert torch.equal(data.x * 16, (data.x * 16).round())
    assert data.y[:10].tolist() == list(range(10))


def test_breast_cancer_is_not_scaled_before_it_is_split() -> None:
    data = load("breast_cancer")
    assert tuple(data.x.shape) == (569, 30)
    assert data.names is not None
    assert data.names[0] == "mean radius"
    assert float(data.x[0, 0]) == pytest.approx(17.99)
    assert data.y.bincount().tolist() == [212, 357]


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(LookupError, match="got 'fashion-mnist'; near it: fashion_mnist"):
        load("fashion-mnist")
    with pytest.raises(LookupError, match="near it: digits, breast_cancer, mnist"):
        load("zzzz")


def test_absent_data_names_both_ways_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPLITLEARN_DATA", raising=False)
    with pytest.raises(LookupError, match="--data-dir or SPLITLEARN_DATA, or fetch it with `splitlearn data mnist`"):
        load("mnist")
    monkeypatch.setenv("SPLITLEARN_DATA", str(tmp_path))
    with pytest.raises(LookupError, match=r"expected ecg/mitbih_beats.npz of 'mitbih' in .*--data-dir"):
        load("mitbih")


def test_files_are_found_gzipped_or_plain_and_the_argument_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITLEARN_DATA", "/nowhere")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "trec_train.txt").write_text("0 How are you ?\n1 Who ?\n")  # listed as .gz
    (tmp_path / "text" / "trec_test.txt").write_bytes("1 Who is Café ?\n".encode("latin-1"))
    data = load("trec", data_dir=tmp_path)
    assert (len(data), data.num_train, data.num_classes) == (3, 2, 2)


def test_every_entry_is_complete() -> None:
    for name, entry in DATASETS.items():
        assert "\n" not in entry.summary
        assert entry.licence, name
        assert min(entry.sizes) > 0
        for file in entry.files:
            assert len(file.sha256) == 64
            assert file.url is None or file.url.endswith(file.path.rpartition("/")[2])


@pytest.mark.parametrize("name", [name for name in DATASETS if is_here(name)])
def test_real_files_load_and_split_by_default(name: str) -> None:
    entry = DATASETS[name]
    data = load(name, data_dir=REAL)
    private, auxiliary, test = entry.sizes
    splits = split(data, private=private, auxiliary=auxiliary, test=test)
    assert len(splits.test) == test
    assert data.name == name
    assert len(data) == EXPECTED[name][0]
    assert tuple(data.x.shape[1:]) == EXPECTED[name][1]
    assert data.y.bincount().tolist()[1] == EXPECTED[name][2]
