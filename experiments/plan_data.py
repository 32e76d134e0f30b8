"""The data of a plan: a data set by name, or an archive of the user's own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.names import find
from experiments.training import load_splits, sizes_of
from splitlearn.data import DATASETS, Splits, load_npz, split, standardise
from splitlearn.data.archives import read_npz
from splitlearn.data.dataset import Modality

__all__ = ["load_for"]

KINDS: dict[int, Modality] = {2: "table", 3: "signal", 4: "image"}  # by the dimensions of x
TENTHS = (5, 3, 2)  # private, auxiliary, test


def load_for(data: str, data_dir: Path | None, *, private: int = 0, auxiliary: int = 0) -> Callable[[], Splits]:
    """Return what loads the splits, which a worker can take; what is wrong with the name is told here.

    An archive is parted by tenths, 5, 3 and 2, unless numbers are given; x [N, F] are tables, [N, 1, L] signals,
    [N, H, W] and [N, C, H, W] images.
    """
    if data.endswith(".npz"):
        path = Path(data).absolute()
        if not path.is_file():
            raise LookupError(f"expected an archive with arrays x and y, got {data}, which is no file")
        return partial(_own, path, private, auxiliary)
    find("data set", data, DATASETS)
    return partial(load_splits, data, data_dir, sizes=sizes_of(data, private=private, auxiliary=auxiliary))


def _own(path: Path, private: int, auxiliary: int) -> Splits:
    shape = read_npz(path, "x", "y")["x"].shape
    if len(shape) not in KINDS:
        raise ValueError(f"expected x of two to four dimensions in {path.name}, got {len(shape)}; tables are [N, F]")
    grey = len(shape) == 3 and shape[1] > 1  # images without a dimension of channels
    dataset = load_npz(path, kind="image" if grey else KINDS[len(shape)])
    sizes = [max(1, tenths * len(dataset) // 10) for tenths in TENTHS]
    splits = split(dataset, private=private or sizes[0], auxiliary=auxiliary or sizes[1], test=sizes[2])
    return standardise(splits) if dataset.kind == "table" else splits
