"""The server of a deployment: it offers a training to clients on other machines, and goes on where it was killed."""

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.deployment import HELLO, Deployment, parts_of, server_learners
from experiments.setups import counted
from splitlearn.checkpoint import load_checkpoint, save_checkpoint
from splitlearn.data import Splits
from splitlearn.federation import (
    NobodyFinishedError,
    Round,
    fedavg_round,
    in_turn_round,
    splitfed_v1_round,
    splitfed_v2_round,
)
from splitlearn.frames import Kind, Message
from splitlearn.members import RemoteMember
from splitlearn.party import Learner
from splitlearn.service import Answer, Service
from splitlearn.train import predict
from splitlearn.transport import Credentials, Gate, GatedMember, Host, Journal, Journaled, held
from splitlearn.wire import Framed, Metered, Transport, serve

__all__ = ["Served", "Server"]

PAUSE, FAREWELL = 1.0, 5.0  # seconds: before a round is tried again, and for a client to take its leave
WAIT = 30.0  # seconds between two words on who is waited for
MEMORY = 4  # exchanges of a client that are answered again; it keeps a checkpoint after every one


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
    far; else run the fed server elsewhere.
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
        self.deployment, self.folder, self._told = deployment, folder, told
        with ExitStack() as stack:
            stack.enter_context(held(folder / "state"))
            self._begin(address, credentials, data_dir, deadline)
            self._held = stack.pop_all()  # until it is closed

    def _begin(self, address: str, credentials: Credentials, data_dir: Path | None, deadline: float) -> None:
        deployment, told = self.deployment, self._told
        self.splits: Splits = parts_of(deployment, data_dir)
        self.bottom, self.top, self.learners = server_learners(deployment, self.splits)
        self.served, self.name = Served(), secrets.token_hex(8)
        self._before: dict[str, dict[str, int]] = {}
        self._generation = 0
        shared = deployment.protocol != "splitfed_v1"
        groups = [self.learners] if shared else [{name: learner} for name, learner in self.learners.items()]
        self._services = [Service(group, memory=MEMORY) for group in groups if group]
        state = self._state()
        self._journals: list[Journal] = []
        self._journaled = [Journaled(service, self._journal(place)) for place, service in enumerate(self._services)]
        of = {name: one for one, group in zip(self._journaled, groups, strict=False) for name in group}
        self._gates = {name: Gate(name, of.get(name, _Nobody())) for name in deployment.clients}
        hello = {
            name: Service({f"{name}/{HELLO}": _Greeting(name, deployment, self.name)}) for name in deployment.clients
        }
        most = self._most_nbytes()
        self._meters = {
            name: Metered(serve(_Either(hello[name], self._gates[name]), max_nbytes=most))
            for name in deployment.clients
        }
        self.host = Host(address, credentials, self._meters, deadline=deadline, max_nbytes=most)
        self._asked = {name: Metered(self.host.line(name), requests="down") for name in deployment.clients}
        remote = {name: RemoteMember(name, Framed(line, max_nbytes=most), name) for name, line in self._asked.items()}
        self._remote = remote
        up_to_date: set[int] = set()

        def before(name: str) -> None:
            one = of.get(name)
            if one is not None and id(one) not in up_to_date:
                up_to_date.add(id(one))
                count = one.replay()
                if count:
                    told(f"{name}: {count} requests of before are made again")

        self.members = [
            GatedMember(remote[name], self._gates[name], partial(before, name), told) for name in deployment.clients
        ]
        if state is not None:
            self._take(state)

    def run(self) -> Served:
        """Train, from wherever the folder's state stands; ``close`` must follow."""
        if self.served.rounds >= self.deployment.rounds:
            self._told("all rounds are done")
            return self.served
        port = self.host.start()
        self._told(f"listening on port {port}; waiting for {', '.join(self.deployment.clients)}")
        x, y = self.splits.test.x, self.splits.test.y
        begun = time.monotonic() - self.served.seconds
        if not self._path.is_file():
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
        over = self.served.rounds >= self.deployment.rounds
        for name, member in self._remote.items():
            line = self.host.line(name)
            if over and line.connected:
                line.deadline = FAREWELL
                with suppress(ConnectionError, TimeoutError, ValueError):
                    member.ask("finish", {})
        for gate in self._gates.values():
            gate.stop()
        self.host.stop()
        for journal in self._journals:
            journal.close()
            if over:
                journal.path.unlink(missing_ok=True)
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
        now = counted([*self._meters.values(), *self._asked.values()])
        return {way: dict(Counter(kinds) + Counter(self._before.get(way, {}))) for way, kinds in now.items()}

    @property
    def _parts(self) -> list[Learner]:
        """The top, and the copies of it that clients train: sessions that share it have no state of their own."""
        copies = self.learners.values() if self.deployment.protocol == "splitfed_v1" else ()
        return [part for part in (self.top, *copies) if part is not None]

    @property
    def _path(self) -> Path:
        return self.folder / "state" / "server.safetensors"

    def _journal(self, place: int) -> Journal:
        journal = Journal(self._path.parent / f"journal-{self._generation}-{place}")
        self._journals.append(journal)
        return journal

    def _state(self) -> dict[str, Any] | None:
        """Return the state in the folder, if there is one, of this deployment."""
        if not self._path.is_file():
            return None
        state: dict[str, Any] = load_checkpoint(self._path)
        if state["deployment"] != self.deployment.told():
            raise ValueError(
                f"expected a folder of this training, got {self.folder}, which holds another one; give another --out"
            )
        self._generation, self.name = state["generation"], state["run"]
        for path in self._path.parent.iterdir():
            if path.name not in (self._path.name, "lock") and not path.name.startswith(f"journal-{self._generation}-"):
                path.unlink()  # a kill came before it was
        return state

    def _take(self, state: Mapping[str, Any]) -> None:
        self.bottom.load_state_dict(state["bottom"])
        for part, own in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(own)
        for service, own in zip(self._services, state["services"], strict=True):
            service.load_state_dict(own)
        for name, member in self._remote.items():
            member.steps = state["members"][name]
        self.served = Served(**state["served"])
        self._before = self.served.nbytes
        self._told(f"goes on from {self._path}: {self.served.rounds} of {self.deployment.rounds} rounds are done")

    def _keep(self) -> None:
        """Write a checkpoint, and begin new journals: what the old ones hold is in it."""
        self._generation += 1
        self.served.nbytes = self._all_nbytes()
        if self.served.rounds >= self.deployment.rounds:
            for service in self._services:
                service.load_state_dict({})  # nobody asks again: no sample's activation stays on the disk
        state = {
            "deployment": self.deployment.told(), "run": self.name, "generation": self._generation,
            "bottom": self.bottom.state_dict(),
            "parts": [part.state_dict() for part in self._parts],
            "services": [service.state_dict() for service in self._services],
            "members": {name: member.steps for name, member in self._remote.items()},
            "served": vars(self.served),
        }  # fmt: skip
        save_checkpoint(self._path, state)
        old, self._journals = self._journals, []
        for place, journaled in enumerate(self._journaled):
            journaled.renew(self._journal(place))
        for journal in old:
            journal.close()
            journal.path.unlink(missing_ok=True)


class _Greeting:
    """Says what training is offered, and to whom it speaks."""

    def __init__(self, name: str, deployment: Deployment, run: str):
        self.name = name
        self._text = json.dumps({"run": run, "training": json.loads(deployment.told())})

    @property
    def answers(self) -> Mapping[str, Answer]:
        """The verb ``hello``."""
        return {HELLO: self._hello}

    def _hello(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {Kind.PARAMETERS: torch.frombuffer(bytearray(self._text.encode()), dtype=torch.uint8)}


class _Either:
    """A transport that has greetings answered at any time, all else through the gate."""

    def __init__(self, hello: Transport, gate: Transport):
        self._hello, self._gate = hello, gate

    def request(self, message: Message) -> Message:
        return (self._hello if message.session.endswith(f"/{HELLO}") else self._gate).request(message)


class _Nobody:
    """What answers where clients train whole models: nothing."""

    def request(self, message: Message) -> Message:
        raise ValueError(f"expected no request of {message.session!r} in this protocol: its clients train whole models")
