"""The shape of protections whose loss reads what the owner's stage did: a wrapper of the stage, and its loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["Notes", "Observed", "Observing"]


class Notes:
    """What a wrapped stage noted of the batch that it saw last, for the loss of the same outputs, and of no others.

    A copy of the stage (``Learner.replica``) writes into the same notes; outputs tell whose they are.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Notes":
        return self

    def keep(self, output: Tensor, seen: Any) -> None:
        """Keep what was seen on the way to ``output``."""
        self._last = output, seen

    def of(self, output: Tensor) -> Any:
        """Return what was seen on the way to ``output``, once; ``ValueError`` for any other outputs."""
        if self._last is None or self._last[0] is not output:
            raise ValueError(
                "expected the outputs that the wrapped stage made last, in training mode, got others; give the owner "
                "both halves of one protection: stage = protection.top(stage) and loss=protection.loss"
            )
        (_, seen), self._last = self._last, None
        return seen


class Observed(nn.Module):
    """``stage`` behind ``entrance``, which maps z to (what the stage gets, what the loss is to see), or (…, None)."""

    def __init__(self, entrance: nn.Module, stage: nn.Module, notes: Notes):
        super().__init__()
        self.entrance, self.stage = entrance, stage
        self._notes = notes

    def forward(self, z: Tensor) -> Tensor:
        """Return the stage's outputs; in training, what was seen is noted for their loss."""
        entered, seen = self.entrance(z)
        output: Tensor = self.stage(entered)
        if self.training:
            self._notes.keep(output, seen)
        return output


@dataclass(frozen=True, eq=False)
class Observing(ABC):
    """A protection in two halves, both the owner's: ``top(stage)`` wraps the stage, ``loss(output, y)`` reads the rest.

    For a loop of one's own: ``stage = protection.top(stage)``, an optimizer over ``stage.parameters()``, and
    ``Learner("owner", stage, optimizer, loss=protection.loss)``.
    """

    notes: Notes = field(init=False, repr=False, default_factory=Notes)

    @abstractmethod
    def parts(self, stage: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Return the entrance, and what comes after it."""

    @abstractmethod
    def mean_loss(self, output: Tensor, y: Tensor, seen: Any) -> Tensor:
        """Return the mean loss over the batch, given what the entrance saw of it."""

    def top(self, stage: nn.Module) -> nn.Module:
        """Return the owner's stage with the protection in it."""
        return Observed(*self.parts(stage), self.notes)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of the outputs that the wrapped stage made last, [n, classes], against labels [n]."""
        return self.mean_loss(output, y, self.notes.of(output))
