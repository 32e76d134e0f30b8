"""Remote: a party seen across a wire, and ``wire``, which puts one there.

client ── Remote ── Framed ── Metered ── serve ── Recorded ── Service ── Learner
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn.frames import Codec, Kind, Message
from splitlearn.party import Party
from splitlearn.service import Answering, Service, keyed, named, need
from splitlearn.wire import Framed, Metered, Recorded, Transport, serve

__all__ = ["Asked", "Caller", "Remote", "Wire", "wire"]


class Caller:
    """Asks one session of a service; each request has a step of its own, greater than those before.

    A transport that sends a lost request again sends the same message: the service then answers as before.
    """

    def __init__(self, name: str, transport: Transport, session: str):
        self._name, self._transport, self._session, self.steps = name, transport, session, 0

    def __call__(self, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of the reply."""
        self.steps += 1
        request = Message(verb, tensors, self._session, self.steps)
        reply = self._transport.request(request)
        if (reply.verb, reply.session, reply.step) != (verb, self._session, request.step):
            raise ValueError(
                f"{self._name}: expected the reply to {verb!r}, step {request.step}; got one to {reply.verb!r}, "
                f"step {reply.step}; give each session a transport of its own"
            )
        return reply.tensors

    def enter(self, session: str) -> None:
        """Ask this session from now on."""
        self._session = session


class Asked:
    """Whoever is on the other end of a transport, as this side knows it: a name, and requests that are counted."""

    def __init__(self, name: str, transport: Transport, session: str):
        self.name = name
        self._ask = Caller(name, transport, session)

    def ask(self, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the reply to a verb of its own, such as a protection has; see ``Service``."""
        return self._ask(verb, tensors)

    def enter(self, session: str) -> None:
        """Ask this session from now on; steps go on."""
        self._ask.enter(session)

    @property
    def steps(self) -> int:
        """How many requests were made. Set it to go on from a checkpoint of this side, or to leave some numbers out."""
        return self._ask.steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._ask.steps = count


class Remote(Asked):
    """A party on the other end of a transport. Protocols cannot tell it from one in this process."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the remote stage's activation as a fresh leaf that asks for a gradient."""
        z = need(self._ask("forward", {_input_kind(x): x}), Kind.ACTIVATION)
        return z.to(x.device).detach().requires_grad_()

    def backward(self, g: Tensor) -> Tensor | None:
        """Return the gradient of the remote stage's input, if that asked for one."""
        reply = self._ask("backward", {Kind.GRADIENT: g})
        return _on(g.device, reply.get(Kind.GRADIENT))

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss and, if ``z`` asks for it, its gradient."""
        reply = self._ask("learn", {_input_kind(z): z, Kind.LABEL: y})
        return need(reply, Kind.LOSS).to(z.device), _on(z.device, reply.get(Kind.GRADIENT))

    def label(self, y: Tensor) -> Tensor:
        """Labels are a local matter; raises ``ValueError``."""
        raise ValueError(
            f"{self.name}: expected labels from a party in this process, got a remote one; ask the local party"
        )

    def predict(self, x: Tensor) -> Tensor:
        """Return the remote stage's output in evaluation mode."""
        kind = Kind.ACTIVATION if x.is_floating_point() else Kind.INPUT
        return need(self._ask("predict", {kind: x}), Kind.PREDICTION).to(x.device)

    def weights(self) -> dict[str, Tensor]:
        """Return the remote stage's parameters and buffers."""
        return named(self._ask("weights", {}), Kind.WEIGHTS)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Have the remote stage take over parameters and buffers."""
        self._ask("load_weights", keyed(weights, Kind.WEIGHTS))


@dataclass(frozen=True)
class Wire:
    """A party across a wire in this process: what the other side calls, what it cost, and what the party saw."""

    party: Remote
    meter: Metered
    record: Recorded


def wire(party: Party | Answering, codec: Codec | None = None, *, max_nbytes: int = 1 << 30) -> Wire:
    """Put ``party`` behind real frames: metered, packed by ``codec``, and recorded on its own side."""
    record = Recorded(Service({party.name: party}), max_nbytes=max_nbytes)
    meter = Metered(serve(record, codec))
    return Wire(Remote(party.name, Framed(meter, codec), party.name), meter, record)


def _input_kind(x: Tensor) -> Kind:
    return Kind.ACTIVATION if x.requires_grad else Kind.INPUT


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
