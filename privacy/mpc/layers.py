"""Which layers a stage on shares may have, and what of them is public: kinds, sizes and strides, never weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitlearn.misfit import MISFITS, Refused

__all__ = ["Layer", "described", "plain_stage"]

CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.ReLU: (),
    nn.LeakyReLU: ("negative_slope",),
    nn.MaxPool1d: ("kernel_size", "stride"),
    nn.MaxPool2d: ("kernel_size", "stride"),
    nn.AvgPool2d: ("kernel_size", "stride"),
    nn.Flatten: (),
    nn.Identity: (),
}
KINDS = {kind.__name__: kind for kind in SETTINGS}
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d)
AS_USUAL: dict[str, Any] = {
    "padding_mode": "zeros", "ceil_mode": False, "return_indices": False, "count_include_pad": True,
    "divisor_override": None, "start_dim": 1, "end_dim": -1,
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer: its name in the stage, its kind, and its public settings."""

    name: str
    kind: str
    settings: Mapping[str, Any]
    bias: bool = False

    def told(self) -> dict[str, Any]:
        """Return it as what crosses."""
        return {"name": self.name, "kind": self.kind, "settings": dict(self.settings), "bias": self.bias}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Layer":
        """Return the layer that was told of; ``ValueError`` for anything else."""
        try:
            kind, settings = KINDS[told["kind"]], dict(told["settings"])
            if set(settings) != set(SETTINGS[kind]) or not isinstance(told["name"], str):
                raise KeyError(told["kind"])
            tuples = {name: tuple(one) if isinstance(one, list) else one for name, one in settings.items()}
            layer = cls(told["name"], told["kind"], tuples, bool(told["bias"]))
            layer.plain()
            return layer
        except (KeyError, TypeError, *MISFITS) as error:
            raise ValueError(f"expected a layer that can be evaluated on shares, got {told!r}") from error

    def plain(self) -> nn.Module:
        """Return a plain layer of these settings, without memory for its weights."""
        kind: Callable[..., nn.Module] = KINDS[self.kind]
        more = {"bias": self.bias} if KINDS[self.kind] in LINEAR else {}
        with torch.device("meta"):
            return kind(**self.settings, **more)


def described(stage: nn.Module) -> list[Layer]:
    """Return the layers of a stage in order; ``Refused`` names the first that cannot be evaluated on shares.

    ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` (padding with zeros), ``nn.ReLU``, ``nn.LeakyReLU``, pooling without
    padding, ``nn.Flatten`` and ``nn.Sequential`` of these.
    """
    leaves = _leaves(stage)
    found = [_described(name, layer) for name, layer in leaves]
    seen: set[nn.Module] = set()
    for name, layer in leaves:
        if isinstance(layer, LINEAR) and layer in seen:
            raise Refused(f"expected each layer's weights once, got those of {layer} again at {name}; copy the layer")
        seen.add(layer)
    if not found:
        raise Refused("expected a stage with layers, got none; cut lower")
    return found


def plain_stage(layers: Sequence[Layer]) -> nn.Sequential:
    """Return the stage as plain layers without memory, which knows which inputs fit and what comes out."""
    return nn.Sequential(*(layer.plain() for layer in layers))


def _leaves(stage: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    if not isinstance(stage, nn.Sequential):
        return [(prefix.rstrip("."), stage)]
    return [
        leaf
        for name, child in stage._modules.items()
        if child is not None
        for leaf in _leaves(child, f"{prefix}{name}.")
    ]


def _described(name: str, layer: nn.Module) -> Layer:
    kind = type(layer)
    odd = [key for key, usual in AS_USUAL.items() if getattr(layer, key, usual) != usual]
    padded = kind.__name__.endswith(("Pool1d", "Pool2d")) and getattr(layer, "padding", 0) not in (0, (0,), (0, 0))
    dilated = kind.__name__.startswith("MaxPool") and getattr(layer, "dilation", 1) not in (1, (1,), (1, 1))
    worded = isinstance(getattr(layer, "padding", 0), str)
    inplace = getattr(layer, "inplace", False)
    grouped = getattr(layer, "groups", 1) not in (1, getattr(layer, "in_channels", 1))
    if kind not in SETTINGS or odd or padded or dilated or worded or inplace or grouped:
        how = "without padding and dilation of pools, padding in words, inplace and groups but depthwise"
        told = " with ".join([kind.__name__, *([", ".join(odd)] if odd else [])])
        raise Refused(
            f"expected layers that can be evaluated on shares ({', '.join(KINDS)}, {how}), got {told} at "
            f"{name or 'the top'}; leave it below the cut, or take one of these"
        )
    settings = {key: _wide(getattr(layer, key)) for key in SETTINGS[kind]}
    return Layer(name, kind.__name__, settings, bias=isinstance(getattr(layer, "bias", None), Tensor))


def _wide(value: Any) -> Any:
    return tuple(value) if isinstance(value, (tuple, list)) else value
