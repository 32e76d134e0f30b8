"""Protections as named at the command line, checked before anything starts."""

from collections.abc import Iterable

import torch

from experiments.ingredients import PROTECTIONS, PROTOCOLS
from experiments.names import at_strengths, spec_of
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
    """Return the same for vanilla split learning on these inputs, and raise ``ValueError`` for what does nothing there.

    That is a protection of other kinds of inputs, or one of updates, which no member of it sends.
    """
    found = named_protections(specs)
    for name, strength in found:
        if PROTECTIONS[name].build(strength).updates is not None:
            fits = ", ".join(protocol for protocol, one in PROTOCOLS.items() if one.updates_cross)
            raise ValueError(
                f"expected protections of activations, for vanilla sends no updates, got {spec_of(name, strength)}; "
                f"drop it, or run tradeoff or compression with {fits}"
            )
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
