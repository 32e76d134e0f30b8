"""The server's end of gRPC: it answers each client in a session of its own, and asks clients that answer.

Who a client is says its certificate, and nothing that it sends: its frames reach the carrier of that name and no other.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

from splitlearn.frames import MAX_NBYTES
from splitlearn.transport.certs import Credentials
from splitlearn.transport.link import ANSWER, ASK, ATTACHED, HANDSHAKE, HEARTBEAT, SERVICE, grpc_module, options, place
from splitlearn.wire import Carrier

__all__ = ["Host", "Line"]

WORKERS = 2  # of a client at once on Ask, and as many on Answer: one more while it comes back
PENDING = 256  # streams that wait for a worker; whoever opens one more is told to try again


class Line:
    """A carrier to a client that answers: ``line(frame)`` asks it, and waits at most ``deadline`` seconds.

    A client that is away, or goes away before it has replied, is asked again when it is back: it must answer a repeat
    as it answered before, as ``Service`` does. Raises ``TimeoutError`` after the deadline; what comes later is dropped.
    One request at a time.
    """

    def __init__(self, client: str, *, deadline: float):
        self.client, self.deadline = client, deadline
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._frame: bytes | None = None
        self._reply: bytes | None = None
        self._number = 0  # of the request
        self._attached = 0  # of the connection that counts: the last one
        self.connected = False
        self._closed = False

    def __call__(self, frame: bytes) -> bytes:
        """Return the client's reply to the frame."""
        with self._asking, self._changed:
            self._number += 1
            self._frame, self._reply = frame, None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._reply is not None or self._closed, self.deadline)
            reply: bytes | None = self._reply
            self._frame = None
            if reply is not None:
                return reply
            if self._closed:
                raise ConnectionError(f"{self.client}: expected a reply, but this server is shutting down")
            raise TimeoutError(
                f"{self.client}: expected a reply within {self.deadline:g} s, got none; it is left out of this round"
            )

    def serve(self, replies: Iterator[bytes], alive: Callable[[], bool]) -> Iterator[bytes]:
        """Yield requests to the client that is connected, and take its ``replies``, until it goes or is replaced."""
        with self._changed:
            self._attached += 1
            mine, self.connected = self._attached, True
            self._changed.notify_all()
        yield ATTACHED
        try:
            yield from self._requests(replies, alive, mine)
        finally:
            with self._changed:
                self.connected = self.connected and self._attached != mine
                self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Return whether the client is connected, or comes within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.connected or self._closed, seconds) and self.connected

    def _requests(self, replies: Iterator[bytes], alive: Callable[[], bool], mine: int) -> Iterator[bytes]:
        answered = 0

        def over() -> bool:
            return self._closed or self._attached != mine or not alive()

        while True:
            with self._changed:
                while not over() and (self._frame is None or self._number == answered):
                    self._changed.wait(1.0)
                if over() or self._frame is None:
                    return
                number, frame = self._number, self._frame
            yield frame
            reply = _next(replies)
            if reply is None:
                return
            answered = number
            with self._changed:
                if self._number == number and self._frame is not None and self._attached == mine:
                    self._reply = reply
                    self._changed.notify_all()

    def wake(self) -> None:
        """Look again whether the client is still there."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Give up: whoever waits gets a ``ConnectionError``."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Host:
    """A gRPC server with mutual TLS. ``carriers`` answer, by client; ``line(client)`` asks one.

    ``host = Host("0.0.0.0:50051", credentials, {name: serve(Service({name: session}))})``, then ``start()``, which
    returns the port. Clients without a certificate of the authority do not get in, nor those whose certificate
    ``credentials`` refuse, and the others reach the carrier of their own name alone: frames go to nobody else, whatever
    session they claim. A client that connects again takes the place of its old connection, so that it has one stream to
    ask and one to answer by, and no more than ``WORKERS`` threads each while an old one ends. Whoever connects and does
    not get through TLS within ``handshake`` seconds is dropped, and takes no thread until then. Frames of more than
    ``max_nbytes`` of tensors are refused before memory is taken. ``deadline`` is how long a client may take to answer,
    in seconds. ``stop()`` ends within ``grace``.

    It protects what crosses from others on the way, and sessions from each other. It does not protect a client from
    what this server does with what it is sent.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        carriers: Mapping[str, Carrier],
        *,
        deadline: float = 60.0,
        max_nbytes: int = MAX_NBYTES,
        heartbeat: float = HEARTBEAT,
        handshake: float = HANDSHAKE,
    ):
        if not carriers or min(deadline, max_nbytes, heartbeat, handshake) <= 0:
            raise ValueError(
                f"expected a client, and a deadline, a frame size, a heartbeat and a handshake above 0, got "
                f"{len(carriers)}, {deadline}, {max_nbytes}, {heartbeat} and {handshake}"
            )
        grpc = grpc_module()
        self._credentials = credentials
        self.address, self._carriers = place(address, least=0), dict(carriers)
        self._lines = {client: Line(client, deadline=deadline) for client in carriers}
        self._turns = {client: _Turns() for client in carriers}
        self._connections: dict[tuple[str, str], Any] = {}
        self._workers: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self.refused = 0  # streams of clients that no carrier is for, or whose certificate is refused
        handlers = {
            ASK: grpc.stream_stream_rpc_method_handler(self._asked),
            ANSWER: grpc.stream_stream_rpc_method_handler(self._answering),
        }
        # A thread a stream, two streams a client, as many again while one that was cut off comes back, and some more
        # to refuse those that are too many.
        threads = 2 * WORKERS * len(carriers) + 4
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="host"),
            options=options(max_nbytes, heartbeat, handshake=handshake),
            maximum_concurrent_rpcs=threads + PENDING,
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        secure = grpc.ssl_server_credentials(
            [(credentials.key, credentials.certificate)], credentials.authority, require_client_auth=True
        )
        try:
            self.port = self._server.add_secure_port(address, secure)
        except RuntimeError as error:
            raise ValueError(
                f"expected an address to listen on, got {address}; is its port taken, or its host another machine's?"
            ) from error

    def start(self) -> int:
        """Listen; return the port."""
        self._server.start()
        return self.port

    def line(self, client: str) -> Line:
        """Return the carrier that asks this client."""
        return self._lines[client]

    def stop(self, grace: float = 5.0) -> None:
        """Take no more requests, let those that are being answered end within ``grace`` seconds, and close."""
        for line in self._lines.values():
            line.close()
        self._server.stop(grace).wait(grace + 5.0)

    def _asked(self, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        client = self._client(context)
        turns = self._turns[client]
        with self._worker(client, ASK, context):
            context.add_callback(turns.wake)
            while (frame := _next(frames)) is not None and turns.take(context.is_active):
                try:
                    reply = self._carriers[client](frame)
                finally:
                    turns.give()
                yield reply

    def _answering(self, replies: Iterator[bytes], context: Any) -> Iterator[bytes]:
        client = self._client(context)
        line = self._lines[client]
        with self._worker(client, ANSWER, context):
            context.add_callback(line.wake)
            yield from line.serve(replies, context.is_active)

    @contextmanager
    def _worker(self, client: str, stream: str, context: Any) -> Iterator[None]:
        """Take the place of the client's older stream; end the call where too many of them have not ended yet."""
        mine = client, stream
        with self._lock:
            before, self._connections[mine] = self._connections.get(mine), context
            self._workers[mine] += 1
            many = self._workers[mine] > WORKERS
        try:
            if before is not None:
                before.cancel()
            if many:
                unavailable = grpc_module().StatusCode.UNAVAILABLE
                context.abort(unavailable, "older streams of this client have not ended; try again")
            yield
        finally:
            with self._lock:
                self._workers[mine] -= 1

    def _client(self, context: Any) -> str:
        """Return the name in the client's certificate, or end the call: no carrier is for it, or it is refused."""
        shown = context.auth_context()
        names = [name.decode(errors="replace") for name in shown.get("x509_common_name", ())]
        if len(names) != 1 or names[0] not in self._carriers:
            self._refuse(context, "no session is for the name in this certificate")
        if any(map(self._credentials.refuses, shown.get("x509_pem_cert", ()))):
            self._refuse(context, "this certificate is not good any longer")
        return names[0]

    def _refuse(self, context: Any, why: str) -> NoReturn:
        with self._lock:
            self.refused += 1
        context.abort(grpc_module().StatusCode.PERMISSION_DENIED, why)
        raise AssertionError("unreachable: abort raises")


class _Turns:
    """One request of a client at a time: an old connection's ends before a new one's begins."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False

    def take(self, wanted: Callable[[], bool]) -> bool:
        """Wait for the turn; return False where it is not wanted any longer, as ``wake`` makes it look."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or not wanted())
            if self._taken or not wanted():
                return False
            self._taken = True
            return True

    def give(self) -> None:
        """End the turn."""
        with self._changed:
            self._taken = False
            self._changed.notify_all()

    def wake(self) -> None:
        """Look again who still wants the turn."""
        with self._changed:
            self._changed.notify_all()


def _next(frames: Iterator[bytes]) -> bytes | None:
    """Return the next frame, or None where the client has gone."""
    try:
        return next(frames, None)
    except grpc_module().RpcError:
        return None
