"""The client's end of gRPC: it asks the server, and answers what the server asks, over connections that come back."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from splitlearn.frames import MAX_NBYTES
from splitlearn.transport.certs import Credentials
from splitlearn.transport.link import ANSWER, ASK, ATTACHED, HEARTBEAT, SERVICE, grpc_module, options, place
from splitlearn.wire import Carrier

__all__ = ["Connection"]

PAUSE = 0.1  # seconds between two tries to connect
FAREWELL = 5.0  # seconds
DISTRUST = ("TSI_PROTOCOL_FAILURE", "Hostname Verification Check failed")  # no TLS, or a certificate not believed
SILENCE = 30.0  # seconds between two words on a server that is away


class Connection:
    """A client's connection to one server, by mutual TLS: ``connection.ask`` is a carrier, ``answer`` serves another.

    ``Remote("server", Framed(Connection("host:50051", credentials).ask), name)`` is then a party like any other. A
    request waits at most ``deadline`` seconds for its reply. Where the connection breaks, or the server is away, the
    request is sent again over a new one for up to ``patience`` seconds, as often as it takes: the server must answer a
    repeat as it answered before, as ``Service`` does. Raises ``TimeoutError`` after the deadline, ``ConnectionError``
    after the patience, and ``PermissionError`` where the server does not let this certificate in. ``told`` hears of a
    server that is away.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        deadline: float = 60.0,
        patience: float = 60.0,
        max_nbytes: int = MAX_NBYTES,
        heartbeat: float = HEARTBEAT,
        server_name: str | None = None,
        told: Callable[[str], None] = lambda line: None,
    ):
        grpc = grpc_module()
        if deadline <= 0 or patience < 0:
            raise ValueError(f"expected a deadline above 0 s and a patience of 0 s or more, got {deadline}, {patience}")
        self.address, self.deadline, self.patience = place(address), deadline, patience
        self._credentials = credentials
        settings = options(max_nbytes, heartbeat)
        if server_name is not None:
            settings.append(("grpc.ssl_target_name_override", server_name))
        self._channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate),
            options=settings,
        )
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        self._answering: _Stream | None = None
        self._closed, self._say, self._said = False, told, 0.0

    def ask(self, frame: bytes) -> bytes:
        """Send a request's frame and return the reply's."""
        with self._lock:
            end = time.monotonic() + self.patience
            while True:
                try:
                    if self._stream is None:
                        self._stream = _Stream(self._channel, ASK)
                    return self._stream.exchange(frame, self.deadline)
                except _BrokenError as error:
                    self._drop()
                    self._told(error, end)
                except BaseException:
                    self._drop()
                    raise

    def answer(self, carrier: Carrier, *, until: Callable[[], bool] = lambda: False) -> None:
        """Answer the server's requests by ``carrier`` until ``until()``, asked between requests, or ``close``.

        Where the connection breaks, it is tried again for up to ``patience`` seconds.
        """
        end = time.monotonic() + self.patience
        while not self._closed and not until():
            stream = _Stream(self._channel, ANSWER)
            self._answering, attached = stream, False
            try:
                while not until():
                    frame = stream.next(None)
                    attached = True
                    if frame != ATTACHED:
                        stream.send(carrier(frame))
                stream.finish()
            except _BrokenError as error:
                if attached:
                    end = time.monotonic() + self.patience
                if not self._closed:
                    self._told(error, end)
            finally:
                stream.close()

    def close(self) -> None:
        """Close it; what waits ends with an error."""
        self._closed = True
        self._drop()
        if self._answering is not None:
            self._answering.close()
        self._channel.close()

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _told(self, error: "_BrokenError", end: float) -> None:
        """Wait a moment before another try, or raise what the user should know."""
        if error.final is not None:
            raise error.final
        self._credentials.check_dates()  # the server does not say that it finds ours too old
        if self._closed or time.monotonic() > end:
            raise ConnectionError(
                f"expected a server at {self.address}, got none within {self.patience:g} s ({error}); is it running, "
                "and is its certificate of the same authority and for that name?"
            ) from None
        if time.monotonic() > self._said + SILENCE:
            self._said = time.monotonic()
            self._say(f"{self.address} does not answer ({error}); trying for {self.patience:g} s")
        time.sleep(PAUSE)


class _BrokenError(Exception):
    """A stream that broke; ``final`` is what to raise where another try is no use."""

    def __init__(self, text: str, final: Exception | None = None):
        super().__init__(text)
        self.final = final


class _Stream:
    """One stream of frames, both ways."""

    def __init__(self, channel: Any, method: str):
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.stream_stream(f"/{SERVICE}/{method}")(iter(self._frames.get, None))
        self._replies: Iterator[bytes] = iter(self._call)
        self._due: float | None = None
        self._watch: threading.Thread | None = None
        self._late, self._over = False, threading.Event()

    def exchange(self, frame: bytes, deadline: float) -> bytes:
        """Send a frame and return what comes back."""
        self.send(frame)
        return self.next(deadline)

    def send(self, frame: bytes) -> None:
        """Send a frame."""
        self._frames.put(frame)

    def next(self, deadline: float | None) -> bytes:
        """Return the next frame from the server; ``TimeoutError`` after the deadline, in seconds, if there is one."""
        self._due = None if deadline is None else time.monotonic() + deadline
        if deadline is not None and self._watch is None:
            self._watch = threading.Thread(target=self._watching, args=(deadline / 8,), daemon=True)
            self._watch.start()
        try:
            return next(self._replies)
        except StopIteration:
            raise _BrokenError("the server ended the stream") from None
        except grpc_module().RpcError as error:
            if self._late:
                raise TimeoutError(f"expected a reply within {deadline:g} s, got none; ask again, or later") from None
            raise _BrokenError(_in_words(error), _final(error)) from None
        finally:
            self._due = None

    def _watching(self, pause: float) -> None:
        """End the stream where a reply is overdue; one thread a stream, as one a request would cost more than it."""
        while not self._over.wait(min(pause, 1.0)):
            due = self._due
            if due is not None and time.monotonic() > due:
                self._late = True
                self._call.cancel()
                return

    def finish(self) -> None:
        """Let what was sent arrive: send no more, and wait a moment for the server to end the stream."""
        self._frames.put(None)
        with suppress(_BrokenError, TimeoutError):
            self.next(FAREWELL)

    def close(self) -> None:
        """End it."""
        self._over.set()
        self._frames.put(None)
        self._call.cancel()


def _in_words(error: Any) -> str:
    return f"{error.code().name}: {error.details()}"


def _final(error: Any) -> Exception | None:
    """Return what to raise for an error that another try would only repeat."""
    codes = grpc_module().StatusCode
    if error.code() in (codes.PERMISSION_DENIED, codes.UNAUTHENTICATED):
        return PermissionError(
            f"expected to be let in, got {_in_words(error)}; ask the operator for another certificate"
        )
    if error.code() == codes.RESOURCE_EXHAUSTED and "message larger than max" in (error.details() or ""):
        return ValueError(f"expected a frame that the other end takes, got {_in_words(error)}; raise max_nbytes=…")
    if error.code() == codes.UNIMPLEMENTED:
        return ValueError(f"expected a server of this toolkit, got {_in_words(error)}")
    if any(mark in (error.details() or "") for mark in DISTRUST):
        return ConnectionError(
            f"expected a server with a certificate that is valid, of our authority and for that name, got "
            f"{_in_words(error)}; ask the operator for the authority's certificate and the server's name"
        )
    return None
