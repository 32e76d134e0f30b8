"""The shapes of inverse networks: from an activation to the input that it came from."""

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

__all__ = ["Convolutional", "Dense", "Network", "suited"]

Shape = tuple[int, ...]
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}  # by the number of dimensions convolved over
CONV_TRANSPOSE: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


@dataclass(frozen=True)
class Dense:
    """Fully connected: ``depth`` hidden layers of ``width`` units; depth 0 is an affine map."""

    width: int = 256
    depth: int = 1

    def __post_init__(self) -> None:
        _check_size(self.width, self.depth)

    def build(self, z_shape: Shape, x_shape: Shape) -> nn.Sequential:
        """Return a network from activations [N, *z_shape] to inputs [N, *x_shape], its last layer all zero."""
        sizes = [prod(z_shape), *[self.width] * self.depth, prod(x_shape)]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes[:-1]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, _zeroed(nn.Linear(sizes[-2], sizes[-1])), nn.Unflatten(1, x_shape))


@dataclass(frozen=True)
class Convolutional:
    """Convolutions of ``width`` channels: one at the activation's scale, then ``depth`` residual blocks at the input's.

    For inputs with places: images [C, H, W] and signals [C, L]. An activation without matching places, such as a
    flat one, is first laid out by a linear layer.
    """

    width: int = 32
    depth: int = 1

    def __post_init__(self) -> None:
        _check_size(self.width, self.depth)

    def build(self, z_shape: Shape, x_shape: Shape) -> nn.Sequential:
        """Return a network from activations [N, *z_shape] to inputs [N, *x_shape], its last layer all zero."""
        places = len(x_shape) - 1
        if places not in CONV:
            raise ValueError(
                f"expected inputs [C, H, W] or [C, L], got shape {x_shape}, which has no places to convolve over; "
                "use Dense"
            )
        layers: list[nn.Module] = []
        if len(z_shape) != len(x_shape) or any(low > high for low, high in zip(z_shape[1:], x_shape[1:], strict=True)):
            coarse = (self.width, *(ceil(size / 4) for size in x_shape[1:]))
            layers += [nn.Flatten(), nn.Linear(prod(z_shape), prod(coarse)), nn.Unflatten(1, coarse)]
            z_shape = coarse
        scale = tuple(ceil(high / low) for low, high in zip(z_shape[1:], x_shape[1:], strict=True))
        layers.append(CONV[places](z_shape[0], self.width, 3, padding=1))
        if max(scale) > 1:
            layers += [nn.ReLU(), CONV_TRANSPOSE[places](self.width, self.width, scale, stride=scale), _Crop(x_shape)]
        layers += [_Residual(self.width, places) for _ in range(self.depth)]
        return nn.Sequential(*layers, nn.ReLU(), _zeroed(CONV[places](self.width, x_shape[0], 3, padding=1)))


Network = Dense | Convolutional


def suited(network: Network | None, x_shape: Shape, *, width: int = 32) -> Network:
    """Return the network, or where it is None one for inputs of this shape: ``Convolutional`` where these have places.

    Signals and images have; columns of a table, and volumes, get ``Dense``. ``width`` is that of the convolutions.
    """
    if network is not None:
        return network
    return Convolutional(width, 1) if len(x_shape) - 1 in CONV else Dense()


class _Residual(nn.Module):
    """Two convolutions beside the identity (He et al. 2016, arXiv:1603.05027, without normalisation)."""

    def __init__(self, width: int, places: int):
        super().__init__()
        self.first = CONV[places](width, width, 3, padding=1)
        self.second = CONV[places](width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(relu(self.first(relu(x))))


class _Crop(nn.Module):
    """Keeps the first places, where upsampling by whole factors went past the input's size."""

    def __init__(self, x_shape: Shape):
        super().__init__()
        self.sizes = x_shape[1:]

    def forward(self, x: Tensor) -> Tensor:
        for dim, size in enumerate(self.sizes, start=2):
            x = x.narrow(dim, 0, size)
        return x


def _check_size(width: int, depth: int) -> None:
    if width < 1 or depth < 0:
        raise ValueError(f"expected a width of 1 or more and a depth of 0 or more, got {width} and {depth}")


def _zeroed(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer
