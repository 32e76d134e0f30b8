"""Names that the user gives: the thing of that name, or one line that lists the near ones."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Protocol, TypeVar

__all__ = ["at_strengths", "find", "spec_of", "unknown"]

T = TypeVar("T")


class Graded(Protocol):
    """What there is at several strengths."""

    @property
    def strengths(self) -> tuple[str, ...]:
        """The usual ones, weakest first."""


G = TypeVar("G", bound=Graded)


def at_strengths(
    kind: str, specs: Iterable[str], among: Mapping[str, G], check: Callable[[G, str], object]
) -> list[tuple[str, str]]:
    """Return (name, strength) for each ``name`` (all its strengths) or ``name:strength``.

    ``check(thing, strength)`` raises for a strength that it cannot have: an error now, and not in the middle.
    """
    found = []
    for spec in specs:
        name, _, strength = spec.partition(":")
        thing = find(kind, name, among)
        if strength and thing.strengths == ("",):
            raise ValueError(f"expected the {kind} {name} without a strength, got {strength!r}; leave it out")
        for one in (strength,) if strength else thing.strengths:
            check(thing, one)
            found.append((name, one))
    return found


def find(kind: str, name: str, among: Mapping[str, T]) -> T:
    """Return the entry of that name; ``LookupError`` where there is none."""
    if name not in among:
        raise unknown(kind, name, among)
    return among[name]


def spec_of(name: str, strength: str) -> str:
    """Return ``name:strength``, or ``name`` where there is none, as ``at_strengths`` reads it."""
    return f"{name}:{strength}" if strength else name


def unknown(kind: str, name: str, among: Iterable[str]) -> LookupError:
    """Return the error for a name that is not ``among`` those there are; it lists the near ones, or all."""
    names = list(among)
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names) or '(none)'}"
    return LookupError(f"no {kind} is named {name!r}: {hint}")
