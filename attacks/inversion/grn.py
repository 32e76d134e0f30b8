"""GRN: a generator of the other party's features from one's own, fitted to what the joint model makes of both.

Luo, Wu, Xiao & Ooi 2021, "Feature inference attack on model predictions in vertical federated learning" (ICDE,
arXiv:2010.10152), the generative regression network: min over G of ‖f(x_own, G(x_own, r)) − v‖² + Ω, where f is the
joint model, v what it put out, r noise drawn anew, and Ω keeps the features' variance from growing. The generator is
fitted to the targets themselves; no sample of the victim's features is needed. Deviations:

- the generator is told v (standardised), so that it is no regression on the own features alone;
- the learning rate follows one cycle, up to 2e-3 (1e-4, constant);
- Ω is the excess of each column's variance over ``variance``, that of a standardised column;
- an estimate is the mean over several draws of the noise.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from attacks.inversion.encoders import stepped
from attacks.inversion.maximum_likelihood import misfit, settled
from attacks.inversion.reconstruction import Bounds, Reconstruction, bounded, check_bounds, seeded
from splitlearn import Encoder, Kind, View

__all__ = ["GRN"]


@dataclass(frozen=True)
class GRN:
    """The active party of vertical learning, which has some columns of the same samples. White box, no auxiliary ones.

    ``own`` [N, C] are its columns of the samples that were predicted, in that order; ``columns`` says which of the
    ``num_columns`` these are. The granted encoder is the path of all columns to the joint activation, which must match
    that seen. Where the activations of the victim alone cross, they tell more. With ``top``, its own stage, the outputs
    are matched in their place, as where joint activations are on shares or encrypted, and predictions are opened.

    ``x_hat`` are the other columns, in their order. ``hidden`` are the generator's layers, ``draws`` of noise are
    averaged, and ``bounds`` None leaves the features unbounded, as standardised ones are.
    """

    own: Tensor
    columns: tuple[int, ...]
    num_columns: int
    top: nn.Module | None = None
    hidden: tuple[int, ...] = (600, 200, 100)
    epochs: int = 300
    lr: float = 2e-3
    batch_size: int = 64
    variance: float = 1.0
    draws: int = 16
    bounds: Bounds | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        inside = all(0 <= column < self.num_columns for column in self.columns)
        if not inside or len(set(self.columns)) != self.own.shape[1] or self.own.shape[1] >= self.num_columns:
            raise ValueError(
                f"expected own columns [N, C] of {self.num_columns}, each numbered once and at least one left, got "
                f"{tuple(self.own.shape)} numbered {self.columns}; pass columns=… in the order of own"
            )
        if self.epochs < 1 or self.batch_size < 2 or self.draws < 1 or not self.lr > 0:
            raise ValueError(
                f"expected at least one epoch, two samples a batch, one draw and lr > 0, got {self.epochs}, "
                f"{self.batch_size}, {self.draws} and {self.lr}; leave them out for the defaults"
            )

    def __call__(self, view: View) -> Reconstruction:
        """Return the estimates; ``evidence`` holds the mean objective of the first and of the last epochs."""
        seen = view.activations() if self.top is None else _predictions(view)
        path: nn.Module = view.encoder
        if self.top is not None:
            path = nn.Sequential(path, Encoder(self.top))
        path = Encoder(path).to(seen)
        own = self.own.to(seen)
        if len(own) != len(seen):
            raise ValueError(
                f"expected own columns of the {len(seen)} samples that were predicted, got {len(own)}; "
                "pass the same samples, in the order in which they crossed"
            )
        with seeded(self.seed, seen.device):
            told = seen.flatten(1)
            told = torch.cat([own, (told - told.mean(0)) / (told.std() or 1.0)], 1)
            generator = self._generator(told.shape[1]).to(seen)
            trace = self._train(generator, path, told, own, seen)
            with torch.no_grad():
                x_hat = torch.stack([self._guess(generator, told) for _ in range(self.draws)]).mean(0)
        return Reconstruction(x_hat, settled(trace))

    def _train(self, generator: nn.Module, path: nn.Module, told: Tensor, own: Tensor, seen: Tensor) -> list[float]:
        """Fit the generator, and return the mean objective of each epoch."""
        unit = seen.square().flatten(1).sum(1).mean().item() or 1.0
        optimizer = torch.optim.Adam(generator.parameters(), self.lr)
        steps = self.epochs * -(-len(own) // self.batch_size)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        trace = []
        for _ in range(self.epochs):
            total = 0.0
            for rows in torch.randperm(len(own)).to(own.device).split(self.batch_size):
                guess = self._guess(generator, told[rows])
                excess = relu(guess.var(0, correction=0) - self.variance).mean()
                objective = misfit(path(self._whole(own[rows], guess)), seen[rows]).mean() / unit + excess
                stepped(optimizer, objective)
                cycle.step()
                total += objective.item() * len(rows)
            trace.append(total / len(own))
        return trace

    @property
    def _others(self) -> list[int]:
        return [column for column in range(self.num_columns) if column not in self.columns]

    def _generator(self, width: int) -> nn.Sequential:
        """Return the network from what it is told, ``width`` numbers, and noise to the other columns; starts at 0."""
        others = len(self._others)
        sizes = [width + others, *self.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        last = nn.Linear(sizes[-1], others)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(*layers, last)

    def _guess(self, generator: nn.Module, told: Tensor) -> Tensor:
        noise = torch.randn(len(told), len(self._others), device=told.device, dtype=told.dtype)
        middle = 0.0 if self.bounds is None else sum(self.bounds) / 2
        return bounded(middle + generator(torch.cat([told, noise], 1)), self.bounds)

    def _whole(self, own: Tensor, guess: Tensor) -> Tensor:
        """Return all columns, each in its place."""
        order = torch.tensor([*self.columns, *self._others], device=own.device).argsort()
        return torch.cat([own, guess], 1)[:, order]


def _predictions(view: View) -> Tensor:
    found = view.tensors(Kind.PREDICTION, verb="predict")
    if not found:
        raise LookupError("this attack reads predictions, and none crossed; record the wire while they do")
    v, releases = torch.cat(found), view.threat.releases
    return v.unflatten(0, (releases, -1)).mean(0) if releases > 1 else v
