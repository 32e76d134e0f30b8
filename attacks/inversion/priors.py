"""Priors over inputs: how unlikely an input is, one number a sample, up to a constant."""

import torch
from torch import Tensor

__all__ = ["GaussianPrior", "total_variation"]


def total_variation(x: Tensor) -> Tensor:
    """Return the anisotropic total variation [N]: the absolute steps between neighbours (Rudin et al. 1992).

    Images [N, C, H, W] have neighbours in two directions, signals [N, C, L] in one. Columns of a table [N, F]
    have none: there it is the sum of squares instead.
    """
    if x.ndim == 2:
        return x.square().sum(1)
    steps = [x.diff(dim=dim).abs().flatten(1).sum(1) for dim in range(2, x.ndim)]
    return torch.stack(steps).sum(0)


class GaussianPrior:
    """The squared Mahalanobis distance [N] to the mean of some samples [M, *], in their own covariance.

    Directions in which the samples do not vary are not impossible: every variance is raised by ``ridge`` times
    the mean one.
    """

    def __init__(self, samples: Tensor, *, ridge: float = 0.05):
        self.mean = samples.mean(0)
        centred = (samples - self.mean).flatten(1)
        _, lengths, self._directions = torch.linalg.svd(centred, full_matrices=False)
        variances = lengths.square() / len(samples)
        self._floor = ridge * variances.sum() / centred.shape[1] + torch.finfo(samples.dtype).tiny
        self._variances = variances + self._floor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the distance of each sample."""
        away = (x - self.mean).flatten(1)
        along = away @ self._directions.T
        across = away.square().sum(1) - along.square().sum(1)  # outside the span of the samples
        return (along.square() / self._variances).sum(1) + across / self._floor
