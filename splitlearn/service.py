"""Service: answers requests on behalf of parties, each exactly once."""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from splitlearn.frames import Kind, Message, decode, encode
from splitlearn.party import Party
from splitlearn.wire import Exchange

__all__ = ["Answer", "Answering", "Service", "keyed", "named", "need"]


Answer = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # the tensors of a request to those of its reply


class Answering(Protocol):
    """A party with verbs of its own, as a protection may need; ``Remote.ask`` asks for them."""

    name: str

    @property
    def answers(self) -> Mapping[str, Answer]:
        """What answers each of its verbs."""


class Service:
    """Answers for parties and members, one a session. A repeated step gets the reply it got before.

    Each request of a session has a greater step than the one before it; one that was refused does not count. Of each
    session the last ``memory`` exchanges are kept: a client that went back to its last checkpoint may ask these again.
    Sessions may be asked from several threads at once; the requests of one session wait in turn.
    """

    def __init__(self, sessions: Mapping[str, Any], *, memory: int = 1):
        if memory < 1:
            raise ValueError(f"expected a memory of 1 exchange or more, got {memory}")
        self.sessions, self._memory = dict(sessions), memory
        self._done: dict[str, deque[Exchange]] = {}
        self._turns: dict[str, threading.Lock] = {}

    def request(self, message: Message) -> Message:
        """Do what the message asks of its session's party and return the reply.

        Raises ``ValueError`` for an unknown session or verb, a step out of order, and a step repeated with another
        verb or other tensors.
        """
        party = self.sessions.get(message.session)
        if party is None:
            raise ValueError(f"expected a session among {', '.join(self.sessions)}; got {message.session!r}")
        answer = _answer_of(party, message)
        with self._turns.setdefault(message.session, threading.Lock()):  # a repeat waits for the first to be done
            done = self._done.setdefault(message.session, deque(maxlen=self._memory))
            for exchange in done:
                if message.step == exchange.request.step:
                    return _repeated(exchange, message)
            if done and message.step < done[-1].request.step:
                raise ValueError(
                    f"expected a step of {message.session} after {done[-1].request.step}, got {message.step}; it was "
                    "done, or comes too late"
                )
            reply = replace(message, tensors=answer(message.tensors))
            done.append(Exchange(message, reply))
            return reply

    def is_new(self, message: Message) -> bool:
        """Return whether this would be done, and not answered from memory or refused by its session or step."""
        done = self._done.get(message.session)
        return message.session in self.sessions and (not done or message.step > done[-1].request.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the exchanges that are kept, by session, as frames. Taken while nobody asks."""
        return {
            name: [(_bytes(encode(one.request)), _bytes(encode(one.reply))) for one in done]
            for name, done in self._done.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._done = {
            name: deque(
                (Exchange(*(decode(tensor.numpy().tobytes()) for tensor in pair)) for pair in done), self._memory
            )
            for name, done in state.items()
        }


def _bytes(frame: bytes) -> Tensor:
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def keyed(tensors: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Return named tensors under a message's keys, ``kind/name``."""
    return {f"{kind}/{name}": tensor for name, tensor in tensors.items()}


def named(tensors: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Return the tensors of one kind by their names."""
    return {key[len(kind) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{kind}/")}


def need(tensors: Mapping[str, Tensor], kind: Kind) -> Tensor:
    """Return the tensor of this kind; ``ValueError`` where there is none."""
    if kind not in tensors:
        raise ValueError(f"expected a message with {kind}, got {', '.join(tensors) or 'an empty one'}")
    return tensors[kind]


def _answer_forward(party: Party, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {Kind.ACTIVATION: party.forward(_received(tensors))}


def _answer_backward(party: Party, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    g = party.backward(need(tensors, Kind.GRADIENT))
    return {} if g is None else {Kind.GRADIENT: g}


def _answer_learn(party: Party, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    loss, g = party.learn(_received(tensors), need(tensors, Kind.LABEL))
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
    if not weights.keys() <= before.keys():
        raise ValueError(f"expected the weights {', '.join(weights)}; got {', '.join(before) or 'none'}")
    changes = {name: w - before[name].to(w.device) for name, w in weights.items() if w.is_floating_point()}
    whole = {name: w for name, w in weights.items() if name not in changes}  # a counter has no difference to pack
    return {**keyed(changes, Kind.UPDATE), **keyed(whole, Kind.WEIGHTS), Kind.COUNT: torch.tensor(count)}


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


def _answer_of(party: Any, message: Message) -> Answer:
    """Return what answers this verb: one of the party's own ``answers`` where it has some, else that of all parties."""
    own: Mapping[str, Answer] = getattr(party, "answers", {})
    if message.verb in own:
        return own[message.verb]
    if message.verb not in ANSWERS:
        raise ValueError(f"expected a verb among {', '.join([*ANSWERS, *own])}; got {message.verb!r}")
    if not hasattr(party, "round" if message.verb == "update" else message.verb):
        raise ValueError(f"{message.session} is a {type(party).__name__}, which does not answer {message.verb!r}")
    return partial(ANSWERS[message.verb], party)


def _received(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the activation, asking for its gradient again, or the input that came."""
    if Kind.ACTIVATION in tensors:
        z = tensors[Kind.ACTIVATION].detach()
        return z.requires_grad_() if z.is_floating_point() else z
    return need(tensors, Kind.INPUT)


def _repeated(last: Exchange, message: Message) -> Message:
    """Return the last reply again, if this is the last request again, to the bit."""
    if encode(message) != encode(last.request):
        raise ValueError(
            f"step {message.step} of {message.session} was {last.request.verb!r}, got {message.verb!r} for it again "
            "with other content; repeat a step as it was, or open a new session"
        )
    return last.reply
