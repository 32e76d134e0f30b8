"""Protections as named at the command line, checked before anything starts."""

from collections.abc import Iterable

import torch

from experiments.ingredients import PROTECTIONS
from experiments.names import at_strengths
from experiments.parts import Protection
from splitlearn.data import Dataset

__all__ = ["described_protection", "named_protections", "protections_for"]

CHANNELS = 8  # of activations that a protection's layers are tried on


def named_protections(specs: Iterable[str]) -> list[tuple[str, str]]:
    """Return (name, strength) of each ``name`` (all its strengths) or ``name:strength``.

    Raises ``LookupError`` for an unknown name, ``ValueError`` for a strength that it cannot have.
    """
    return at_strengths("protection", specs, PROTECTIONS, _build)


def protections_for(specs: Iterable[str], private: Dataset) -> list[tuple[str, str]]:
    """Return the same, and raise ``ValueError`` for protections that do nothing to inputs of this kind."""
    found = named_protections(specs)
    for name, _ in found:
        if private.kind not in PROTECTIONS[name].inputs:
            raise ValueError(
                f"expected protections that work on {private.kind}, which {private.name} holds, got {name}; drop it"
            )
    return found


def described_protection(name: str, strength: str) -> dict[str, str]:
    """Return what a trial's configuration says of its protection."""
    shield = PROTECTIONS[name].build(strength)
    codec = {"codec": shield.codec.name} if shield.codec else {}
    return {"name": name, "strength": strength, "guard": repr(shield.guard), **codec}


def _build(protection: Protection, strength: str) -> None:
    shield = protection.build(strength)
    with torch.random.fork_rng(devices=[]):
        for layers in (shield.layers, shield.above):
            if layers is not None:
                layers(CHANNELS)
