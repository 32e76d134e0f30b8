"""Labels by gradient matching: which label would have made the gradient that came back?

Erdoğan, Küpçü and Çiçek 2022, "UnSplit" (arXiv:2108.09033), the label inference: for each sample, try every label,
and take the one whose gradient is closest. Deviations: the head is known (public, or cloned before), so that nothing
is learned of it here; the gradient is taken in the head's input, row by row; a mechanism that clips and noises rows is
known, and its rows of the same sample in several passes are taken together, which is the likeliest label under
Gaussian noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitlearn import Kind, View

__all__ = ["GradientMatching"]


@dataclass(frozen=True)
class GradientMatching:
    """Honest but curious server of U-shaped training, whose client keeps head and labels. Returns labels, [N].

    It reads the activations that it was sent and sent on, and the gradients of the mean loss that came back. A pass is
    of ``samples`` samples, whose activations do not change from one to the next (a frozen bottom without noise).
    ``clip`` is the L2 norm that each row of a gradient was cut to, None for none. With ``prior``, which maps the
    activations that were sent to logits (a model that the attacker has from elsewhere), and ``std``, the spread of the
    noise on each entry, the labels are those of the greatest posterior.
    """

    head: nn.Module
    classes: int
    samples: int
    clip: float | None = None
    std: float | None = None
    prior: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.prior is not None and not self.std:
            raise ValueError(f"expected std above 0 with a prior, got {self.std}; it weighs the one against the other")

    def __call__(self, view: View) -> Tensor:
        """Return the likeliest label of each sample, in the order in which the samples first crossed."""
        sent, costs = [], []
        waiting: tuple[Tensor, Tensor] | None = None
        for exchange in view.exchanges:
            request, reply = exchange.request.tensors, exchange.reply.tensors
            if exchange.request.verb == "forward" and Kind.ACTIVATION in request and Kind.ACTIVATION in reply:
                waiting = request[Kind.ACTIVATION], reply[Kind.ACTIVATION]
            elif exchange.request.verb == "backward" and waiting is not None:
                z, h = waiting
                sent.append(z)
                costs.append(self._costs(h, request[Kind.GRADIENT]))
                waiting = None
        if not sent:
            raise LookupError("this attack reads the forward and backward requests of a U shape, and none crossed")
        z = torch.cat(sent)
        total = self._together(z.flatten(1), torch.cat(costs))
        if self.prior is not None and self.std:
            with torch.no_grad():
                total = total / (2 * self.std**2) - self.prior(z[: self.samples]).log_softmax(1)
        return total.argmin(1)

    def _costs(self, h: Tensor, g: Tensor) -> Tensor:
        """Return, [n, classes], how far each row of the gradient is from that of every label, squared."""
        costs = []
        for label in range(self.classes):
            leaf = h.detach().clone().requires_grad_()
            loss = cross_entropy(self.head(leaf), torch.full((len(h),), label, device=h.device))
            (would,) = torch.autograd.grad(loss, leaf)
            if self.clip is not None:
                norms = would.flatten(1).norm(dim=1).clamp(min=self.clip)
                would = would * (self.clip / norms).reshape(-1, *[1] * (would.ndim - 1))
            costs.append((g - would).flatten(1).square().sum(1))
        return torch.stack(costs, 1)

    def _together(self, sent: Tensor, costs: Tensor) -> Tensor:
        """Return the costs of each sample summed over its passes; a sample is known by its activation."""
        first = sent[: self.samples]
        which = torch.cat([torch.cdist(part, first).argmin(1) for part in sent.split(256)])
        return torch.zeros(len(first), costs.shape[1], device=costs.device).index_add_(0, which, costs)
