"""Open a data file, gzipped or plain, such that whatever is wrong with it is one line that names the file."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

__all__ = ["INFLATION", "opened", "read_text"]

INFLATION = 1032  # deflate's greatest ratio (RFC 1951: 258 bytes from two bits), hence a bound on what a file can hold
_MOST_TEXT = 1 << 30  # bytes; the longest text among our data sets has 5 MB


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Yield the file's content as bytes to be read, unpacked where the file begins as gzip does.

    Raises ``LookupError`` where there is no such file, and ``ValueError`` where reading in the ``with`` block finds
    the gzip data truncated or corrupt.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or corrupt gzip data ({error}); fetch the file again") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise LookupError(f"expected a data file at {path}, got none; check the path") from error


def read_text(path: Path) -> str:
    """Return the whole file, gzipped or plain, as UTF-8 text of at most 1 GiB."""
    with opened(path) as file:
        content = file.read(_MOST_TEXT + 1)
    if len(content) > _MOST_TEXT:
        raise ValueError(f"{path}: expected at most {_MOST_TEXT} bytes of text, got more; split the file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte {error.start} outside it; convert the file") from error
