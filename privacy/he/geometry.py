"""Geometry: an encrypted layer as a matrix product, what a convolution's inputs are laid out as, and back.

A convolution is a linear layer on patches (im2col): each output position is a row, each entry of a patch a column. The
client lays them out before it encrypts, and adds overlapping gradients up after it has decrypted; both are torch's own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.nn.parameter import is_lazy

from privacy.he.layout import Real

__all__ = ["Geometry"]

Pair = tuple[int, int]
MOST = 1 << 24  # inputs, outputs and sizes that a holder may tell of


@dataclass(frozen=True)
class Geometry:
    """The shape of a layer, which is public: ``inner`` inputs and ``outer`` outputs of each row."""

    kind: Literal["linear", "conv1d", "conv2d"]
    inner: int
    outer: int
    bias: bool
    channels: int = 0
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @classmethod
    def of(cls, layer: nn.Module) -> "Geometry":
        """Return the geometry of an ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``; ``ValueError`` for others."""
        if any(is_lazy(parameter) for parameter in layer.parameters()):
            raise ValueError(f"expected a layer with shapes, got {layer}; pass a batch through it once")
        if isinstance(layer, nn.Linear):
            return cls("linear", layer.in_features, layer.out_features, layer.bias is not None)
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise ValueError(
                    f"expected a convolution of one group, padded with zeros by a number, got {layer}; write it so"
                )
            sizes = [_pair(size) for size in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)]
            if isinstance(layer, nn.Conv1d):
                fill = ((1, 1), (1, 1), (0, 0), (1, 1))
                sizes = [(blank[0], size[0]) for blank, size in zip(fill, sizes, strict=True)]
            kernel, stride, padding, dilation = sizes
            return cls(
                "conv1d" if isinstance(layer, nn.Conv1d) else "conv2d", layer.in_channels * kernel[0] * kernel[1],
                layer.out_channels, layer.bias is not None, layer.in_channels, kernel, stride, padding, dilation,
            )  # fmt: skip
        raise ValueError(
            f"expected an nn.Linear, nn.Conv1d or nn.Conv2d to encrypt, got {type(layer).__name__}; leave other layers "
            "with the client"
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight."""
        if self.kind == "linear":
            return self.outer, self.inner
        kernel = self.kernel if self.kind == "conv2d" else self.kernel[1:]
        return self.outer, self.channels, *kernel

    def matrix(self, layer: nn.Module) -> tuple[Real, Real | None]:
        """Return the layer's weights as M [inner, outer], and its bias, in double precision."""
        weight, bias = _own(layer)
        return self.as_matrix(weight), None if bias is None else np.array(bias.detach().cpu().double().numpy())

    def as_matrix(self, weight: Tensor) -> Real:
        """Return a weight as M [inner, outer], a copy in double precision."""
        return np.array(weight.detach().cpu().double().reshape(self.outer, self.inner).numpy().T)

    def rows(self, x: Tensor) -> Tensor:
        """Return the layer's input as rows [N, positions, inner]; one position for a linear layer."""
        wanted = {"linear": 2, "conv1d": 3, "conv2d": 4}[self.kind]
        entries = self.inner if self.kind == "linear" else self.channels
        if x.ndim != wanted or x.shape[1] != entries or not len(x):
            raise ValueError(
                f"expected inputs of {wanted} dimensions, at least one, with {entries} in the second, got shape "
                f"{tuple(x.shape)}"
            )
        if self.kind == "linear":
            return x.unsqueeze(1)
        image = x.unsqueeze(2) if self.kind == "conv1d" else x
        room = [size + 2 * pad for size, pad in zip(image.shape[2:], self.padding, strict=True)]
        needed = [gap * (size - 1) + 1 for size, gap in zip(self.kernel, self.dilation, strict=True)]
        if any(have < need for have, need in zip(room, needed, strict=True)):
            raise ValueError(f"expected inputs, padding included, of at least {needed} to convolve, got {room}")
        return unfold(image, self.kernel, self.dilation, self.padding, self.stride).transpose(1, 2)

    def output(self, rows: Tensor, x: Tensor) -> Tensor:
        """Return the rows of outputs [N, positions, outer] in the shape that the layer puts out for ``x``."""
        if self.kind == "linear":
            return rows.squeeze(1)
        sizes = x.shape[2:] if self.kind == "conv2d" else (1, x.shape[2])
        form = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((size + 2 * pad - gap * (k - 1) - 1) // step + 1 for size, k, step, pad, gap in form)
        image = rows.transpose(1, 2).unflatten(2, (height, width))
        return (image.squeeze(2) if self.kind == "conv1d" else image).contiguous()  # as torch's own, or Opacus errs

    def told(self) -> dict[str, Any]:
        """Return it as what crosses."""
        return asdict(self)

    @classmethod
    def from_told(cls, told: Mapping[str, Any]) -> "Geometry":
        """Return the geometry that a holder told."""
        try:
            fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
            found = cls(**fields)
            pairs = (found.kernel, found.stride, found.padding, found.dilation)
            numbers = [found.inner, found.outer, *found.kernel, *found.stride, *found.dilation]
            sound = found.kind in ("linear", "conv1d", "conv2d") and isinstance(found.bias, bool)
            sound &= all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)
            sound &= all(type(n) is int for n in (*numbers, *found.padding, found.channels))
            sound = sound and all(1 <= n <= MOST for n in numbers) and all(0 <= n <= MOST for n in found.padding)
            sound = sound and found.channels >= 0
            if found.kind != "linear":
                sound = sound and found.inner == found.channels * found.kernel[0] * found.kernel[1]
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"expected the geometry of a layer, got {sorted(told)}") from error
        if not sound:
            raise ValueError(f"expected the geometry of a layer, got {dict(told)}")
        return found

    def parameters(self, layer: nn.Module | None = None) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Return the weight and bias of ``layer``, its own, or zeros of their shapes."""
        if layer is not None:
            weight, bias = _own(layer)
            assert isinstance(weight, nn.Parameter)
            assert bias is None or isinstance(bias, nn.Parameter)
            return weight, bias
        return nn.Parameter(torch.zeros(self.weight_shape)), nn.Parameter(
            torch.zeros(self.outer)
        ) if self.bias else None


def _own(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d), layer
    return layer.weight, layer.bias


def _pair(size: int | tuple[int, ...]) -> Pair:
    numbers = (size,) if isinstance(size, int) else size
    return (numbers[0], numbers[-1])
