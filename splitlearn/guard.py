"""Guard: what a party does to what it sends. Nothing, until a method is overridden."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Guard", "Guards"]


class Guard:
    """What a party does to what it sends: nothing, until a method is overridden.

    ``activation`` and ``penalty`` run inside the graph, so that training goes through them; one that cannot be
    differentiated defines its own straight-through gradient. Randomness comes from torch's global generator,
    which a ``Learner`` swaps for its own. Evaluation calls ``prediction``, without gradient, which is
    ``activation`` until overridden: a guard that keeps a state moves it only where ``torch.is_grad_enabled()``.
    """

    def __repr__(self) -> str:
        """Return what a record keeps of it: the same in every run. A guard with settings is best a dataclass."""
        return f"{type(self).__name__}()"

    def activation(self, z: Tensor) -> Tensor:
        """Return what is sent in place of the activation ``z`` (batch first)."""
        return z

    def prediction(self, z: Tensor) -> Tensor:
        """Return what is sent in place of the activation ``z`` of a prediction: as in training, until overridden."""
        return self.activation(z)

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what is sent in place of the gradient ``g``; ``y`` are the labels where this party knows them."""
        return g

    def label(self, y: Tensor) -> Tensor:
        """Return what is sent in place of the labels ``y``."""
        return y

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Return a scalar added to the loss of the party that sends ``z`` for its input ``x``, or None."""
        return None

    @property
    def secret(self) -> bool:
        """Whether what it draws must stay unknown: a party that is given no seed then draws one by chance."""
        return False

    @property
    def penalises(self) -> bool:
        """Whether this guard adds a penalty to the loss of a party that sends activations."""
        return type(self).penalty is not Guard.penalty

    def simulated(self) -> "Guard":
        """Return a guard that does the same for who only simulates it, such as an attacker: nothing is sent by it."""
        return copy.deepcopy(self)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must carry: tensors, numbers, strings and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Take over an earlier state in the same run; what was sent since stays sent."""
        self.load_state_dict(state)


class Guards(Guard):
    """Several guards as one, applied in the order given; their penalties, each of the stage's own output, add up."""

    def __init__(self, *guards: Guard):
        self.guards = guards

    def __repr__(self) -> str:
        return f"Guards({', '.join(map(repr, self.guards))})"

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` passed through every guard."""
        for guard in self.guards:
            z = guard.activation(z)
        return z

    def prediction(self, z: Tensor) -> Tensor:
        """Return ``z`` passed through every guard, as each does for a prediction."""
        for guard in self.guards:
            z = guard.prediction(z)
        return z

    @property
    def secret(self) -> bool:
        """Whether one of the guards is."""
        return any(guard.secret for guard in self.guards)

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        """Return ``g`` passed through every guard."""
        for guard in self.guards:
            g = guard.gradient(g, y)
        return g

    def label(self, y: Tensor) -> Tensor:
        """Return ``y`` passed through every guard."""
        for guard in self.guards:
            y = guard.label(y)
        return y

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Return the sum of the guards' penalties, or None where none has one."""
        terms = [term for guard in self.guards if (term := guard.penalty(x, z)) is not None]
        return sum(terms[1:], start=terms[0]) if terms else None

    @property
    def penalises(self) -> bool:
        """Whether one of the guards does."""
        return any(guard.penalises for guard in self.guards)

    def simulated(self) -> Guard:
        """Return the guards as each is simulated."""
        return Guards(*(guard.simulated() for guard in self.guards))

    def state_dict(self) -> dict[str, Any]:
        """Return each guard's state under its position."""
        return {str(number): guard.state_dict() for number, guard in enumerate(self.guards)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; raises ``ValueError`` for the state of another number of guards."""
        if len(state) != len(self.guards):
            raise ValueError(
                f"expected the state of {len(self.guards)} guards, got {len(state)}; resume with the same ones"
            )
        for number, guard in enumerate(self.guards):
            guard.load_state_dict(state[str(number)])

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Have each guard take over its earlier state."""
        for number, guard in enumerate(self.guards):
            guard.put_back(state[str(number)])
