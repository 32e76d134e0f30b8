"""The data sets by name: what each is, where its files come from, and how they are read."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from splitlearn.data import schemas
from splitlearn.data.archives import load_mitbih, load_orl_faces
from splitlearn.data.cifar import load_cifar10
from splitlearn.data.dataset import Dataset
from splitlearn.data.embedded import load_breast_cancer, load_digits
from splitlearn.data.idx import load_idx
from splitlearn.data.table import load_csv
from splitlearn.data.text import load_lines

__all__ = ["DATASETS", "File", "Source", "load", "source"]


@dataclass(frozen=True)
class File:
    """A file of a data set: its path below the data directory, its digest, and its official address."""

    path: str
    sha256: str
    url: str | None = None
    """None where the file is derived from the official one, or has no official address: name a mirror."""
    packed_sha256: str | None = None
    """The digest of ``path`` with ``.gz``, as which a mirror may hold it."""


@dataclass(frozen=True)
class Source:
    """One data set of the catalogue."""

    summary: str
    sizes: tuple[int, int, int]
    """The default numbers of private, auxiliary and test rows."""
    licence: str
    load: Callable[..., Dataset]
    """Called with the paths of ``files``, in their order."""
    files: tuple[File, ...] = ()
    """None where the data set is embedded."""


def load(name: str, *, data_dir: Path | None = None) -> Dataset:
    """Return the data set of this name, its files found below ``data_dir``, else below ``SPLITLEARN_DATA``.

    Raises ``LookupError`` for an unknown name, and for absent files; ``ValueError`` for corrupt ones.
    """
    wanted = source(name)
    if not wanted.files:
        return wanted.load()
    folder = data_dir or (Path(os.environ["SPLITLEARN_DATA"]) if os.environ.get("SPLITLEARN_DATA") else None)
    fix = f"name its folder by --data-dir or SPLITLEARN_DATA, or fetch it with `splitlearn data {name}`"
    if folder is None:
        raise LookupError(f"expected a folder with the files of {name!r}, got none; {fix}")
    paths = []
    for file in wanted.files:
        spellings = (folder / file.path, folder / (file.path + ".gz"), folder / file.path.removesuffix(".gz"))
        path = next((path for path in spellings if path.is_file()), None)
        if path is None:
            raise LookupError(f"expected {file.path} of {name!r} in {folder}, got no such file; {fix}")
        paths.append(path)
    return wanted.load(*paths)


def source(name: str) -> Source:
    """Return the catalogue's entry; ``LookupError`` names those near where there is none."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5) or DATASETS
        raise LookupError(f"expected the name of a data set, got {name!r}; near it: {', '.join(near)}")
    return DATASETS[name]


def _idx(name: str) -> Callable[..., Dataset]:
    def loaded(images: Path, labels: Path, test_images: Path, test_labels: Path) -> Dataset:
        return load_idx(images, labels, test_images=test_images, test_labels=test_labels, name=name)

    return loaded


def _idx_files(folder: str, base: str, *digests: str) -> tuple[File, ...]:
    files = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(
        File(f"{folder}/{file}-ubyte.gz", digest, f"{base}/{file}-ubyte.gz")
        for file, digest in zip(files, digests, strict=True)
    )


DATASETS: dict[str, Source] = {
    "digits": Source(
        "1,797 handwritten digits of 8×8, embedded (scikit-learn)", (800, 600, 397), "CC BY 4.0 (UCI)", load_digits
    ),
    "breast_cancer": Source(
        "569 tumours with 30 measurements, embedded (scikit-learn)",
        (300, 150, 119),
        "CC BY 4.0 (UCI)",
        load_breast_cancer,
    ),
    "mnist": Source(
        "70,000 handwritten digits of 28×28",
        (50_000, 10_000, 10_000),
        "CC BY-SA 3.0 (LeCun, Cortes and Burges)",
        _idx("mnist"),
        _idx_files(
            "mnist",
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion_mnist": Source(
        "70,000 pieces of clothing of 28×28",
        (50_000, 10_000, 10_000),
        "MIT (Zalando)",
        _idx("fashion_mnist"),
        _idx_files(
            "fashion_mnist",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "cifar10": Source(
        "60,000 colour photographs of 32×32 in ten classes",
        (40_000, 10_000, 10_000),
        "none stated (Krizhevsky 2009; research use)",
        load_cifar10,
        (
            File(
                "cifar10/cifar-10-python.tar.gz",
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            ),
        ),
    ),
    "mitbih": Source(
        "43,885 heart beats of 23 patients' records, 128 samples each (MIT-BIH)",
        (13_245, 13_245, 13_245),
        "ODC-By 1.0 (PhysioNet)",
        load_mitbih,
        (File("ecg/mitbih_beats.npz", "e06c8ff76385d8ccee1ed97668628fbef9126dc3848b15d678674081ef8b786c"),),
    ),
    "orl_faces": Source(
        "400 faces of 40 persons, 112×92 (ORL, AT&T Laboratories Cambridge)",
        (200, 120, 80),
        "free for research, credit AT&T Laboratories Cambridge",
        load_orl_faces,
        (File("faces/orl_faces.npz", "11990379e8245fc2922459ac074dce299051c00f1bf048f1035cc8c4e8fcf055"),),
    ),
    "adult": Source(
        "48,842 persons: more than 50,000 dollars a year? (UCI Adult)",
        (20_000, 12_000, 16_281),
        "CC BY 4.0 (UCI)",
        lambda train, test: load_csv(train, schemas.ADULT, test=test, name="adult"),
        (
            File(
                "tabular/adult.data",
                "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
                "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/adult.data",
                "c7a2b4716a97f930123e0baf879188d701e798172631a654fc703d4b082907f3",
            ),
            File(
                "tabular/adult.test",
                "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
                "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/adult.test",
                "8a2c1bffa6e7ce5abfa43881ae5e87c4311ebc2b3cd526c9c40a43f19f06f799",
            ),
        ),
    ),
    "bank": Source(
        "45,211 clients: a term deposit? (UCI Bank Marketing)",
        (20_000, 15_000, 10_000),
        "CC BY 4.0 (UCI)",
        lambda path: load_csv(path, schemas.BANK, name="bank"),
        (File("tabular/bank-full.csv.gz", "a33820520e31d26b498e31003e99eb0e477690b699a38eade375acf3b3004dcd"),),
    ),
    "credit": Source(
        "30,000 clients: default next month? (UCI Default of Credit Card Clients)",
        (15_000, 10_000, 5_000),
        "CC BY 4.0 (UCI)",
        lambda path: load_csv(path, schemas.CREDIT, name="credit"),
        (File("tabular/credit_default.csv.gz", "42aeb98f777f808ab6c601d1f5453927a1c3bfc7510c690292c5095e2f39eef9"),),
    ),
    "sst2": Source(
        "8,741 sentences of film reviews: good or bad? (SST-2, without its development set)",
        (4_000, 2_900, 1_821),
        "none stated (Stanford; research use)",
        lambda train, test: load_lines(train, label="last", test=test, length=48, name="sst2"),
        (
            File("text/sst2_train.tsv.gz", "a8bb76d586d14567aa086e896db7e9d0425a8bd39de6648e21cca95ee21ffca1"),
            File("text/sst2_test.tsv.gz", "568827564c7f1be992a699cda63755da59bb7d91bca51b9e7b126e36f609d0e2"),
        ),
    ),
    "trec": Source(
        "5,952 questions by what they ask for, six classes (TREC)",
        (3_000, 2_400, 500),
        "none stated (UIUC; research use)",
        lambda train, test: load_lines(
            train, label="first", separator=" ", test=test, length=24, encoding="latin-1", name="trec"
        ),
        (
            File("text/trec_train.txt.gz", "cce2c84819f4d0a3e1491bcd9e50513e34e06d8c3fcb08f6ca9925bff4dcd711"),
            File("text/trec_test.txt.gz", "cd57b53bc4cc1d29f0be85299e604b7866422823231c3b6330c713bff5d6921c"),
        ),
    ),
}
