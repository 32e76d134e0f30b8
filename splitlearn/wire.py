"""The wire: transports carry messages, carriers carry frames.

    client ── Remote ── Framed ── Metered ── serve ── Recorded ── Service ── Learner

A view is recorded on the observer's own side, here right of ``serve``, after every codec: an attack then reads
what crossed and nothing else.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from splitlearn.frames import MAX_NBYTES, Codec, Kind, Message, decode, encode, frame_nbytes
from splitlearn.misfit import Refused

__all__ = ["ROUND", "Carrier", "Exchange", "Framed", "Metered", "Recorded", "Transport", "copied", "serve"]

MAX_ERROR_NBYTES = 10_000  # of an error's text that are read
ROUND = "@"  # a session may be asked as name@tag, where the tag says for which round
REPEATED = 8  # replies of a session that are kept packed, in case they are asked for again

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


class Recorded:
    """A transport that keeps a transcript of what crosses it, up to ``max_nbytes``; then the oldest are dropped.

    The transcript holds copies: what a party does to its tensors later does not show in it. Sessions may be asked
    from several threads at once.
    """

    def __init__(self, transport: Transport, *, max_nbytes: int = 1 << 30):
        self.exchanges: deque[Exchange] = deque()
        self.dropped = 0  # exchanges no longer kept
        self._transport, self._max_nbytes, self._nbytes = transport, max_nbytes, 0
        self._lock = threading.Lock()

    def request(self, message: Message) -> Message:
        """Pass the message on, and keep a copy of it and of its reply."""
        asked = copied(message)  # before the party may change what it is given
        reply = self._transport.request(message)
        exchange = Exchange(asked, copied(reply))
        with self._lock:
            self.exchanges.append(exchange)
            self._nbytes += _nbytes(exchange)
            while self._nbytes > self._max_nbytes:
                self._nbytes -= _nbytes(self.exchanges.popleft())
                self.dropped += 1
        return reply

    def clear(self, *, keep: Sequence[Exchange] = ()) -> None:
        """Forget the transcript, but for some of its exchanges."""
        with self._lock:
            self.exchanges = deque(keep)
            self._nbytes, self.dropped = sum(_nbytes(exchange) for exchange in keep), 0


class Framed:
    """A transport whose messages really become frames on a carrier, packed by ``codec``.

    A reply whose tensors take more than ``max_nbytes``, packed or not, is an error.
    """

    def __init__(self, carrier: Carrier, codec: Codec | None = None, *, max_nbytes: int = MAX_NBYTES):
        self._carrier, self._codec, self._max_nbytes = carrier, codec, max_nbytes

    def request(self, message: Message) -> Message:
        """Send the message as a frame and return the decoded reply; an error on the other end is raised here."""
        reply = decode(self._carrier(encode(message, self._codec)), self._codec, max_nbytes=self._max_nbytes)
        if Kind.ERROR in reply.tensors:
            text = bytes(reply.tensors[Kind.ERROR].flatten()[:MAX_ERROR_NBYTES].to(torch.uint8).tolist())
            line = " ".join(text.decode(errors="replace").split())  # one line, whatever the other end says
            raise Refused("".join(letter for letter in line if letter.isprintable()))
        return reply


def serve(transport: Transport, codec: Codec | None = None, *, max_nbytes: int = MAX_NBYTES) -> Carrier:
    """Return a carrier that decodes each frame, has it answered, and encodes the reply; errors travel as text.

    A reply that comes again is the same frame, so that a codec with a memory packs it once.
    """
    sent: dict[str, deque[tuple[Message, bytes]]] = {}

    def carry(frame: bytes) -> bytes:
        try:
            reply = transport.request(decode(frame, codec, max_nbytes=max_nbytes))
            if codec is None:
                return encode(reply)
            before = sent.setdefault(reply.session.partition(ROUND)[0], deque(maxlen=REPEATED))
            for again, packed in before:
                if again.tensors is reply.tensors and again.step == reply.step:
                    return packed
            before.append((reply, encode(reply, codec)))
            return before[-1][1]
        except (ValueError, LookupError) as error:
            text = str(error).encode(errors="replace") or b"error"
            return encode(Message("error", {Kind.ERROR: torch.frombuffer(bytearray(text), dtype=torch.uint8)}))

    return carry


class Metered:
    """A carrier that counts the bytes of real frames: ``nbytes[direction][kind]``, headers as ``framing``.

    ``requests`` is the direction of the requests: "up" where a client asks a server, "down" where a server asks.
    It may be called from several threads at once.
    """

    def __init__(self, carrier: Carrier, *, requests: str = "up"):
        if requests not in ("up", "down"):
            raise ValueError(f"expected requests to go 'up' or 'down', got {requests!r}")
        self.nbytes: dict[str, Counter[str]] = {"up": Counter(), "down": Counter()}
        self.frames = 0
        self._lock = threading.Lock()
        self._carrier, self._requests, self._replies = carrier, requests, "down" if requests == "up" else "up"

    def __call__(self, frame: bytes) -> bytes:
        """Pass the frame on and count it and its reply."""
        self._count(self._requests, frame)
        reply = self._carrier(frame)
        self._count(self._replies, reply)
        return reply

    def _count(self, direction: str, frame: bytes) -> None:
        try:
            counts = frame_nbytes(frame)
        except ValueError:  # whoever reads it says what is wrong with it
            counts = Counter({Kind.FRAMING.value: len(frame)})
        with self._lock:
            self.nbytes[direction].update(counts)
            self.frames += 1

    @property
    def total_nbytes(self) -> int:
        """All bytes so far, both directions."""
        return sum(counts.total() for counts in self.nbytes.values())

    def clear(self) -> None:
        """Count from zero again."""
        self.nbytes, self.frames = {"up": Counter(), "down": Counter()}, 0


def copied(message: Message) -> Message:
    """Return the message with tensors of its own, which nobody else can change."""
    return replace(message, tensors={key: tensor.detach().clone() for key, tensor in message.tensors.items()})


def _nbytes(exchange: Exchange) -> int:
    tensors = (*exchange.request.tensors.values(), *exchange.reply.tensors.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
