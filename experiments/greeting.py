"""The greeting: a server says what training it offers and which part of it is, and whoever takes part asks for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.deployment import FED_SERVER, HELLO, Deployment, announced
from splitlearn.frames import Kind, Message
from splitlearn.remote import Remote
from splitlearn.service import Answer, Service, need
from splitlearn.transport import Connection
from splitlearn.wire import Framed, Transport

__all__ = ["BOTH", "FED", "MAIN", "Greeted", "Nobody", "Offer", "greeting_of", "offered", "read_greeting"]

BOTH, MAIN, FED = "server", "main server", "fed server"  # what a server may be in a training


class Greeted:
    """A transport that has greetings of one party answered at any time, all else by another transport."""

    def __init__(self, name: str, text: str, transport: Transport):
        self._hello, self._transport = Service({f"{name}/{HELLO}": _Greeting(name, text)}), transport

    def request(self, message: Message) -> Message:
        """Answer a greeting, or pass the message on."""
        greets = message.session.endswith(f"/{HELLO}")
        return (self._hello if greets else self._transport).request(message)


class _Greeting:
    """Says what training is offered, and to whom it speaks."""

    def __init__(self, name: str, text: str):
        self.name, self._text = name, text

    @property
    def answers(self) -> Mapping[str, Answer]:
        """The verb ``hello``."""
        return {HELLO: self._hello}

    def _hello(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {Kind.PARAMETERS: torch.frombuffer(bytearray(self._text.encode()), dtype=torch.uint8)}


class Nobody:
    """What answers where nothing is to be asked."""

    def __init__(self, why: str):
        self._why = why

    def request(self, message: Message) -> Message:
        """Refuse the message."""
        raise ValueError(f"expected no request of {message.session!r}: {self._why}")


@dataclass(frozen=True)
class Offer:
    """What a server says: the training, its run's name, which part of it this server is, the salt of rounds' tags."""

    deployment: Deployment
    run: str
    part: str = BOTH
    salt: str = ""


def greeting_of(offer: Offer) -> str:
    """Return it as one line of JSON."""
    told = {"run": offer.run, "training": json.loads(offer.deployment.told()), "part": offer.part}
    return json.dumps(told | ({"salt": offer.salt} if offer.salt else {}))


def read_greeting(text: str) -> Offer:
    """Return what a server said; ``ValueError`` where this release cannot take part in it."""
    deployment, run = announced(text)
    told = json.loads(text)
    return Offer(deployment, run, str(told.get("part", BOTH))[:40], str(told.get("salt", "")))


def offered(connection: Connection, name: str, part: str) -> Offer:
    """Return what a server offers to the party of this name.

    Raises ``ValueError`` where it offers none to it, or is another part of it than ``part``.
    """
    found = Remote("server", Framed(connection.ask), f"{name}/{HELLO}").ask(HELLO, {})
    text = bytes(need(found, Kind.PARAMETERS).tolist()).decode(errors="replace")
    offer = read_greeting(text)
    if name not in ((FED_SERVER,) if name == FED_SERVER and offer.deployment.apart else offer.deployment.clients):
        raise ValueError(f"expected a training for {name}, got one for {', '.join(offer.deployment.clients)}")
    if offer.part != part:
        raise ValueError(
            f"expected the {part} at {connection.address}, got one that says it is the {offer.part}; "
            + ("give --fed-server too" if (part, offer.part) == (BOTH, MAIN) else "look at --server and --fed-server")
        )
    return offer
