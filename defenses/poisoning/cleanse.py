"""Neural Cleanse: the class that every input can be turned into by an unusually small mask has a backdoor.

Wang et al. 2019 ("Neural Cleanse: identifying and mitigating backdoor attacks in neural networks", IEEE S&P).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["Cleansed", "NeuralCleanse"]

LEAST_SPREAD = 0.1  # of the median: of norms that are all alike none is an outlier
MAD_SCALE = 1.4826  # makes the median absolute deviation a normal law's standard deviation


@dataclass(frozen=True)
class Cleansed:
    """What was found per class, C of them: the trigger, its size, and whether the size is an outlier.

    ``masks`` [C, 1, H, W] in [0, 1], ``patterns`` [C, channels, H, W], ``norms`` [C] the masks' sums (infinity where
    no trigger was found), ``success`` [C] the share of inputs that the trigger moves, ``anomaly`` [C] the distance from
    the median norm in deviations, ``flagged`` [C] where that is above the threshold and the norm below the median.
    """

    masks: Tensor
    patterns: Tensor
    norms: Tensor
    success: Tensor
    anomaly: Tensor
    flagged: Tensor


@dataclass(frozen=True)
class NeuralCleanse:
    """Searches each class's smallest trigger on inputs of one's own, and flags classes whose is an outlier.

    ``NeuralCleanse()(model, x, num_classes)``: ``model`` is any function of inputs [N, channels, H, W] to logits that
    can be differentiated, in evaluation mode, such as ``lambda x: top(bottom(x))``; ``x`` a few clean inputs. The
    trigger is (1 - m)·x + m·p with a mask m common to the channels and a pattern p within the range of ``x``.

    It finds, after training, a backdoor of a small input patch into few of the classes, whoever planted it. It takes
    who holds the whole model and clean inputs: in split learning neither the server nor one client, unless they join.
    It does not find triggers as large as a class's own features, of the activations, of single inputs, or into half of
    the classes; with few classes the deviation is rough, so that a flag is evidence and no proof.

    Deviations: fewer steps and no early stop; the weight of the mask's size is moved every ``patience`` steps; the
    deviation is floored (``anomalies``), as norms within some per cent of each other would else have outliers; none of
    the paper's repairs.
    """

    steps: int = 300
    rate: float = 0.1
    weight: float = 0.01
    target: float = 0.99
    patience: int = 5
    threshold: float = 2.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.patience < 1 or not (self.rate > 0 and self.weight > 0 and 0 < self.target <= 1):
            raise ValueError(
                f"expected steps and patience ≥ 1, rate and weight above 0, a target in (0, 1], got {self}"
            )

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, num_classes: int) -> Cleansed:
        """Return the trigger of each class, and which are outliers."""
        if x.ndim != 4 or not len(x) or not torch.isfinite(x).all():
            raise ValueError(f"expected finite inputs [N, channels, H, W], got shape {tuple(x.shape)}")
        if num_classes < 3:
            raise ValueError(f"expected 3 classes or more, of which one can stand out, got {num_classes}")
        found = [self._trigger(model, x.detach(), label) for label in range(num_classes)]
        masks, patterns = torch.stack([mask for mask, _, _ in found]), torch.stack([p for _, p, _ in found])
        success = torch.tensor([share for _, _, share in found])
        norms = masks.flatten(1).sum(1).double()
        norms[success < self.target] = math.inf
        anomaly = anomalies(norms)
        below = norms < norms[torch.isfinite(norms)].median() if torch.isfinite(norms).any() else norms < 0
        return Cleansed(masks, patterns, norms, success, anomaly, (anomaly > self.threshold) & below)

    def _trigger(self, model: Callable[[Tensor], Tensor], x: Tensor, label: int) -> tuple[Tensor, Tensor, float]:
        """Return the smallest mask that reaches the target, its pattern and success; the best tried if none does."""
        low, high = x.min(), x.max()
        raw_mask = torch.full((1, *x.shape[2:]), -1.0, device=x.device, dtype=x.dtype).requires_grad_()
        raw_pattern = torch.zeros(x.shape[1:], device=x.device, dtype=x.dtype).requires_grad_()
        optimizer = torch.optim.Adam([raw_mask, raw_pattern], self.rate, betas=(0.5, 0.9))
        y = torch.full((len(x),), label, device=x.device)
        weight, best, key = self.weight, (raw_mask, raw_pattern, 0.0), (True, math.inf)
        for step in range(self.steps):
            mask, pattern = torch.sigmoid(raw_mask), low + (high - low) * torch.sigmoid(raw_pattern)
            logits = model((1 - mask) * x + mask * pattern)
            success = float((logits.argmax(1) == label).double().mean())
            size = mask.sum()
            reached = success >= self.target
            if (rank := (not reached, float(size.detach()) if reached else -success)) < key:
                best, key = (mask.detach().clone(), pattern.detach().clone(), success), rank
            if step % self.patience == self.patience - 1:
                weight *= 1.5 if reached else 1.5**-1.5
            loss = cross_entropy(logits, y) + weight * size
            raw_mask.grad, raw_pattern.grad = torch.autograd.grad(loss, [raw_mask, raw_pattern])
            optimizer.step()
        return best


def anomalies(norms: Tensor) -> Tensor:
    """Return how many deviations each norm [C] is from the median of the finite ones; infinity stays so.

    A deviation is 1.4826 times the median absolute one, and that at least a tenth of the median.
    """
    finite = norms[torch.isfinite(norms)]
    if not len(finite):
        return torch.zeros_like(norms)
    median = finite.quantile(0.5)
    spread = max(float((finite - median).abs().quantile(0.5)), LEAST_SPREAD * float(median), 1e-12)
    return (norms - median).abs() / (MAD_SCALE * spread)
