"""Early exits: heads on a device's part of the model, and rules that say when their answer is sure enough.

BranchyNet (Teerapittayanon, McDanel and Kung 2016, "BranchyNet: Fast Inference via Early Exiting from Deep Neural
Networks", arXiv:1709.01686). Deviations: the head is trained after the model, which stays as it is, not jointly with
it; and thresholds are calibrated on held-out data for a loss of accuracy that is allowed, not screened by hand.
"""

import copy
import math
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from splitlearn.party import Learner
from splitlearn.randomness import Randomness
from splitlearn.train import Batches, Predictor, epochs_of, fit, predict

__all__ = ["Confidence", "Entropy", "Rule", "Threshold", "calibrated", "exit_head", "loss_bound", "train_exit"]

GRID = 1000  # thresholds that are fixed before the held-out data is seen, where a bound is to hold
FINEST = 1e-6  # what is left to certainty at the strictest of them


class Rule(Protocol):
    """Says which samples may leave at an exit."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return for the exit's logits [N, C] whether each sample leaves, a boolean [N]."""


class Threshold(Rule, Protocol):
    """A rule by one threshold, which ``calibrated`` can choose."""

    @property
    def threshold(self) -> float:
        """The threshold, in the rule's own unit."""

    @classmethod
    def sureness(cls, logits: Tensor) -> Tensor:
        """Return how sure the exit is of each sample, [N], more being surer."""

    @classmethod
    def leaving(cls, sureness: float) -> Self:
        """Return the rule by which all leave that are at least so sure; none, where it is infinite."""

    @classmethod
    def grid(cls, num_classes: int) -> list[float]:
        """Return some sureness levels, strictest first, that depend on no data; at the last one all leave."""


T = TypeVar("T", bound=Threshold)


@dataclass(frozen=True)
class Confidence:
    """A sample leaves where the greatest softmax probability is at least ``threshold``; above 1 none does."""

    threshold: float

    def __post_init__(self) -> None:
        _check_threshold(self.threshold, "a probability; above 1 nothing leaves")

    def __call__(self, logits: Tensor) -> Tensor:
        """Return whether each sample of the logits [N, C] leaves, [N]."""
        return self.sureness(logits) >= self.threshold

    @classmethod
    def sureness(cls, logits: Tensor) -> Tensor:
        """Return the greatest softmax probability of each sample, [N], in [1/C, 1]."""
        return _checked(logits).double().softmax(1).amax(1)

    @classmethod
    def leaving(cls, sureness: float) -> "Confidence":
        """Return the rule by which all leave that are at least so sure."""
        return cls(sureness)

    @classmethod
    def grid(cls, num_classes: int) -> list[float]:
        """Return probabilities from 1 - 10⁻⁶ down to 0, finer where little is left to 1."""
        return [1 - left for left in _steps(1 - 1 / num_classes)[:-1]] + [0.0]


@dataclass(frozen=True)
class Entropy:
    """A sample leaves where the softmax's entropy, in nats, is at most ``threshold`` (as in BranchyNet)."""

    threshold: float

    def __post_init__(self) -> None:
        _check_threshold(self.threshold, "nats; below 0 nothing leaves")

    def __call__(self, logits: Tensor) -> Tensor:
        """Return whether each sample of the logits [N, C] leaves, [N]."""
        return -self.sureness(logits) <= self.threshold

    @classmethod
    def sureness(cls, logits: Tensor) -> Tensor:
        """Return minus the entropy of each sample's softmax, [N], in [-ln C, 0] nats."""
        shares = _checked(logits).double().log_softmax(1)
        return (shares.exp() * shares).sum(1)

    @classmethod
    def leaving(cls, sureness: float) -> "Entropy":
        """Return the rule by which all leave that are at least so sure."""
        return cls(-sureness)

    @classmethod
    def grid(cls, num_classes: int) -> list[float]:
        """Return entropies from 10⁻⁶ up to ln C, and infinity, the small ones finer, as sureness."""
        return [-nats for nats in _steps(math.log(num_classes))[:-1]] + [-math.inf]


def exit_head(z_shape: tuple[int, ...], num_classes: int, *, side: int = 7, seed: int = 0) -> nn.Sequential:
    """Return an untrained head: max pooling to at most ``side`` places a dimension, then one linear layer.

    ``z_shape`` is the shape of an activation, batch left out: [C, H, W], [C, L] or [F]. The linear layer costs
    2 · features · ``num_classes`` operations a sample, such as 2 · 16 · 7 · 7 · 10 = 15,680 behind ``cnn28``'s first
    block (0.6 % of the whole model). Weights are torch's defaults, drawn from ``seed``.
    """
    if num_classes < 2 or side < 1:
        raise ValueError(f"expected at least 2 classes and a side of 1 or more, got {num_classes} and {side}")
    if not 1 <= len(z_shape) <= 3 or min(z_shape) < 1:
        raise ValueError(
            f"expected an activation of shape [C, H, W], [C, L] or [F], got {z_shape}; leave the batch out"
        )
    pooled = [min(side, size) for size in z_shape[1:]]
    features = z_shape[0] * math.prod(pooled)
    pools: list[nn.Module] = []
    if len(pooled) == 2:
        pools = [nn.AdaptiveMaxPool2d((pooled[0], pooled[1])), nn.Flatten()]
    elif len(pooled) == 1:
        pools = [nn.AdaptiveMaxPool1d(pooled[0]), nn.Flatten()]
    with Randomness(seed, "exit head").own(torch.device("cpu")):
        return nn.Sequential(*pools, nn.Linear(features, num_classes))


def train_exit(
    head: nn.Module,
    bottom: Predictor,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> Learner:
    """Return a party "exit" with a trained copy of ``head``, for samples x [N, …] and labels y [N].

    It happens on the device alone, after the training of the model: the bottom answers in evaluation mode and stays
    as it is, and nothing crosses. The head reads what the bottom would send, its guard's work included. Adam.
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(f"expected as many labels as samples and at least one, got {len(x)} and {len(y)}")
    z = predict([bottom], x)
    own = copy.deepcopy(head).to(z.device)
    party = Learner("exit", own, torch.optim.Adam(own.parameters(), lr=lr), seed=seed)
    batches = Batches(z, y.to(z.device), batch_size=batch_size, seed=seed)
    fit(epochs_of(lambda z, y: party.learn(z, y)[0], batches), epochs=epochs)
    return party


def calibrated(
    kind: type[T],
    exit_logits: Tensor,
    final_logits: Tensor,
    y: Tensor,
    *,
    max_loss: float,
    delta: float | None = None,
) -> T:
    """Return the rule by which most samples leave while the accuracy falls by at most ``max_loss``.

    ``exit_logits`` and ``final_logits`` [N, C] are the exit's and the whole model's answers to held-out samples, which
    neither was trained on, and ``y`` [N] their labels; the fall is that of the cascade from the whole model.

    Without ``delta`` the fall on these very samples counts: elsewhere it is as likely greater as smaller. With it, the
    fall on further samples of the same distribution is at most ``max_loss`` but with probability ``delta``, over the
    draw of the held-out ones: thresholds of a fixed grid are tried from the strictest on, until the first one whose
    ``loss_bound`` is above ``max_loss`` (fixed-sequence testing, as in Angelopoulos et al. 2021, "Learn then Test",
    arXiv:2110.01052). Nothing leaves where too few samples are there to tell.
    """
    _checked(exit_logits)
    _checked(final_logits)
    if exit_logits.shape != final_logits.shape or y.shape != exit_logits.shape[:1]:
        raise ValueError(
            f"expected both answers [N, C] and the labels [N] of the same samples, got {tuple(exit_logits.shape)}, "
            f"{tuple(final_logits.shape)} and {tuple(y.shape)}"
        )
    if not 0 <= max_loss <= 1:
        raise ValueError(f"expected a max_loss in [0, 1], got {max_loss}; 0.005 is half a point of accuracy")
    sure = kind.sureness(exit_logits)
    early, late = (logits.argmax(1) == y.to(logits.device) for logits in (exit_logits, final_logits))
    if delta is not None:
        return kind.leaving(
            _tested(sure, early, late.to(early.device), kind.grid(exit_logits.shape[1]), max_loss, delta)
        )
    order = sure.argsort(descending=True)
    falls = (late.to(early.device).long() - early.long())[order].cumsum(0)  # samples lost if the first so many leave
    level = sure[order]
    whole = torch.ones_like(early)  # those as sure as the last one leave with it: only a whole group can
    whole[:-1] = level[1:] < level[:-1]
    allowed = (whole & (falls <= max_loss * len(y) + 1e-9)).nonzero()
    return kind.leaving(level[int(allowed[-1])].item() if len(allowed) else math.inf)


def loss_bound(harmed: int, helped: int, num: int, *, delta: float) -> float:
    """Return an upper bound on the expected fall of accuracy, of confidence 1 - ``delta``.

    Of ``num`` samples, ``harmed`` are answered right by the whole model alone and ``helped`` by the cascade alone. The
    fall is the difference of both rates, each bounded exactly (Clopper and Pearson 1934) at ``delta`` / 2.
    """
    from scipy.stats import beta  # takes a while to import

    if not 0 < delta < 1:
        raise ValueError(f"expected a delta between 0 and 1, got {delta}; 0.05 is usual")
    if min(harmed, helped) < 0 or harmed + helped > num or num < 1:
        raise ValueError(f"expected counts of {num} samples, at least one, got {harmed} harmed and {helped} helped")
    most = 1.0 if harmed == num else float(beta.ppf(1 - delta / 2, harmed + 1, num - harmed))
    least = 0.0 if helped == 0 else float(beta.ppf(delta / 2, helped, num - helped + 1))
    return most - least


def _tested(sure: Tensor, early: Tensor, late: Tensor, grid: list[float], max_loss: float, delta: float) -> float:
    """Return the last sureness of the grid before the first at which the bound is too great."""
    num, found, before = len(sure), math.inf, (-1, -1)
    harmed, helped = late & ~early, early & ~late
    for level in grid:
        leaves = sure >= level
        counts = int((leaves & harmed).sum()), int((leaves & helped).sum())
        if counts != before and loss_bound(*counts, num, delta=delta) > max_loss:
            break
        found, before = level, counts
    return found


def _steps(last: float) -> list[float]:
    """Return ``GRID`` rising numbers from ``FINEST`` to ``last``, up to a tenth of it at equal ratios, then evenly."""
    half, tenth = GRID // 2, last / 10
    ratios = [FINEST * math.pow(tenth / FINEST, place / half) for place in range(half)]
    return ratios + [tenth + (last - tenth) * place / (half - 1) for place in range(half)]


def _check_threshold(threshold: float, unit: str) -> None:
    if math.isnan(threshold):
        raise ValueError(f"expected a threshold, got nan; give {unit}")


def _checked(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] < 2 or not len(logits):
        raise ValueError(f"expected logits [N, C] of at least one sample and two classes, got {tuple(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise ValueError("expected finite logits, got nan or inf; look at what the exit or the model puts out")
    return logits
