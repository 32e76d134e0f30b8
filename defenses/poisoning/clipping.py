"""Clipping at the server: no client's step moves the top further than an honest one could.

The usual gradient clipping by norm (Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063), put at every client's step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitlearn import Guard

__all__ = ["ClippedGradient", "ClippedSteps"]


class ClippedSteps(torch.optim.Optimizer):
    """``inner`` with the gradient of all its parameters together cut to a norm of ``max_norm`` before every step.

    ``Learner("server", top, ClippedSteps(SGD(top.parameters(), 0.1), max_norm=1.0))``: one step is one client's batch.
    A step whose gradient has a nan or an infinity is left out whole, its momentum too, and counted in ``skipped``;
    parameters are then as they were. The gradients themselves are cut in place, as they are the step's own.

    It protects the top from steps of a size that no honest batch has: activations scaled up, labels that are far off, a
    numerical blow-up. From malicious clients, of any number. It does not protect from poison of ordinary size: a
    backdoor's gradients are as small as honest ones and pass, and many small steps in one direction add up.

    A wrapper rather than a step hook of torch's, since a hook is lost in ``Learner.replica`` (a deepcopy). The state
    that it saves is the inner optimizer's, so that checkpoints fit with and without; ``skipped`` is not in it.
    """

    def __init__(self, inner: torch.optim.Optimizer, max_norm: float):
        if not isinstance(inner, torch.optim.Optimizer):
            raise ValueError(
                f"expected an optimizer to clip the steps of, got {inner!r}; pass SGD(top.parameters(), …)"
            )
        if not (max_norm > 0 and math.isfinite(max_norm)):
            raise ValueError(f"expected a finite max_norm above 0, got {max_norm}; for example 1.0")
        self.inner, self.max_norm, self.skipped = inner, max_norm, 0

    def __repr__(self) -> str:
        return f"ClippedSteps({type(self.inner).__name__}, max_norm={self.max_norm:g})"

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "max_norm": self.max_norm, "skipped": self.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's, so that schedules reach it."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's."""
        return self.inner.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Cut the gradients and step, or leave the step out where they are not finite; no closure."""
        if closure is not None:
            raise ValueError("expected a step without a closure, got one; compute the gradients before step()")
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            norm = torch.linalg.vector_norm(torch.stack([g.double().norm() for g in gradients]))
            if not torch.isfinite(norm):
                self.skipped += 1
                return
            if norm > self.max_norm:
                for gradient in gradients:
                    gradient.mul_((self.max_norm / norm).to(gradient.dtype))
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the inner optimizer take over its state."""
        self.inner.load_state_dict(state_dict)


@dataclass(frozen=True)
class ClippedGradient(Guard):
    """Cuts the gradient that a server sends back to a norm of ``max_norm`` over the batch.

    It bounds what the top's state can do to a client's bottom in one step, such as after a poisoner's batch, and keeps
    a blow-up at the server from spreading. It says nothing of the direction. A gradient with a nan or an infinity is
    sent as it is: the client's ``backward`` refuses it, aloud.
    """

    max_norm: float

    def __post_init__(self) -> None:
        if not (self.max_norm > 0 and math.isfinite(self.max_norm)):
            raise ValueError(f"expected a finite max_norm above 0, got {self.max_norm}; for example 1.0")

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        """Return ``g`` scaled down to the norm, or as it is where that is small enough."""
        norm = g.double().norm()
        if not torch.isfinite(norm) or norm <= self.max_norm:
            return g
        return g * (self.max_norm / norm).to(g.dtype)
