"""Shadow: a stage trained to fit the victim's top stands in for its bottom, and is inverted in its place.

He, Zhang & Lee 2019, "Model inversion attacks against collaborative inference" (ACSAC), the query-free attack: train a
shadow of the bottom against the frozen top on labelled auxiliary samples, then invert the shadow. Deviations:

- the shadow need not have the bottom's architecture (``stand_in``), and did better on digits where it had not: the top
  is satisfied by many bottoms of few parameters that are nothing like the victim's;
- several shadows of other starts, since one may be far off: an estimate is the mean of theirs;
- how to invert them is not guessed. One more, a narrow ``stand_in``, plays the victim: of several attacks through the
  others, that is taken which rebuilds held-out auxiliary samples best from its activations. If none beats the mean
  image, it is the mean image. Through its own activations each would look better than it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from attacks.inversion.decoder import Decoder
from attacks.inversion.encoders import guarded, stand_in, stepped
from attacks.inversion.judging import parted
from attacks.inversion.maximum_likelihood import MaximumLikelihood
from attacks.inversion.networks import Dense
from attacks.inversion.reconstruction import (
    Bounds,
    Inversion,
    Reconstruction,
    auxiliary_inputs,
    auxiliary_labels,
    check_bounds,
    seeded,
)
from splitlearn import Encoder, Grants, Guard, Kind, Message, Threat, View
from splitlearn.wire import Exchange

__all__ = ["Shadow", "imagined"]

NARROW = 12  # channels of the shadow that plays the victim


def inversions_within(bounds: Bounds | None) -> tuple[Inversion, ...]:
    """Return what is tried on a shadow, unless told otherwise."""
    return (
        MaximumLikelihood(iterations=60, tv_weights=(), gaussian_weights=(0.5,), bounds=bounds),
        Decoder(Dense(depth=0), epochs=15, lr=2e-3, bounds=bounds),
        Decoder(Dense(256, 1), epochs=15, lr=2e-3, bounds=bounds),
    )


@dataclass(frozen=True)
class Shadow:
    """Honest but curious server with labelled auxiliary samples; no queries, no weights of the client.

    ``top`` is its own stage, which puts out logits. ``stage`` builds a fresh bottom, where the architecture is known;
    None is a ``stand_in``. ``inversions`` are tried on the shadows, each with white box and auxiliary samples; None are
    a maximum likelihood and two decoders within ``bounds``, the least and greatest value of an input. ``guard`` is what
    the client is known to do to its activations, of the same shape before and after: a shadow's pass through it.
    """

    top: nn.Module
    stage: Callable[[], nn.Module] | None = None
    shadows: int = 3
    epochs: int = 5
    lr: float = 2e-3
    batch_size: int = 32
    inversions: tuple[Inversion, ...] | None = None
    bounds: Bounds | None = (0.0, 1.0)
    guard: Guard = field(default_factory=Guard)
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        counts = (self.shadows, self.epochs, self.batch_size, 1 if self.inversions is None else len(self.inversions))
        if min(counts) < 1 or not self.lr > 0:
            raise ValueError(
                f"expected at least one shadow, epoch, sample a batch and inversion, got {counts}, and lr > 0, got "
                f"{self.lr}; leave them out for the defaults"
            )

    def __call__(self, view: View) -> Reconstruction:
        """Return the estimates; ``evidence`` holds what was chosen, its error (MSE) on the shadow that plays the
        victim, that of the mean image beside it, and a shadow's held-out accuracy under the top.
        """
        z = view.activations()
        y = auxiliary_labels(view, z.device)
        x = auxiliary_inputs(view, at_least=16, like=z, bounds=self.bounds)
        with seeded(self.seed, z.device):
            held_out, rest = parted(len(x), z.device, at_least=2)
            releases = view.threat.releases
            shapes = tuple(x.shape[1:]), tuple(z.shape[1:])
            fresh = [stand_in(*shapes) if self.stage is None else self.stage() for _ in range(self.shadows)]
            shadows = [self._fitted(one, x[rest], y[rest], z, releases) for one in fresh]
            other = self._fitted(stand_in(*shapes, width=NARROW), x[rest], y[rest], z, releases)
        with seeded(self.seed, z.device), torch.no_grad():
            rehearsed = other(x[held_out])
            accuracy = (self._top(z)(shadows[0](x[held_out])).argmax(1) == y[held_out]).float().mean().item()
        average = x[rest].mean(0)
        best, chosen = mse_loss(average.expand_as(x[held_out]), x[held_out]).item(), "mean image"
        evidence: dict[str, float | str] = {"auxiliary_mse_mean_image": best, "shadow_accuracy": accuracy}
        x_hat, settled = average.expand(len(z), *average.shape), 1.0
        for inversion in inversions_within(self.bounds) if self.inversions is None else self.inversions:
            views = [imagined(torch.cat([rehearsed, z]), shadow, x[rest]) for shadow in shadows]
            found = [inversion(view) for view in views]
            settled = min(settled, *(float(one.evidence["converged"]) for one in found))
            guess = torch.stack([one.x_hat for one in found]).mean(0)
            error = mse_loss(guess[: len(held_out)], x[held_out]).item()
            if error < best:
                best, chosen, x_hat = error, repr(inversion), guess[len(held_out) :]
        return Reconstruction(x_hat, {**evidence, "auxiliary_mse": best, "attack": chosen, "converged": settled})

    def _fitted(self, stage: nn.Module, x: Tensor, y: Tensor, seen: Tensor, releases: int) -> nn.Sequential:
        """Return the stage, trained under the frozen top, and the guard after it, averaged over the releases."""
        shadow, top = guarded(stage, self.guard).to(seen).train(), self._top(seen)
        optimizer = torch.optim.Adam(shadow.parameters(), self.lr)
        steps = self.epochs * -(-len(x) // self.batch_size)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x)).to(x.device).split(self.batch_size):
                z = shadow(x[rows])
                if z.shape[1:] != seen.shape[1:]:
                    raise ValueError(
                        f"expected a shadow that puts out activations of the shape {tuple(seen.shape[1:])} seen, got "
                        f"{tuple(z.shape[1:])}; pass the stage of the victim's cut, or none"
                    )
                stepped(optimizer, cross_entropy(top(z), y[rows]))
                cycle.step()
        return guarded(stage, self.guard, releases=releases).eval()

    def _top(self, like: Tensor) -> nn.Module:
        return Encoder(self.top).to(like)  # a frozen copy in evaluation mode


def imagined(z: Tensor, stage: nn.Module, x: Tensor) -> View:
    """Return the view in which ``z`` crossed and the attacker's own ``stage`` is the victim's path; ``x`` are samples.

    What an attack on the victim's path does there, it does to a substitute of it.
    """
    threat = Threat("one who has a substitute", white_box=True, queries=True, auxiliary=True)
    exchange = Exchange(Message("predict", {Kind.ACTIVATION: z}), Message("predict"))
    return View(threat, (exchange,), Grants(Encoder(stage), x))
