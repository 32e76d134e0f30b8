"""Compressions of what crosses, by name: what ``--protections compression:NAME`` and the planner read."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from experiments.parts import Shield, number
from splitlearn.codecs import Ans, ErrorFeedback, Float16, Int8, Palette, PerKind, RandomK, TopK, Uniform, Zstd
from splitlearn.frames import Codec, Kind
from splitlearn.quantisation import LearnedQuantiser, Pointwise

__all__ = ["COMPRESSIONS", "compressed"]

COMPRESSIONS = (
    "float16, intB (B bits), ansB or zstdB (the same, entropy-coded), learnedB (a learned step), a fraction (top-k), "
    "randomF (random-k), narrowF (a bottleneck of so many channels), awareB (weights below the cut of B bits); "
    "joined by +, as in narrow0.25+ans4; updateNAME, of members' updates with error feedback, as in update0.1"
)
UPDATE = "update"
GRADIENTS = frozenset({Kind.GRADIENT})
NAMED = re.compile(r"(float|int|ans|zstd|learned|aware|random|narrow)(\d+(?:\.\d+)?)")
BY_BITS: dict[str, Callable[[int], Codec]] = {
    "int": Uniform,
    "ans": lambda bits: Ans(Uniform(bits)),
    "zstd": lambda bits: Zstd(Uniform(bits)),
    # The gradient is on no levels of its own.
    "learned": lambda bits: PerKind(Ans(Palette(bits)), Int8(kinds=GRADIENTS)),
}


def compressed(strength: str) -> Shield:
    """Return the shield for a compression, or several joined by +; ``ValueError`` for what is none.

    Activations and gradients are both packed; a learned quantiser is the activation's, and gradients cross in int8.
    """
    shield = Shield()
    for part in strength.split("+"):
        if part.startswith(UPDATE):
            shield = replace(shield, updates=partial(_fed_back, _inner(part)))
            continue
        name, value = found.groups() if (found := NAMED.fullmatch(part)) else ("", part)
        own = _part(name, value, part)
        if own.codec is not None and shield.codec is not None:
            raise ValueError(f"expected one codec, got two in {strength!r}; join it with narrow or aware alone")
        shield = replace(
            shield,
            codec=own.codec or shield.codec,
            layers=_stacked(shield.layers, own.layers),
            above=own.above or shield.above,
            weight_bits=own.weight_bits or shield.weight_bits,
        )
    return shield


def _inner(part: str) -> str:
    """Return what packs an update, once it has been seen to be a codec."""
    own = compressed(part.removeprefix(UPDATE))
    if own.codec is None or own.layers is not None or own.updates is not None:
        raise ValueError(f"expected a codec after {UPDATE}, got {part!r}; for example update0.1 or updateint8")
    return part.removeprefix(UPDATE)


def _fed_back(inner: str) -> Codec:
    codec = compressed(inner).codec
    assert codec is not None
    return ErrorFeedback(codec)


def _part(name: str, value: str, part: str) -> Shield:
    if name == "float" and value == "16":
        return Shield(codec=Float16())
    if name == "learned":
        bits = _bits(value, part)
        return Shield(codec=BY_BITS[name](bits), layers=lambda _: LearnedQuantiser(bits))
    if name in BY_BITS:
        return Shield(codec=BY_BITS[name](_bits(value, part)))
    if name == "aware":
        bits = _bits(value, part)
        if not 2 <= bits <= 8:
            raise ValueError(f"expected weights of 2 to 8 bits, got {part!r}")
        return Shield(weight_bits=bits)
    if name == "random":
        return Shield(codec=RandomK(float(value)))
    if name == "narrow":
        share = float(value)
        if not 0 < share < 1:
            raise ValueError(f"expected a share of the channels between 0 and 1, got {part!r}; for example narrow0.25")
        return Shield(layers=partial(_narrow, share), above=partial(_widen, share))
    return Shield(codec=TopK(number(value, f"a fraction to keep, or one of {COMPRESSIONS}")))


def _bits(value: str, part: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"expected whole bits, got {part!r}; for example int4")
    return int(value)


def _narrow(share: float, channels: int) -> nn.Module:
    return Pointwise(channels, max(1, round(share * channels)))


def _widen(share: float, channels: int) -> nn.Module:
    return Pointwise(max(1, round(share * channels)), channels)


def _stacked(
    first: Callable[[int], nn.Module] | None, second: Callable[[int], nn.Module] | None
) -> Callable[[int], nn.Module] | None:
    """Return what makes both layers; the second's do not depend on the number of channels."""
    if first is None or second is None:
        return second if first is None else first
    return lambda channels: nn.Sequential(first(channels), second(channels))
