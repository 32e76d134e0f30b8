"""Fetch the files of a data set: resumed where they broke off, checked by digest before they take their place."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from splitlearn.data.catalogue import File, source

__all__ = ["download"]

Progress = Callable[[int, int | None], None]
_CHUNK = 1 << 18
_TIMEOUT_SECONDS = 30.0  # without any byte


def download(name: str, *, data_dir: Path, url: str | None = None, progress: Progress | None = None) -> list[Path]:
    """Return the paths of the data set's files below ``data_dir``, fetched where they are not there yet.

    They come from their official addresses, or from ``url`` (https, http or file): the file itself, or a base below
    which the files lie by their paths here or by their names alone. ``progress`` is called with the bytes of a file
    so far and in all, None where unknown. A file is first written beside its place as ``.part``, which a later call
    goes on from. An embedded data set has no files.

    Raises ``LookupError`` for an unknown name and an address that cannot be had, ``ValueError`` for a wrong digest,
    a bad address, or a folder that cannot be written.
    """
    files = source(name).files
    if url is not None and url.partition("://")[0] not in ("https", "http", "file"):
        raise ValueError(f"expected an address that begins https://, http:// or file://, got {url!r}; spell it out")
    return [_place(name, file, data_dir, url, progress) for file in files]


def _place(name: str, file: File, folder: Path, url: str | None, progress: Progress | None) -> Path:
    """Return where the file, or its packed form, stands; fetch it first where neither does."""
    from http.client import HTTPException

    versions = [(file.path, file.sha256)]
    if file.packed_sha256 is not None:
        versions.append((f"{file.path}.gz", file.packed_sha256))
    for path, digest in versions:
        if (folder / path).is_file() and _sha256(folder / path) == digest:
            return folder / path
    if url is None and file.url is None:
        raise LookupError(
            f"{file.path} of {name!r} has no official address of its own; name where to get it with --url: "
            "https://, http:// or file://, the file or the folder that holds it"
        )
    for path, digest in versions if url is not None else versions[:1]:
        for address in [str(file.url)] if url is None else _addresses(url, path):
            try:
                if _fetch(address, folder / path, digest, progress):
                    return folder / path
            except (OSError, HTTPException) as error:
                raise LookupError(
                    f"could not fetch {address} ({error}); run it again to go on, or name a mirror with --url"
                ) from error
    raise LookupError(f"found no {file.path} at {url or file.url}; name another address with --url")


def _addresses(url: str, path: str) -> list[str]:
    file = path.rpartition("/")[2]
    if url.rstrip("/").rpartition("/")[2] == file:
        return [url]
    return [f"{url.rstrip('/')}/{path}", f"{url.rstrip('/')}/{file}"]


def _fetch(address: str, target: Path, digest: str, progress: Progress | None) -> bool:
    """Put the checked file at ``target`` and return True, or False where there is no file at the address."""
    _make_writable(target.parent)
    part = target.with_name(f"{target.name}.part")
    if not (part.is_file() and _sha256(part) == digest) and not _receive(address, part, progress):
        return False
    got = _sha256(part)
    if got != digest:
        part.unlink()
        raise ValueError(
            f"{address}: expected a file of sha256 {digest}, got {got}; "
            f"the partial copy {part} was removed: run it again, or name another address with --url"
        )
    part.replace(target)
    return True


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder} ({error}); choose another --data-dir") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"expected a folder to write to, {folder} is not one; choose another --data-dir")


def _receive(address: str, part: Path, progress: Progress | None) -> bool:
    """Append to ``part`` what is missing, or write it anew where the server cannot resume; False where not found."""
    import urllib.error
    import urllib.request

    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-") and response.status == 206
            if not resumed:
                start = 0
            with part.open("ab" if resumed else "wb") as out:
                _copy(response, out, start, progress)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # nothing is left to send: what lies there is not this file
            part.unlink()
            return _receive(address, part, progress)
        if error.code in (403, 404, 410):  # object stores answer 403 for what is not there
            return False
        raise
    except urllib.error.URLError as error:
        if address.startswith("file:") and isinstance(error.reason, FileNotFoundError):
            return False
        raise
    return True


def _copy(response: Any, out: Any, start: int, progress: Progress | None) -> None:
    length = response.headers.get("Content-Length")
    total = start + int(length) if length is not None and length.isdigit() else None
    done = start
    while chunk := response.read(_CHUNK):
        out.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, total)
    if total is not None and done < total:
        raise ConnectionError(f"it broke off after {done} of {total} bytes")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
