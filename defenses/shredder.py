"""Shredder: noise learned to be large where the model does not mind it, for a model that is trained already.

Mireshghallah, Taram, Ramrakhyani, Jalali, Tullsen & Esmaeilzadeh 2020, "Shredder: learning noise distributions to
protect inference privacy" (arXiv:1905.11814).
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitlearn import Guard
from splitlearn.party import Loss
from splitlearn.randomness import Randomness

__all__ = ["LearnedNoise", "learn_noise"]


class LearnedNoise(Guard):
    """Adds to each sample's activation one of ``noise`` [num, *shape], drawn anew at each release.

    It bounds nothing: there are only ``num`` noises, the same for all samples. Who knows the guard, or averages many
    activations, subtracts each of them and keeps what looks like an activation; a decoder that trains on noisy
    activations learns that by itself.
    """

    def __init__(self, noise: Tensor):
        if noise.ndim < 2 or not len(noise):
            raise ValueError(f"expected noise [num, *shape], at least one, got {tuple(noise.shape)}; see learn_noise")
        self.noise = noise.detach().clone()

    def __repr__(self) -> str:
        return f"LearnedNoise({len(self.noise)} of shape {tuple(self.noise.shape[1:])}, std {self.noise.std():.3g})"

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` plus a noise tensor a sample; ``ValueError`` where the shapes differ."""
        if z.shape[1:] != self.noise.shape[1:]:
            raise ValueError(
                f"expected activations of shape {tuple(self.noise.shape[1:])}, got {tuple(z.shape[1:])}; learn "
                "noise at the cut where it is added"
            )
        return z + self.noise.to(z)[torch.randint(len(self.noise), (len(z),), device=z.device)]

    def state_dict(self) -> dict[str, Any]:
        """Return the noise."""
        return {"noise": self.noise.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.noise = state["noise"].clone()


def learn_noise(
    bottom: nn.Module,
    top: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    power: float = 1.0,
    weight: float = 1.0,
    num: int = 8,
    steps: int = 500,
    lr: float = 1e-2,
    batch_size: int = 64,
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> LearnedNoise:
    """Return ``num`` noise tensors for the cut between two trained stages, which stay as they are.

    Each starts as Laplace noise of half the amplitude that it aims for. Adam minimises loss(top(z + n), y) − ``weight``
    · mean|n| / rms(z); the second term ends where the noise has ``power``: mean n² / mean z² (1 over the
    signal-to-noise ratio, the paper's in-vivo privacy). A power of 0 returns noise of zeros.

    x, y are the client's own samples: noise learned on the private ones is made of them. Random numbers come from
    ``seed``, and torch's generators stay where they were. Deviations: all tensors are learned at once, each sample of
    a batch under a random one; the second term stops at ``power`` and sets in again below it, where the paper
    decays its weight.
    """
    if not power >= 0 or not weight >= 0 or num < 1 or steps < 0 or batch_size < 1 or not lr > 0:
        raise ValueError(
            f"expected power and weight of 0 or more, at least one tensor and one sample a batch, 0 steps or more and "
            f"lr above 0, got {power}, {weight}, {num}, {batch_size}, {steps} and {lr}; leave them out for the defaults"
        )
    bottom, top = (deepcopy(stage).eval().requires_grad_(False) for stage in (bottom, top))
    with torch.no_grad():
        z = torch.cat([bottom(part) for part in x.split(256)])
    rms = z.square().mean().sqrt()
    with Randomness(seed, "shredder").own(z.device):
        up, down = (torch.empty(num, *z.shape[1:], dtype=z.dtype, device=z.device).exponential_() for _ in range(2))
        noise = ((up - down) / 8**0.5 * power**0.5 * rms).requires_grad_()  # √2 is the std of the difference
        optimizer = torch.optim.Adam([noise], lr * rms.item())
        for _ in range(steps if power else 0):
            rows = torch.randint(len(z), (batch_size,), device=z.device)
            drawn = torch.randint(num, (batch_size,), device=z.device)
            task = loss(top(z[rows] + noise[drawn]), y[rows])
            relative = (noise / rms).flatten(1)
            below = (relative.detach().square().mean(1) < power).to(z)
            optimizer.zero_grad()
            (task - weight * (below * relative.abs().mean(1)).sum()).backward()
            optimizer.step()
    return LearnedNoise(noise)
