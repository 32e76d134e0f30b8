"""Detector: the client's own learner, watched; from what comes back it scores whether the server trains the task."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defenses.detectors.policies import Policy, crosses
from splitlearn import Learner
from splitlearn.train import TrainingStopped

__all__ = ["Detector", "first_gradient"]


class Detector(ABC):
    """A party in the learner's place that does as the learner does, and scores the server on the way.

    It watches the client of ``vanilla``, who holds the inputs and sends its labels along; one that needs no labels also
    watches the bottom of the U shape, where any other raises ``ValueError``. ``scores`` grows by one for every batch
    that is checked. ``detected_at`` is the batch, counted from 1, at which the ``policy`` over the scores first crossed
    the ``threshold``; None so far otherwise. With ``stop`` that batch raises ``TrainingStopped``, and nothing is sent
    after it.

    It sees the server's gradients and nothing else of it. A server that is caught has had the activations of all
    batches before. A verdict is evidence and no proof: an honest server can be suspected, and one that knows of the
    detector can evade it.
    """

    above: ClassVar[bool] = False  # whether scores above the threshold are the suspicious ones, or those below
    needs_labels: ClassVar[bool] = True  # whether it goes by the labels that are sent: not in the U shape, then

    def __init__(self, learner: Learner, *, threshold: float, policy: Policy, stop: bool):
        if not isfinite(threshold):
            raise ValueError(f"expected a threshold that is a number, got {threshold}")
        self.learner, self.name = learner, learner.name
        self.threshold, self.stop = threshold, stop
        self.policy = policy
        self.scores: list[float] = []
        self.batches = 0
        self.detected_at: int | None = None
        self._labels: Tensor | None = None
        self._open = False

    @property
    def verdict(self) -> bool:
        """Whether the server has been caught."""
        return self.detected_at is not None

    @property
    def ready(self) -> bool:
        """Whether the scores are as many as the policy needs; before that there can be no verdict."""
        return self._held() is not None

    @property
    def stage(self) -> nn.Module:
        """The learner's stage."""
        return self.learner.stage

    def forward(self, x: Tensor) -> Tensor:
        """Return the learner's activation; after a verdict with ``stop``, raise ``TrainingStopped`` instead."""
        self._stop_if_caught()
        z = self.learner.forward(x)
        self._labels, self._open = None, True
        return z

    def label(self, y: Tensor) -> Tensor:
        """Return the labels that are sent."""
        sent = self.learner.label(self._chosen(y) if self._open else y)
        if self._open:
            self._labels = sent
        return sent

    def backward(self, g: Tensor) -> Tensor | None:
        """Take the gradient as the learner does, and score the server."""
        self._open = False
        if self.needs_labels and self._labels is None:
            raise ValueError(
                f"{self.name}: expected a step in which the client sends its labels, as in vanilla, got none; watch "
                "the client there, or use SplitOut, which needs none"
            )
        back, score = self._taken(g)
        self.batches += 1
        if score is not None:
            self.scores.append(score)
            if self.detected_at is None and crosses(self._held(), self.threshold, above=self.above):
                self.detected_at = self.batches
        self._stop_if_caught()
        return back

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Learn as the learner does: no server takes part, so there is nothing to check."""
        return self.learner.learn(z, y)

    def predict(self, x: Tensor) -> Tensor:
        """Return the learner's output in evaluation mode."""
        return self.learner.predict(x)

    def abandon(self) -> None:
        """Give up the open step."""
        self._open = False
        self.learner.abandon()

    def weights(self) -> dict[str, Tensor]:
        """Return clones of the learner's parameters and buffers."""
        return self.learner.weights()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Have the learner take over parameters and buffers."""
        self.learner.load_weights(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the learner's state and what was seen of the server so far."""
        seen = {"scores": list(self.scores), "batches": self.batches, "detected_at": self.detected_at}
        return {"learner": self.learner.state_dict(), "seen": seen, "evidence": self._evidence()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; the next step is then bit for bit the same."""
        self.learner.load_state_dict(state["learner"])
        self.scores = list(state["seen"]["scores"])
        self.batches, self.detected_at = state["seen"]["batches"], state["seen"]["detected_at"]
        self._open = False
        self._load_evidence(state["evidence"])

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Put the learner back to an earlier state of the same run; what was seen of the server stays seen."""
        self.learner.put_back(state["learner"])

    def _chosen(self, y: Tensor) -> Tensor:
        """Return the labels of an open step that are to be sent."""
        return y

    @abstractmethod
    def _taken(self, g: Tensor) -> tuple[Tensor | None, float | None]:
        """Have the learner take ``g``; return what it returns, and the score of this batch where it is checked."""

    @abstractmethod
    def _evidence(self) -> dict[str, Any]:
        """Return what the next score depends on, beyond the scores so far."""

    @abstractmethod
    def _load_evidence(self, evidence: Mapping[str, Any]) -> None:
        """Take over what ``_evidence`` returned."""

    def _held(self) -> float | None:
        return self.policy(self.scores, above=self.above)

    def _stop_if_caught(self) -> None:
        if self.stop and self.detected_at is not None:
            side = "above" if self.above else "below"
            raise TrainingStopped(
                f"{self.name}: the server hijacks the training, by {type(self).__name__}: its score is {side} "
                f"{self.threshold:g} at batch {self.detected_at}; nothing more is sent to it"
            )


def first_gradient(learner: Learner) -> Tensor:
    """Return the last step's gradient in the first parameter that the learner trains, as one vector on the CPU."""
    gradient = _first_parameter(learner).grad
    if gradient is None:
        return torch.zeros(_first_parameter(learner).numel(), dtype=torch.float64)
    return gradient.detach().flatten().to("cpu", torch.float64)


def _first_parameter(learner: Learner) -> nn.Parameter:
    groups = learner.optimizer.param_groups if learner.optimizer is not None else []
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in learner.stage.parameters():
        if id(parameter) in trained and parameter.requires_grad:
            return parameter
    raise ValueError(
        f"{learner.name}: expected a learner that trains, whose gradients tell what it is trained for, got one without "
        "trained parameters; give it an optimizer over its stage's"
    )
