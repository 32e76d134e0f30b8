"""Poisson batches: each sample takes part by chance and in secret, padded so that nobody sees how many do."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, exp, sqrt
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from scipy.stats import binom
from torch import Tensor
from torch.nn.functional import cross_entropy

from privacy.dp.adjacency import Adjacency
from privacy.dp.budget import Account
from privacy.dp.releases import GaussianRelease

if TYPE_CHECKING:
    from privacy.dp.sgd import PrivateLearner

__all__ = ["PADDING", "PaddedCrossEntropy", "PoissonBatches", "capacity_for", "joint_noise_multiplier"]

PADDING = -100  # the label of a row that stands for nobody: torch's own ignore_index
OVERFLOW = 1e-3  # of δ at most, by default, for batches over their capacity


@dataclass(frozen=True)
class PaddedCrossEntropy:
    """Cross-entropy summed over the rows that are no padding, divided by the public ``expected`` batch size.

    Padding has exactly no gradient, and no divisor tells how many samples there were.
    """

    expected: float

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of logits [N, classes] against labels [N], of which ``PADDING`` count for nothing."""
        return cross_entropy(output, y, reduction="sum", ignore_index=PADDING) / self.expected


def joint_noise_multiplier(noise_multipliers: Sequence[float]) -> float:
    """Return the noise multiplier of several Gaussian releases about the same samples, as one: (Σ 1/m²)^(−1/2).

    Each party clips its own part of a sample's gradient to C_k and adds noise m_k·C_k. Measured in units of each part's
    noise, one sample moves the whole by at most √Σ 1/m_k²; one draw of noise on all parts is what they make together.
    """
    return 1 / sqrt(sum(noise**-2 for noise in noise_multipliers))


def capacity_for(num_samples: int, rate: float, failure: float) -> int:
    """Return the least number of rows that a Poisson batch exceeds with a probability of at most ``failure``."""
    # Not binom.isf, which goes by 1 - failure and knows none below 1e-16.
    rows = range(num_samples + 1)
    return max(1, bisect_left(rows, True, key=lambda count: bool(binom.sf(count, num_samples, rate) <= failure)))


def _frames_seen(account: Account) -> str:
    """Return an adjacency under which the same budget enters what this observer is sent of single samples, or ""."""
    local = [Adjacency.REPLACE_INPUT, Adjacency.REPLACE_LABEL, Adjacency.REPLACE_SAMPLE]
    others = [one for one in account.budget.accounts.values() if one.observer == account.observer]
    return next((str(one.adjacency) for one in others if one.client == account.client and one.adjacency in local), "")


class PoissonBatches:
    """Yields batches in which each sample is with probability ``rate``, and enters each into ``account`` first.

    - Every batch is padded to ``capacity`` by rows of zeros with the label ``PADDING``, so that frames do not tell how
      many samples there are; the losses of all parties are ``PaddedCrossEntropy(expected)``, under which padding has no
      gradient. A batch over the capacity loses the excess, at random; how likely that is is entered as slack in δ
      (``capacity`` None: the least that spends 0.1 % of δ on ``steps`` steps).
    - ``parties`` are the ``PrivateLearner``\\ s that train on these batches: their steps on one batch are one release,
      and they take no other batch. All that train privately in the account must be among them.
    - ``physical`` rows at most cross at once (virtual batches): the parties add up clipped gradients over the parts of
      a batch, and make one noised step at its end. None: the whole capacity.

    One iteration is an epoch of round(1 / rate) steps. Who takes part is drawn from ``seed``: keep it secret outside of
    experiments, and use it for one training only. ``account`` is central, under ``Adjacency.ADD_REMOVE_SAMPLE``. An
    observer who sees who is in a batch (any server that receives activations in the clear, anyone who is told sample
    numbers) is not kept from anything by sampling: ``amplified=False`` enters each step in full, as for it, and is
    asked for where the same budget has an account of such frames. ``ValueError`` for parties of another expected batch
    size.

    Public beside the data: the capacity and the expected size, which by default follow from how many samples there are.
    A codec whose frames grow with their content (``Zstd``) tells how much of a frame is padding; use none with these.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        rate: float,
        account: Account,
        parties: Sequence["PrivateLearner"],
        steps: int,
        capacity: int | None = None,
        physical: int | None = None,
        amplified: bool = True,
        seed: int = 0,
    ):
        if len(x) != len(y) or not len(x):
            raise ValueError(f"expected as many labels as samples, at least one, got {len(x)} and {len(y)}")
        if not 0 < rate <= 1 or steps < 1:
            raise ValueError(f"expected a rate above 0 and at most 1, and at least one step, got {rate} and {steps}")
        if account.adjacency is not Adjacency.ADD_REMOVE_SAMPLE or account.model != "central":
            raise ValueError(
                f"expected a central account to {Adjacency.ADD_REMOVE_SAMPLE}, under which DP-SGD is proved, got a "
                f"{account.model} one to {account.adjacency}"
            )
        missing = [one.name for one in account.private if all(one is not other for other in parties)]
        foreign = [one.name for one in parties if all(one is not other for other in account.private)]
        if missing or foreign or not parties:
            raise ValueError(
                f"expected the parties that train by DP-SGD in this account, "
                f"{', '.join(one.name for one in account.private) or 'none'}, got "
                f"{', '.join(one.name for one in parties) or 'none'}; name them in shaped_by=… of budget.account too"
            )
        self.expected = parties[0].expected_batch_size  # public, and so not exactly that of these samples
        for party in parties:
            if party.expected_batch_size != self.expected or not 2 / 3 < rate * len(x) / self.expected < 3 / 2:
                raise ValueError(
                    f"{party.name}: expected the same expected batch size of all parties, about rate · samples = "
                    f"{rate * len(x):g}, got {party.expected_batch_size:g}; it is a public number, that all divide by"
                )
        if amplified and (seen := _frames_seen(account)):
            raise ValueError(
                f"expected an observer who does not see who is in a batch, got {account.observer}, whose account to "
                f"{seen} has frames of single samples in it: amplification by sampling is void against it; pass "
                "amplified=False, which enters every step in full"
            )
        if not amplified:
            warn(
                f"amplification by sampling is void for {account.name}, who sees who takes part: every step is entered "
                "in full",
                stacklevel=2,
            )
        failure = OVERFLOW * account.budget.delta / (steps * (1 + exp(min(account.budget.epsilon, 600))))
        self.capacity = capacity_for(len(x), rate, failure) if capacity is None else capacity
        if self.capacity < 1:
            raise ValueError(f"expected a capacity of at least one row, got {capacity}")
        # A batch's probability of being cut short, that of the neighbour with one sample more being the greater one;
        # a capacity of all samples grows with them.
        self.overflow = float(binom.sf(self.capacity, len(x) + 1, rate)) if self.capacity < len(x) else 0.0
        self.x, self.y, self.rate, self.account, self.parties = x, y, rate, account, list(parties)
        self.physical = self.capacity if physical is None else physical
        if self.physical < 1:
            raise ValueError(f"expected at least one row at once, got {physical}")
        self.seed, self.epoch = seed, 0
        noise = joint_noise_multiplier([party.noise_multiplier for party in parties])
        self.release = GaussianRelease(noise, rate if amplified else 1.0)

    def __len__(self) -> int:
        """Return the number of frames an epoch."""
        return round(1 / self.rate) * ceil(self.capacity / self.physical)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch; ``BudgetExceeded`` in place of the batch that would exceed the budget."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        for _ in range(round(1 / self.rate)):
            chosen = (torch.rand(len(self.x), generator=generator, dtype=torch.float64) < self.rate).nonzero()[:, 0]
            kept = chosen[torch.randperm(len(chosen), generator=generator)[: self.capacity]]
            self.account.spend(self.release, slack=self.overflow)
            x, y = self._padded(kept)
            parts = list(zip(x.split(self.physical), y.split(self.physical), strict=True))
            for number, part in enumerate(parts, start=1):
                for party in self.parties:
                    party.allow(first=number == 1, last=number == len(parts))
                yield part

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the epoch to come; what was spent is in the budget's state."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.epoch = state["epoch"]

    def _padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        empty = self.capacity - len(rows)
        x = torch.cat([self.x[rows], self.x.new_zeros(empty, *self.x.shape[1:])])
        return x, torch.cat([self.y[rows], self.y.new_full((empty,), PADDING)])
