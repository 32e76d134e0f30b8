"""User-level DP for federated averages: each member's whole update clipped, the sum noised.

McMahan, Ramage, Talwar and Zhang 2018, "Learning differentially private recurrent language models" (DP-FedAvg,
arXiv:1710.06963), with the fixed-denominator estimator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from privacy.dp.adjacency import Adjacency
from privacy.dp.budget import Account
from privacy.dp.clipping import check_clip, check_multiplier
from privacy.dp.releases import Clear, GaussianRelease, Release
from splitlearn.members import Weights

__all__ = ["PrivateMean", "poisson_members"]

T = TypeVar("T")
Entries = frozenset[tuple[str, tuple[int, ...]]]  # names and shapes of a set of weights


@dataclass(frozen=True)
class PrivateMean:
    """An aggregator that returns the start plus the noised mean of clipped updates, and enters each round.

    - Adjacency: one client is added or removed, with all that it has, in all its rounds.
    - Sensitivity: ``clip`` in L2, of the sum of the clipped updates (weights less those that the round started from).
    - Noise: N(0, (``noise_multiplier`` · ``clip``)²) on every entry of the sum, which is then divided by
      ``expected_members``: a public number, never that of who took part. All members count the same, since their
      numbers of samples are private.
    - Protects: that a client took part, and all its data, from whoever sees the global weights: other members, users.
      The fed server is trusted (central model); it sees every update.
    - Does not protect: what a member sends to the *main* server. In SplitFed that server sees activations, and
      in V2 its shared stage is trained by all members without privacy and shapes the updates of those that follow: this
      aggregator bounds nothing there. In V1 it averages bottoms and tops, one after the other: each is a release, and
      each is entered.

    With ``sampling`` below 1 members take part by chance and in secret (``poisson_members``), and the round is entered
    as subsampled. A round in which nobody takes part must be made, too: ``aggregate([], [], start)`` adds noise alone.
    Two averages of one draw of members, as V1's of bottoms and tops, are no two samplings: they tell more, so that
    ``ValueError`` refuses a second set of weights then.
    Entries that are no floating-point numbers stay as they were. The noise comes from torch's global generator, its
    lowest bits are no part of the proof.
    """

    clip: float
    noise_multiplier: float
    expected_members: float
    account: Account
    sampling: float = 1.0
    _averaged: set[Entries] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_clip(self.clip, "L2")
        check_multiplier(self.noise_multiplier, "σ ÷ clip")
        if not self.expected_members > 0:
            raise ValueError(f"expected a number of members above 0, got {self.expected_members}; it is public")
        if self.account.adjacency is not Adjacency.ADD_REMOVE_CLIENT or self.account.model != "central":
            raise ValueError(
                f"expected a central account to {Adjacency.ADD_REMOVE_CLIENT}, got a {self.account.model} one to "
                f"{self.account.adjacency}; budget.account(…, 'add or remove one client', model='central')"
            )

    @property
    def release(self) -> Release:
        """What one average releases."""
        return GaussianRelease(self.noise_multiplier, self.sampling) if self.noise_multiplier else Clear()

    def __call__(
        self, weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> Weights:
        """Return the start plus the noised mean of clipped updates; entered first. Nobody's weights are changed."""
        if any(_entries(other) != _entries(start) for other in weights):
            raise ValueError(
                "expected all entries of the start, in their shapes, from every member; local entries cannot be "
                "averaged here"
            )
        if self.sampling < 1 and self._averaged - {_entries(start)}:
            raise ValueError(
                "expected averages of one set of weights with a sampling below 1, got a second (bottoms and tops?): "
                "both come from one draw of members, which two subsampled releases understate; use sampling=1"
            )
        self._averaged.add(_entries(start))
        self.account.spend(self.release)
        names = [name for name, entry in start.items() if entry.is_floating_point()]
        total = {name: torch.zeros_like(start[name]) for name in names}
        for own in weights:
            update = {name: own[name].to(start[name].device) - start[name] for name in names}
            norm = torch.stack([entry.double().norm() for entry in update.values()]).norm()
            # A member that sends nan or inf sends nothing: no clip bounds it.
            factor = float(self.clip / max(norm.item(), self.clip)) if torch.isfinite(norm) else 0.0
            for name in names:
                total[name] += torch.nan_to_num(update[name], 0.0, 0.0, 0.0) * factor
        noise = {name: torch.randn_like(total[name]) * (self.noise_multiplier * self.clip) for name in names}
        new = {name: start[name] + (total[name] + noise[name]) / self.expected_members for name in names}
        return {**{name: entry.clone() for name, entry in start.items()}, **new}


def _entries(weights: Mapping[str, Tensor]) -> Entries:
    return frozenset((name, tuple(entry.shape)) for name, entry in weights.items())


def poisson_members(members: Sequence[T], rate: float, generator: torch.Generator) -> list[T]:
    """Return the members that take part in a round, each with probability ``rate``, maybe none."""
    if not 0 < rate <= 1:
        raise ValueError(f"expected a rate above 0 and at most 1, got {rate}")
    drawn = torch.rand(len(members), generator=generator, dtype=torch.float64) < rate
    return [member for member, taken in zip(members, drawn.tolist(), strict=True) if taken]
