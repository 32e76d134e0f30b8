"""The fed server of a deployment whose main server is another operator's: it holds bottoms, and drives the rounds."""

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.deployment import FED_SERVER, own_stages, parts_of, server_learners
from experiments.greeting import FED, MAIN, Greeted, Nobody, Offer, greeting_of, offered, read_greeting
from experiments.serving import FAREWELL, PAUSE, WAIT, Served, summed_nbytes
from experiments.sessions import found_state
from experiments.setups import counted
from splitlearn.checkpoint import save_checkpoint
from splitlearn.federation import NobodyFinishedError, Round, fedavg_round, in_turn_round, splitfed_v2_round
from splitlearn.frames import Kind
from splitlearn.members import RemoteMember
from splitlearn.remote import Asked
from splitlearn.service import keyed, named, need
from splitlearn.transport import Connection, Credentials, GatedMember, Host, held
from splitlearn.transport.gate import BusyError
from splitlearn.wire import ROUND, Framed, Metered, serve

__all__ = ["FedServer"]

SPARE = 1 << 20  # bytes that a frame may take beyond the bottom's weights
WHY = "this is the fed server, which answers no training; look at --server and --fed-server"


class FedServer:
    """The fed server of a deployment, on ``address``: it asks the main server at ``main`` what is trained, and drives.

    ``run()`` waits for the clients and trains, round by round: each begins with a bottom, comes back with one, and
    trains against the main server in between, whose gate is open for it that long. What the clients exchange with the
    main server never comes here: no activation, no label, no gradient, no top. ``close()`` lets the clients go. Made
    anew over the same ``folder`` after it was killed, it goes on in mid-round. A client that does not answer within
    ``deadline`` seconds, or answers with an error, is left out of the round. The bottom begins with weights drawn by
    chance, or by ``own_seed``: for trials alone, as with a start that it can guess the main server reads inputs from
    the activations of the first round, and knows every bottom after it. Where the main server is away for longer
    than ``patience`` seconds, the training stops with an ``OSError``, and may go on later.
    """

    def __init__(
        self,
        main: str,
        address: str,
        credentials: Credentials,
        folder: Path,
        *,
        own_seed: int | None = None,
        data_dir: Path | None = None,
        deadline: float = 600.0,
        patience: float = 600.0,
        told: Callable[[str], None] = lambda line: None,
    ):
        self.folder, self._told = folder, told
        with ExitStack() as stack:
            stack.enter_context(held(folder / "state"))
            state = found_state(self._path, None)
            self._main: ToMain | None = None
            if state is None or not state["settled"]:
                self._main = ToMain(Connection(main, credentials, patience=patience, told=told))
                stack.callback(self._main.close)
                offer = self._main.offered()
            else:  # the main server may have gone
                offer = read_greeting(state["greeting"])
            self.deployment, self.name, salt = offer.deployment, offer.run, secrets.token_hex(16)
            if state is not None:
                self._check(state)
                salt = read_greeting(state["greeting"]).salt
            self._offer = Offer(self.deployment, self.name, FED, salt)
            if self._main is not None:
                self._main.check(state["attempts"] if state is not None else 0)
            self._begin(address, credentials, data_dir, own_seed, deadline, state)
            if state is None:
                self._keep()  # before any client knows of this run's salt: made anew it would have another one
            self._held = stack.pop_all()  # until it is closed

    def _begin(
        self, address: str, credentials: Credentials, data_dir: Path | None, own_seed: int | None, deadline: float,
        state: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        names, splits = self.deployment.clients, parts_of(self.deployment, data_dir)
        start = own_stages(self.deployment, splits, own_seed)
        self.bottom = server_learners(self.deployment, splits, start)[0]
        self.served, self.attempts = Served(), 0
        self._counts: dict[str, int] = {}  # of the last round that was tried: who finished it
        self._before: dict[str, dict[str, int]] = {}
        most = 2 * sum(tensor.nbytes for tensor in self.bottom.weights().values()) + SPARE
        self._text = greeting_of(self._offer)
        self.meters = {name: Metered(serve(Greeted(name, self._text, Nobody(WHY)), max_nbytes=most)) for name in names}
        self.host = Host(address, credentials, self.meters, deadline=deadline, max_nbytes=most)
        self.asked = {name: Metered(self.host.line(name), requests="down") for name in names}
        self._remote = {name: RemoteMember(name, Framed(self.asked[name], max_nbytes=most), name) for name in names}
        if state is not None:
            self._take(state)
        if self._main is not None:
            doors = {name: _Door(name, self._main) for name in names}
            self.members = [
                GatedMember(self._remote[name], doors[name], told=self._told, salt=self._offer.salt) for name in names
            ]

    def run(self) -> Served:
        """Train, from wherever the folder's state stands; ``close`` must follow."""
        port = self.host.start()
        self._told(f"fed server on port {port}; waiting for {', '.join(self.deployment.clients)}")
        begun = time.monotonic() - self.served.seconds
        if not self.attempts:
            self._gather()
        self._settle()
        while not self.over:
            try:
                done: Round | None = self._round()
            except NobodyFinishedError as error:
                self._told(f"{error}")
                done = None
            self.attempts += 1
            self._counts = {} if done is None else dict(done.counts)
            if done is not None:
                self.served.rounds += 1
                self.served.left_out.append(list(done.dropped))
            self.served.seconds = time.monotonic() - begun
            self._keep()  # first, so that who finished is said of this round once and for all
            self._settle()
            if done is None:
                time.sleep(PAUSE)
            else:
                out = f", left out: {', '.join(done.dropped)}" if done.dropped else ""
                self._told(f"round {self.served.rounds} of {self.deployment.rounds} is done{out}")
        self._farewell()
        return self.served

    def close(self) -> None:
        """Stop. Gates of a round that is not done stay open: clients train on while this server is away."""
        if self._main is not None:
            self._main.close()
        self.host.stop()
        self._held.close()

    @property
    def over(self) -> bool:
        """Whether all rounds are done."""
        return self.served.rounds >= self.deployment.rounds

    @property
    def _path(self) -> Path:
        return self.folder / "state" / "fed-server.safetensors"

    def _gather(self) -> None:
        """Wait until every client is there, however long that takes; say for whom."""
        away = list(self.deployment.clients)
        while away := [name for name in away if not self.host.line(name).wait(WAIT / len(away))]:
            self._told(f"waiting for {', '.join(away)}")

    def _round(self) -> Round:
        """Train a round: of SplitFed V1, the fed server's half is FedAvg's; the main server averages tops."""
        if self.deployment.protocol == "splitfed_v1":
            return fedavg_round(self.members, self.bottom)
        if self.deployment.protocol == "splitfed_v2":
            return splitfed_v2_round(self.members, self.bottom)
        return in_turn_round(self.members, self.bottom)

    def _settle(self) -> None:
        """Have the main server end the last round that was tried, if there was one."""
        if self._main is None:
            return
        while self.attempts and not self._main.end(self.attempts, self._counts):
            self._told("the main server still answers a request of a client that was left out; waiting for it")
            time.sleep(PAUSE)
        self._main.attempt = self.attempts + 1
        if self.over:
            self._keep(settled=True)

    def _farewell(self) -> None:
        """Tell the main server that all is done, and each client that is there or comes within a moment.

        After a restart some have gone, as they were told before.
        """
        if self._main is not None:
            self._main.leave()
        for name, member in self._remote.items():
            line = self.host.line(name)
            if line.wait(FAREWELL):
                line.deadline = FAREWELL
                with suppress(ConnectionError, TimeoutError, ValueError):
                    member.ask("finish", {})

    def _all_nbytes(self) -> dict[str, dict[str, int]]:
        """Return the bytes of all frames, those of before a restart too, as far as the last checkpoint knew."""
        return summed_nbytes(counted([*self.meters.values(), *self.asked.values()]), self._before)

    def _check(self, state: Mapping[str, Any]) -> None:
        if (state["deployment"], state["run"]) != (self.deployment.told(), self.name):
            raise ValueError(
                f"expected the state of the training that the main server offers, got that of another one in "
                f"{self.folder}; give both servers the folders that they had, or both new ones"
            )

    def _take(self, state: Mapping[str, Any]) -> None:
        self.bottom.load_state_dict(state["bottom"])
        for name, member in self._remote.items():
            member.steps = state["members"][name]
        self.served, self.attempts, self._counts = Served(**state["served"]), state["attempts"], state["counts"]
        self._before = self.served.nbytes
        self._told(f"goes on: {self.served.rounds} of {self.deployment.rounds} rounds are done")

    def _keep(self, *, settled: bool = False) -> None:
        """Write a checkpoint; ``settled`` where the main server is needed no more."""
        self.served.nbytes = self._all_nbytes()
        state = {
            "deployment": self.deployment.told(), "run": self.name, "greeting": self._text, "settled": settled,
            "bottom": self.bottom.state_dict(), "served": vars(self.served), "attempts": self.attempts,
            "members": {name: member.steps for name, member in self._remote.items()}, "counts": self._counts,
        }  # fmt: skip
        save_checkpoint(self._path, state)


class ToMain:
    """The main server, as its fed server speaks to it; one request at a time. ``attempt`` is the round's number.

    That it is away is an ``OSError``, and no ``ConnectionError``, by which a client would drop out.
    """

    def __init__(self, connection: Connection):
        self._connection, self._asked = connection, Asked("main server", Framed(connection.ask), FED_SERVER)
        self._lock, self.attempt = threading.Lock(), 1

    def offered(self) -> Offer:
        """Return what it offers."""
        try:
            return offered(self._connection, FED_SERVER, MAIN)
        except PermissionError as error:
            raise PermissionError(f"{error}; or start that server with --apart") from error

    def check(self, attempts: int) -> None:
        """Go on where the last request was; ``ValueError`` where the main server is in another round."""
        standing = {name: int(n) for name, n in named(self._ask(FED_SERVER, "standing", {}), Kind.COUNT).items()}
        self._asked.steps = standing.get("asked", 0)
        if standing.get("attempts") not in (attempts, attempts - 1):
            raise ValueError(
                f"expected a main server that has tried {attempts} rounds, got one that has tried "
                f"{standing.get('attempts')}; give both servers the folders that they had, or both new ones"
            )

    def close(self) -> None:
        """Say no more; who asks gets an ``OSError``."""
        self._connection.close()

    def turn(self, verb: str, session: str) -> bool:
        """Have a client's gate opened or closed; return whether it is."""
        return self._is_done(self._ask(session, verb, {Kind.COUNT: torch.tensor(self.attempt)}))

    def end(self, attempt: int, counts: Mapping[str, int]) -> bool:
        """Have a round ended; return whether it is."""
        samples = keyed({name: torch.tensor(count) for name, count in counts.items()}, Kind.COUNT)
        return self._is_done(self._ask(FED_SERVER, "end", {Kind.COUNT: torch.tensor(attempt), **samples}))

    def leave(self) -> None:
        """Say that nothing more is needed; the main server may have gone, too."""
        self._connection.patience = FAREWELL
        with suppress(OSError):
            self._ask(FED_SERVER, "leave", {})

    def _is_done(self, reply: Mapping[str, Tensor]) -> bool:
        return bool(need(reply, Kind.COUNT).any())

    def _ask(self, session: str, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with self._lock:
            self._asked.enter(session)
            try:
                return self._asked.ask(verb, tensors)
            except (ConnectionError, TimeoutError, ValueError) as error:
                raise OSError(f"the main server: {error}") from error


@dataclass(frozen=True)
class _Door:
    """A client's gate, which is on the main server."""

    name: str
    main: ToMain

    def open(self, tag: str) -> None:
        """Have it opened for a round."""
        if not self.main.turn("open", f"{self.name}{ROUND}{tag}"):
            raise BusyError(f"{self.name}: expected its requests of before to be answered by now, but one is not")

    def close(self) -> bool:
        """Have it closed; return whether no request is being answered any more."""
        return self.main.turn("close", f"{self.name}{ROUND}")
