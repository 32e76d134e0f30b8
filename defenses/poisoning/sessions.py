"""A server that learns in a way of its own, one client's side of it, and learning from some samples of a batch."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from splitlearn import Learner

__all__ = ["ClientSession", "LabelledServer", "finite_rows", "learned_from"]

Learn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class LabelledServer:
    """A party that learns in its own way from activations with labels, and answers all else as ``learner`` does.

    The U shape, which has no labels for it, raises ``ValueError``.
    """

    REFUSES = "expected activations with labels, as in vanilla; this server sees both, or none"

    def __init__(self, name: str, learner: Learner):
        self.name, self.learner = name, learner

    def forward(self, x: Tensor) -> Tensor:
        """Raise ``ValueError``: this server needs the labels."""
        raise ValueError(f"{self.name}: {self.REFUSES}")

    def backward(self, g: Tensor) -> Tensor | None:
        """Raise ``ValueError``, as ``forward`` does."""
        raise ValueError(f"{self.name}: {self.REFUSES}")

    def label(self, y: Tensor) -> Tensor:
        """Return what the learner says its labels are."""
        return self.learner.label(y)

    def predict(self, x: Tensor) -> Tensor:
        """Return the learner's output in evaluation mode."""
        return self.learner.predict(x)

    def weights(self) -> dict[str, Tensor]:
        """Return clones of the learner's parameters and buffers."""
        return self.learner.weights()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Have the learner take over parameters and buffers."""
        self.learner.load_weights(weights)


class ClientSession(LabelledServer):
    """A party that learns as ``learn`` does for one client, and answers all else as ``learner`` does."""

    def __init__(self, name: str, learner: Learner, learn: Learn):
        super().__init__(name, learner)
        self._learn = learn

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss and, if ``z`` asks for it, the gradient that goes back to the client."""
        return self._learn(z, y)


def finite_rows(z: Tensor) -> Tensor:
    """Return which samples of ``z`` [n, …] are finite throughout, bool [n]."""
    return torch.isfinite(z.detach()).flatten(1).all(1)


def learned_from(learner: Learner, z: Tensor, y: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Have ``learner`` learn from the kept samples alone; return its loss on them (nan for none) and g, else zeros."""
    back = torch.zeros_like(z, requires_grad=False) if z.requires_grad else None
    if not kept.any():
        return torch.full((), float("nan"), device=z.device), back
    loss, g = learner.learn(z.detach()[kept].requires_grad_(z.requires_grad), y.to(z.device)[kept])
    if back is not None and g is not None:
        back[kept] = g.to(back.device)
    return loss, back
