"""Insider: an attack that takes part in the training, as a party in the server's place."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from torch import Tensor

from attacks.inversion.reconstruction import Reconstruction
from splitlearn import Learner, View

__all__ = ["Infiltration", "Insider"]


class Insider(ABC):
    """A server with aims of its own: it keeps a party's methods, and afterwards is called as an ``Inversion``.

    By these methods it does as the honest ``server`` does, whose stage is its own. A passive attack adds what it learns
    on the way and answers as the honest server would, bit for bit; an active one answers with lies.
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

    @abstractmethod
    def __call__(self, view: View) -> Reconstruction:
        """Return an estimate of the input behind each activation of the view's predict requests."""


class Infiltration(Protocol):
    """A frozen set of settings, which puts an insider in a server's place.

    ``view`` is what it knows before training (``granted``): samples of its own, for the most part.
    """

    @abstractmethod
    def insider(self, server: Learner, view: View) -> Insider:
        """Return the party that takes the server's place."""

    def __call__(self, view: View) -> NoReturn:
        """Raise ``ValueError``: settings rebuild nothing, their insider does."""
        raise ValueError(
            f"expected an insider that took part in a training, got the settings of {type(self).__name__}; put "
            "insider(server, view) in the server's place first, and call that"
        )
