"""Threat, View and observe: the only gate between an attack and what it may know.

An attack reads a View and nothing else. What its threat model does not grant is not there, and asking for it
is an error that names the grant.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from splitlearn.codecs import through
from splitlearn.enclave import Host
from splitlearn.frames import Codec, Kind, Message
from splitlearn.party import Guard
from splitlearn.wire import Exchange, Recorded

__all__ = ["Encoder", "Grants", "Threat", "View", "granted", "observe", "observe_host"]

T = TypeVar("T")


@dataclass(frozen=True)
class Threat:
    """What an adversary is assumed to see and to know. Nothing is granted by default but what crosses its wire."""

    name: str = "honest-but-curious server"
    sees: frozenset[Kind] = frozenset(Kind)  # kinds of tensor it reads on its wire
    white_box: bool = False  # the victim's path: weights of its stage, its guard and codec
    queries: bool = False  # may send own inputs through the victim's path and see what crosses
    auxiliary: bool = False  # samples of its own from the same distribution, disjoint from the private ones
    auxiliary_labels: bool = False  # and their labels
    own_inputs: bool = False  # it holds the stage and the inputs itself: a client that is after labels
    hints: int = 0  # private samples of each class whose labels it knows
    releases: int = 1  # how often each private sample crosses anew; the adversary averages them

    def __post_init__(self) -> None:
        if self.releases < 1:
            raise ValueError(f"expected at least one release of each sample, got {self.releases}")
        if self.hints < 0:
            raise ValueError(f"expected 0 or more labels of each class that are known, got {self.hints}")
        if unknown := sorted(str(kind) for kind in self.sees if kind not in set(Kind)):
            raise ValueError(f"expected kinds among {', '.join(Kind)}; got {', '.join(unknown)}")
        object.__setattr__(self, "sees", frozenset(Kind(kind) for kind in self.sees))
        if self.auxiliary_labels and not self.auxiliary:
            raise ValueError("expected samples with the labels, got labels alone; grant Threat(auxiliary=True) too")

    def in_words(self) -> list[str]:
        """Return what it sees and knows, a line each, in plain words."""
        knows = [
            "every kind of message on its wire"
            if self.sees == frozenset(Kind)
            else "on its wire: " + (", ".join(sorted(self.sees)) or "no tensor, but how many bytes pass, and when")
        ]
        if self.white_box:
            knows.append("the client's weights, guard and codec")
        if self.queries:
            knows.append("what crosses for inputs of its own choice")
        if self.auxiliary:
            labelled = "labelled" if self.auxiliary_labels else "unlabelled"
            knows.append(f"{labelled} samples of its own, disjoint from the private ones")
        if self.own_inputs:
            knows.append("the inputs, and the weights of the stage below the cut: they are its own")
        if self.hints:
            knows.append(f"the labels of {self.hints} private sample{'s' * (self.hints > 1)} of each class")
        knows.append("one release of each sample" if self.releases == 1 else f"the mean of {self.releases} releases")
        return knows


class Encoder(nn.Module):
    """The victim's path from an input to what crosses of a prediction: stage, guard, codec; frozen, in evaluation mode.

    It is a copy, which later training does not move, and stays in evaluation mode inside a module that trains. It is
    differentiable in its input (codecs by the identity), so that an adaptive attack can train through the
    protection that it must beat. A guard's noise is drawn anew at every call, and where an adversary averages several
    ``releases`` of a sample, as often.
    """

    def __init__(self, stage: nn.Module, guard: Guard | None = None, codec: Codec | None = None):
        super().__init__()
        self.stage = copy.deepcopy(stage).eval().requires_grad_(False)
        self.guard = guard.simulated() if guard is not None else Guard()
        self.codec = codec
        self.releases = 1
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return what crosses for ``x``, batch first."""
        z = self.stage(x)
        sent = [self._released(z) for _ in range(self.releases)]
        return sent[0] if self.releases == 1 else torch.stack(sent).mean(0)

    def _released(self, z: Tensor) -> Tensor:
        z = self.guard.prediction(z)
        return z if self.codec is None or Kind.ACTIVATION not in self.codec.kinds else through(self.codec, z)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, as the victim answers."""
        return super().train(False)


@dataclass(frozen=True)
class Grants:
    """What an evaluation can hand over to an adversary; its ``Threat`` decides what of it arrives."""

    encoder: Encoder | None = None
    auxiliary_x: Tensor | None = None
    auxiliary_y: Tensor | None = None
    own_x: Tensor | None = None  # the inputs [N, …] of what crossed, in that order
    y: Tensor | None = None  # the labels [N] of what crossed, in that order, of which hints are taken
    sizes_of: Callable[[Tensor], Tensor] | None = (
        None  # sends inputs, one an exchange; returns rows like a Host's sizes
    )

    def __post_init__(self) -> None:
        if not (self.encoder is None or isinstance(self.encoder, Encoder)):
            raise ValueError(
                f"expected an Encoder, got {type(self.encoder).__name__}; pass Encoder(stage, guard, codec), the whole "
                "path of what crosses"
            )


@dataclass(frozen=True)
class View:
    """What one adversary saw and knows. Made by ``observe``, or by ``observe_host``."""

    threat: Threat
    exchanges: tuple[Exchange, ...]
    _granted: Grants = field(repr=False)
    _sizes: Tensor | None = field(default=None, repr=False)

    def tensors(self, kind: Kind, *, verb: str | None = None) -> list[Tensor]:
        """Return the tensors of one kind in the order in which they crossed, of one verb's exchanges or of all."""
        self._check_seen(kind)
        found = []
        for exchange in self.exchanges:
            if verb is not None and exchange.request.verb != verb:
                continue
            for message in (exchange.request, exchange.reply):
                found += _of_kind(message, kind)
        return found

    def activations(self, *, verb: str = "predict") -> Tensor:
        """Return the activations that crossed in one verb's requests, as one batch; averaged over the releases."""
        self._check_seen(Kind.ACTIVATION)
        requests = [exchange.request for exchange in self.exchanges if exchange.request.verb == verb]
        found = [tensor for request in requests for tensor in _of_kind(request, Kind.ACTIVATION)]
        if not found:
            raise LookupError(
                f"this attack reads activations of {verb!r} requests, and none crossed; record the wire while they do"
            )
        z, releases = torch.cat(found), self.threat.releases
        return _averaged(z, releases, "activations crossed")

    @property
    def sizes(self) -> Tensor:
        """Bytes up, bytes down and seconds of each exchange on a host, [exchanges, 3]; averaged over the releases."""
        if self._sizes is None:
            raise LookupError(
                "this attack reads sizes and times of sealed frames; grant them with observe_host(host, …)"
            )
        return _averaged(self._sizes.clone(), self.threat.releases, "exchanges passed")

    def query_sizes(self, x: Tensor) -> Tensor:
        """Return the sizes of the attacker's own inputs, sent one by one as a client sends its: [len(x), 3]."""
        if not self.threat.queries:
            raise LookupError("this attack sends inputs of its own; grant that with Threat(queries=True)")
        return _handed(self._granted.sizes_of, "sizes_of")(x)

    @property
    def encoder(self) -> Encoder:
        """The victim's path, or the stage of one who holds it itself, to be differentiated through."""
        if not (self.threat.white_box or self.threat.own_inputs):
            raise LookupError("this attack needs the victim's weights; grant them with Threat(white_box=True)")
        return _handed(self._granted.encoder, "encoder")

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """Return what crosses for inputs of the attacker's own choice; no gradient."""
        if not (self.threat.queries or self.threat.white_box):
            raise LookupError("this attack sends inputs of its own; grant that with Threat(queries=True)")
        return _handed(self._granted.encoder, "encoder")(x)

    @property
    def auxiliary_x(self) -> Tensor:
        """Inputs of the attacker's own, disjoint from the private ones."""
        if not self.threat.auxiliary:
            raise LookupError("this attack needs samples of its own; grant them with Threat(auxiliary=True)")
        return _handed(self._granted.auxiliary_x, "auxiliary_x")

    @property
    def auxiliary_y(self) -> Tensor:
        """Labels of the attacker's own samples."""
        if not self.threat.auxiliary_labels:
            raise LookupError(
                "this attack needs labels of its own samples; grant them with Threat(auxiliary_labels=True)"
            )
        return _handed(self._granted.auxiliary_y, "auxiliary_y")

    @property
    def own_x(self) -> Tensor:
        """The inputs of what crossed, in that order, of an adversary who sent it."""
        if not self.threat.own_inputs:
            raise LookupError("this attack needs its own inputs; grant them with Threat(own_inputs=True)")
        return _handed(self._granted.own_x, "own_x")

    @property
    def hints(self) -> tuple[Tensor, Tensor]:
        """Places [m] among the samples that crossed, and their labels [m]: the first of each class."""
        if not self.threat.hints:
            raise LookupError("this attack needs to know labels of some private samples; grant Threat(hints=1)")
        y = _handed(self._granted.y, "y")
        known = y >= 0
        return known.nonzero()[:, 0], y[known]

    def _check_seen(self, kind: Kind) -> None:
        if kind not in self.threat.sees:
            raise LookupError(
                f"this attack reads tensors of kind {kind}; "
                f"grant them with Threat(sees=frozenset({{Kind.{kind.name}, …}}))"
            )


def observe(
    *recorded: Recorded, threat: Threat, grants: Grants | None = None, device: torch.device | str | None = None
) -> View:
    """Return the view of one adversary: the wires that it reads, filtered by its threat, and what it is granted.

    What crossed is on the CPU, as decoded, or on ``device``.
    """
    if not recorded:
        raise LookupError("expected a recorded wire, got none: no wire, no view; put the party behind wire(party)")
    if other := [type(one).__name__ for one in recorded if not isinstance(one, Recorded)]:
        raise LookupError(f"expected recorded wires, got {', '.join(other)}; pass wire(party).record")
    if dropped := sum(one.dropped for one in recorded):
        raise LookupError(
            f"expected the whole transcript, {dropped} exchanges were dropped; raise Recorded(max_nbytes=…)"
        )
    exchanges = tuple(_filtered(exchange, threat.sees, device) for one in recorded for exchange in one.exchanges)
    return replace(granted(threat, grants), exchanges=exchanges)


def observe_host(*hosts: Host, threat: Threat, grants: Grants | None = None) -> View:
    """Return the view of the host of an enclave: sizes, directions and times of sealed frames, and no tensor at all."""
    if not hosts:
        raise LookupError(
            "expected the host of an enclave, got none: no host, no view; put the party behind enclosed(…)"
        )
    if other := [type(one).__name__ for one in hosts if not isinstance(one, Host)]:
        raise LookupError(f"expected hosts of enclaves, got {', '.join(other)}; of a recorded wire there is observe(…)")
    if threat.sees:
        raise ValueError(
            "expected a threat that reads no tensor, since frames are sealed on a host, got one that sees "
            f"{', '.join(sorted(threat.sees))}; use Threat(sees=frozenset(), …)"
        )
    return replace(granted(threat, grants), _sizes=torch.cat([one.sizes for one in hosts]))


def granted(threat: Threat, grants: Grants | None = None) -> View:
    """Return the view of one adversary before anything has crossed: what its threat lets it know."""
    given = grants if grants is not None else Grants()
    encoder = copy.copy(given.encoder) if threat.white_box or threat.queries or threat.own_inputs else None
    if encoder is not None:
        encoder.releases = threat.releases
    handed = Grants(
        encoder,
        given.auxiliary_x if threat.auxiliary else None,
        given.auxiliary_y if threat.auxiliary_labels else None,
        given.own_x if threat.own_inputs else None,
        _hinted(given.y, threat.hints) if threat.hints and given.y is not None else None,
        given.sizes_of if threat.queries else None,
    )
    return View(threat, (), handed)


def _averaged(rows: Tensor, releases: int, what: str) -> Tensor:
    if len(rows) % releases:
        raise LookupError(
            f"this threat averages {releases} releases of each sample, and {len(rows)} {what}, which do not divide "
            "evenly; record the same samples as often, in the same order"
        )
    return rows.unflatten(0, (releases, -1)).mean(0) if releases > 1 else rows


def _hinted(y: Tensor, hints: int) -> Tensor:
    """Return the labels with all but the first few of each class left out, as -1."""
    told = torch.full_like(y, -1)
    for label in y.unique().tolist():
        rows = (y == label).nonzero()[:hints, 0]
        told[rows] = label
    return told


def _filtered(exchange: Exchange, kinds: frozenset[Kind], device: torch.device | str | None) -> Exchange:
    def kept(message: Message) -> Message:
        seen = {key: tensor for key, tensor in message.tensors.items() if Kind.of(key) in kinds}
        return replace(message, tensors=seen if device is None else {key: t.to(device) for key, t in seen.items()})

    return Exchange(kept(exchange.request), kept(exchange.reply))


def _of_kind(message: Message, kind: Kind) -> list[Tensor]:
    # Clones: what one attack does to them must not reach the next one.
    return [tensor.clone() for key, tensor in message.tensors.items() if Kind.of(key) is kind]


def _handed(thing: T | None, name: str) -> T:
    if thing is None:
        raise LookupError(f"the threat grants it, but nothing was handed over; pass Grants({name}=…) to observe")
    return thing
