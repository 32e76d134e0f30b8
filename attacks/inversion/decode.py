"""Decode: the decoder of an attack, from what crosses to inputs."""

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

from attacks.inversion.networks import Network, suited
from attacks.inversion.reconstruction import Bounds, bounded

__all__ = ["Decode"]


class Decode(nn.Module):
    """From an activation and, where there are ``classes``, a label to an input; starts as the mean image.

    Built from auxiliary inputs ``x`` and the shape of an activation; ``network`` None is one that suits the inputs.
    With ``seen`` it standardises activations as these would be, else it takes them as they come.
    """

    def __init__(
        self,
        network: Network | None,
        x: Tensor,
        z_shape: tuple[int, ...],
        bounds: Bounds | None,
        *,
        classes: int = 0,
        seen: Tensor | None = None,
    ):
        super().__init__()
        tiny, x_shape = torch.finfo(x.dtype).tiny, tuple(x.shape[1:])
        self.mean, self.spread = x.mean(0), (x - x.mean(0)).std() + tiny  # one for all entries, as in the error
        self.network = suited(network, x_shape).build((z_shape[0] + classes, *z_shape[1:]), x_shape).to(x)
        self.classes, self.bounds = classes, bounds
        self.center: Tensor | float = 0.0
        self.scale: Tensor | float = 1.0
        if seen is not None:
            over = [0, *range(2, seen.ndim)]  # one scale a channel, or a column where there are no places
            self.center = seen.mean(over, keepdim=True)
            self.scale = seen.std(over, keepdim=True) + 1e-3 * seen.std() + tiny  # a dead channel stays near 0

    def unbounded(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the input as it comes, to be trained through."""
        z = (z - self.center) / self.scale
        if self.classes and y is not None:  # one channel a class, all ones where it is the label's
            told = one_hot(y, self.classes).to(z).reshape(len(z), self.classes, *[1] * (z.ndim - 2))
            z = torch.cat([z, told.expand(-1, -1, *z.shape[2:])], dim=1)
        return self.mean + self.spread * self.network(z)

    def misfit(self, z: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the mean squared error of what ``z`` decodes to, in units of the inputs' variance."""
        return mse_loss(self.unbounded(z, y), x) / self.spread**2

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the input, in its bounds."""
        return bounded(self.unbounded(z, y), self.bounds)
