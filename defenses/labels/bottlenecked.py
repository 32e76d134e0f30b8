"""A bottleneck at the owner's entrance: what its stage learns from is a noisy, narrow reading of the activation.

Zou, Liu & Zhang 2023, "Mutual information regularization for vertical federated learning" (arXiv:2301.01142), the
active party's defense; the layer and its rate are those of ``defenses.MID`` on the client's side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.bottleneck import MID, Bottleneck
from defenses.labels.observed import Observing

__all__ = ["BottleneckedTop"]

CHANNELS_LAST = (nn.Linear,)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class BottleneckedTop(Observing):
    """Puts a ``Bottleneck`` before the owner's first layer with weights, and ``weight`` · rate on its loss.

    The stage gets a draw of ``features`` from N(mean, variance) in training, led back to as many channels as there were
    by a linear map, and the mean at a prediction. The rate, KL(N(mean, variance) ‖ N(0, 1)) in nats, is summed over a
    sample's entries and averaged over the batch; it bounds what a draw tells of the activation on average.

    It protects labels from who reads gradients, noisy now, and from a bottom that has learnt what labels follow from.
    It bounds nothing of a single label: the draw hides the activation from the stage, while the gradient is still of
    the true label. Gradients' directions read it through small weights, and model completion whatever the bottom
    learns. ``stage`` is an ``nn.Sequential`` with a linear layer or a convolution in it; its first says how many
    channels there are. Layers before it that have none (pooling, flattening) stay before the bottleneck.

    Deviations: a Gaussian head at each place of the activation in place of one over all of it, starting at a standard
    deviation of .135, so that training starts; one bottleneck for the joined activations of all clients.
    """

    weight: float
    features: int = 16
    task: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight >= 0) or self.features < 1:
            raise ValueError(
                f"expected a finite weight of 0 or more and at least one feature, got {self.weight} and "
                f"{self.features}; for example BottleneckedTop(1e-3)"
            )

    def parts(self, stage: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return the layers up to the first with weights and the bottleneck, and the rest of the stage."""
        layers = _layers(stage)
        for place, layer in enumerate(layers):
            first = next((part for part in layer.modules() if isinstance(part, WEIGHTED)), None)
            if first is not None:
                last = isinstance(first, CHANNELS_LAST)
                channels = first.in_features if isinstance(first, nn.Linear) else first.in_channels
                entrance = _Narrow(nn.Sequential(*layers[:place]), channels, self, -1 if last else 1)
                return entrance, nn.Sequential(*layers[place:])
        raise ValueError(
            f"expected a stage with a linear layer or a convolution to stand before, got {type(stage).__name__} "
            "without one; the bottleneck takes the number of channels from it"
        )

    def mean_loss(self, output: Tensor, y: Tensor, seen: Any) -> Tensor:
        """Return the task's loss plus the weighted rate, ``seen``."""
        return self.task(output, y) + seen


class _Narrow(nn.Module):
    """What comes before, the bottleneck, and the way back to as many channels; beside it the weighted rate."""

    def __init__(self, before: nn.Module, channels: int, settings: BottleneckedTop, dim: int):
        super().__init__()
        self.before, self.dim = before, dim
        self.bottleneck = Bottleneck(channels, settings.features, dim=dim)
        self.back = nn.Linear(settings.features, channels)
        self._mid = MID(settings.weight, dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        halves = self.bottleneck(self.before(z))
        narrow = self._mid.activation(halves) if self.training else halves.chunk(2, self.dim)[0]
        return self.back(narrow.movedim(self.dim, -1)).movedim(-1, self.dim), self._mid.penalty(z, halves)


def _layers(stage: nn.Module) -> list[nn.Module]:
    if isinstance(stage, nn.Sequential):
        return [layer for part in stage for layer in _layers(part)]
    return [stage]
