"""Latent search: maximum likelihood over the latents of a generator, a learned prior that is plugged in.

The form that GAN and diffusion attacks on split inference share, min over w of ‖f(G(w)) − z‖² + weight · ‖w‖²: Li et
al. 2023, "GAN you see me? Enhanced data reconstruction attacks against split inference" (GLASS, NeurIPS); before them
Bora et al. 2017, arXiv:1703.03208. Theirs are pretrained GANs; here G is any module. The penalty is a Gaussian prior:
it asks for latents of mean 0 and spread 1. Deviations: several starts, of which each sample keeps the one with the
least objective; Adam with cosine decay; none of GLASS's two phases, which are particular to StyleGAN.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.inversion.maximum_likelihood import descend, misfit
from attacks.inversion.reconstruction import Bounds, Reconstruction, auxiliary_inputs, bounded, check_bounds, seeded
from splitlearn import View

__all__ = ["LatentSearch"]


@dataclass(frozen=True)
class LatentSearch:
    """White box, and a generator from elsewhere: public samples, or the attacker's own. Reads predictions' activations.

    ``generator`` maps latents [N, *latent] to inputs, 0 to a typical one; it is used in evaluation mode and not
    trained. The first of ``starts`` is 0, the others are drawn from the prior. ``weight`` is in units of the mean
    square of the activations seen. ``bounds`` cut off what the generator puts out.
    """

    generator: nn.Module
    latent: tuple[int, ...]
    iterations: int = 300
    lr: float = 0.1
    weight: float = 0.003
    starts: int = 2
    bounds: Bounds | None = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        if self.iterations < 1 or self.starts < 1 or not self.lr > 0 or not self.weight >= 0:
            raise ValueError(
                f"expected at least one iteration and one start, lr > 0 and a weight of 0 or more, got "
                f"{self.iterations}, {self.starts}, {self.lr} and {self.weight}; leave them out for the defaults"
            )

    def __call__(self, view: View) -> Reconstruction:
        """Return the estimates; ``evidence`` holds the mean objective a sample at both ends, over all starts."""
        z = view.activations()
        if view.threat.auxiliary:  # not needed, but they tell whether the bounds are the inputs'
            auxiliary_inputs(view, at_least=1, like=None, bounds=self.bounds)
        encoder = copy.deepcopy(view.encoder).to(z.device)
        generator = copy.deepcopy(self.generator).to(z.device).eval().requires_grad_(False)

        def path(w: Tensor) -> Tensor:
            return encoder(bounded(generator(w), self.bounds))

        weight = self.weight * z.square().mean().item()
        with seeded(self.seed, z.device):
            first = z.new_zeros(len(z), *self.latent)
            start = torch.cat([first, *(torch.randn_like(first) for _ in range(self.starts - 1))])
            aims = z.repeat(self.starts, *[1] * (z.ndim - 1))
            terms = [(_norm, weight)]
            w, evidence = descend(path, aims, start, terms, iterations=self.iterations, lr=self.lr, bounds=None)
            with torch.no_grad():
                objective = (misfit(path(w), aims) + weight * _norm(w)).reshape(self.starts, -1)
                best = w.reshape(self.starts, len(z), *self.latent)[
                    objective.argmin(0), torch.arange(len(z), device=z.device)
                ]
                x_hat = bounded(generator(best), self.bounds)
        return Reconstruction(x_hat, {**evidence, "objective_best": objective.amin(0).mean().item()})


def _norm(w: Tensor) -> Tensor:
    return w.square().flatten(1).sum(1)
