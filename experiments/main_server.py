"""The main server of a deployment whose fed server is another operator's: it holds tops, and never sees a bottom."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.deployment import FED_SERVER, Deployment, own_stages, parts_of, server_learners
from experiments.greeting import MAIN, Greeted, Offer, greeting_of
from experiments.serving import Served, summed_nbytes
from experiments.sessions import Sessions
from experiments.setups import counted
from splitlearn.federation import mean
from splitlearn.frames import Kind, Message
from splitlearn.service import named, need
from splitlearn.transport import Credentials, Host, held
from splitlearn.transport.gate import BusyError
from splitlearn.wire import ROUND, Metered, serve

__all__ = ["MainServer"]

LEAVE = 30.0  # seconds in which a fed server takes its leave after the last round
SPARE = 1 << 20  # bytes that a frame may take beyond a batch of activations


class MainServer:
    """The main server of a deployment, on ``address``: clients train against its tops, the fed server drives.

    No bottom's weights reach it, and of every round no more than a salted digest of the bottom that it starts from. The
    top begins with weights drawn by chance, or by ``own_seed``: for trials alone, as a start that others can guess
    tells them of what follows. ``run()`` serves until the fed server says that all
    rounds are done; ``close()`` must follow. Made anew over the same ``folder`` after it was killed, it goes on in
    mid-round. Whoever has the certificate of the name ``fed-server`` opens and closes gates, and reaches no session.
    """

    def __init__(
        self,
        deployment: Deployment,
        address: str,
        credentials: Credentials,
        folder: Path,
        *,
        own_seed: int | None = None,
        data_dir: Path | None = None,
        told: Callable[[str], None] = lambda line: None,
    ):
        if not deployment.apart:
            raise ValueError("expected a deployment whose servers are apart, got one of both in one; give --apart")
        self.deployment, self.folder, self._told = deployment, folder, told
        with ExitStack() as stack:
            stack.enter_context(held(folder / "state"))
            self._begin(address, credentials, data_dir, own_seed)
            self._held = stack.pop_all()  # until it is closed

    def _begin(self, address: str, credentials: Credentials, data_dir: Path | None, own_seed: int | None) -> None:
        deployment, splits = self.deployment, parts_of(self.deployment, data_dir)
        bottom, top, self.learners = server_learners(deployment, splits, own_stages(deployment, splits, own_seed))
        if top is None:
            raise ValueError(f"expected a protocol with a main server, got {deployment.protocol}")
        self.top, self.served, self.attempts = top, Served(), 0
        self._before: dict[str, dict[str, int]] = {}
        self._sessions = Sessions(deployment, top, self.learners, self.folder / "state" / "server.safetensors")
        if self._sessions.state is not None:
            self._take(self._sessions.state)
        self.gates = self._sessions.gates
        text = greeting_of(Offer(deployment, self._sessions.run, MAIN))
        most = 2 * bottom.predict(splits.test.x[:1]).nbytes * deployment.batch_size + SPARE
        carriers = {name: serve(Greeted(name, text, gate), max_nbytes=most) for name, gate in self.gates.items()}
        self.desk = Desk(self)
        carriers[FED_SERVER] = serve(Greeted(FED_SERVER, text, self.desk), max_nbytes=most)
        self.meters = {name: Metered(carrier) for name, carrier in carriers.items()}
        self.host = Host(address, credentials, self.meters, max_nbytes=most)
        self._changed = threading.Condition()
        self._left = False
        self._failure: BaseException | None = None
        if self._sessions.state is None:
            self._kept()  # before anybody hears this run's name
        for name in deployment.clients:
            if count := self._sessions.replay(name):
                self._told(f"{name}: {count} requests of before are made again")
        self._doors = self._sessions.journal("gates")
        for message in self._doors:
            self._turn(message)

    def run(self) -> Served:
        """Serve until all rounds are done and the fed server has taken its leave, or has had the time to."""
        port = self.host.start()
        self._told(f"main server on port {port}; the fed server and {', '.join(self.deployment.clients)} may come")
        begun = time.monotonic() - self.served.seconds
        with self._changed:
            while self._failure is None and not self.over:
                self._changed.wait(1.0)
                self.served.seconds = time.monotonic() - begun
            self._changed.wait_for(lambda: self._left or self._failure is not None, LEAVE)
        if self._failure is not None:
            raise self._failure
        self.served.nbytes = self._all_nbytes()
        return self.served

    def close(self) -> None:
        """Stop, and forget the journals if all is over."""
        for gate in self.gates.values():
            gate.stop()
        self.host.stop()
        self._sessions.close()
        self._held.close()

    @property
    def over(self) -> bool:
        """Whether all rounds are done."""
        return self.served.rounds >= self.deployment.rounds

    def turn(self, message: Message) -> None:
        """Open or close a client's gate, and write down that it is so; ``BusyError`` where it cannot be opened yet."""
        self._turn(message)
        self._doors.append(message)

    def end(self, attempt: int, counts: Mapping[str, int]) -> bool:
        """End a round with those who finished it, once; return whether it is ended, or a request is still answered.

        What goes wrong here ends this server: its memory is then not what its folder says.
        """
        if self._failure is not None:
            raise RuntimeError("this server has failed, and ends")
        if attempt == self.attempts:
            return True  # the fed server was killed, or did not hear
        if unknown := [name for name in counts if name not in self.learners]:
            raise ValueError(f"expected samples of clients, got some of {unknown[0][:40]!r}")
        if not all(gate.close() for gate in self.gates.values()):
            return False
        try:
            self._average(counts)
            self.attempts = attempt
            if counts:
                self.served.rounds += 1
                self.served.left_out.append([name for name in self.deployment.clients if name not in counts])
            self._kept()
            self._doors = self._sessions.journal("gates")
        except BaseException as error:
            self.fail(error)
            raise
        if counts:
            out = f", left out: {', '.join(self.served.left_out[-1])}" if self.served.left_out[-1] else ""
            self._told(f"round {self.served.rounds} of {self.deployment.rounds} is done{out}")
        with self._changed:
            self._changed.notify_all()
        return True

    def leave(self) -> None:
        """Hear that the fed server needs nothing more."""
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End ``run`` with this error."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _average(self, counts: Mapping[str, int]) -> None:
        """SplitFed V1's half of a round's end: the mean of the copies that finished, which all copies begin with."""
        if self.deployment.protocol != "splitfed_v1":
            return
        names = [name for name in self.deployment.clients if name in counts]
        if names:
            tops = [self.learners[name].weights() for name in names]
            self.top.load_weights(mean(tops, [counts[name] for name in names]))
        for learner in self.learners.values():
            learner.load_weights(self.top.weights())

    def _turn(self, message: Message) -> None:
        name, _, tag = message.session.rpartition(ROUND)
        if name not in self.gates:
            raise ValueError(f"expected a gate of a client, got {name[:40]!r}")
        if message.verb == "open":
            self.gates[name].open(tag)
        else:
            self.gates[name].close()

    def _all_nbytes(self) -> dict[str, dict[str, int]]:
        """Return the bytes of all frames, those of before a restart too, as far as the last checkpoint knew."""
        return summed_nbytes(counted(list(self.meters.values())), self._before)

    def _take(self, state: Mapping[str, Any]) -> None:
        self.served, self.attempts = Served(**state["served"]), state["attempts"]
        self._before = self.served.nbytes
        self._told(f"goes on: {self.served.rounds} of {self.deployment.rounds} rounds are done")

    def _kept(self) -> None:
        """Write a checkpoint."""
        self.served.nbytes = self._all_nbytes()
        self._sessions.keep({"served": vars(self.served), "attempts": self.attempts}, over=self.over)


class Desk:
    """Answers the fed server: gates open and close, a round ends. What was done and is asked again does no harm.

    Verbs: ``standing`` tells how many rounds were tried and how many requests came; ``open`` and ``close`` a client's
    gate, whose name and round's tag are the session; ``end``, with the samples of each who finished; ``leave``. The
    reply's count is 1 where it is so, 0 where a client's last request is still being answered.
    """

    def __init__(self, server: MainServer):
        self._server, self._step, self._lock = server, 0, threading.Lock()

    def request(self, message: Message) -> Message:
        """Do what the message says, unless it comes from a round that is over, or after one that was sent later."""
        with self._lock:
            if message.verb == "standing":
                standing = {"attempts": self._server.attempts, "asked": self._step}
                return _reply(message, {f"{Kind.COUNT}/{name}": torch.tensor(n) for name, n in standing.items()})
            if message.step < self._step:
                raise ValueError(f"expected a step of {self._step} or more, got {message.step}; it comes too late")
            self._step = message.step
            return _reply(message, {Kind.COUNT: torch.tensor(int(self._done(message)))})

    def _done(self, message: Message) -> bool:
        server = self._server
        if message.verb == "leave":
            server.leave()
            return True
        attempt = _whole(need(message.tensors, Kind.COUNT))
        counts = {name: _whole(n) for name, n in named(message.tensors, Kind.COUNT).items()}
        if attempt != server.attempts + 1 and not (message.verb == "end" and attempt == server.attempts):
            raise ValueError(
                f"expected the round after {server.attempts} that were tried, got number {attempt}: main and fed "
                "server are not of one training; give both the folders that they had, or both new ones"
            )
        if message.verb == "end":
            if counts and not sum(counts.values()):
                raise ValueError("expected some samples of those who finished, got none")
            return server.end(attempt, counts)
        if message.verb not in ("open", "close"):
            raise ValueError(f"expected a verb among standing, open, close, end, leave; got {message.verb[:40]!r}")
        try:
            server.turn(message)
        except BusyError:
            return False
        name = message.session.rpartition(ROUND)[0]
        return message.verb == "open" or not server.gates[name].busy


def _whole(tensor: Tensor) -> int:
    """Return a count; ``ValueError`` for what is none."""
    if tensor.numel() != 1 or tensor.dtype != torch.int64 or int(tensor) < 0:
        raise ValueError(f"expected a whole number from 0 on, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return int(tensor)


def _reply(message: Message, tensors: dict[str, Tensor]) -> Message:
    return Message(message.verb, tensors, message.session, message.step)
