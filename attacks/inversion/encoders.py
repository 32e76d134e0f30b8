"""Networks of an attacker's own beside the victim's: a stage that stands in for its bottom, and critics."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from splitlearn import Encoder, Guard

__all__ = ["Critic", "gradient_penalty", "guarded", "stand_in", "stepped"]

Shape = tuple[int, ...]
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}  # by the number of dimensions convolved over
POOL: dict[int, Any] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d}


def stand_in(x_shape: Shape, z_shape: Shape, *, width: int = 32) -> nn.Sequential:
    """Return a network from inputs [N, *x_shape] to activations [N, *z_shape], of no architecture but the shapes'.

    Two convolutions of ``width`` channels, a pooling to the activation's places and a third; where either shape has no
    places, two linear layers.
    """
    places = len(x_shape) - 1
    if places not in CONV:
        hidden = 8 * width
        layers = [nn.Flatten(), nn.Linear(prod(x_shape), hidden), nn.ReLU(), nn.Linear(hidden, prod(z_shape))]
        return nn.Sequential(*layers, nn.Unflatten(1, z_shape))
    conv = CONV[places]
    layers = [conv(x_shape[0], width, 3, padding=1), nn.ReLU(), conv(width, width, 3, padding=1), nn.ReLU()]
    if len(z_shape) == len(x_shape):
        pooled = [POOL[places](z_shape[1:])] if z_shape[1:] != x_shape[1:] else []
        return nn.Sequential(*layers, *pooled, conv(width, z_shape[0], 3, padding=1))
    coarse = tuple(-(-size // 2) for size in x_shape[1:])
    layers += [POOL[places](coarse), nn.Flatten(), nn.Linear(width * prod(coarse), prod(z_shape))]
    return nn.Sequential(*layers, nn.Unflatten(1, z_shape))


def guarded(stage: nn.Module, guard: Guard, *, releases: int = 1) -> nn.Sequential:
    """Return the attacker's own stage, and after it what the client is known to do to its activations.

    The guard is simulated: nothing is sent by it, and its noise is drawn anew at every call; ``releases`` of them are
    averaged.
    """
    through = Encoder(nn.Identity(), guard)
    through.releases = releases
    return nn.Sequential(stage, through)


class Critic(nn.Module):
    """Tells real samples [N, *shape] from made ones: one number a sample; of ``classes`` labels, where it is told them.

    A label is given by projection (Miyato & Koyama 2018, arXiv:1802.05637). No normalisation, as gradient penalties
    ask for (Gulrajani et al. 2017, arXiv:1704.00028).
    """

    def __init__(self, shape: Shape, *, classes: int = 0, width: int = 64):
        super().__init__()
        places = len(shape) - 1
        layers: list[nn.Module]
        if places in CONV:
            conv, small = CONV[places], tuple(min(size, 4) for size in shape[1:])
            layers = [conv(shape[0], width, 3, padding=1), nn.LeakyReLU(0.2), conv(width, width, 3, padding=1)]
            layers += [nn.LeakyReLU(0.2), POOL[places](small), nn.Flatten(), nn.Linear(width * prod(small), 2 * width)]
        else:
            layers = [nn.Flatten(), nn.Linear(prod(shape), 4 * width), nn.LeakyReLU(0.2)]
            layers += [nn.Linear(4 * width, 2 * width)]
        self.features = nn.Sequential(*layers, nn.LeakyReLU(0.2))
        self.score = nn.Linear(2 * width, 1)
        self.labels = nn.Embedding(classes, 2 * width) if classes else None
        if self.labels is not None:
            nn.init.zeros_(self.labels.weight)

    def forward(self, sample: Tensor, y: Tensor | None = None) -> Tensor:
        """Return one number a sample [N], higher for what looks real; ``y`` are labels [N], where it is told them."""
        found = self.features(sample)
        score: Tensor = self.score(found).squeeze(1)
        return score if self.labels is None or y is None else score + (found * self.labels(y)).sum(1)


def stepped(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step down the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def gradient_penalty(critic: Critic, real: Tensor, made: Tensor, y: Tensor | None = None) -> Tensor:
    """Return the mean of (‖∇ critic‖ − 1)² on lines between real and made samples (Gulrajani et al. 2017)."""
    share = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device, dtype=real.dtype)
    between = (share * real.detach() + (1 - share) * made.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between, y).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()
