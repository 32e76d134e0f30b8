"""FORA: a substitute of the client's stage, of which nothing is known but how its activations are distributed.

Xu et al. 2024, "A stealthy wrongdoer: feature-oriented reconstruction attack against split learning" (CVPR,
arXiv:2405.04115). The substitute is trained on auxiliary samples to put out what is distributed as the activations
that were seen: (1 − a) · adversarial loss of a critic + a · MK-MMD. An inverse network of the substitute then reads the
victim's activations. Deviations:

- after the training, from what it left in the view, in place of during it;
- of the size that digits need: learning rates 1e-3 (1e-4 and 3e-4), a penalty of 10 (1000) and fewer steps (40,000);
- the kernels' widths are those multiples of the mean squared distance in the batch;
- where no activation that was seen is below 0, neither is one of the substitute (its last layer is then a ReLU);
- its inverse is the ``Decoder``, which starts as the mean image.
"""

from dataclasses import dataclass, field
from statistics import mean

import torch
from torch import Tensor, nn

from attacks.inversion.decoder import Decoder
from attacks.inversion.encoders import Critic, gradient_penalty, guarded, stand_in, stepped
from attacks.inversion.judging import fall, tail
from attacks.inversion.networks import Dense
from attacks.inversion.reconstruction import Bounds, Inversion, Reconstruction, auxiliary_inputs, check_bounds, seeded
from attacks.inversion.shadow import imagined
from splitlearn import Guard, Kind, View

__all__ = ["FORA", "discrepancy"]

WIDTHS = tuple(2.0**k for k in range(-3, 2))  # of the Gaussian kernels
TRAINING = ("learn", "forward")  # what is asked of a server in training; in the U shape it is sent no labels


@dataclass(frozen=True)
class FORA:
    """Unlabelled auxiliary samples and what crossed, training included; no architecture, weights or queries.

    It learns the distribution from the ``recent`` last activations of the training, where these crossed, and from those
    to be inverted; from these alone where they are means of several releases. ``share`` is a, the weight of MK-MMD.
    ``inverse`` is trained on the substitute, a ``stand_in`` of ``width`` channels; None is an affine decoder within
    ``bounds``, the least and greatest value of an input. The critic has ``critic_width``. ``guard`` is what the client
    is known to do to its activations, of the same shape before and after: the substitute's pass through it.

    A substitute can match the distribution in another way than the victim's, which the attacker cannot see. On digits
    at the first cut these settings came to .004 to .006 on each of five seeds; wider ones (32 channels) came to .003
    once and to .18 to .22 otherwise, which is worse than the mean image (.072). Report several seeds.
    """

    inverse: Inversion | None = None
    steps: int = 500
    batch_size: int = 32
    lr: float = 1e-3
    critic_lr: float = 1e-3
    share: float = 0.8
    penalty: float = 10.0
    recent: int = 800
    width: int = 8
    critic_width: int = 16
    bounds: Bounds | None = (0.0, 1.0)
    guard: Guard = field(default_factory=Guard)
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        counts = (self.steps, self.width, self.critic_width, self.recent)
        if min(counts) < 1 or self.batch_size < 2 or not 0 <= self.share <= 1 or not min(self.lr, self.critic_lr) > 0:
            raise ValueError(
                f"expected steps, widths and recent of 1 or more, got {counts}, batches of two or more, got "
                f"{self.batch_size}, a share in [0, 1], got {self.share}, and learning rates above 0; leave them out "
                "for the defaults"
            )

    def __call__(self, view: View) -> Reconstruction:
        """Return the estimates; ``evidence`` holds MK-MMD at both ends, and that of the inverse on the substitute.

        Neither tells whether the substitute is like the victim's stage.
        """
        z = view.activations()
        x = auxiliary_inputs(view, at_least=16, like=z, bounds=self.bounds)
        inverse = self.inverse or Decoder(Dense(depth=0), epochs=15, lr=2e-3, bounds=self.bounds)
        learned = _of_training(view) if view.threat.releases == 1 else []
        seen = torch.cat([torch.cat(learned)[-self.recent :].to(z), z]) if learned else z
        with seeded(self.seed, z.device):
            layers: list[nn.Module] = [stand_in(tuple(x.shape[1:]), tuple(z.shape[1:]), width=self.width)]
            layers += [nn.ReLU()] if bool((seen >= 0).all()) else []
            unit = seen.square().mean().sqrt() + torch.finfo(z.dtype).tiny
            if type(self.guard) is not Guard:  # which knows no units
                layers = [guarded(nn.Sequential(*layers, _Times(unit)), self.guard, releases=view.threat.releases)]
                layers += [_Times(1 / unit)]
            substitute = nn.Sequential(*layers).to(z)
            trace = self._imitate(substitute, seen / unit, x)
            found = inverse(imagined(z / unit, substitute, x))
        evidence = {"discrepancy_first": trace[0], "discrepancy_last": mean(trace[-tail(trace) :])}
        converged = float(fall(trace) < 0.01 * trace[0] and found.evidence["converged"] == 1)
        return Reconstruction(found.x_hat, {**found.evidence, **evidence, "converged": converged})

    def _imitate(self, substitute: nn.Module, seen: Tensor, x: Tensor) -> list[float]:
        """Train the substitute, and return the discrepancy at each step."""
        critic = Critic(tuple(seen.shape[1:]), width=self.critic_width).to(seen)
        optimizer = torch.optim.Adam(substitute.parameters(), self.lr, betas=(0.5, 0.9))
        critics = torch.optim.Adam(critic.parameters(), self.critic_lr, betas=(0.5, 0.9))
        trace = []
        for _ in range(self.steps):
            real = seen[torch.randint(len(seen), (self.batch_size,), device=seen.device)]
            made = substitute(x[torch.randint(len(x), (self.batch_size,), device=x.device)])
            told = critic(made.detach()).mean() - critic(real).mean()
            stepped(critics, told + self.penalty * gradient_penalty(critic, real, made))
            apart = discrepancy(made, real)
            stepped(optimizer, self.share * apart - (1 - self.share) * critic(made).mean())
            trace.append(apart.item())
        return trace


class _Times(nn.Module):
    """Multiplies."""

    def __init__(self, factor: Tensor):
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        return self.factor * z


def _of_training(view: View) -> list[Tensor]:
    """Return the activations that were sent in training, in order; not what a middle stage answered."""
    requests = [exchange.request for exchange in view.exchanges if exchange.request.verb in TRAINING]
    return [tensor for one in requests for key, tensor in one.tensors.items() if Kind.of(key) is Kind.ACTIVATION]


def discrepancy(a: Tensor, b: Tensor) -> Tensor:
    """Return MK-MMD of two batches [N, *], squared and unbiased: around 0 where both are of one distribution.

    Long et al. 2015 (arXiv:1502.02791): a sum of Gaussian kernels exp(−‖·‖² / 2σ²), σ² multiples of the mean ‖·‖².
    """
    both = torch.cat([a, b]).flatten(1)
    squared = (both.square().sum(1)[:, None] + both.square().sum(1) - 2 * both @ both.T).clamp(min=0)
    mean = squared.detach().mean() + torch.finfo(squared.dtype).tiny
    kernel = torch.stack([(-squared / (2 * width * mean)).exp() for width in WIDTHS]).sum(0)
    kernel = kernel - torch.diag(kernel.diagonal())
    n, m = len(a), len(b)
    return kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1)) - 2 * kernel[:n, n:].mean()
