"""IDX files, the format of MNIST (LeCun et al. 1998): a magic number, big-endian sizes, then the bytes."""

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from splitlearn.data.dataset import Dataset
from splitlearn.data.opening import INFLATION, opened, read_most

__all__ = ["load_idx", "read_idx"]

_UNSIGNED_BYTE = 0x08


def load_idx(
    images: str | Path,
    labels: str | Path,
    *,
    test_images: str | Path | None = None,
    test_labels: str | Path | None = None,
    name: str = "idx",
) -> Dataset:
    """Return grey images, x [N, 1, H, W] in [0, 1], from IDX files, gzipped or plain.

    Where test files are named too, their rows follow as the official test set. There are as many classes as the
    greatest training label says. Raises ``ValueError`` for a file that is corrupt, truncated or of another format.
    """
    x, y = _pair(Path(images), Path(labels))
    num_train, num_classes = None, int(y.max()) + 1 if len(y) else 1
    if (test_images is None) != (test_labels is None):
        raise ValueError("expected test images and test labels together, got one of them; name both or neither")
    if test_images is not None and test_labels is not None:
        held_x, held_y = _pair(Path(test_images), Path(test_labels))
        if held_x.shape[1:] != x.shape[1:]:
            expected, got = tuple(x.shape[1:]), tuple(held_x.shape[1:])
            raise ValueError(
                f"{test_images}: expected images of {expected} as in {images}, got {got}; use one data set"
            )
        num_train, x, y = len(x), torch.cat([x, held_x]), torch.cat([y, held_y])
    scaled = x.unsqueeze(1).float().div_(255)
    return Dataset(name, scaled, y.long(), num_classes, "image", torch.arange(len(x)), num_train)


def read_idx(path: Path, *, ndim: int) -> Tensor:
    """Return the file's unsigned bytes as a uint8 tensor of ``ndim`` dimensions.

    The header, and the size that it promises against the size of the file, are checked before memory is taken.
    """
    with opened(path) as file:
        header = file.read(4 + 4 * ndim)
        if len(header) < 4 + 4 * ndim or header[:4] != bytes([0, 0, _UNSIGNED_BYTE, ndim]):
            raise ValueError(
                f"{path}: expected an IDX file of unsigned bytes in {ndim} dimensions, which begins 0000080{ndim}, "
                f"got {header[:4].hex() or 'nothing'}; check that images and labels are not exchanged"
            )
        shape = [int.from_bytes(header[4 + 4 * place : 8 + 4 * place], "big") for place in range(ndim)]
        nbytes, there = prod(shape), path.stat().st_size
        if nbytes > there * INFLATION:
            raise ValueError(f"{path}: promises {nbytes} bytes, {there} cannot hold them; fetch the file again")
        content = read_most(file, nbytes + 1)  # one more, so that what follows is noticed and gzip checks its CRC
    if len(content) != nbytes:
        got = "more" if len(content) > nbytes else f"{len(content)}"
        raise ValueError(f"{path}: expected {nbytes} bytes for shape {tuple(shape)}, got {got}; fetch the file again")
    flat = torch.frombuffer(content, dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)
    return flat.reshape(shape)


def _pair(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    x, y = read_idx(images, ndim=3), read_idx(labels, ndim=1)
    if len(x) != len(y):
        raise ValueError(f"expected a label for each image, got {len(x)} in {images}, {len(y)} in {labels}")
    return x, y
