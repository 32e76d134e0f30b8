"""What a party of CrypTen has received, and drawn itself: all that an honest but curious one could look through."""

import torch
from torch import Tensor

from splitlearn.frames import Kind, Message
from splitlearn.wire import Exchange, Transport, copied

__all__ = ["Memory"]


class Memory:
    """Notes, in order, of what crossed CrypTen's own sockets and of what this party drew. Off unless asked for.

    Each note is an exchange like those of a recorded wire: ``opened`` (what this party sent, and the sum that all then
    know), ``received`` (from one other party), ``drew`` (from a stream of its own or a common one).
    """

    def __init__(self, *, on: bool):
        self.on = on
        self.exchanges: list[Exchange] = []

    def note(self, verb: str, sent: dict[str, Tensor], got: dict[str, Tensor]) -> None:
        """Keep copies of what was sent and what came."""
        if self.on:
            sides = ({f"{Kind.GLOO}/{name}": t.detach().clone() for name, t in side.items()} for side in (sent, got))
            self.exchanges.append(Exchange(*(Message(verb, side, "gloo") for side in sides)))

    def noting(self, transport: Transport) -> Transport:
        """Return the transport with its exchanges noted too, but for those about this memory; as it is when off."""
        return _Noting(self, transport) if self.on else transport

    def take(self, most: int) -> list[Exchange]:
        """Return the oldest notes, and forget them."""
        taken, self.exchanges = self.exchanges[:most], self.exchanges[most:]
        return taken

    def heard(self, text: str) -> None:
        """Keep an object that came, as its text."""
        self.note("received", {}, {"text": torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)})


class _Noting:
    def __init__(self, memory: Memory, transport: Transport):
        self._memory, self._transport = memory, transport

    def request(self, message: Message) -> Message:
        asked = copied(message)  # before anybody may change what came
        reply = self._transport.request(message)
        if message.session != "ledger":
            self._memory.exchanges.append(Exchange(asked, copied(reply)))
        return reply
