"""CIFAR-10 (Krizhevsky 2009) from its official archive, whose pickled batches are read without running any of them.

Unpickling runs whatever a file names. Here every name but the five that a batch needs is refused, and those five are
stand-ins that only keep what they are given, so not even numpy's own reconstruction sees the file.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitlearn.data.dataset import Dataset

__all__ = ["load_cifar10", "read_batch"]

_TRAIN = tuple(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6))
_TEST = "cifar-10-batches-py/test_batch"
_PIXELS = 3 * 32 * 32
_MOST_BYTES = 1 << 26  # a batch of the official archive has 31,035,704


def load_cifar10(archive: str | Path) -> Dataset:
    """Return x [N, 3, 32, 32] in [0, 1], the official test set last, from ``cifar-10-python.tar.gz``, not unpacked.

    Raises ``ValueError`` where the archive is corrupt, a batch is missing, or a batch names anything to be run.
    """
    import tarfile
    import zlib

    path = Path(archive)
    wanted, batches = {*_TRAIN, _TEST}, {}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                if member.name not in wanted:
                    continue
                file = tar.extractfile(member)
                if file is None or member.size > _MOST_BYTES:
                    raise ValueError(f"{path}: {member.name} is no file of at most {_MOST_BYTES} bytes; fetch it again")
                batches[member.name] = read_batch(file.read(), f"{path}: {member.name}")
    except FileNotFoundError as error:
        raise LookupError(f"expected a data file at {path}, got none; check the path") from error
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or corrupt archive ({error}); fetch the file again") from error
    if missing := sorted(wanted - batches.keys()):
        raise ValueError(f"{path}: expected all six batches, {', '.join(missing)} missing; fetch the file again")
    pairs = [batches[batch] for batch in (*_TRAIN, _TEST)]
    x = torch.cat([x for x, _ in pairs]).float().div_(255)
    y = torch.cat([y for _, y in pairs])
    return Dataset("cifar10", x, y, 10, "image", torch.arange(len(x)), len(x) - len(pairs[-1][1]))


def read_batch(raw: bytes, where: str) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 [N, 3, 32, 32], and labels, int64 [N], of one batch; ``where`` begins an error."""
    batch = _unpickled(raw, where)
    pixels, labels = (batch.get(b"data"), batch.get(b"labels")) if isinstance(batch, dict) else (None, None)
    if not isinstance(pixels, _Array) or not isinstance(labels, list):
        raise ValueError(f"{where}: expected an array b'data' and a list b'labels', got neither or one of them")
    if not all(type(label) is int and 0 <= label < 10 for label in labels):
        raise ValueError(f"{where}: expected labels from 0 to 9, got others; fetch the file again")
    n = len(labels)
    if pixels.shape != (n, _PIXELS) or pixels.dtype != "u1" or len(pixels.content) != n * _PIXELS:
        got = f"{pixels.dtype} of shape {pixels.shape} in {len(pixels.content)} bytes"
        raise ValueError(f"{where}: expected {n} rows of {_PIXELS} unsigned bytes, got {got}; fetch the file again")
    rows = np.frombuffer(bytearray(pixels.content), np.uint8).reshape((n, _PIXELS), order=pixels.order)
    x = torch.from_numpy(np.ascontiguousarray(rows)).reshape(n, 3, 32, 32)
    return x, torch.tensor(labels, dtype=torch.int64)


def _unpickled(raw: bytes, where: str) -> Any:
    import pickletools

    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name.endswith("PUT") and (argument or 0) > len(raw):  # the memo is as long as its greatest place
                raise ValueError(f"place {argument} in the memo")
        return _Restricted(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a hostile pickle can raise anything at all
        raise ValueError(f"{where}: not a CIFAR-10 batch ({error}); fetch the file again") from error


class _Array:
    """What a pickled numpy array holds: its shape, the name of its type, its order and its bytes."""

    def __init__(self, *_: object) -> None:
        self.shape: object = ()
        self.dtype = ""
        self.order: Any = "C"
        self.content = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise ValueError("an array without type or bytes")
        self.dtype, self.order, self.content = dtype.name, "F" if fortran else "C", content


class _Dtype:
    """The name of a pickled numpy type."""

    def __init__(self, name: bytes | str, *_: object) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        pass


class _Encoded:
    """``codecs.encode``, by which Python 3 pickles bytes for Python 2: makes latin-1 bytes and nothing else."""

    def __new__(cls, text: str, encoding: bytes | str) -> bytes:  # type: ignore[misc]
        if encoding not in ("latin1", b"latin1"):
            raise ValueError(f"bytes encoded as {encoding!r}")
        return text.encode("latin1")

    def __setstate__(self, state: object) -> None:
        raise ValueError("state for a function")


class _Name:
    """``numpy.ndarray``, which a batch only names."""

    def __init__(self, *_: object) -> None:
        raise ValueError("an array made outright")


_PERMITTED: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Name,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _PERMITTED:
            raise ValueError(f"it names {module}.{name}, which is refused")
        return _PERMITTED[module, name]
