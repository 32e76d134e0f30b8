"""A journal of what was asked of parties, so that a server that was killed goes on as though it had not been."""

import fcntl
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitlearn.frames import Message, decode, encode
from splitlearn.service import Service

__all__ = ["Journal", "Journaled", "held", "private_folder"]

ENTRY = struct.Struct("<II")  # length, CRC-32
READS = frozenset({"predict", "weights"})  # what moves nothing


@contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Make a folder private and this process's alone, for as long as the context; ``ValueError`` where it is taken."""
    with (private_folder(folder) / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"expected {folder} for one process, but another one that runs uses it; give another --out"
            ) from None
        yield folder


def private_folder(path: Path) -> Path:
    """Make the folder, readable by its owner alone, and return it: what is in it tells of samples."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


class Journal:
    """Messages in a file, each whole or not at all: what a kill cut short at the end is not read, and written over.

    The file holds what clients sent, activations and labels too: it is readable by its owner alone, and goes when it
    has been ``clear``ed. It outlives the process, not a power cut.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        end = sum(ENTRY.size + len(frame) for frame in self._frames())
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)

    def append(self, message: Message) -> None:
        """Write the message at the end, or nothing: ``ValueError`` where there is no space."""
        frame = encode(message)
        whole = memoryview(ENTRY.pack(len(frame), zlib.crc32(frame)) + frame)
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            while whole:
                whole = whole[os.write(self._file, whole) :]
        except OSError as error:
            os.ftruncate(self._file, start)  # or what follows would lie behind a torn entry, and not be read
            os.lseek(self._file, start, os.SEEK_SET)
            raise ValueError(f"{self.path} cannot be written ({error.strerror}); free space") from error

    def __iter__(self) -> Iterator[Message]:
        """Yield all messages, from the first on."""
        return map(decode, self._frames())

    def clear(self) -> None:
        """Forget all messages: what they did is kept elsewhere."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._file)

    def _frames(self) -> Iterator[bytes]:
        at, size = 0, os.fstat(self._file).st_size
        while len(head := os.pread(self._file, ENTRY.size, at)) == ENTRY.size:
            length, crc = ENTRY.unpack(head)
            if at + ENTRY.size + length > size:
                return
            frame = os.pread(self._file, length, at + ENTRY.size)
            if len(frame) < length or zlib.crc32(frame) != crc:
                return
            yield frame
            at += ENTRY.size + length


class Journaled:
    """A service whose requests are journaled before they are answered, one at a time.

    After a restart, with parties and service as they were when the journal was empty, ``replay()`` has the service
    answer them again: parties are then as before the kill, and a client that repeats its last request gets the reply
    that it did not get. For sessions that share a stage and train by ``learn``, or one session each: an exchange that
    stays open between two requests would make others wait.
    """

    def __init__(self, service: Service, journal: Journal):
        self._service, self._journal, self._lock = service, journal, threading.Lock()

    def request(self, message: Message) -> Message:
        """Write the message down, unless it moves nothing, and pass it on."""
        with self._lock:
            if message.verb not in READS and self._service.is_new(message):
                self._journal.append(message)
            return self._service.request(message)

    def renew(self, journal: Journal) -> None:
        """Go on in another journal, an empty one: what this one holds is kept elsewhere."""
        with self._lock:
            self._journal = journal

    def replay(self) -> int:
        """Ask again what the journal holds; return how many requests that were. What was refused is refused again."""
        with self._lock:
            count = 0
            for message in self._journal:
                with suppress(ValueError, LookupError):
                    self._service.request(message)
                count += 1
            return count
