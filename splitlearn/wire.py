"""The wire: transports carry messages, carriers carry frames, and a party is seen through them.

    client ── Remote ── Framed ── Metered ── serve ── Recorded ── Service ── Learner

A view is recorded on the observer's own side, here right of ``serve``, after every codec: an attack then reads
what crossed and nothing else.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from splitlearn.frames import Codec, Kind, Message, decode, encode, frame_nbytes
from splitlearn.party import Party

__all__ = [
    "Carrier", "Emulated", "Exchange", "Framed", "Metered", "Recorded", "Remote", "Service", "Transport", "Wire",
    "serve", "wire",
]  # fmt: skip

Carrier = Callable[[bytes], bytes]  # takes a request's frame, returns the reply's


class Transport(Protocol):
    """Carries one message to a service and its reply back."""

    def request(self, message: Message) -> Message:
        """Return the reply to ``message``."""


@dataclass(frozen=True)
class Exchange:
    """One request and its reply."""

    request: Message
    reply: Message


class Service:
    """Answers for parties and members, one a session. A repeated step gets the reply it got before.

    Each session counts its steps up by one, from wherever its first request starts. A step that was refused does
    not count. Sessions may be asked from several threads at once; the requests of one session wait in turn.
    """

    def __init__(self, sessions: Mapping[str, Any]):
        self.sessions = dict(sessions)
        self._last: dict[str, Exchange] = {}
        self._turns: dict[str, threading.Lock] = {}

    def request(self, message: Message) -> Message:
        """Do what the message asks of its session's party and return the reply.

        Raises ``ValueError`` for an unknown session or verb, a step out of order, and a step repeated with another
        verb or other tensors.
        """
        party = self.sessions.get(message.session)
        if party is None:
            raise ValueError(f"expected a session among {', '.join(self.sessions)}; got {message.session!r}")
        if message.verb not in ANSWERS:
            raise ValueError(f"expected a verb among {', '.join(ANSWERS)}; got {message.verb!r}")
        if not hasattr(party, "round" if message.verb == "update" else message.verb):
            raise ValueError(f"{message.session} is a {type(party).__name__}, which does not answer {message.verb!r}")
        with self._turns.setdefault(message.session, threading.Lock()):  # a repeat waits for the first to be done
            last = self._last.get(message.session)
            if last is not None and message.step == last.request.step:
                return _repeated(last, message)
            if last is not None and message.step != last.request.step + 1:
                raise ValueError(
                    f"expected step {last.request.step + 1} of {message.session}, got {message.step}; steps count up "
                    "by one"
                )
            reply = replace(message, tensors=ANSWERS[message.verb](party, message.tensors))
            self._last[message.session] = Exchange(message, reply)
            return reply


class Recorded:
    """A transport that keeps a transcript of what crosses it, up to ``max_nbytes``; then the oldest are dropped.

    The transcript holds copies: what a party does to its tensors later does not show in it.
    """

    def __init__(self, transport: Transport, *, max_nbytes: int = 1 << 30):
        self.exchanges: deque[Exchange] = deque()
        self.dropped = 0  # exchanges no longer kept
        self._transport, self._max_nbytes, self._nbytes = transport, max_nbytes, 0

    def request(self, message: Message) -> Message:
        """Pass the message on, and keep a copy of it and of its reply."""
        asked = _copied(message)  # before the party may change what it is given
        reply = self._transport.request(message)
        self.exchanges.append(Exchange(asked, _copied(reply)))
        self._nbytes += _nbytes(self.exchanges[-1])
        while self._nbytes > self._max_nbytes:
            self._nbytes -= _nbytes(self.exchanges.popleft())
            self.dropped += 1
        return reply

    def clear(self) -> None:
        """Forget the transcript."""
        self.exchanges.clear()
        self._nbytes = self.dropped = 0


class Framed:
    """A transport whose messages really become frames on a carrier, packed by ``codec``."""

    def __init__(self, carrier: Carrier, codec: Codec | None = None):
        self._carrier, self._codec = carrier, codec

    def request(self, message: Message) -> Message:
        """Send the message as a frame and return the decoded reply; an error on the other end is raised here."""
        reply = decode(self._carrier(encode(message, self._codec)), self._codec)
        if Kind.ERROR in reply.tensors:
            text = bytes(reply.tensors[Kind.ERROR].to(torch.uint8).flatten().tolist())
            raise ValueError(text.decode(errors="replace"))
        return reply


def serve(transport: Transport, codec: Codec | None = None) -> Carrier:
    """Return a carrier that decodes each frame, has it answered, and encodes the reply; errors travel as text.

    A reply that comes a second time is the same frame, so that a codec with a memory packs it once.
    """
    last: dict[str, tuple[Message, bytes]] = {}

    def carry(frame: bytes) -> bytes:
        try:
            reply = transport.request(decode(frame, codec))
            before, sent = last.get(reply.session, (None, b""))
            if reply is not before:
                sent = encode(reply, codec)
                last[reply.session] = reply, sent
            return sent
        except (ValueError, LookupError) as error:
            text = str(error).encode(errors="replace") or b"error"
            return encode(Message("error", {Kind.ERROR: torch.frombuffer(bytearray(text), dtype=torch.uint8)}))

    return carry


class Metered:
    """A carrier that counts the bytes of real frames: ``nbytes[direction][kind]``, headers as ``framing``.

    ``requests`` is the direction of the requests: "up" where a client asks a server, "down" where a server asks.
    """

    def __init__(self, carrier: Carrier, *, requests: str = "up"):
        if requests not in ("up", "down"):
            raise ValueError(f"expected requests to go 'up' or 'down', got {requests!r}")
        self.nbytes: dict[str, Counter[str]] = {"up": Counter(), "down": Counter()}
        self.frames = 0
        self._carrier, self._requests, self._replies = carrier, requests, "down" if requests == "up" else "up"

    def __call__(self, frame: bytes) -> bytes:
        """Pass the frame on and count it and its reply."""
        self.nbytes[self._requests].update(frame_nbytes(frame))
        reply = self._carrier(frame)
        self.nbytes[self._replies].update(frame_nbytes(reply))
        self.frames += 2
        return reply

    @property
    def total_nbytes(self) -> int:
        """All bytes so far, both directions."""
        return sum(counts.total() for counts in self.nbytes.values())

    def clear(self) -> None:
        """Count from zero again."""
        self.nbytes, self.frames = {"up": Counter(), "down": Counter()}, 0


class Emulated:
    """A carrier that takes as long as a network would: one-way ``latency`` seconds and ``bandwidth`` bits a second.

    ``seconds`` adds up the delay. Pass ``sleep=None`` to count it without waiting.
    """

    def __init__(
        self,
        carrier: Carrier,
        *,
        latency: float,
        bandwidth: float,
        sleep: Callable[[float], None] | None = time.sleep,
    ):
        if not (latency >= 0 and bandwidth > 0):
            raise ValueError(f"expected latency ≥ 0 s and bandwidth > 0 bit/s, got {latency} and {bandwidth}")
        self.seconds = 0.0
        self._carrier, self._latency, self._bandwidth, self._sleep = carrier, latency, bandwidth, sleep

    def __call__(self, frame: bytes) -> bytes:
        """Pass the frame on after its delay, and the reply after its own."""
        self._wait(frame)
        reply = self._carrier(frame)
        self._wait(reply)
        return reply

    def _wait(self, frame: bytes) -> None:
        delay = self._latency + 8 * len(frame) / self._bandwidth
        self.seconds += delay
        if self._sleep is not None:
            self._sleep(delay)


class Remote:
    """A party on the other end of a transport. Protocols cannot tell it from one in this process."""

    def __init__(self, name: str, transport: Transport, session: str):
        self.name = name
        self._transport, self._session, self._steps = transport, session, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the remote stage's activation as a fresh leaf that asks for a gradient."""
        z = _need(self._ask("forward", {_input_kind(x): x}), Kind.ACTIVATION)
        return z.to(x.device).detach().requires_grad_()

    def backward(self, g: Tensor) -> Tensor | None:
        """Return the gradient of the remote stage's input, if that asked for one."""
        reply = self._ask("backward", {Kind.GRADIENT: g})
        return _on(g.device, reply.get(Kind.GRADIENT))

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss and, if ``z`` asks for it, its gradient."""
        reply = self._ask("learn", {_input_kind(z): z, Kind.LABEL: y})
        return _need(reply, Kind.LOSS).to(z.device), _on(z.device, reply.get(Kind.GRADIENT))

    def label(self, y: Tensor) -> Tensor:
        """Labels are a local matter; raises ``ValueError``."""
        raise ValueError(
            f"{self.name}: expected labels from a party in this process, got a remote one; ask the local party"
        )

    def predict(self, x: Tensor) -> Tensor:
        """Return the remote stage's output in evaluation mode."""
        kind = Kind.ACTIVATION if x.is_floating_point() else Kind.INPUT
        return _need(self._ask("predict", {kind: x}), Kind.PREDICTION).to(x.device)

    def weights(self) -> dict[str, Tensor]:
        """Return the remote stage's parameters and buffers."""
        return named(self._ask("weights", {}), Kind.WEIGHTS)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Have the remote stage take over parameters and buffers."""
        self._ask("load_weights", keyed(weights, Kind.WEIGHTS))

    def _ask(self, verb: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        request = Message(verb, tensors, self._session, self._steps + 1)
        reply = self._transport.request(request)
        if (reply.verb, reply.session, reply.step) != (verb, self._session, request.step):
            raise ValueError(
                f"{self.name}: expected the reply to {verb!r}, step {request.step}; got one to {reply.verb!r}, "
                f"step {reply.step}; give each session a transport of its own"
            )
        self._steps += 1  # a request that failed may be sent again
        return reply.tensors


@dataclass(frozen=True)
class Wire:
    """A party across a wire in this process: what the other side calls, what it cost, and what the party saw."""

    party: Remote
    meter: Metered
    record: Recorded


def wire(party: Party, codec: Codec | None = None, *, max_nbytes: int = 1 << 30) -> Wire:
    """Put ``party`` behind real frames: metered, packed by ``codec``, and recorded on its own side."""
    record = Recorded(Service({party.name: party}), max_nbytes=max_nbytes)
    meter = Metered(serve(record, codec))
    return Wire(Remote(party.name, Framed(meter, codec), party.name), meter, record)


def keyed(tensors: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Return named tensors under a message's keys, ``kind/name``."""
    return {f"{kind}/{name}": tensor for name, tensor in tensors.items()}


def named(tensors: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Return the tensors of one kind by their names."""
    return {key[len(kind) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{kind}/")}


def _answer_forward(party: Party, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {Kind.ACTIVATION: party.forward(_received(tensors))}


def _answer_backward(party: Party, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    g = party.backward(_need(tensors, Kind.GRADIENT))
    return {} if g is None else {Kind.GRADIENT: g}


def _answer_learn(party: Party, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    loss, g = party.learn(_received(tensors), _need(tensors, Kind.LABEL))
    return {Kind.LOSS: loss} if g is None else {Kind.LOSS: loss, Kind.GRADIENT: g}


def _answer_predict(party: Party, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {Kind.PREDICTION: party.predict(_received(tensors).detach())}


def _answer_weights(party: Party, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return keyed(party.weights(), Kind.WEIGHTS)


def _answer_load_weights(party: Party, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    party.load_weights(named(tensors, Kind.WEIGHTS))
    return {}


def _answer_round(member: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights, count = member.round(named(tensors, Kind.WEIGHTS))
    return {**keyed(weights, Kind.WEIGHTS), Kind.COUNT: torch.tensor(count)}


def _answer_update(member: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    before = named(tensors, Kind.WEIGHTS)
    weights, count = member.round(before)
    if weights.keys() != before.keys():
        raise ValueError(f"expected the weights {', '.join(weights)}; got {', '.join(before) or 'none'}")
    return {
        **keyed({name: w - before[name] for name, w in weights.items()}, Kind.UPDATE),
        Kind.COUNT: torch.tensor(count),
    }


ANSWERS: dict[str, Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "forward": _answer_forward,
    "backward": _answer_backward,
    "learn": _answer_learn,
    "predict": _answer_predict,
    "weights": _answer_weights,
    "load_weights": _answer_load_weights,
    "round": _answer_round,
    "update": _answer_update,
}


def _input_kind(x: Tensor) -> Kind:
    return Kind.ACTIVATION if x.requires_grad else Kind.INPUT


def _received(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the activation, asking for its gradient again, or the input that came."""
    if Kind.ACTIVATION in tensors:
        z = tensors[Kind.ACTIVATION].detach()
        return z.requires_grad_() if z.is_floating_point() else z
    return _need(tensors, Kind.INPUT)


def _need(tensors: Mapping[str, Tensor], kind: Kind) -> Tensor:
    if kind not in tensors:
        raise ValueError(f"expected a message with {kind}, got {', '.join(tensors) or 'an empty one'}")
    return tensors[kind]


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _repeated(last: Exchange, message: Message) -> Message:
    """Return the last reply again, if this is the last request again, to the bit."""
    if encode(message) != encode(last.request):
        raise ValueError(
            f"step {message.step} of {message.session} was {last.request.verb!r}, got {message.verb!r} for it again "
            "with other content; repeat a step as it was, or open a new session"
        )
    return last.reply


def _copied(message: Message) -> Message:
    return replace(message, tensors={key: tensor.detach().clone() for key, tensor in message.tensors.items()})


def _nbytes(exchange: Exchange) -> int:
    tensors = (*exchange.request.tensors.values(), *exchange.reply.tensors.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
