"""One client's side of a server that must know whose batch it learns from."""

from collections.abc import Callable, Mapping

from torch import Tensor

from splitlearn import Learner

__all__ = ["ClientSession"]

Learn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class ClientSession:
    """A party that learns as ``learn`` does for one client, and answers all else as ``learner`` does.

    It takes activations with labels, as in ``vanilla``; the U shape raises ``ValueError``.
    """

    def __init__(self, name: str, learner: Learner, learn: Learn):
        self.name, self.learner, self._learn = name, learner, learn

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss and, if ``z`` asks for it, the gradient that goes back to the client."""
        return self._learn(z, y)

    def forward(self, x: Tensor) -> Tensor:
        """Raise ``ValueError``: this server needs the labels."""
        raise ValueError(
            f"{self.name}: expected activations with labels, as in vanilla; this server sees both, or none"
        )

    def backward(self, g: Tensor) -> Tensor | None:
        """Raise ``ValueError``, as ``forward`` does."""
        raise ValueError(
            f"{self.name}: expected activations with labels, as in vanilla; this server sees both, or none"
        )

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
