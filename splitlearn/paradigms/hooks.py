"""What is added to the gradients before each step of an optimizer: drift corrections and penalties go in here."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from splitlearn.party import Learner

__all__ = ["add_before_steps", "trained"]

Addition = Callable[[], list[Tensor] | None]


def trained(learner: Learner, *, but: Collection[str] = ()) -> list[Tensor]:
    """Return the stage's parameters that its optimizer steps, but for some names; ``ValueError`` where it has none."""
    if learner.optimizer is None:
        raise ValueError(f"{learner.name}: expected a party with an optimizer, got one that trains nothing")
    left_out = {id(own) for name, own in learner.stage.named_parameters() if name in but}
    held = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in held if id(parameter) not in left_out]


def add_before_steps(learner: Learner, addition: Addition, *, but: Collection[str] = ()) -> Any:
    """Have ``addition()``, a tensor for each of ``trained(learner, but=but)`` or None, added to gradients before steps.

    So it goes into any protocol, split or not, through the optimizer alone. Returns a handle; ``remove()`` ends it.
    A copy of the optimizer would learn without it, and torch would not say so: ``replica``, deepcopy and pickling are
    a ``ValueError`` while it is there. So is an optimizer around another one, which takes no additions.
    """
    parameters = trained(learner, but=but)
    optimizer: Any = learner.optimizer
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"{learner.name}: expected one of torch's optimizers, to add to its gradients, got "
            f"{type(optimizer).__name__} around another; choose one of the two"
        )
    optimizer.__reduce_ex__ = partial(_reduced, optimizer)  # deepcopy and pickle ask the instance first
    return optimizer.register_step_pre_hook(_Adding(parameters, addition))


class _Adding:
    """Before an optimizer's step: adds to the gradients that there are."""

    def __init__(self, parameters: list[Tensor], addition: Addition):
        self.parameters, self.addition = parameters, addition

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        more = self.addition()
        for parameter, own in zip(self.parameters, more or (), strict=more is not None):
            if parameter.grad is not None:
                parameter.grad += own


def _reduced(optimizer: torch.optim.Optimizer, protocol: Any) -> Any:
    if any(isinstance(hook, _Adding) for hook in optimizer._optimizer_step_pre_hooks.values()):
        raise ValueError(
            f"expected an optimizer to copy that nothing is added to, got a {type(optimizer).__name__} with a penalty "
            "or a correction, which the copy would lose; make replicas first, then what adds to each"
        )
    return type(optimizer).__reduce_ex__(optimizer, protocol)
