"""Unlike members beyond their labels: unlike amounts, unlike devices."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["device_noise", "quantities"]


def quantities(n: int, clients: int, alpha: float, seed: int, min_rows: int = 1) -> list[Tensor]:
    """Return ``n`` rows dealt at random in unlike amounts, whose shares are drawn from a Dirichlet (alpha, …, alpha).

    Quantity skew of Li et al. 2021 (arXiv:2102.02079). Every client has ``min_rows`` or more; what is above is skewed.
    """
    if not 1 <= clients * min_rows <= n or clients < 1:
        raise ValueError(f"expected at most {n} rows for {clients} clients of {min_rows} or more; ask for fewer")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"expected alpha above 0, got {alpha}; for example 0.5")
    rng = np.random.default_rng(seed)
    shares = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1]
    spare = n - clients * min_rows
    sizes = np.diff([0, *np.round(shares * spare).astype(int), spare]) + min_rows
    parts = np.split(rng.permutation(n), np.cumsum(sizes)[:-1])
    return [torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts]


def device_noise(x: Tensor, client: int, clients: int, level: float, seed: int) -> Tensor:
    """Return the samples as this client's device takes them: Gaussian noise of variance level · (client + 1)/clients.

    Feature skew of Li et al. 2021 (arXiv:2102.02079), whose first of N parties has level·1/N. ``client`` counts from 0.
    Images may leave their range, as they do there.
    """
    if not 0 <= client < clients or not 0 <= level < float("inf"):
        raise ValueError(f"expected a client from 0 to {clients - 1} and a level of 0 or more, got {client}, {level}")
    if not x.is_floating_point():
        raise ValueError(f"expected inputs that are numbers, got {x.dtype}; tokens have no sensor's noise")
    draws = torch.Generator().manual_seed(seed * 1_000_003 + client)
    spread = (level * (client + 1) / clients) ** 0.5
    return x + spread * torch.randn(x.shape, generator=draws, dtype=x.dtype).to(x.device)
