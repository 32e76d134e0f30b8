"""VILLAIN: a client of vertical training without labels finds samples of one class, and backdoors the top with these.

Bai et al. 2023, "VILLAIN: backdoor attacks against vertical split learning" (USENIX Security), from its description.
The client knows a sample or more of the target class. It swaps another's embedding for one of those: where the gradient
that comes back does not grow, the top found nothing odd, and the sample is of the class too. To embeddings of such
samples it then adds a trigger (their labels are right: nothing else need be changed), until the top reads the class
from it.

Deviations: candidates are those nearest to the known samples' embeddings, in place of a classifier's choice; the
bottom's learning rate stays as it is; the client's own gradient of swapped samples is set to 0.

On small data the paper's figures are not to be expected. On the halves of 1400 digits (one seed, five known samples)
labels were found at a precision of .39 (a tenth by chance) and a recall of .81, and success stayed at or below 2 % for
β from .4 to 3; with all labels known it was 1 % at β = 3, so that it is not for want of these. A class that the top
recognises as it is leaves the trigger little to explain. Where this client's features tell the class nearly alone
(Gaussian blobs, four classes, β = 3) success was .8 to 1 on three seeds of four, at a precision of .95 to 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from attacks.poisoning.data import check_share
from splitlearn import Features

__all__ = ["VILLAIN", "Villain"]


@dataclass(frozen=True, kw_only=True)
class VILLAIN:
    """Settings of a malicious client of ``vertical``; ``party`` makes it of the honest one.

    ``known`` are numbers of its samples that it knows to be of the target class. In the first ``warm_up`` steps it only
    notes the norm of each sample's gradient; then it swaps up to ``swaps`` embeddings a step, and takes a sample for
    one of the class where the norm is at most ``ratio`` times what it was, and at most ``greatest``. From step
    ``poison_from`` on it adds the trigger to a ``share`` of the samples found, and of the known ones, in a batch.

    The trigger is β · s · (+, +, −, −, …) on the ``size`` share of units that vary most, s the mean of their standard
    deviations over all own samples; each time an entry is left out with chance ``dropout``, and the whole is stretched
    by a factor drawn from ``stretch`` ("backdoor augmentation").
    """

    known: tuple[int, ...]
    warm_up: int = 50
    poison_from: int = 150
    swaps: int = 8
    ratio: float = 1.5
    greatest: float = inf
    beta: float = 0.4
    size: float = 0.75
    share: float = 0.5
    dropout: float = 0.25
    stretch: tuple[float, float] = (0.6, 1.2)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.known or min(self.known) < 0:
            raise ValueError(f"expected numbers of known samples of the target class, got {self.known}; give one")
        for share in (self.share, self.size, self.dropout):
            check_share(share)
        if not 0 <= self.warm_up <= self.poison_from or self.swaps < 0:
            raise ValueError(
                f"expected 0 ≤ warm_up ≤ poison_from steps and swaps of 0 or more, got {self.warm_up}, "
                f"{self.poison_from} and {self.swaps}"
            )
        if not (self.ratio > 0 and self.greatest > 0 and self.beta >= 0 and 0 <= self.stretch[0] <= self.stretch[1]):
            raise ValueError(
                f"expected a ratio and a greatest norm above 0, a beta of 0 or more and 0 ≤ low ≤ high to stretch by, "
                f"got {self.ratio}, {self.greatest}, {self.beta} and {self.stretch}"
            )

    def party(self, features: Features) -> "Villain":
        """Return the malicious party that takes the place of ``features``."""
        return Villain(self, features)


class Villain:
    """The client of VILLAIN: keeps the methods of ``Features``; what it found is in ``found``.

    Draws come from a generator of its own. Predictions are honest; ``triggered`` are those that carry the trigger.
    """

    def __init__(self, settings: VILLAIN, features: Features):
        if max(settings.known) >= len(features.x):
            raise ValueError(
                f"expected known samples among {len(features.x)}, got {max(settings.known)}; number them from 0"
            )
        self.settings, self.features, self.name = settings, features, features.name
        self.found: dict[int, bool] = {}  # by sample number: whether it was taken for one of the class
        self.steps = 0
        self._norms: dict[int, float] = {}
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._ids, self._swapped = torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)
        self._trigger: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations of the samples numbered ``x``, some of them swapped or with the trigger."""
        settings = self.settings
        z = self.features.forward(x).detach().clone()
        self._ids, self._swapped = x, x[:0]
        if settings.warm_up <= self.steps < settings.poison_from:
            self._swapped = self._candidates(x, z)
            if len(self._swapped):
                picked = torch.randint(len(settings.known), (len(self._swapped),), generator=self._generator)
                z[self._swapped] = self.features.predict(torch.tensor(settings.known)[picked].to(x.device))
        elif self.steps >= settings.poison_from:
            ours = [place for place, number in enumerate(x.tolist()) if number in self._of_the_class()]
            drawn = torch.randperm(len(ours), generator=self._generator)[: int(settings.share * len(ours) + 0.5)]
            rows = torch.tensor(ours, dtype=torch.int64)[drawn]
            z[rows] = z[rows] + self._augmented(z, len(rows))
        return z.requires_grad_()

    def backward(self, g: Tensor) -> None:
        """Take the gradients, see by them which swapped samples are of the class, and learn from the others."""
        norms = g.flatten(1).norm(dim=1).tolist()
        swapped = set(self._swapped.tolist())
        for place, (number, norm) in enumerate(zip(self._ids.tolist(), norms, strict=True)):
            if place in swapped:
                self.found[number] = norm <= min(self.settings.ratio * self._norms[number], self.settings.greatest)
            else:
                self._norms[number] = norm
        own = g.clone()
        own[self._swapped] = 0
        self.steps += 1
        self.features.backward(own)

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Learn from the samples numbered ``z`` alone, as the honest party does."""
        return self.features.learn(z, y)

    def label(self, y: Tensor) -> Tensor:
        """Return the labels as the honest party does."""
        return self.features.label(y)

    def predict(self, x: Tensor) -> Tensor:
        """Return the activations of the samples numbered ``x``, without the trigger."""
        return self.features.predict(x)

    def triggered(self, x: Tensor) -> Tensor:
        """Return the activations of the samples numbered ``x`` with the whole trigger, as at test time."""
        z = self.features.predict(x)
        return z + self.trigger().to(z)

    def weights(self) -> dict[str, Tensor]:
        """Return clones of parameters and buffers."""
        return self.features.weights()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over parameters and buffers."""
        self.features.load_weights(weights)

    def state_dict(self) -> dict[str, Any]:
        """Raise ``ValueError``: what it found is not kept."""
        raise ValueError(
            f"{self.name}: expected a party that can be checkpointed, got an attack that takes part; run it without "
            "checkpoint= and patience="
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError``, as ``state_dict`` does."""
        self.state_dict()

    def trigger(self) -> Tensor:
        """Return the trigger [*cut], made of the embeddings as they are when it is first asked for."""
        if self._trigger is None:
            every = torch.arange(len(self.features.x), device=self.features.x.device).split(256)
            z = torch.cat([self.features.predict(part) for part in every])
            spread = z.flatten(1).std(0, correction=0)
            units = spread.argsort(descending=True, stable=True)[: int(self.settings.size * len(spread) + 0.5)]
            units = units.sort().values
            signs = 1.0 - 2.0 * (torch.arange(len(units), device=z.device) % 4 >= 2)
            trigger = torch.zeros_like(spread)
            if len(units):
                trigger[units] = self.settings.beta * spread[units].mean() * signs
            self._trigger = trigger.view(z.shape[1:])
        return self._trigger

    def _of_the_class(self) -> set[int]:
        return {number for number, ours in self.found.items() if ours} | set(self.settings.known)

    def _candidates(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the places of samples to swap: not judged yet, their gradient noted, nearest to the known ones."""
        open_places = [
            place
            for place, number in enumerate(x.tolist())
            if number in self._norms and number not in self.found and number not in self.settings.known
        ]
        places = torch.tensor(open_places, dtype=torch.int64)
        middle = self.features.predict(torch.tensor(self.settings.known, device=x.device)).mean(0)
        distances = (z[places] - middle).flatten(1).norm(dim=1)
        return places[distances.argsort(stable=True).cpu()[: self.settings.swaps]]

    def _augmented(self, z: Tensor, rows: int) -> Tensor:
        trigger, (low, high) = self.trigger().to(z), self.settings.stretch
        kept = torch.rand(rows, *trigger.shape, generator=self._generator) >= self.settings.dropout
        factor = low + (high - low) * torch.rand(rows, *[1] * trigger.ndim, generator=self._generator)
        return trigger * (kept * factor).to(z)
