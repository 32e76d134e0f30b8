"""Features: a party that holds its own inputs and is asked by sample number (vertical split learning)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from splitlearn.party import Learner

__all__ = ["Features"]


class Features:
    """A party that holds its own inputs: it is asked by sample number and looks them up (vertical split learning).

    ``x`` are this party's features, one row a sample; ``forward`` and ``predict`` take int64 sample numbers.
    """

    def __init__(self, learner: Learner, x: Tensor):
        self.name = learner.name
        self.learner = learner
        self.x = x

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of the samples numbered ``x``."""
        return self.learner.forward(self._rows(x))

    def backward(self, g: Tensor) -> None:
        """Take the gradient of the last activation and step; sample numbers have no gradient."""
        self.learner.backward(g)

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Learn from the samples numbered ``z`` alone."""
        return self.learner.learn(self._rows(z), y)

    def label(self, y: Tensor) -> Tensor:
        """Return what this party says its labels are."""
        return self.learner.label(y)

    def predict(self, x: Tensor) -> Tensor:
        """Return the output for the samples numbered ``x``."""
        return self.learner.predict(self._rows(x))

    def weights(self) -> dict[str, Tensor]:
        """Return clones of parameters and buffers."""
        return self.learner.weights()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over parameters and buffers."""
        self.learner.load_weights(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the learner's state; the features are not part of it."""
        return self.learner.state_dict()

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Have the learner take over an earlier state, but for its randomness, which goes on."""
        self.learner.put_back(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.learner.load_state_dict(state)

    def _rows(self, ids: Tensor) -> Tensor:
        if ids.dtype != torch.int64 or ids.ndim != 1:
            raise ValueError(f"{self.name}: expected a row of int64 sample numbers, got {ids.dtype} of {ids.ndim} dims")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.x):
            raise ValueError(
                f"{self.name}: expected sample numbers from 0 to {len(self.x) - 1}, got {int(ids.min())} to "
                f"{int(ids.max())}; align the parties' samples first"
            )
        return self.x[ids]
