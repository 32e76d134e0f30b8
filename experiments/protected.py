"""Protections as named at the command line, checked before anything starts."""

from collections.abc import Iterable

from experiments.ingredients import PROTECTIONS
from experiments.names import find
from splitlearn.data import Dataset

__all__ = ["protections_for"]


def protections_for(specs: Iterable[str], private: Dataset) -> list[tuple[str, str]]:
    """Return (name, strength) of each ``name`` (all its strengths) or ``name:strength``.

    Raises ``LookupError`` for an unknown name, ``ValueError`` for a strength that it cannot have, and for protections
    that do nothing to inputs of this kind.
    """
    found = []
    for spec in specs:
        name, _, strength = spec.partition(":")
        protection = find("protection", name, PROTECTIONS)
        if private.kind not in protection.inputs:
            raise ValueError(
                f"expected protections that work on {private.kind}, which {private.name} holds, got {name}; drop it"
            )
        for one in (strength,) if strength else protection.strengths:
            protection.build(one)
            found.append((name, one))
    return found
