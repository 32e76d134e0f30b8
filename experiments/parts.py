"""What the catalogue lists: protections, attacks, protocols and benchmarks, each with the line that describes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar

from splitlearn.frames import Codec
from splitlearn.party import Guard

__all__ = ["Attack", "Bench", "Protection", "Protocol", "Shield", "find"]

T = TypeVar("T")


@dataclass(frozen=True)
class Shield:
    """What protects one client: a guard on what it sends, a codec on its wire; by default neither."""

    guard: Guard = field(default_factory=Guard)
    codec: Codec | None = None


@dataclass(frozen=True)
class Protection:
    """A protection at several strengths, weakest first. ``build`` makes the shield for one of them, or any other."""

    summary: str
    unit: str  # what a strength is; "" where there is none
    strengths: tuple[str, ...]
    build: Callable[[str], Shield]


@dataclass(frozen=True)
class Attack:
    """An attack on a view. ``build(seed)`` makes it; its result's candidates are scored, the best one counts."""

    summary: str
    family: str
    build: Callable[[int], Callable[[Any], Any]]


@dataclass(frozen=True)
class Protocol:
    """A way to train; ``train(setting, splits)`` runs it and returns what the evaluation needs."""

    summary: str
    train: Callable[..., Any]


@dataclass(frozen=True)
class Bench:
    """A benchmark. ``run()`` returns its figures; a time is always a ratio within one run."""

    summary: str
    run: Callable[[], dict[str, Any]]


def find(kind: str, name: str, among: Mapping[str, T]) -> T:
    """Return the entry of that name; an unknown one is a ``LookupError`` that lists the near ones."""
    if name in among:
        return among[name]
    near = get_close_matches(name, among, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(among)}"
    raise LookupError(f"no {kind} is named {name!r}: {hint}")
