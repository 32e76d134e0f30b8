"""DISCO: channels of the activation that are not sent, chosen for each sample by a learned filter.

Singh, Chopra, Garza, Zhang, Vepakomma, Sharma & Raskar 2021, "DISCO: dynamic and invariant sensitive channel
obfuscation for deep neural networks" (arXiv:2012.11025).
"""

import torch
from torch import Tensor, nn

__all__ = ["Disco"]


class Disco(nn.Module):
    """The last layer of a bottom: [N, channels, *] with ``ratio`` ρ of each sample's channels set to zero.

    A filter network of two layers scores the channels from their means over the places; the lowest ρ · channels of a
    sample are zeros, at least one is left. The gradient of the choice goes straight through: that of the scores'
    sigmoid, at ``temperature``. It stands in the stage, so that the party's optimizer trains it.

    What makes the choice private is the penalty of ``AdversarialRepresentation`` as the party's guard: its decoder
    sees the channels that are left, and the filter learns to leave out those on which it succeeds, while the task's
    loss holds on to those that it needs: ``Learner("client", nn.Sequential(*bottom, Disco(16)), adam,
    AdversarialRepresentation(1.0))``. Alone it prunes for the task. ρ 0 sends z as it is.

    Deviations: penalty and task train bottom and filter alike, where the paper has the penalty train the filter only;
    the filter sees channel means, not the whole activation.

    It bounds nothing: the channels left are exact, and which ones are left tells of the input. Who knows it trains a
    decoder on the pruned activations, or inverts by a prior.
    """

    def __init__(self, channels: int, *, ratio: float = 0.75, temperature: float = 1.0):
        super().__init__()
        if channels < 1 or not 0 <= ratio < 1 or not temperature > 0:
            raise ValueError(
                f"expected a channel or more, a ratio of at least 0 and below 1 and a temperature above 0, got "
                f"{channels}, {ratio} and {temperature}; for example Disco(16, ratio=0.75)"
            )
        self.temperature = temperature
        self.kept = max(1, channels - round(ratio * channels))
        self.score = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))

    def forward(self, z: Tensor) -> Tensor:
        """Return ``z`` with the channels that scored lowest set to zero."""
        if self.kept == z.shape[1]:
            return z
        soft = (self.score(z.flatten(2).mean(2) if z.ndim > 2 else z) / self.temperature).sigmoid()
        hard = torch.zeros_like(soft).scatter_(1, soft.topk(self.kept, dim=1).indices, 1.0)
        mask = hard + (soft - soft.detach())
        return z * mask.reshape(*mask.shape, *[1] * (z.ndim - 2))
