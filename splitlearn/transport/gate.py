"""A gate before a client's session: open for the round that the client is asked for, and no other."""

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from splitlearn.frames import Message
from splitlearn.members import FedMember, Weights
from splitlearn.wire import Transport

__all__ = ["ROUND", "Gate", "GatedMember", "round_tag"]

ROUND = "@"  # a client asks its session, name@tag, where the tag says for which round


def round_tag(weights: Mapping[str, Tensor]) -> str:
    """Return what both ends know a round by: 16 hex digits of SHA-256 over the weights that it starts from."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


class Gate:
    """A transport that refuses requests of any round but the one that is open.

    So a client that took too long, and still trains in a round that went on without it, reaches nothing. To close it
    waits for the request that is being answered.
    """

    def __init__(self, client: str, transport: Transport):
        self._client, self._transport, self._lock, self._tag = client, transport, threading.Lock(), ""

    def request(self, message: Message) -> Message:
        """Pass the message on, its session without the tag; ``ValueError`` where it is not of the round."""
        session, _, tag = message.session.partition(ROUND)
        with self._lock:
            if not self._tag or tag != self._tag:
                raise ValueError(
                    f"{self._client}: expected a request of the round that is open, but this one's is over, or went on "
                    "without this client, which took longer than the deadline; wait for the next one"
                )
            return replace(self._transport.request(replace(message, session=session)), session=message.session)

    def open(self, tag: str) -> None:
        """Let requests of this round through."""
        with self._lock:
            self._tag = tag

    def close(self) -> None:
        """Let no more requests through."""
        self.open("")


class GatedMember:
    """A member elsewhere whose session on the main server is open during its round alone.

    ``before`` is called first, such as to bring a server that was killed up to date. Members that are independent of
    each other (SplitFed V1, FedAvg) are asked at the same time.
    """

    elsewhere = True

    def __init__(self, member: FedMember, gate: Gate, before: Callable[[], object] = lambda: None):
        self.name, self._member, self._gate, self._before = member.name, member, gate, before

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Return what the member does."""
        self._before()
        self._gate.open(round_tag(weights))
        try:
            return self._member.round(weights)
        finally:
            self._gate.close()
