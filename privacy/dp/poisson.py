"""Poisson batches: each sample takes part by chance and in secret, padded so that nobody sees how many do."""

import secrets
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, sqrt
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from scipy.stats import binom
from torch import Tensor
from torch.nn.functional import cross_entropy

from privacy.dp.adjacency import Adjacency
from privacy.dp.budget import Account
from privacy.dp.releases import GaussianRelease
from splitlearn.train import TrainingStopped

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


def _who_sees(account: Account) -> str:
    """Return why this account's observer sees who is in a batch, or ""."""
    names = [getattr(shaper, "name", None) for shaper in account.shapers]
    if account.observer in names and account.observer != account.client:
        return "which takes part in the training itself, and is sent frames of single samples"
    local = [Adjacency.REPLACE_INPUT, Adjacency.REPLACE_LABEL, Adjacency.REPLACE_SAMPLE]
    for other in account.budget.accounts.values():
        if (other.observer, other.client) == (account.observer, account.client) and other.adjacency in local:
            return f"whose account to {other.adjacency} has frames of single samples in it"
    return ""


def _check_loss(party: Any, classes: int) -> None:
    """Raise ``ValueError`` for a loss of a party that is not the sum of its samples', or that padding moves."""
    loss = getattr(party, "loss", None)
    if loss is None:
        return
    logits = torch.linspace(-1, 1, 4 * classes, dtype=torch.float64).reshape(4, classes)
    y = torch.tensor([0, 1, PADDING, PADDING])
    try:
        whole, first, second = (float(loss(logits[part], y[part])) for part in (slice(4), slice(1), slice(1, 2)))
    except Exception:  # a loss of other outputs or labels, of which nothing can be said here
        return
    if not abs(whole - first - second) <= 1e-6 * (1 + abs(whole)):
        raise ValueError(
            f"{party.name}: expected a loss that is the sum of its samples' over a public number, to which padding "
            f"adds nothing, got {loss!r}: one that divides by how many samples there are changes every sample's "
            "gradient when one is added, and voids ε; loss=PaddedCrossEntropy(expected_batch_size)"
        )


class PoissonBatches:
    """Yields batches in which each sample is with probability ``rate``, and enters each into its accounts first.

    - Every batch is padded to ``capacity`` by rows of zeros with the label ``PADDING``, so that frames do not tell how
      many samples there are; the losses of all parties are ``PaddedCrossEntropy(expected)``, under which padding has no
      gradient. A batch over the capacity loses the excess, at random; how likely that is is entered as slack in δ
      (``capacity`` None: the least that spends 0.1 % of δ on ``steps`` steps).
    - ``parties`` are the ``PrivateLearner``\\ s that train on these batches: their steps on one batch are one release,
      and they take no other batch. All that train privately in the account must be among them.
    - ``physical`` rows at most cross at once (virtual batches): the parties add up clipped gradients over the parts of
      a batch, and make one noised step at its end. None: the whole capacity.

    One iteration is an epoch of round(1 / rate) steps; after ``steps`` in all it raises ``TrainingStopped``, on which
    ``fit`` ends in good order. Who takes part is drawn from ``seed``; without one it is drawn by chance, as it must be
    outside of experiments.

    ``account`` is central, under ``Adjacency.ADD_REMOVE_SAMPLE``, or several such, one an observer: all of the budget
    that the same parties shape. An observer who sees who is in a batch (any server that receives activations in the
    clear, anyone who is told sample numbers) is not kept from anything by sampling: ``amplified=False`` enters each
    step in full, as for it. It is asked for where the observer is a party of the training, or the same budget has an
    account of frames that it is sent. ``ValueError`` for parties of another expected batch size, and for losses that do
    not add up over samples.

    Public beside the data: the capacity and the expected size, which by default follow from how many samples there are.
    A codec whose frames grow with their content (``Zstd``) tells how much of a frame is padding; use none with these.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        rate: float,
        account: Account | Sequence[Account],
        parties: Sequence["PrivateLearner"],
        steps: int,
        capacity: int | None = None,
        physical: int | None = None,
        amplified: bool = True,
        seed: int | None = None,
    ):
        accounts = [account] if isinstance(account, Account) else list(account)
        if len(x) != len(y) or not len(x):
            raise ValueError(f"expected as many labels as samples, at least one, got {len(x)} and {len(y)}")
        if not 0 < rate <= 1 or steps < 1:
            raise ValueError(f"expected a rate above 0 and at most 1, and at least one step, got {rate} and {steps}")
        for one in accounts:
            if one.adjacency is not Adjacency.ADD_REMOVE_SAMPLE or one.model != "central":
                raise ValueError(
                    f"expected a central account to {Adjacency.ADD_REMOVE_SAMPLE}, under which DP-SGD is proved, got a "
                    f"{one.model} one to {one.adjacency}"
                )
            missing = [party.name for party in one.private if all(party is not other for other in parties)]
            foreign = [party.name for party in parties if all(party is not other for other in one.private)]
            if missing or foreign or not parties:
                raise ValueError(
                    f"expected the parties that train by DP-SGD in this account, "
                    f"{', '.join(party.name for party in one.private) or 'none'}, got "
                    f"{', '.join(party.name for party in parties) or 'none'}; name them in shaped_by=… of "
                    "budget.account too"
                )
            for shaper in one.shapers:
                _check_loss(shaper, max(2, int(y.max()) + 1) if not y.is_floating_point() else 2)
        if not accounts:
            raise ValueError("expected at least one account to enter steps into; budget.account(…) opens one")
        self.expected = parties[0].expected_batch_size  # public, and so not exactly that of these samples
        for party in parties:
            if party.expected_batch_size != self.expected or not 2 / 3 < rate * len(x) / self.expected < 3 / 2:
                raise ValueError(
                    f"{party.name}: expected the same expected batch size of all parties, about rate · samples = "
                    f"{rate * len(x):g}, got {party.expected_batch_size:g}; it is a public number, that all divide by"
                )
        if not amplified:
            warn(
                f"amplification by sampling is void for {accounts[0].name}, who sees who takes part: every step is "
                "entered in full",
                stacklevel=2,
            )
        noise = joint_noise_multiplier([party.noise_multiplier for party in parties])
        self.release = GaussianRelease(noise, rate if amplified else 1.0)
        self.accounts, self.amplified, self.parties, self._resumed = accounts, amplified, list(parties), 0
        self._check_accounts()
        budget = accounts[0].budget
        failure = OVERFLOW * budget.delta / (steps * (1 + exp(min(budget.epsilon, 600))))
        self.capacity = capacity_for(len(x) + 1, rate, failure) if capacity is None else capacity
        if self.capacity < 1:
            raise ValueError(f"expected a capacity of at least one row, got {capacity}")
        # A batch's probability of being cut short: that of the neighbour with one sample more, the greater one.
        self.overflow = min(float(binom.sf(self.capacity, len(x) + 1, rate)), 1 - 1e-9)
        if self.overflow >= budget.delta and budget.epsilon < inf:
            raise ValueError(
                f"expected a capacity that a batch exceeds with a probability below δ = {budget.delta:g}, got "
                f"capacity={capacity}, exceeded with {self.overflow:.3g}; leave it out for one that fits"
            )
        self.x, self.y, self.rate, self.steps = x, y, rate, steps
        self.physical = self.capacity if physical is None else physical
        if self.physical < 1:
            raise ValueError(f"expected at least one row at once, got {physical}")
        self.seed = secrets.randbits(40) if seed is None else seed  # times a million and more, in 63 bits
        self.epoch, self.made = 0, 0

    def __len__(self) -> int:
        """Return the number of frames an epoch."""
        return round(1 / self.rate) * ceil(self.capacity / self.physical)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch; ``BudgetExceeded`` in place of the batch that would exceed the budget."""
        if self.made >= self.steps:
            raise TrainingStopped(f"all {self.steps} steps that were planned are made")
        self._check_accounts()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        for _ in range(min(round(1 / self.rate), self.steps - self.made)):
            chosen = (torch.rand(len(self.x), generator=generator, dtype=torch.float64) < self.rate).nonzero()[:, 0]
            kept = chosen[torch.randperm(len(chosen), generator=generator)[: self.capacity]]
            for account in self.accounts:
                account.spend(self.release, slack=self.overflow)
            self.made += 1
            x, y = self._padded(kept)
            parts = list(zip(x.split(self.physical), y.split(self.physical), strict=True))
            for number, part in enumerate(parts, start=1):
                for party in self.parties:
                    party.allow(first=number == 1, last=number == len(parts), rows=len(part[0]))
                yield part

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the epoch to come, the steps made, and the secret seed; the budget has its own state."""
        entered = min(account.releases[self.release] for account in self.accounts)
        return {"epoch": self.epoch, "made": self.made, "seed": self.seed, "entered": entered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.epoch, self.made, self.seed, self._resumed = state["epoch"], state["made"], state["seed"], state["entered"]

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Go on: the draws of an earlier epoch under new noise would not be new draws, and steps made stay made."""

    def _check_accounts(self) -> None:
        """Raise ``ValueError`` where an account does not hold, or one that these steps belong into is left out."""
        for account in self.accounts:
            if account.releases[self.release] < self._resumed:
                raise ValueError(
                    f"expected the {self._resumed} steps of {account.name} that were entered before, got "
                    f"{account.releases[self.release]}; resume with the budget too: state={{'budget': budget, …}}"
                )
            if self.amplified and (why := _who_sees(account)):
                raise ValueError(
                    f"expected an observer who does not see who is in a batch, got {account.observer}, {why}: "
                    "amplification by sampling is void against it; pass amplified=False, which enters every step in "
                    "full"
                )
            for other in account.budget.accounts.values():
                shared = [party.name for party in other.private if any(party is one for one in self.parties)]
                if shared and all(other is not one for one in self.accounts):
                    raise ValueError(
                        f"expected all accounts that {', '.join(shared)} shape, got none of {other.name}, which would "
                        "stay at 0; account=[…] takes several"
                    )

    def _padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        empty = self.capacity - len(rows)
        x = torch.cat([self.x[rows], self.x.new_zeros(empty, *self.x.shape[1:])])
        return x, torch.cat([self.y[rows], self.y.new_full((empty,), PADDING)])
