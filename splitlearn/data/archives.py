"""Arrays in ``.npz`` archives: any with ``x`` and ``y``, the MIT-BIH heart beats, and the ORL faces. No pickle."""

import zipfile
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from splitlearn.data.dataset import Dataset, Modality
from splitlearn.data.opening import INFLATION

__all__ = ["load_mitbih", "load_npz", "load_orl_faces", "read_npz"]


def load_npz(path: str | Path, *, kind: Modality, name: str | None = None) -> Dataset:
    """Return the data set of an archive with arrays ``x`` and ``y``, and perhaps ``groups`` and ``num_train``.

    Images are [N, H, W] or [N, C, H, W], uint8 or floats in [0, 1]; signals [N, L] or [N, 1, L]; tables [N, F]; tokens
    integers [N, L]. Labels are integers from 0; the first ``num_train`` rows are the official training set.
    """
    path = Path(path)
    arrays = read_npz(path, "x", "y", optional=("groups", "num_train"))
    x = torch.from_numpy(arrays["x"])
    if kind == "image":
        x = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
    else:
        x = x.long() if kind == "tokens" else x.float()
    if (kind, x.ndim) in (("image", 3), ("signal", 2)):
        x = x.unsqueeze(1)
    y = _integers(path, "y", arrays)
    groups = _integers(path, "groups", arrays) if "groups" in arrays else None
    num_train = int(_integers(path, "num_train", arrays)) if "num_train" in arrays else None
    num_classes = int(y.max()) + 1 if y.numel() else 1
    return Dataset(name or path.stem, x, y, num_classes, kind, torch.arange(len(x)), num_train, groups)


def load_mitbih(path: str | Path, *, first: int = 64, last: int = 192) -> Dataset:
    """Return heart beats, x [N, 1, last - first] in millivolts around the R peak at sample 128, at 360 Hz.

    MIT-BIH Arrhythmia Database (Moody and Mark 2001; PhysioNet mitdb 1.0.0), 23 of its 48 records; y is N, L, R, A or
    V as 0 to 4, and groups are the records. The default window has the 128 samples of the split-learning ECG papers
    (Abuadbba et al. 2020, arXiv:2003.12365), yet these beats are not the file of those papers.
    """
    path = Path(path)
    arrays = read_npz(path, "x", "y", "record", "adc_zero", "adc_gain")
    beats = arrays["x"]
    if beats.ndim != 2 or not 0 <= first < last <= beats.shape[1]:
        got = f"{first} to {last} of shape {beats.shape}"
        raise ValueError(f"{path}: expected a window inside beats of shape [N, L], got {got}; move the window")
    millivolts = (beats[:, first:last] - float(arrays["adc_zero"])) / float(arrays["adc_gain"])
    x = torch.from_numpy(millivolts.astype(np.float32)).unsqueeze(1)
    y, groups = _integers(path, "y", arrays), _integers(path, "record", arrays)
    return Dataset("mitbih", x, y, 5, "signal", torch.arange(len(x)), groups=groups)


def load_orl_faces(path: str | Path) -> Dataset:
    """Return 400 faces, x [N, 1, 112, 92] in [0, 1]; y and groups are the 40 persons.

    The Database of Faces (Samaria and Harter 1994), to be credited to AT&T Laboratories Cambridge.
    """
    path = Path(path)
    arrays = read_npz(path, "x", "y")
    if arrays["x"].dtype != np.uint8 or arrays["x"].ndim != 3:
        got = f"{arrays['x'].dtype} of shape {arrays['x'].shape}"
        raise ValueError(f"{path}: expected faces as uint8 [N, H, W], got {got}; fetch the file again")
    x = torch.from_numpy(arrays["x"]).unsqueeze(1).float().div_(255)
    persons = _integers(path, "y", arrays)
    return Dataset("orl_faces", x, persons, 40, "image", torch.arange(len(x)), groups=persons.clone())


def read_npz(path: Path, *wanted: str, optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Return the wanted arrays, and those of the optional ones that are there.

    Pickled objects are refused, and each array's promised size is checked before memory is taken. Raises
    ``ValueError`` where the archive is corrupt or an array is missing, ``LookupError`` where there is no file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {member.filename.removesuffix(".npy") for member in archive.infolist()}
            if missing := sorted(set(wanted) - names):
                raise ValueError(f"expected the arrays {', '.join(wanted)}, {', '.join(missing)} missing")
            return {name: _read_array(archive, name) for name in (*wanted, *optional) if name in names}
    except FileNotFoundError as error:
        raise LookupError(f"expected a data file at {path}, got none; check the path") from error
    except Exception as error:  # zipfile and numpy raise many kinds on corrupt data
        raise ValueError(f"{path}: not a readable archive of arrays ({error}); fetch or write it again") from error


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > member.compress_size * INFLATION:
        raise ValueError(f"{name} promises {member.file_size} bytes, which {member.compress_size} cannot hold")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of npy version {version}, expected 1.0 or 2.0")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.kind not in "biuf":
            raise ValueError(f"{name} is of type {dtype}, expected numbers; pickled objects are refused")
        if prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(
                f"{name} promises shape {shape} of {dtype}, which is not what {member.file_size} bytes hold"
            )
        content = bytearray(file.read())
    flat = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(flat.reshape(shape, order="F" if fortran else "C")).reshape(shape)


def _integers(path: Path, name: str, arrays: dict[str, np.ndarray]) -> Tensor:
    if arrays[name].dtype.kind not in "iu":
        raise ValueError(f"{path}: expected {name} as integers, got {arrays[name].dtype}; convert and write it again")
    return torch.from_numpy(arrays[name].astype(np.int64))
