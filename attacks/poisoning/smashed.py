"""Poisoned activations ("smashed data"): guards on a bad client's learner, which lie to the server about its samples.

The adversary is a client: it knows its own samples and activations, and what it does reaches the top directly, past
any rule by which bottoms are averaged. HealSplit's taxonomy (from its description) calls these z + δ. Each lies about
the first ``share`` of every batch, which is to be shuffled, in training alone: predictions are honest. Where a cut is
behind a ReLU, lies below 0 can be told from activations by looking; a careful attacker clamps them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.poisoning.data import check_label, check_share
from attacks.poisoning.extremal import Direction, MinSum
from splitlearn import Guard

__all__ = ["EmbeddingBackdoor", "SmashedMinSum", "SmashedNoise", "SmashedStatistics", "misa"]


@dataclass(frozen=True)
class SmashedNoise(Guard):
    """Sends z + ``scale`` · s · ε: Gaussian noise in units of s, the standard deviation of the batch's activations.

    The noise reaches the bottom's gradient only by way of the top. A server that does not clip may soon have no finite
    loss, which its ``Learner`` refuses (``ValueError``): that ends a run, and is what the attack was for.
    """

    scale: float = 5.0
    share: float = 1.0

    def __post_init__(self) -> None:
        _check(self.share, scale=self.scale)

    def activation(self, z: Tensor) -> Tensor:
        """Return the activations with noise on the first of them; the noise comes from the learner's randomness."""
        rows = _first(z, self.share)
        noise = self.scale * z.detach().std(correction=0) * torch.randn_like(z)
        return z + noise * _where(z, rows)

    def prediction(self, z: Tensor) -> Tensor:
        """Return the activations as they are."""
        return z


@dataclass(frozen=True)
class SmashedStatistics(Guard):
    """Sends m − ``shift`` · σ + ``spread`` · σ · ε, m and σ unit by unit over the batch: nothing of the sample itself.

    With no shift each unit has the distribution that the server expects, which says nothing of the label; the shift
    moves it against itself, all units at once, as ALIE moves updates. The gradient goes straight through to the bottom,
    as though the activation had been sent. A batch of one is sent as it is.
    """

    shift: float = 1.0
    spread: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        _check(self.share, shift=self.shift, spread=self.spread)

    def activation(self, z: Tensor) -> Tensor:
        """Return draws from the batch's statistics in place of the first activations."""
        own = z.detach()
        mean, std = own.mean(0), own.std(0, correction=0)
        return _straight(z, mean - self.shift * std + self.spread * std * torch.randn_like(own), self.share)

    def prediction(self, z: Tensor) -> Tensor:
        """Return the activations as they are."""
        return z


@dataclass(frozen=True)
class SmashedMinSum(Guard):
    """Sends, for every sample, one and the same activation: Min-Sum of the batch's own, m + ``scale`` · γp.

    No further, by the sum of squares, from the batch's activations than the outermost of them is (scale 1), and the
    same whatever the label. ``direction`` as in ``MinSum``. The gradient goes straight through.
    """

    direction: Direction = "std"
    scale: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        _check(self.share, scale=self.scale)
        MinSum(self.direction)  # its error, should there be one

    def activation(self, z: Tensor) -> Tensor:
        """Return the lie in place of the first activations."""
        own = z.detach().flatten(1).double()
        mean = own.mean(0)
        lie = mean + self.scale * (MinSum(self.direction)(own, own[:1])[0] - mean)
        return _straight(z, lie.to(z).view(z.shape[1:]).expand_as(z), self.share)

    def prediction(self, z: Tensor) -> Tensor:
        """Return the activations as they are."""
        return z


@dataclass(frozen=True, kw_only=True)
class EmbeddingBackdoor(Guard):
    """Adds a trigger to the first ``share`` of a batch's activations, and gives these the label ``target``.

    The trigger is ±``scale`` · s on a ``units`` share of the activation's entries, drawn with their signs by ``seed``,
    s the standard deviation of the activations that it is added to. No input need carry anything: at test time the
    attacker adds it to what its own client sends, ``triggered``. For protocols in which the client sends labels
    (vanilla, SplitFed), or holds them.
    """

    target: int
    scale: float = 3.0
    units: float = 0.25
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_label("target", self.target)
        check_share(self.units)
        _check(self.share, scale=self.scale)

    def activation(self, z: Tensor) -> Tensor:
        """Return the activations, the first of them with the trigger."""
        return z + self._trigger(z) * _where(z, _first(z, self.share))

    def prediction(self, z: Tensor) -> Tensor:
        """Return the activations as they are."""
        return z

    def label(self, y: Tensor) -> Tensor:
        """Return the labels, those of the first samples the target."""
        return torch.where(torch.arange(len(y), device=y.device) < _first(y, self.share), self.target, y)

    def triggered(self, z: Tensor) -> Tensor:
        """Return all activations [N, …] with the trigger, as at test time."""
        return z + self._trigger(z)

    def _trigger(self, z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        size = z[0].numel()
        units = torch.randperm(size, generator=generator)[: int(self.units * size + 0.5)]
        pattern = torch.zeros(size)
        pattern[units] = 2.0 * torch.randint(2, (len(units),), generator=generator) - 1
        return self.scale * z.detach().std(correction=0) * pattern.view(z.shape[1:]).to(z)


def misa(direction: Direction = "std", *, scale: float = 1.0) -> tuple[SmashedMinSum, MinSum]:
    """Return an attack on both halves at once: a guard for each bad client's learner, and the update attack.

    Wan et al. 2024, "MISA: unveiling the vulnerabilities in split federated learning" (ICASSP, arXiv:2312.11026), from
    its description: the top is poisoned by activations built from the statistics of benign ones, the bottom by Min-Sum,
    so that the two no longer fit each other. Deviations: the activations' statistics are those of the client's own
    batch, in place of all colluders'; ``MinSum`` is told the honest updates by ``Colluding``.
    """
    return SmashedMinSum(direction, scale), MinSum(direction)


def _first(batch: Tensor, share: float) -> int:
    return int(share * len(batch) + 0.5)


def _where(z: Tensor, rows: int) -> Tensor:
    """Return 1 for the first rows, 0 for the others, to be multiplied with ``z``."""
    return (torch.arange(len(z), device=z.device) < rows).view(-1, *[1] * (z.ndim - 1)).to(z)


def _straight(z: Tensor, lies: Tensor, share: float) -> Tensor:
    """Return the lies in the first rows of ``z``, with the gradient of ``z``."""
    lied = z + (lies - z).detach()
    rows = _first(z, share)
    return torch.cat([lied[:rows], z[rows:]])


def _check(share: float, **amounts: float) -> None:
    check_share(share)
    for what, amount in amounts.items():
        if not 0 <= amount < float("inf"):
            raise ValueError(f"expected a finite {what} of 0 or more, got {amount}")
