"""How an attack judges its own training: on samples held out of it, and by whether the end of it still helped."""

from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor

__all__ = ["converged", "fall", "parted", "tail"]

HELD_OUT = 0.15  # share of the auxiliary samples on which nothing is trained
TAIL = 0.1  # share of the epochs or steps, at the end, over which convergence is judged


def parted(num: int, device: torch.device, *, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Return the places of the held-out samples among ``num``, in random order, and those of the rest."""
    held_out, rest = torch.randperm(num).to(device).tensor_split([max(at_least, int(HELD_OUT * num))])
    return held_out, rest


def tail(values: Sequence[float]) -> int:
    """Return how many of the values are the last tenth: one or more."""
    return max(1, int(TAIL * len(values)))


def converged(errors: Sequence[float]) -> float:
    """Return 1 where the last tenth lowered the least error by under 1 % of the first, the mean image's, else 0."""
    last = tail(errors)
    return float(min(errors[:-last]) - min(errors) < 0.01 * errors[0])


def fall(values: Sequence[float]) -> float:
    """Return by how much the mean of the last tenth of the values is below that of as many before."""
    last = tail(values)
    return mean(values[-2 * last : -last] or values[:1]) - mean(values[-last:])
