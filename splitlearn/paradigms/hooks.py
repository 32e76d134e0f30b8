"""What is added to the gradients before each step of an optimizer: drift corrections and penalties go in here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from splitlearn.party import Learner

__all__ = ["add_before_steps", "trained"]

Addition = Callable[[], list[Tensor] | None]


def trained(learner: Learner) -> list[Tensor]:
    """Return the stage's parameters that its optimizer steps; ``ValueError`` where it has none."""
    if learner.optimizer is None:
        raise ValueError(f"{learner.name}: expected a party with an optimizer, got one that trains nothing")
    return [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]


def add_before_steps(learner: Learner, addition: Addition) -> Any:
    """Have ``addition()``, a tensor a parameter or None, added to the gradients before each step.

    So it goes into any protocol, split or not, through the optimizer alone. Returns a handle; ``remove()`` ends it.
    """
    parameters = trained(learner)

    @torch.no_grad()
    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        more = addition()
        for parameter, own in zip(parameters, more or (), strict=more is not None):
            if parameter.grad is not None:
                parameter.grad += own

    assert learner.optimizer is not None
    return learner.optimizer.register_step_pre_hook(before)
