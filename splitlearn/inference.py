"""Collaborative inference, f(x) = top(bottom(x)): the device answers what it is sure of, and the server the rest.

    x ── bottom ──┬── exit ── sure? answered at the edge
                  └── else across the wire ── server: answered in the cloud, or the exit's answer as a fallback

Neurosurgeon (Kang et al. 2017, doi:10.1145/3037697.3037698) splits a model between both; early exits are BranchyNet's
(``exits``). A sample that leaves at the edge never crosses; which samples cross is seen by whoever sees the wire.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from splitlearn.exits import Rule
from splitlearn.network import Clock, RealClock
from splitlearn.train import Predictor

__all__ = ["Answers", "Deadline", "Inference", "Mode", "Place", "infer", "joined", "stream"]

Mode = Literal["edge", "cloud", "split", "cascade"]
Place = Literal["edge", "cloud", "fallback"]
T = TypeVar("T")


@dataclass(frozen=True)
class Answers:
    """What a batch was answered, and where: ``logits`` [N, C], and a row of ``where`` and ``sent`` [N] a sample.

    ``sent`` says whether it was put on the wire, as one was too whose answer did not come in time.
    """

    logits: Tensor
    where: tuple[Place, ...]
    sent: Tensor

    @property
    def labels(self) -> Tensor:
        """The most likely class of each sample, [N]."""
        return self.logits.argmax(1)

    @property
    def totals(self) -> dict[str, int]:
        """How many samples were answered at each place, and how many were ``sent``."""
        return {**{place: self.where.count(place) for place in get_args(Place)}, "sent": int(self.sent.sum())}

    def share(self, place: Place) -> float:
        """Return the share of samples that were answered there, in [0, 1]."""
        return self.where.count(place) / len(self.where)


class Deadline:
    """How long a server may take, and when one that failed is asked again; it remembers failures, so keep one a server.

    A request (of a batch) has failed that has no answer after ``seconds``, or that ends in an ``OSError`` (such as
    ``ConnectionError`` and ``TimeoutError``) or ``EOFError``; any other error is raised, and None is no answer.
    After the n-th failure in a row nothing is asked for min(``retry`` · 2ⁿ⁻¹, ``longest``) seconds. A late answer is
    dropped. While a request that failed is still on its way, no other is made: no answer can be taken for another's,
    and a carrier that never returns is never asked again.

    In real time the request waits in a thread of its own. By any other clock, such as the ``network.VirtualClock`` of
    an ``Emulated`` (give it the same one), it is waited for, and what it took by that clock counts. For one user at a
    time.

    A server in this very process is no network: its stage and the device's wait for each other (``Randomness``), so
    that a request left behind holds up the next batch, which no deadline covers, until the server is done.
    """

    def __init__(self, seconds: float, *, retry: float = 1.0, longest: float = 60.0, clock: Clock | None = None):
        for name, value in (("a deadline", seconds), ("retry", retry)):
            if not 0 < value < float("inf"):
                raise ValueError(f"expected {name} of finite seconds > 0, got {value}; or pass deadline=None to wait")
        if not retry <= longest < float("inf"):
            raise ValueError(f"expected longest of finite seconds ≥ retry = {retry:g}, got {longest}")
        self.seconds, self.retry, self.longest = seconds, retry, longest
        self.failures = 0  # in a row
        self.reason = ""  # of the last failure
        self._clock: Clock = RealClock() if clock is None else clock
        self._until = self._clock.now()
        self._flight: _Flight | None = None

    @property
    def ready(self) -> bool:
        """Whether the server is to be asked now: no failure is too recent, and no request still on its way."""
        return (self._flight is None or self._flight.done.is_set()) and self._clock.now() >= self._until

    def ask(self, call: Callable[[], T]) -> T | None:
        """Return what ``call`` returns; None where it has failed. Ask only when ``ready``."""
        if not self.ready:
            raise ValueError("expected to be asked when ready, got a failure too recent; look at ready first")
        began, real = self._clock.now(), isinstance(self._clock, RealClock)
        flight = _Flight(call)
        self._flight = flight
        if real:
            threading.Thread(target=flight.fly, daemon=True).start()
            flight.done.wait(self.seconds)
        else:
            flight.fly()
        late = not flight.done.is_set() or self._clock.now() - began > self.seconds
        if late and (flight.error is None or isinstance(flight.error, Exception)):  # not an interrupt, say
            self._failed(f"expected an answer within {self.seconds:g} s, got none")
            return None
        if isinstance(flight.error, OSError | EOFError):
            self._failed(str(flight.error) or type(flight.error).__name__)
            return None
        if flight.error is not None:
            raise flight.error
        if flight.answer is None:
            raise ValueError("expected an answer, got None; let the call return what the server says")
        self.failures = 0
        return flight.answer

    def _failed(self, reason: str) -> None:
        self.failures, self.reason = self.failures + 1, reason
        self._until = self._clock.now() + min(self.longest, self.retry * 2.0 ** min(self.failures - 1, 60))


class _Flight(Generic[T]):
    """One request on its way: its answer or its error once ``done``."""

    def __init__(self, call: Callable[[], T]):
        self.answer: T | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._call = call

    def fly(self) -> None:
        """Make the request."""
        try:
            self.answer = self._call()
        except BaseException as error:  # whoever asked raises it
            self.error = error
        finally:
            self.done.set()


@dataclass(frozen=True)
class Inference:
    """Who holds what, and who answers: ``answer(x)`` for one batch.

    ``mode``: ``edge``, the exit answers all; ``cloud``, the input itself crosses to a server with the whole model;
    ``split``, every activation crosses; ``cascade``, those that the ``rule`` does not let leave at the exit do.
    ``bottom``, ``exit`` and ``server`` are parties, here or across a wire. With a ``deadline`` the exit answers
    where the server fails, and works out its answer before the server is asked, so that it is there in time; without
    one the server's errors are raised as they come. Its logits are taken as they are, nan and inf too.

    One that stands in the ``server``'s place of another is the device's next part, with an exit of its own.
    """

    bottom: Predictor | None
    server: Predictor | None
    exit: Predictor | None = None
    rule: Rule | None = None
    mode: Mode = "cascade"
    deadline: Deadline | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise LookupError(f"expected a mode among {', '.join(get_args(Mode))}; got {self.mode!r}")
        needs = {"edge": ("bottom", "exit"), "cloud": ("server",), "split": ("bottom", "server")}
        needs["cascade"] = ("bottom", "server", "exit", "rule")
        if missing := [name for name in needs[self.mode] if getattr(self, name) is None]:
            raise ValueError(f"mode {self.mode!r} needs {', '.join(needs[self.mode])}; got no {', '.join(missing)}")
        if self.deadline is not None and (self.exit is None or self.bottom is None):
            raise ValueError(
                "expected an exit (and its bottom) that answers when the server does not in time, got none; train one "
                "with train_exit, or leave the deadline out"
            )
        if self.deadline is not None and isinstance(self.server, Inference):
            raise ValueError("expected the deadline on the part whose server is across the wire; give it to that one")

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits, wherever they come from."""
        return self.answer(x).logits

    def answer(self, x: Tensor) -> Answers:
        """Return the answers to a batch x [N, …], N ≥ 1, which is one request to the server at most."""
        if not len(x):
            raise ValueError(f"expected a batch of at least one sample, got shape {tuple(x.shape)}; skip empty ones")
        z = x if self.mode == "cloud" else _of(self.bottom).predict(x)
        early = _of(self.exit).predict(z) if self.mode in ("edge", "cascade") else None
        stays = torch.full((len(x),), self.mode == "edge")
        if early is not None and self.mode == "cascade":
            stays = _decided(self.rule, early)
        if early is not None and bool(stays.all()):
            return _all(early, "edge", sent=False)
        crosses = ~stays
        asked = z[crosses.to(z.device)]
        spare = None if early is None else early[crosses.to(early.device)]
        if self.deadline is not None and spare is None:
            spare = self._fallback(asked)
        reply, sent = self._reply(asked)
        if reply is None:
            assert spare is not None  # without a deadline the server's error was raised
            reply = _all(spare, "fallback", sent=sent)
        return reply if early is None else _merged(early, reply, crosses)

    def _reply(self, z: Tensor) -> tuple[Answers | None, bool]:
        """Return the server's answers, None where it failed, and whether it was asked."""
        if isinstance(self.server, Inference):
            return self.server.answer(z), False
        server = _of(self.server)
        if self.deadline is None:
            logits: Tensor | None = server.predict(z)
        elif self.deadline.ready:
            logits = self.deadline.ask(lambda: server.predict(z))
        else:
            return None, False
        if logits is None:
            return None, True
        if logits.ndim != 2 or len(logits) != len(z):
            raise ValueError(f"expected logits [N, C] for {len(z)} samples from the server, got {tuple(logits.shape)}")
        return _all(logits, "cloud", sent=True), True

    def _fallback(self, z: Tensor) -> Tensor:
        """Return the exit's logits for what would have crossed."""
        return _of(self.exit).predict(_of(self.bottom).predict(z) if self.mode == "cloud" else z)


def infer(
    x: Tensor,
    bottom: Predictor | None,
    server: Predictor | None,
    *,
    exit: Predictor | None = None,
    rule: Rule | None = None,
    mode: Mode = "cascade",
    deadline: Deadline | None = None,
    batch_size: int = 256,
) -> Answers:
    """Return the answers to x [N, …], ``batch_size`` samples at a time; see ``Inference`` for who does what.

    In mode ``split`` the logits are those of ``predict([bottom, server], x)``, bit for bit.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of 1 or more, got {batch_size}")
    batches = x.split(batch_size)
    return joined(stream(batches, bottom, server, exit=exit, rule=rule, mode=mode, deadline=deadline))


def stream(
    batches: Iterable[Tensor],
    bottom: Predictor | None,
    server: Predictor | None,
    *,
    exit: Predictor | None = None,
    rule: Rule | None = None,
    mode: Mode = "cascade",
    deadline: Deadline | None = None,
) -> Iterator[Answers]:
    """Yield the answers to each batch as it comes, in order; a single sample is a batch of one. See ``Inference``."""
    whole = Inference(bottom, server, exit, rule, mode, deadline)
    return map(whole.answer, batches)


def joined(parts: Iterable[Answers]) -> Answers:
    """Return the answers to several batches as those to one."""
    parts = list(parts)
    if not parts:
        raise ValueError("expected the answers to at least one batch, got none")
    where = tuple(place for part in parts for place in part.where)
    return Answers(torch.cat([part.logits for part in parts]), where, torch.cat([part.sent for part in parts]))


def _of(party: Predictor | None) -> Predictor:
    assert party is not None  # by __post_init__
    return party


def _all(logits: Tensor, place: Place, *, sent: bool) -> Answers:
    return Answers(logits, (place,) * len(logits), torch.full((len(logits),), sent))


def _decided(rule: Rule | None, logits: Tensor) -> Tensor:
    assert rule is not None  # by __post_init__
    stays = rule(logits)
    if stays.shape != logits.shape[:1] or stays.dtype is not torch.bool:
        raise ValueError(
            f"expected a rule that returns a boolean a sample, [{len(logits)}], got {stays.dtype} of shape "
            f"{tuple(stays.shape)}; return logits.… >= threshold"
        )
    return stays.cpu()


def _merged(early: Tensor, reply: Answers, crosses: Tensor) -> Answers:
    """Return the exit's answers with those of the rows that crossed in their places."""
    late = reply.logits.to(early.device)
    if late.shape[1:] != early.shape[1:]:
        raise ValueError(
            f"expected as many classes from the server as from the exit, {early.shape[1]}, got {late.shape[1]}; "
            "train the exit for the model's classes"
        )
    logits = early.to(torch.promote_types(early.dtype, late.dtype), copy=True)
    logits[crosses.to(logits.device)] = late.to(logits.dtype)
    where: list[Place] = ["edge"] * len(early)
    rows: Sequence[int] = crosses.nonzero().flatten().tolist()
    for row, place in zip(rows, reply.where, strict=True):
        where[row] = place
    sent = torch.zeros(len(early), dtype=torch.bool)
    sent[crosses] = reply.sent
    return Answers(logits, tuple(where), sent)
