"""The server of a deployment: it offers a training to clients on other machines, and goes on where it was killed."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from experiments.deployment import Deployment, parts_of, server_learners
from experiments.greeting import Greeted, Offer, greeting_of
from experiments.sessions import Sessions
from experiments.setups import counted
from splitlearn.data import Splits
from splitlearn.federation import (
    NobodyFinishedError,
    Round,
    fedavg_round,
    in_turn_round,
    splitfed_v1_round,
    splitfed_v2_round,
)
from splitlearn.members import RemoteMember
from splitlearn.train import predict
from splitlearn.transport import Credentials, GatedMember, Host, held
from splitlearn.wire import Framed, Metered, serve

__all__ = ["FAREWELL", "PAUSE", "WAIT", "Served", "Server", "summed_nbytes"]

PAUSE, FAREWELL = 1.0, 5.0  # seconds: before a round is tried again, and for a client to take its leave
WAIT = 30.0  # seconds between two words on who is waited for


@dataclass
class Served:
    """What came of a training: accuracy after each round, who was left out of which, bytes and seconds."""

    rounds: int = 0
    accuracy: list[float] = field(default_factory=list)
    left_out: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0
    nbytes: dict[str, dict[str, int]] = field(default_factory=dict)


class Server:
    """Main server and fed server of a deployment in one process, on ``address``.

    ``run()`` waits for the clients, trains for the deployment's rounds by the same protocol functions as in one
    process, and returns what came of it; ``close()`` lets the clients go. ``folder`` holds its state: a checkpoint at
    every round's start, and a journal of what clients asked since. Made anew over the same folder after it was killed,
    it goes on in mid-round, and no step is lost or made twice. A client that does not answer within ``deadline``
    seconds, or answers with an error, is left out of the round.

    Both servers in one hands hold bottom and top, that is the whole model, and what clients send: split learning's
    privacy is against a main server that does not have the bottoms. For trials, or where the operator is trusted so
    far; else they are a ``MainServer`` and a ``FedServer`` in two hands.
    """

    def __init__(
        self,
        deployment: Deployment,
        address: str,
        credentials: Credentials,
        folder: Path,
        *,
        data_dir: Path | None = None,
        deadline: float = 600.0,
        told: Callable[[str], None] = lambda line: None,
    ):
        if deployment.apart:
            raise ValueError("expected a deployment of both servers in one, got one whose servers are apart")
        self.deployment, self.folder, self._told = deployment, folder, told
        with ExitStack() as stack:
            stack.enter_context(held(folder / "state"))
            self._begin(address, credentials, data_dir, deadline)
            self._held = stack.pop_all()  # until it is closed

    def _begin(self, address: str, credentials: Credentials, data_dir: Path | None, deadline: float) -> None:
        deployment, told = self.deployment, self._told
        self.splits: Splits = parts_of(deployment, data_dir)
        self.bottom, self.top, self.learners = server_learners(deployment, self.splits)
        self.served = Served()
        self._before: dict[str, dict[str, int]] = {}
        self._sessions = Sessions(deployment, self.top, self.learners, self.folder / "state" / "server.safetensors")
        gates, most = self._sessions.gates, self._most_nbytes()
        text = greeting_of(Offer(deployment, self._sessions.run))
        self._meters = {
            name: Metered(serve(Greeted(name, text, gates[name]), max_nbytes=most)) for name in deployment.clients
        }
        self.host = Host(address, credentials, self._meters, deadline=deadline, max_nbytes=most)
        self._asked = {name: Metered(self.host.line(name), requests="down") for name in deployment.clients}
        remote = {name: RemoteMember(name, Framed(line, max_nbytes=most), name) for name, line in self._asked.items()}
        self._remote = remote

        def before(name: str) -> None:
            if count := self._sessions.replay(name):
                told(f"{name}: {count} requests of before are made again")

        self.members = [GatedMember(remote[name], gates[name], partial(before, name), told) for name in remote]
        if self._sessions.state is not None:
            self._take(self._sessions.state)

    def run(self) -> Served:
        """Train, from wherever the folder's state stands; ``close`` must follow."""
        if self.served.rounds >= self.deployment.rounds:
            self._told("all rounds are done")
            return self.served
        port = self.host.start()
        self._told(f"listening on port {port}; waiting for {', '.join(self.deployment.clients)}")
        x, y = self.splits.test.x, self.splits.test.y
        begun = time.monotonic() - self.served.seconds
        if not self._sessions.path.is_file():
            self._gather()
            self._keep()
        while self.served.rounds < self.deployment.rounds:
            try:
                done = self._round()
            except NobodyFinishedError as error:
                self._told(f"{error}")
                self._keep()  # or a restart would make this round's steps without what they began from
                time.sleep(PAUSE)
                continue
            chain = [self.bottom] if self.top is None else [self.bottom, self.top]
            self.served.accuracy.append((predict(chain, x).argmax(1) == y).double().mean().item())
            self.served.left_out.append(list(done.dropped))
            self.served.rounds += 1
            self.served.seconds = time.monotonic() - begun
            self._keep()
            out = f", left out: {', '.join(done.dropped)}" if done.dropped else ""
            self._told(
                f"round {self.served.rounds} of {self.deployment.rounds}: accuracy {self.served.accuracy[-1]:.4f} "
                f"on the test set{out}"
            )
        return self.served

    def close(self) -> None:
        """Tell the clients that are there that all is done, if it is, and stop."""
        for name, member in self._remote.items():
            line = self.host.line(name)
            if self._sessions.over and line.connected:
                line.deadline = FAREWELL
                with suppress(ConnectionError, TimeoutError, ValueError):
                    member.ask("finish", {})
        for gate in self._sessions.gates.values():
            gate.stop()
        self.host.stop()
        self._sessions.close()
        self._held.close()

    def _most_nbytes(self) -> int:
        """Return what one frame's tensors may take: a batch of activations, or the bottom's weights, and some more."""
        weights = sum(tensor.nbytes for tensor in self.bottom.weights().values())
        z = self.bottom.predict(self.splits.test.x[:1])
        return 2 * max(weights, z.nbytes * self.deployment.batch_size) + (1 << 20)

    def _gather(self) -> None:
        """Wait until every client is there, however long that takes; say for whom."""
        away = list(self.deployment.clients)
        while away := [name for name in away if not self.host.line(name).wait(WAIT / len(away))]:
            self._told(f"waiting for {', '.join(away)}")

    def _round(self) -> Round:
        if self.top is None:
            return fedavg_round(self.members, self.bottom)
        if self.deployment.protocol == "splitfed_v1":
            return splitfed_v1_round(self.members, self.learners, self.bottom, self.top)
        if self.deployment.protocol == "splitfed_v2":
            return splitfed_v2_round(self.members, self.bottom)
        return in_turn_round(self.members, self.bottom)

    def _all_nbytes(self) -> dict[str, dict[str, int]]:
        """Return the bytes of all frames, those of before a restart too, as far as the last checkpoint knew."""
        return summed_nbytes(counted([*self._meters.values(), *self._asked.values()]), self._before)

    def _take(self, state: Mapping[str, Any]) -> None:
        self.bottom.load_state_dict(state["bottom"])
        for name, member in self._remote.items():
            member.steps = state["members"][name]
        self.served = Served(**state["served"])
        self._before = self.served.nbytes
        self._told(f"goes on: {self.served.rounds} of {self.deployment.rounds} rounds are done")

    def _keep(self) -> None:
        """Write a checkpoint, when all that was asked in the round is answered, also of clients that were left out."""
        while busy := self._sessions.busy():
            self._told(f"the last request of {', '.join(busy)} is still being answered; waiting for it")
            time.sleep(PAUSE)
        self.served.nbytes = self._all_nbytes()
        more = {
            "bottom": self.bottom.state_dict(),
            "members": {name: member.steps for name, member in self._remote.items()},
            "served": vars(self.served),
        }
        self._sessions.keep(more, over=self.served.rounds >= self.deployment.rounds)


def summed_nbytes(now: Mapping[str, Mapping[str, int]], before: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return the bytes by direction and kind, those of before a restart too."""
    return {way: dict(Counter(kinds) + Counter(before.get(way, {}))) for way, kinds in now.items()}
