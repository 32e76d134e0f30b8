"""Codecs of codecs: what earlier packings lost goes into the next one; each kind of tensor by a codec of its own."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from splitlearn.frames import Codec, Kind
from splitlearn.train import Stateful

__all__ = ["ErrorFeedback", "PerKind", "through"]

INNER = "inner codec"  # no key of a message


class ErrorFeedback:
    """Adds what earlier packings lost to the next one (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847).

    For model updates only: on activations the residual of one batch would leak into the code of another. One
    instance belongs to one sender.
    """

    kinds = frozenset({Kind.UPDATE})

    def __init__(self, inner: Codec):
        self.inner = inner
        self._residual: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        """The name, the inner codec's included."""
        return f"feedback({self.inner.name})"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the inner codec's parts of ``tensor`` plus what was lost under this key so far."""
        if Kind.of(key) is not Kind.UPDATE:
            raise ValueError(
                f"expected a model update, got {str(key)!r}; error feedback would mix samples in anything else"
            )
        residual = self._residual.get(key)
        if residual is not None and residual.shape != tensor.shape:
            raise ValueError(
                f"expected {str(key)!r} of shape {tuple(residual.shape)} as before, got {tuple(tensor.shape)}; "
                "use one ErrorFeedback a sender and model"
            )
        wanted = tensor if residual is None else tensor + residual
        parts = self.inner.pack(key, wanted)
        self._residual[key] = wanted - self.inner.unpack(parts, tensor.dtype, tuple(tensor.shape))
        return parts

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return what the inner codec unpacks."""
        return self.inner.unpack(parts, dtype, shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals by key, and the inner codec's state where it has one."""
        residual = {key: residual.clone() for key, residual in self._residual.items()}
        return {**residual, INNER: self.inner.state_dict()} if _has_state(self.inner) else residual

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._residual = {key: residual.clone() for key, residual in state.items() if key != INNER}
        if _has_state(self.inner):
            self.inner.load_state_dict(state[INNER])


class PerKind:
    """Packs each kind of tensor by a codec of its own: ``PerKind(Ans(Palette(4)), Uniform(8))``.

    The first codec that packs a kind packs it. Kinds that none of them names cross as they are.
    """

    def __init__(self, *codecs: Codec):
        if not codecs:
            raise ValueError("expected at least one codec, got none; as in PerKind(Palette(4), Int8())")
        self.codecs = codecs
        self.kinds = frozenset().union(*(codec.kinds for codec in codecs))

    @property
    def name(self) -> str:
        """The name, those of the codecs and what they pack included."""
        described = (f"{codec.name}:{'+'.join(sorted(codec.kinds))}" for codec in self.codecs)
        return f"perkind({','.join(described)})"

    def pack(self, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the parts of the codec of this kind, each name with the codec's number before it."""
        kind = Kind.of(key)
        number = next(number for number, codec in enumerate(self.codecs) if kind in codec.kinds)
        return {f"{number}.{name}": part for name, part in self.codecs[number].pack(key, tensor).items()}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return what the codec whose number the parts bear unpacks."""
        numbers = {name.partition(".")[0] for name in parts}
        number = int(numbers.pop()) if len(numbers) == 1 and min(numbers).isdecimal() else len(self.codecs)
        if number >= len(self.codecs):
            raise ValueError(f"malformed frame: expected parts of one of {len(self.codecs)} codecs")
        inner = {name.partition(".")[2]: part for name, part in parts.items()}
        return self.codecs[number].unpack(inner, dtype, shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the codecs that have one, by number."""
        return {str(number): codec.state_dict() for number, codec in enumerate(self.codecs) if _has_state(codec)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        for number, codec in enumerate(self.codecs):
            if _has_state(codec):
                codec.load_state_dict(state[str(number)])


def through(codec: Codec, z: Tensor) -> Tensor:
    """Return the activation ``z`` as the other end of the wire gets it, with the identity as its gradient.

    Split training itself is straight-through in this sense: the gradient that comes back is used as it is.
    """
    sent = codec.unpack(codec.pack(Kind.ACTIVATION, z.detach().cpu()), z.dtype, tuple(z.shape)).to(z.device)
    return z + (sent - z).detach() if z.requires_grad else sent


def _has_state(codec: Codec) -> TypeGuard[Stateful]:
    return hasattr(codec, "state_dict")
