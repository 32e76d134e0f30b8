"""A gate before a client's session: open for the round that the client is asked for, and no other."""

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from splitlearn.frames import Message
from splitlearn.members import FedMember, Weights
from splitlearn.wire import ROUND, Transport

__all__ = ["Gate", "GatedMember", "round_tag"]


def round_tag(weights: Mapping[str, Tensor]) -> str:
    """Return what both ends know a round by: 16 hex digits of SHA-256 over the weights that it starts from."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


class Gate:
    """A transport that lets through the verbs of training, in the round that is open, and refuses all else.

    So a client that took too long, and still trains in a round that went on without it, reaches nothing. A request of
    a round that has not been open yet waits until it is, or another one is: after a restart clients may be quicker than
    the server. To close it waits for the request that is being answered.
    """

    def __init__(self, client: str, transport: Transport, verbs: Collection[str] = ("learn",)):
        self._client, self._transport, self._verbs = client, transport, frozenset(verbs)
        self._changed = threading.Condition()
        self._tag, self._over, self._stopped = "", {""}, False

    def request(self, message: Message) -> Message:
        """Pass the message on, its session without the tag; ``ValueError`` where it is not of the round."""
        session, _, tag = message.session.rpartition(ROUND)
        if message.verb not in self._verbs:
            raise ValueError(f"expected a verb among {', '.join(sorted(self._verbs))}; got {message.verb!r}")
        with self._changed:
            self._changed.wait_for(lambda: self._tag or self._stopped or not session or tag in self._over)
            if not session or not tag or tag != self._tag:
                raise ValueError(
                    f"{self._client}: expected a request of the round that is open, but this one's is over, or went on "
                    "without this client, which took longer than the deadline; wait for the next one"
                )
            return replace(self._transport.request(replace(message, session=session)), session=message.session)

    def open(self, tag: str) -> None:
        """Let requests of this round through."""
        with self._changed:
            self._tag = tag
            self._changed.notify_all()

    def close(self) -> None:
        """Let no more requests through; the round is over."""
        with self._changed:
            self._over = {"", self._tag}  # the last one is enough: whoever is in an older one sees another tag open
            self._tag = ""
            self._changed.notify_all()

    def stop(self) -> None:
        """Refuse also what waits: this server ends."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class GatedMember:
    """A member elsewhere whose session on the main server is open during its round alone.

    ``before`` is called first, such as to bring a server that was killed up to date. Members that are independent of
    each other (SplitFed V1, FedAvg) are asked at the same time. One that answers with an error, or with other entries
    than it was given, drops out of the round (``ConnectionError``), and ``told`` says so.
    """

    elsewhere = True

    def __init__(
        self, member: FedMember, gate: Gate, before: Callable[[], object] = lambda: None,
        told: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        self.name, self._member, self._gate, self._before, self._told = member.name, member, gate, before, told

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Return what the member does."""
        self._before()
        self._gate.open(round_tag(weights))
        try:
            found, count = self._member.round(weights)
            if found.keys() != weights.keys():
                raise ValueError(f"expected the {len(weights)} entries that it was given, got {len(found)}")
            return found, count
        except (ValueError, LookupError) as error:
            self._told(f"{self.name} is left out of this round: {error}")
            raise ConnectionError(f"{self.name}: {error}") from error
        finally:
            self._gate.close()
