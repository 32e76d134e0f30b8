"""Two servers and a dealer, each a process of its own, and how a client asks both servers at once."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from privacy.mpc.compat import INSTALL
from privacy.mpc.costs import Costs
from privacy.mpc.sharing import SERVERS
from splitlearn.frames import Kind, Message
from splitlearn.remote import Remote
from splitlearn.settings import settings_of, settings_tensor
from splitlearn.wire import Carrier, Exchange, Framed, Metered, Recorded

__all__ = ["SECURITY", "Pair", "Servers"]

SECURITY = (
    "semi-honest parties: all follow the protocol, and only look",
    "the two servers do not collude, and neither does the dealer with one of them",
    "research-grade randomness: SHAKE-128 streams of 256-bit seeds, no audit, nothing against side channels",
    "no TLS between the servers and the dealer: gloo on loopback; who reads both servers' wires reads everything",
)
FIRST_PARTY = "INSECURE: server 0 deals the triples itself (trusted first party), and can read every secret"
ROLES = ("server 0", "server 1", "dealer")
LAST_WORDS = 2000  # bytes of a party's error output that are looked at
POLL_SECONDS = 0.2
START_SECONDS = 60.0  # to start takes seconds of processor time, whatever an answer may take
GRACE_SECONDS = 3.0


class Servers:
    """Two servers that do not collude, and the dealer who gives them correlated randomness (CrypTen's ``TTP``).

    Three processes on this machine, each with a socket to this one; among themselves they speak CrypTen's gloo over
    loopback. Use it as a context, or ``close()`` it; however this process ends, they end too.

    ``timeout`` is how many seconds any answer may take: a party that dies or hangs then ends the run with
    ``ConnectionError`` or ``TimeoutError``, and with it all three. ``remember=True`` has each keep all that it receives
    and draws, for attacks and tests: see ``observed``. ``threads`` is how many each computes with.

    ``insecure_trust_first_party=True`` leaves the dealer out: server 0 then makes the triples, and can open whatever
    the other holds. It is there for attacks to win against, and stands in ``security`` and so in every record.

    - Protects: what is shared, from each server and from the dealer, who see uniformly random halves, and what these
      are multiplied to, masked.
    - Does not protect: shapes, the kinds of layers, learning rates, how often and when; anything from two who collude;
      against a party that deviates: nothing is authenticated, and whoever holds this object speaks for every client.
      See ``SECURITY``, which stands in every record.
    """

    def __init__(
        self,
        *,
        timeout: float = 120.0,
        remember: bool = False,
        threads: int = 1,
        insecure_trust_first_party: bool = False,
    ):
        if not (isinstance(timeout, int | float) and timeout > 0 and isinstance(threads, int) and threads > 0):
            raise ValueError(f"expected a timeout above 0 s and threads of 1 or more, got {timeout!r} and {threads!r}")
        if find_spec("crypten") is None:
            raise LookupError(f"expected CrypTen, got none; install it: {INSTALL}")
        self.timeout, self.remember = timeout, remember
        self.insecure_trust_first_party = insecure_trust_first_party
        self._process = os.getpid()
        self._folder = tempfile.TemporaryDirectory(prefix="splitlearn-mpc-")
        self._processes: list[subprocess.Popen[str]] = []
        self._connections: list[Connection] = []
        self._turns = [threading.Lock() for _ in ROLES]
        self._ending, self._telling = threading.Lock(), threading.Lock()
        self._both = threading.Lock()  # both servers get requests in the same order
        self._pool = ThreadPoolExecutor(1)
        self._numbers = 0
        self._why_closed = ""
        try:
            for rank, _ in enumerate(self.roles):
                self._start(rank, threads)
            for rank, role in enumerate(self.roles):
                if self._received(rank, max(timeout, START_SECONDS)) != b"ready":
                    raise ConnectionError(f"expected {role} to be ready, got something else")
        except (ConnectionError, TimeoutError) as error:
            raise self._ended(error) from error
        except BaseException:
            self.close()
            raise
        self._desk = self.pair("desk")
        ledgers = [Remote("ledger", Framed(self._carrier(rank)), "ledger") for rank, _ in enumerate(self.roles)]
        self._ledgers = dict(zip(self.roles, ledgers, strict=True))

    @property
    def roles(self) -> tuple[str, ...]:
        """The parties: both servers, and the dealer where there is one."""
        return ROLES[: SERVERS + (not self.insecure_trust_first_party)]

    @property
    def security(self) -> list[str]:
        """What has to hold for the shares to protect anything, a line each; it belongs in every record."""
        return [*([FIRST_PARTY] if self.insecure_trust_first_party else []), *SECURITY]

    @property
    def meters(self) -> list[Metered]:
        """The wires to both servers themselves: stages opened, and contributions of secure aggregation."""
        return self._desk.meters

    def pair(self, session: str) -> "Pair":
        """Return a session's wires to both servers, metered."""
        return Pair(self, session)

    def new_session(self, what: str) -> str:
        """Return a name that no other session of these servers has."""
        self._numbers += 1
        return f"{what}{self._numbers}"

    def desk(self, verb: str, told: Mapping[str, Any], messages: tuple[Mapping[str, Tensor], ...] = ({}, {})) -> Any:
        """Ask both servers themselves, and not a session of theirs."""
        return self._desk.ask(verb, told, messages)

    def costs(self) -> Costs:
        """Return what both servers and the dealer have cost since ``count_anew``."""
        told = {role: settings_of(self._ledger(role, "costs")[Kind.PARAMETERS]) for role in self.roles}
        return Costs.of(told)

    def count_anew(self) -> None:
        """Count from zero again."""
        for role in self.roles:
            self._ledger(role, "count_anew")

    def observed(self, role: str) -> Recorded:
        """Return all that one party (``server 0``, ``server 1``, ``dealer``) has received and drawn, and forget it.

        It goes where a recorded wire goes: ``observe(servers.observed("server 0"), threat=…)``.
        """
        if not self.remember:
            raise LookupError("expected parties that remember, got none; start Servers(remember=True)")
        if role not in self.roles:
            raise LookupError(f"expected a party among {', '.join(self.roles)}; got {role!r}")
        record = Recorded(_Nowhere())
        while found := self._ledger(role, "remembered"):
            record.exchanges.extend(_exchanges(found))
        return record

    def close(self) -> list[str]:
        """End all three processes, and return which had to be killed; closing again does nothing.

        Whatever is open with them is lost.
        """
        stubborn = []
        self._why_closed = self._why_closed or "they were closed"
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()  # they end with it, as they would if this process had died
        for role, process in zip(self.roles, self._processes, strict=False):
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                stubborn.append(role)
                process.kill()
                process.wait()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        self._pool.shutdown(wait=False)
        self._folder.cleanup()
        return stubborn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def asked(self, calls: tuple[Callable[[], Any], Callable[[], Any]]) -> tuple[Any, Any]:
        """Return the answers of both servers, asked at once; what ends one of them ends all."""
        self._check_process()
        with self._both, self._whole():
            self._check_open()
            other = self._pool.submit(calls[1])
            answers, errors = zip(_tried(calls[0]), _tried(other.result), strict=True)
        for error in errors:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise self._ended(error) from error
        for error in errors:
            if error is not None:
                raise error
        return answers

    def carry(self, rank: int, frame: bytes) -> bytes:
        """Send a frame to one party and return its answer."""
        with self._turns[rank], self._whole():
            self._check_open()
            try:
                self._connections[rank].send_bytes(frame)
            except OSError as error:
                raise ConnectionError(f"{ROLES[rank]} took nothing ({error})") from error
            return self._received(rank, self.timeout)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """End all parties where Ctrl-C cuts the block short: an answer still to come would be taken for the next."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self._why_closed = "the run was interrupted while they worked"
            self.close()
            raise

    def _carrier(self, rank: int) -> Carrier:
        return lambda frame: self.carry(rank, frame)

    def _ledger(self, role: str, verb: str) -> Mapping[str, Tensor]:
        try:
            with self._telling:  # a request is numbered before it waits for its turn
                return self._ledgers[role].ask(verb, {})
        except (ConnectionError, TimeoutError) as error:
            raise self._ended(error) from error

    def _start(self, rank: int, threads: int) -> None:
        here, there = socket.socketpair()
        with here, there, (Path(self._folder.name) / f"{rank}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "privacy.mpc.process"],
                stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, pass_fds=(there.fileno(),),
                start_new_session=True,
            )  # fmt: skip
            self._processes.append(process)
            self._connections.append(Connection(here.detach()))
            told = {
                "rank": rank, "rendezvous": str(Path(self._folder.name) / "rendezvous"), "seconds": self.timeout,
                "socket": there.fileno(), "threads": threads, "remember": self.remember,
                "insecure_trust_first_party": self.insecure_trust_first_party,
            }  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.flush()

    def _received(self, rank: int, seconds: float) -> bytes:
        """Return the next frame of one party; an error where it ends first, or any other does, or time is up."""
        end = time.monotonic() + seconds
        connection = self._connections[rank]
        while not wait([connection], min(POLL_SECONDS, max(0.0, end - time.monotonic()))):
            if gone := [role for role, one in zip(self.roles, self._processes, strict=False) if one.poll() is not None]:
                raise ConnectionError(f"{gone[0]} ended")
            if time.monotonic() >= end:
                raise TimeoutError(f"{ROLES[rank]} did not answer within {seconds:g} s")
        try:
            return connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise ConnectionError(f"{ROLES[rank]} ended") from error

    def _ended(self, error: Exception) -> Exception:
        """End all parties, and return the error that says which of them failed, and why."""
        with self._ending:  # whoever comes second is told what the first one found
            if self._why_closed:
                return type(error)(f"{error} ({self._why_closed}); start Servers() anew, and load weights")
            return self._found(error)

    def _found(self, error: Exception) -> Exception:
        time.sleep(POLL_SECONDS)  # the one that fell first takes the others with it, which then say so
        found = [_last_words(Path(self._folder.name) / f"{rank}.log") for rank, _ in enumerate(self.roles)]
        codes = [process.poll() for process in self._processes]
        killed = [
            f"{role} was killed (signal {-code})"
            for role, code in zip(self.roles, codes, strict=False)
            if code and code < 0
        ]
        said = [f"{role}: {words}" for role, words in zip(self.roles, found, strict=False) if words]
        self._why_closed = "one of them failed"
        hung = [f"{role} hung" for role in self.close()]
        why = "; ".join(killed or hung or said[:1])
        self._why_closed = why or str(error)
        return type(error)(f"{error}{f' ({why})' if why else ''}; start Servers() anew, and load weights")

    def __reduce__(self) -> Any:
        """Refuse copies: they would speak over the same sockets."""
        raise TypeError(
            "expected servers to stay in this process, got a copy or a pickle of them; save state_dict() instead, and "
            "build the model anew around Servers()"
        )

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ConnectionError(
                "expected to be asked by the process that started the servers, got a fork of it; start Servers() there"
            )

    def _check_open(self) -> None:
        if self._why_closed:
            with self._ending:
                raise ConnectionError(
                    f"expected servers that run, got ones that have ended: {self._why_closed}; start Servers() anew"
                )


class Pair:
    """One session with both servers: what it says to each crosses a wire of its own, metered."""

    def __init__(self, servers: Servers, session: str):
        self.session, self._servers = session, servers
        self.meters = [Metered(servers._carrier(rank)) for rank in range(SERVERS)]
        self._remotes = [Remote(ROLES[rank], Framed(meter), session) for rank, meter in enumerate(self.meters)]

    def ask(
        self,
        verb: str,
        told: Mapping[str, Any] | None = None,
        messages: tuple[Mapping[str, Tensor], ...] = ({}, {}),
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return both servers' replies. ``told`` goes to both; of ``messages`` each gets its own."""
        public = {} if told is None else {Kind.PARAMETERS: settings_tensor(told)}
        first, second = (
            lambda remote=remote, message=message: remote.ask(verb, {**public, **message})
            for remote, message in zip(self._remotes, messages, strict=True)
        )
        return self._servers.asked((first, second))


class _Nowhere:
    def request(self, message: Message) -> Message:
        raise LookupError("expected nothing to be asked of a memory")


def _tried(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error


def _exchanges(found: Mapping[str, Tensor]) -> list[Exchange]:
    """Return the notes that one answer of a ledger holds, in order."""
    notes: dict[str, tuple[str, dict[str, dict[str, Tensor]]]] = {}
    for key, tensor in found.items():
        kind, place, verb, side, name = key.split("/", 4)
        _, sides = notes.setdefault(place, (verb, {"sent": {}, "got": {}}))
        sides[side][f"{kind}/{name}" if name else kind] = tensor
    return [
        Exchange(Message(verb, sides["sent"], "party"), Message(verb, sides["got"], "party"))
        for _, (verb, sides) in sorted(notes.items())
    ]


def _last_words(log: Path) -> str:
    """Return the last line of a party's error output."""
    try:
        lines = log.read_bytes()[-LAST_WORDS:].decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    return errors[-1].strip() if errors else ""
