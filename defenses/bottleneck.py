"""MID: a variational bottleneck at the cut, so that the activation tells less of the input.

Wang, Zhang & Jia 2021, "Improving robustness to model inversion attacks via mutual information regularization"
(arXiv:2009.05241); Zou et al. 2022, "Defending batch-level label inference and replacement attacks in vertical
federated learning", for split models. The bound is that of Alemi et al. 2017 (arXiv:1612.00410).
"""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

from splitlearn import Guard

__all__ = ["MID", "Bottleneck"]

FIRST_LOG_VARIANCE = -4.0  # noise of std .135 to start with


class Bottleneck(nn.Module):
    """The last layer of a bottom: [N, channels, *] to means and log-variances [N, 2·features, *], one beside the other.

    A linear map at each place, of its own for each half. It belongs to ``MID``, which draws from it what is sent, [N,
    features, *]; without that guard the top gets twice the channels. With as many ``features`` as channels (the
    default) the top stays as it is. ``dim`` is the dimension of channels: 1, or -1 for tokens [N, T, D].

    It stands in the stage, not in the guard, so that the party's optimizer trains it, and its checkpoints, averages and
    replicas hold it: ``bottom = nn.Sequential(*bottom, Bottleneck(16))``.
    """

    def __init__(self, channels: int, features: int | None = None, *, dim: int = 1):
        super().__init__()
        features = channels if features is None else features
        if channels < 1 or features < 1:
            raise ValueError(f"expected at least one channel and one feature, got {channels} and {features}")
        self.dim = dim
        self.mean = nn.Linear(channels, features)
        self.log_variance = nn.Linear(channels, features)
        with torch.no_grad():
            self.log_variance.weight.zero_()
            self.log_variance.bias.fill_(FIRST_LOG_VARIANCE)

    def forward(self, z: Tensor) -> Tensor:
        """Return means and log-variances, one beside the other along the channels."""
        last = z.movedim(self.dim, -1)
        return torch.cat([self.mean(last), self.log_variance(last)], -1).movedim(-1, self.dim)


@dataclass(frozen=True)
class MID(Guard):
    """Sends a draw from N(mean, variance) of a ``Bottleneck``; adds ``weight`` · KL(N(mean, variance) ‖ N(0, 1)).

    The KL, in nats, is summed over a sample's entries and averaged over the batch, so that a useful ``weight`` falls
    with their number (1e-4 to 1e-3 at 2048). What is sent at a prediction is drawn, too: the mean alone would tell
    more. ``dim`` as in the bottleneck.

    The mean KL over the distribution of inputs bounds their mutual information with one draw from above. That is an
    average, measured on the training's own batches, and says nothing of a single sample or of a second draw: as a
    defense it bounds nothing. Who knows it trains a decoder on draws, or averages the releases of a sample, which
    recovers the mean.

    Deviations: a Gaussian head after the bottom in place of one that replaces its last layer; it starts at a standard
    deviation of .135, so that training starts.
    """

    weight: float
    dim: int = 1

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"expected a finite weight of 0 or more, got {self.weight}; for example MID(1e-3)")

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    def activation(self, z: Tensor) -> Tensor:
        """Return a draw for the means and log-variances ``z``."""
        mean, log_variance = self._halves(z)
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Return the weighted KL, a scalar."""
        mean, log_variance = self._halves(z)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return self.weight * kl.flatten(1).sum(1).mean()

    def _halves(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.ndim < 2 or z.shape[self.dim] % 2:
            raise ValueError(
                f"expected means and log-variances along dimension {self.dim}, got shape {tuple(z.shape)}; end the "
                "stage with Bottleneck(channels)"
            )
        mean, log_variance = z.chunk(2, self.dim)
        return mean, log_variance
