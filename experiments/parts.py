"""What the catalogue lists: protections, attacks, protocols and benchmarks, each with the line that describes it."""

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, nan
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitlearn.data.dataset import Dataset, Modality
from splitlearn.frames import Codec
from splitlearn.party import Guard, Learner
from splitlearn.quantisation import quantisation_aware
from splitlearn.threat import Threat

__all__ = [
    "CONTINUOUS", "Aim", "Attack", "Bench", "BuiltAttack", "DetectorEntry", "LabelAim", "LabelAttack",
    "LabelProtection", "LabelShield", "Protection", "Protocol", "Shield", "Watched", "number",
    "told", "whole",
]  # fmt: skip

CONTINUOUS: tuple[Modality, ...] = ("image", "signal", "table")


@dataclass(frozen=True)
class Shield:
    """What protects one client: a guard on what it sends, a codec on its wire, layers of its own; by default none.

    ``layers(channels)`` makes what comes last in the bottom, for activations of so many channels, or columns, and
    ``above(channels)`` what comes first in the stage above, which undoes it. ``weight_bits`` rounds the bottom's
    weights in training, 0 leaves them. ``updates()`` makes a codec for one member's updates of its weights.
    """

    guard: Guard = field(default_factory=Guard)
    codec: Codec | None = None
    layers: Callable[[int], nn.Module] | None = None
    above: Callable[[int], nn.Module] | None = None
    weight_bits: int = 0
    updates: Callable[[], Codec] | None = None

    def shaped(self, bottom: nn.Module, x: Tensor) -> nn.Module:
        """Return the bottom with these layers after it; ``x`` is an input [1, …] of its."""
        own = bottom
        if self.layers is not None:
            own = nn.Sequential(bottom, _like(self.layers(_channels(bottom, x)), x))
        return quantisation_aware(own, self.weight_bits) if self.weight_bits else own

    def raised(self, top: nn.Module, bottom: nn.Module, x: Tensor) -> nn.Module:
        """Return the stage above the plain ``bottom``, with the layers that it needs before it."""
        return top if self.above is None else nn.Sequential(_like(self.above(_channels(bottom, x)), x), top)


@torch.no_grad()
def _channels(bottom: nn.Module, x: Tensor) -> int:
    return copy.deepcopy(bottom).eval()(x).shape[1]  # whose norms need and move nothing


def _like(layers: nn.Module, x: Tensor) -> nn.Module:
    return layers.to(x.device, x.dtype) if x.is_floating_point() else layers.to(x.device)


def _same(module: nn.Module) -> nn.Module:
    return module


def _as_they_are(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class LabelShield:
    """What whoever holds the labels does to hide them; by default nothing.

    ``guard`` changes the gradient that goes back, ``top(stage)`` wraps the stage that is trained on the labels,
    ``loss`` takes its outputs, ``labels(y)`` says once, before training, what is trained on, ``decode`` turns outputs
    into logits.
    """

    guard: Guard = field(default_factory=Guard)
    top: Callable[[nn.Module], nn.Module] = _same
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    labels: Callable[[Tensor], Tensor] = _as_they_are
    decode: Callable[[Tensor], Tensor] = _as_they_are
    epsilon: float | None = None  # to the change of one label, where there is a proof
    settings: str = ""  # of what is no guard, in a trial's configuration
    notes: tuple[str, ...] = ()  # what its ε is to, and what it does not cover


@dataclass(frozen=True)
class LabelProtection:
    """A protection of labels at several strengths, weakest first.

    ``build(strength, classes, seed)`` makes the shield; ``broken_by`` names the attack that knows it.
    """

    summary: str
    unit: str
    strengths: tuple[str, ...]
    build: Callable[[str, int, int], LabelShield]
    broken_by: str
    binary: bool = False  # whether it is defined for two classes alone


@dataclass(frozen=True)
class LabelAim:
    """What is public about the labels that an attack is after, how many of each class it knows, and its seed."""

    classes: int
    hints: int
    seed: int
    bottom: Callable[[], nn.Module] = nn.Identity  # builds a fresh one of the client's architecture
    shares: tuple[float, ...] = ()  # of the classes, which are public

    @property
    def rare(self) -> int:
        """Of two classes, the rarer one."""
        return 0 if len(self.shares) == 2 and self.shares[0] < self.shares[1] else 1


@dataclass(frozen=True)
class LabelAttack:
    """An attack on labels from what crosses. ``build(aim)`` makes it, under ``threat`` with the aim's hints."""

    summary: str
    build: Callable[[LabelAim], Any]
    hinted: int = 0  # times the hints that the experiment grants; 0: it needs none
    own_inputs: bool = False  # whether it must hold inputs and bottom itself
    blind: Callable[[LabelAim], Any] | None = None  # an attack without what training left: what that gets is no leakage
    shares: bool = False  # whether it knows how frequent each class is
    binary: bool = False  # whether it is for two classes alone
    remembers: bool = False  # whether it goes by all epochs so far, where samples are asked for by number

    @property
    def seats(self) -> tuple[str, ...]:
        """Who can run it."""
        return ("client",) if self.own_inputs else ("client", "server")

    def threat(self, seat: str, hints: int) -> Threat:
        """Return what it needs, and no more."""
        name = {"client": "client without labels", "server": "server of the U shape"}[seat]
        return Threat(name, own_inputs=self.own_inputs, hints=self.hinted * hints)

    def described(self, aim: LabelAim, seat: str) -> dict[str, Any]:
        """Return what its result depends on: threat, itself as built for the aim, and what is no leakage."""
        return {
            "attack": told(self.build(aim)),
            "threat": _described(self.threat(seat, aim.hints)),
            "shares": self.shares,
            "remembers": self.remembers,
            "blind": "" if self.blind is None else told(self.blind(aim)),
        }


@dataclass(frozen=True)
class Protection:
    """A protection at several strengths, weakest first. ``build`` makes the shield for one of them, or any other."""

    summary: str
    unit: str  # what a strength is; "" where there is none
    strengths: tuple[str, ...]
    build: Callable[[str], Shield]
    inputs: tuple[Modality, ...] = (*CONTINUOUS, "tokens")  # kinds of inputs that it can protect


@dataclass(frozen=True)
class Aim:
    """What is public about the inputs that an attack is after, and its seed."""

    shape: tuple[int, ...]  # of one input
    bounds: tuple[float, float] | None  # least and greatest value of an input, None where there are none
    seed: int
    classes: int = 0
    stage: Callable[[], nn.Module] = nn.Identity  # builds a fresh bottom of the victim's architecture
    top: nn.Module = field(default_factory=nn.Identity)  # the server's own stage, where it puts out logits
    guard: Guard = field(default_factory=Guard)  # what the victim does to any stage's activations


@dataclass(frozen=True)
class Attack:
    """An attack under the threat that it declares. ``build(aim)`` makes its members; the best one's score counts.

    With ``steps`` it takes part in a training of so many steps, and its members are infiltrations; else it comes after.
    """

    summary: str
    family: Literal["reconstruction", "label", "membership", "property", "poisoning"]
    threat: Threat
    build: Callable[["Aim"], Mapping[str, Any]]
    inputs: tuple[Modality, ...] = CONTINUOUS  # kinds of inputs that it can estimate
    steps: int = 0  # of training, in batches of the training's own size
    knows: tuple[str, ...] = ()  # beyond what its threat says, in plain words
    active: bool = False  # whether it answers with lies
    needs_top: bool = False  # whether it goes by the server's stage, which must then put out logits
    needs_labels: bool = False  # whether it goes by labels that the client sends, which the U shape does not

    def described(self, aim: Aim) -> dict[str, Any]:
        """Return what its result depends on: steps, threat, and each member as built for seed 0.

        So that trials that differ by their seed alone are seen to do so.
        """
        return {
            "steps": self.steps,
            "threat": _described(self.threat),
            "members": {name: told(one) for name, one in self.build(replace(aim, seed=0)).items()},
        }

    @property
    def in_words(self) -> list[str]:
        """What it sees, knows and does, a line each."""
        lies = ["in the server's place, and answers with lies"] if self.active else []
        honest = ["in the server's place, and answers as that would"] if self.steps and not self.active else []
        return [*self.threat.in_words(), *self.knows, *lies, *honest]


@dataclass(frozen=True)
class Watched:
    """What a detector has to go by: the client's learner, a guess at the server's stage, the client's own data."""

    learner: Learner
    guess: nn.Module
    private: Dataset
    training: Any  # the Training of this run


@dataclass(frozen=True)
class DetectorEntry:
    """A detector of hijacked training: ``kind``, which takes the learner's place, with what ``given(watched)`` returns.

    Everything else is as by default.
    """

    summary: str
    kind: Callable[..., Any]
    given: Callable[[Watched], Mapping[str, Any]]
    least: int = 1  # private samples that it needs

    def build(self, watched: Watched) -> Any:
        """Return the detector in the learner's place."""
        return self.kind(watched.learner, **self.given(watched))

    def described(self) -> dict[str, str]:
        """Return what its scores and its verdict depend on: the settings, and how what it is given is made."""
        settings = inspect.signature(self.kind).parameters.values()
        return {
            **{one.name: told(one.default) for one in settings if one.default is not inspect.Parameter.empty},
            "given": told(self.given),
        }


@dataclass(frozen=True)
class BuiltAttack:
    """An attack that an experiment builds itself, since it must know the mechanism that protects what it is after."""

    summary: str


@dataclass(frozen=True)
class Protocol:
    """A way to train; ``train(training, splits, shield)`` runs it and returns what the evaluation needs."""

    train: Callable[..., Any]
    activations_cross: bool = True
    infiltrable: bool = False  # whether ``train`` takes ``infiltrate``: somebody else in the server's place
    labels_cross: bool = True  # whether the server is sent labels
    updates_cross: bool = False  # whether members send what they changed of their weights, which a codec may pack

    @property
    def summary(self) -> str:
        """The first line of what the function says of itself."""
        return (self.train.__doc__ or "").split("\n")[0]


@dataclass(frozen=True)
class Bench:
    """A benchmark. ``run()`` returns its figures; a time is always a ratio within one run."""

    summary: str
    run: Callable[[], dict[str, Any]]


def number(text: str, what: str) -> float:
    """Return the finite number in ``text``; anything else is a ``ValueError`` that says what was expected."""
    try:
        value = float(text)
    except ValueError:
        value = nan
    if not isfinite(value):
        raise ValueError(f"expected {what}, got {text!r}; for example 0.1")
    return value


def whole(text: str, what: str) -> int:
    """Return the whole number in ``text``; anything else is a ``ValueError`` that says what was expected."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected {what}, a whole number, got {text!r}; for example 2") from None


def _described(threat: Threat) -> dict[str, Any]:
    return {**asdict(threat), "sees": sorted(threat.sees)}


def told(thing: Any) -> str:
    """Return an object's settings as text, without where in memory a function of them lies."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))
