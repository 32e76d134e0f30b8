"""Impostor: a party in the server's place, with aims of its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from splitlearn import Learner

__all__ = ["Impostor"]


class Impostor:
    """A server with aims of its own: it keeps a party's methods, and by these does as the honest ``server`` does.

    The server's stage is its own. What an attack does besides, or in their place, is for those who inherit.
    """

    def __init__(self, server: Learner):
        self.server, self.name = server, server.name

    def forward(self, x: Tensor) -> Tensor:
        """Return the middle stage's output, in the U shape."""
        return self.server.forward(x)

    def backward(self, g: Tensor) -> Tensor | None:
        """Take the gradient of the last output; return that of the activation, in the U shape."""
        return self.server.backward(g)

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take activations and labels; return the loss and the gradient at the cut."""
        return self.server.learn(z, y)

    def label(self, y: Tensor) -> Tensor:
        """Return the labels, as a server does that holds them."""
        return self.server.label(y)

    def predict(self, x: Tensor) -> Tensor:
        """Return the stage's output in evaluation mode."""
        return self.server.predict(x)

    def weights(self) -> dict[str, Tensor]:
        """Return clones of the stage's parameters and buffers."""
        return self.server.weights()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over parameters and buffers."""
        self.server.load_weights(weights)

    def abandon(self) -> None:
        """Give up the open step, if there is one, as the server does."""
        self.server.abandon()

    def state_dict(self) -> dict[str, Any]:
        """Raise ``ValueError``: what it trains beside the server is not kept."""
        raise self._not_kept()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError``, as ``state_dict`` does."""
        raise self._not_kept()

    def _not_kept(self) -> ValueError:
        return ValueError(
            f"{self.name}: expected a party that can be checkpointed, got an attack that takes part; run it without "
            "checkpoint= and patience="
        )
