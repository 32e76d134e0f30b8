"""A gate before a client's session: open for the round that the client is asked for, and no other."""

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from splitlearn.frames import Message
from splitlearn.members import FedMember, Weights
from splitlearn.wire import ROUND, Transport

__all__ = ["Gate", "GatedMember", "round_tag"]

GRACE = 5.0  # seconds for a request that is being answered when its round ends


def round_tag(weights: Mapping[str, Tensor], salt: str = "") -> str:
    """Return what both ends know a round by: 16 hex digits of SHA-256 over the weights that it starts from.

    Whoever does not know the ``salt`` cannot try guesses of weights on it.
    """
    found = hashlib.sha256(salt.encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


class BusyError(TimeoutError):
    """A client that cannot take part, as the server still answers a request of its."""


class Gate:
    """A transport that lets through the verbs of training, in the round that is open, and refuses all else.

    So a client that took too long, and still trains in a round that went on without it, reaches nothing. A request of
    a round that has not been open yet waits until it is, or another one is: after a restart clients may be quicker than
    the server. Requests pass one at a time. To close it waits for the one that is being answered, ``grace`` seconds at
    most: past that the client is ``busy``, and no round opens for it until that one is answered.
    """

    def __init__(self, client: str, transport: Transport, verbs: Collection[str] = ("learn",), *, grace: float = GRACE):
        self._client, self._transport, self._verbs, self._grace = client, transport, frozenset(verbs), grace
        self._changed = threading.Condition()
        self._tag, self._over, self._stopped = "", {""}, False
        self.busy = False  # with a request that is being answered

    def request(self, message: Message) -> Message:
        """Pass the message on, its session without the tag; ``ValueError`` where it is not of the round."""
        session, _, tag = message.session.rpartition(ROUND)
        if message.verb not in self._verbs:
            raise ValueError(f"expected a verb among {', '.join(sorted(self._verbs))}; got {message.verb!r}")
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or not session or tag in self._over or (self._tag and not self.busy)
            )
            if not session or not tag or tag != self._tag:
                raise ValueError(
                    f"{self._client}: expected a request of the round that is open, but this one's is over, or went on "
                    "without this client, which took longer than the deadline; wait for the next one"
                )
            self.busy = True
        try:
            return replace(self._transport.request(replace(message, session=session)), session=message.session)
        finally:
            with self._changed:
                self.busy = False
                self._changed.notify_all()

    def open(self, tag: str) -> None:
        """Let requests of this round through; ``BusyError`` where one of before is still being answered."""
        with self._changed:
            if self.busy:
                raise BusyError(
                    f"{self._client}: expected its requests of before to be answered by now, but one is not"
                )
            self._tag = tag
            self._changed.notify_all()

    def close(self) -> bool:
        """Let no more requests through, the round is over; return whether none is being answered."""
        with self._changed:
            if self._tag:  # or it was closed before
                self._over = {"", self._tag}  # the last is enough: whoever is in an older one sees another tag open
            self._tag = ""
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self.busy, self._grace)

    def stop(self) -> None:
        """Refuse also what waits: this server ends."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Gated(Protocol):
    """What opens and closes a client's session: a ``Gate`` here, or whoever has one opened elsewhere."""

    def open(self, tag: str) -> None:
        """Let requests of this round through; ``BusyError`` where one of before is still being answered."""

    def close(self) -> bool:
        """Let no more requests through; return whether none is being answered."""


class GatedMember:
    """A member elsewhere whose session on the main server is open during its round alone.

    ``before`` is called first, such as to bring a server that was killed up to date. Members that are independent of
    each other (SplitFed V1, FedAvg) are asked at the same time. One that answers with an error, or with other entries
    than it was given, drops out of the round (``ConnectionError``), and ``told`` says so. So does one with a request
    that this server still answers when the round ends (``TimeoutError``): its session is not settled, and others do
    not wait for it.
    """

    elsewhere = True

    def __init__(
        self, member: FedMember, gate: Gated, before: Callable[[], object] = lambda: None,
        told: Callable[[str], None] = lambda line: None, salt: str = "",
    ):  # fmt: skip
        self.name, self._member, self._gate, self._before, self._told = member.name, member, gate, before, told
        self._salt = salt

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Return what the member does."""
        self._before()
        try:
            self._gate.open(round_tag(weights, self._salt))
            try:
                found, count = self._member.round(weights)
            finally:
                settled = self._gate.close()
            if found.keys() != weights.keys():
                raise ValueError(f"expected the {len(weights)} entries that it was given, got {len(found)}")
            if not settled:
                raise BusyError(f"{self.name}: expected its requests to be answered by now, but one is not")
            return found, count
        except BusyError as error:
            self._told(f"{self.name} is left out of this round: {error}")
            raise
        except (ValueError, LookupError) as error:
            self._told(f"{self.name} is left out of this round: {error}")
            raise ConnectionError(f"{self.name}: {error}") from error
