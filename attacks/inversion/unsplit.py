"""UnSplit: inputs and the stage that they went through, both guessed at once from the activations alone.

Erdoğan, Küpçü & Çiçek 2022, "UnSplit: data-oblivious model inversion, model stealing, and label inference attacks
against split learning" (WPES, arXiv:2108.09033). In turn, steps on the inputs and steps on a clone of the stage make
clone(x) match z; the inputs start as .5 and are held by TV and their squares (Adam, AMSGrad). Its label inference is
``attacks.labels.matching``. Deviations:

- one clone for all targets, where the reference has one for each;
- weights are in units of the activations' mean square, and those of the reference (.1 and 1, in that of the data)
  are too great for digits: the squares then shrink the inputs and the clone makes up for it;
- clone and inputs have a scale and an offset in common, which the activations do not tell. They are taken from the
  bounds: the estimates' least value and their 99th percentile are set to these;
- several clones from other starts, of which the one with the least misfit is kept (the reference takes the first);
- fewer steps, and larger ones on the inputs (1e-2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from attacks.inversion.maximum_likelihood import misfit, settled
from attacks.inversion.reconstruction import Bounds, Reconstruction, bounded, check_bounds, seeded
from splitlearn import View

__all__ = ["UnSplit"]

BRIGHT = 0.99  # share of the estimates' entries up to what is set to the greatest value of an input


@dataclass(frozen=True)
class UnSplit:
    """Honest but curious server that knows the bottom's architecture: no weights, queries or auxiliary samples.

    ``stage`` builds a fresh bottom for inputs of ``input_shape`` (of one sample), which lie in ``bounds``. ``rounds``
    of ``input_steps`` and ``clone_steps``, for each of ``clones``. On digits at the first cut a misfit of .001 had
    an error (MSE) of .0005, one of .08, where no clone had come further, had .022: then ask for more ``clones``.

    A clone stays in training mode: it normalises by the targets themselves, and its dropout draws at every step.
    """

    stage: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    rounds: int = 40
    input_steps: int = 20
    clone_steps: int = 20
    input_lr: float = 1e-2
    clone_lr: float = 1e-3
    tv_weight: float = 0.01
    square_weight: float = 0.1
    clones: int = 3
    bounds: Bounds = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        counts = (self.rounds, self.input_steps, self.clone_steps, self.clones)
        if min(counts) < 1 or not (self.input_lr > 0 and self.clone_lr > 0):
            raise ValueError(
                f"expected at least one round, step of each kind and clone, and learning rates above 0, got {counts}, "
                f"{self.input_lr} and {self.clone_lr}; leave them out for the defaults"
            )

    def __call__(self, view: View) -> Reconstruction:
        """Return the estimates; ``evidence`` holds the misfit (mean square, of the activations' own) at both ends."""
        z = view.activations()
        with seeded(self.seed, z.device):
            tried = [self._tried(z) for _ in range(self.clones)]
        x, trace = min(tried, key=lambda one: one[1][-1])
        evidence = settled(trace)
        return Reconstruction(self._scaled(x), {**evidence, "misfit": trace[-1]})

    def _tried(self, z: Tensor) -> tuple[Tensor, list[float]]:
        """Return the inputs that one clone comes to, and its misfit after each round."""
        clone = self.stage().to(z)
        if not any(parameter.requires_grad for parameter in clone.parameters()):
            raise ValueError("expected a stage with weights to clone, got one without; build the victim's bottom")
        low, high = self.bounds
        x = z.new_full((len(z), *self.input_shape), (low + high) / 2).requires_grad_()
        inputs = torch.optim.Adam([x], self.input_lr * (high - low), amsgrad=True)
        weights = torch.optim.Adam(clone.parameters(), self.clone_lr, amsgrad=True)
        unit = z.square().mean().item() or 1.0
        misfit(clone(x), z)  # an error where the shapes differ
        trace = []
        for _ in range(self.rounds):
            for _ in range(self.input_steps):
                seen = (x - low) / (high - low)
                held = self.tv_weight * _roughness(seen) + self.square_weight * seen.square().mean()
                inputs.zero_grad()
                (mse_loss(clone(x), z) / unit + held).backward()
                inputs.step()
                with torch.no_grad():
                    x.clamp_(low, high)
            for _ in range(self.clone_steps):
                apart = mse_loss(clone(x.detach()), z) / unit
                weights.zero_grad()
                apart.backward()
                weights.step()
            trace.append(apart.item())
        return x.detach(), trace

    def _scaled(self, x: Tensor) -> Tensor:
        """Return the estimates, stretched over the bounds."""
        low, high = self.bounds
        least = x.min()
        bright = x.flatten().kthvalue(ceil(BRIGHT * x.numel())).values
        span = (bright - least).clamp(min=1e-6)
        return bounded(low + (high - low) * (x - least) / span, self.bounds)


def _roughness(x: Tensor) -> Tensor:
    """Return the mean squared step between neighbours, added over directions; 0 for a table, which has none."""
    return torch.stack([x.new_zeros(()), *(x.diff(dim=dim).square().mean() for dim in range(2, x.ndim))]).sum()
