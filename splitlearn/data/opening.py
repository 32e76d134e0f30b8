"""Open a data file, gzipped or plain, such that whatever is wrong with it is one line that names the file."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

__all__ = ["INFLATION", "opened", "read_most", "read_text"]

INFLATION = 1032  # deflate's greatest ratio (RFC 1951: 258 bytes from two bits), hence a bound on what a file can hold
_CHUNK = 1 << 20
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


def read_most(file: BinaryIO, nbytes: int) -> bytearray:
    """Return the next ``nbytes`` bytes, or all that there are; memory grows with what comes, not with ``nbytes``."""
    content = bytearray()
    while chunk := file.read(min(_CHUNK, nbytes - len(content))):
        content += chunk
    return content


def read_text(path: Path, *, encoding: str = "utf-8-sig") -> str:
    """Return the whole file, gzipped or plain, as text of at most 1 GiB; as UTF-8 unless told otherwise."""
    with opened(path) as file:
        content = read_most(file, _MOST_TEXT + 1)
    if len(content) > _MOST_TEXT:
        raise ValueError(f"{path}: expected at most {_MOST_TEXT} bytes of text, got more; split the file")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not {encoding} text; convert the file to UTF-8") from error
