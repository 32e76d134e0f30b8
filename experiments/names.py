"""Names that the user gives: the thing of that name, or one line that lists the near ones."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

__all__ = ["find", "unknown"]

T = TypeVar("T")


def find(kind: str, name: str, among: Mapping[str, T]) -> T:
    """Return the entry of that name; ``LookupError`` where there is none."""
    if name not in among:
        raise unknown(kind, name, among)
    return among[name]


def unknown(kind: str, name: str, among: Iterable[str]) -> LookupError:
    """Return the error for a name that is not ``among`` those there are; it lists the near ones, or all."""
    names = list(among)
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names) or '(none)'}"
    return LookupError(f"no {kind} is named {name!r}: {hint}")
