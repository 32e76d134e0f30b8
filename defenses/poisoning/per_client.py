"""A robust step on the top: each client's gradient by itself, and a rule that makes one of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from defenses.poisoning.sessions import LabelledServer
from splitlearn import Learner

__all__ = ["PerClientServer"]

Rule = Callable[[Tensor], Tensor]


class PerClientServer(LabelledServer):
    """The server of ``parallel`` and ``parallel_round`` that steps by ``rule`` of the clients' gradients.

    ``rule`` maps rows [n, d], the gradient in all parameters of each of n clients' mean loss (float64), to the one [d]
    that the learner's optimizer steps with. What a client gets back is as in ``parallel``: its own loss's gradient,
    weighed by its part of the samples; other clients make no difference to it but through the top.

    ``sizes`` says whose rows are whose: for each client, in their order, the number of samples of each batch of a
    round. ``batch_sizes(n, batch_size)`` gives those of ``Batches``; [[8], [8]] is two clients that send 8 each step. A
    client whose list is shorter leaves the later steps, as in ``parallel_round``; after the longest all begin anew.

    It protects the top from a minority of clients whose gradients stand out from those of the others, as far as the
    rule does, at each step; rows with a nan or an infinity are left out, with zeros sent back, and counted in
    ``refused``. It does not protect from poison that stays within the spread of honest gradients (heterogeneous clients
    spread far), from what a client's own bottom learns, or where one step has few clients left. A finite activation so
    large that the loss overflows ends the step with the learner's ``ValueError``.

    ``rule`` weighs clients alike and not by their samples, unlike the mean of ``parallel``. Batch norm sees one client
    at a time. The design is ours; rules are those of robust aggregation.
    """

    REFUSES = "expected activations with labels, as in parallel; this server only learns"

    def __init__(self, learner: Learner, rule: Rule, sizes: Sequence[Sequence[int]]):
        if learner.optimizer is None:
            raise ValueError(f"{learner.name}: expected a learner with an optimizer, to step with, got none")
        if not sizes or any(not own or min(own) < 1 for own in sizes):
            raise ValueError(
                f"expected the sizes of at least one batch a client, each 1 or more, got {[list(own) for own in sizes]}"
            )
        super().__init__(learner.name, learner.session(learner.name))
        self.rule, self.sizes = rule, [list(own) for own in sizes]
        self.refused = 0
        self._at = 0
        self._collected = _Collecting(learner.optimizer)
        self.learner.optimizer = self._collected

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss over all samples and, if ``z`` asks for it, its gradient; step by the rule."""
        counts = [own[self._at] for own in self.sizes if self._at < len(own)]
        if sum(counts) != len(z) or len(z) != len(y):
            raise ValueError(
                f"{self.name}: expected {sum(counts)} samples of {len(counts)} clients at step {self._at + 1} of the "
                f"round, got {len(z)} with {len(y)} labels; say the clients' batch sizes in PerClientServer(sizes=…)"
            )
        self._collected.rows = []
        loss, kept, parts = torch.zeros((), device=z.device), 0, []
        for own, labels in zip(z.split(counts), y.split(counts), strict=True):
            if not torch.isfinite(own).all():
                self.refused += 1
                parts.append(torch.zeros_like(own))
                continue
            part, g = self.learner.learn(own.detach().requires_grad_(z.requires_grad), labels)
            loss, kept = loss + part.to(loss.device) * len(labels), kept + len(labels)
            parts.append(g * (len(labels) / len(z)) if g is not None else torch.zeros_like(own))
        rows = [row for row in self._collected.rows if torch.isfinite(row).all()]
        self.refused += len(self._collected.rows) - len(rows)
        if not rows:
            raise ValueError(
                f"{self.name}: expected finite activations of at least one client, got none; stop, or look"
            )
        self._collected.finish(self.rule(torch.stack(rows)))
        self._at = (self._at + 1) % max(map(len, self.sizes))
        return loss / kept, torch.cat([part.to(z.device) for part in parts]).detach() if z.requires_grad else None

    def state_dict(self) -> dict[str, Any]:
        """Return the learner's state and the place in the round."""
        return {"learner": self.learner.state_dict(), "at": self._at, "refused": self.refused}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; the next step is then bit for bit the same."""
        self.learner.load_state_dict(state["learner"])
        self._at, self.refused = state["at"], state["refused"]


def batch_sizes(samples: int, batch_size: int) -> list[int]:
    """Return the sizes of the batches that ``samples`` make, the last one perhaps smaller, as ``Batches`` has them."""
    if samples < 1 or batch_size < 1:
        raise ValueError(f"expected at least one sample and a batch size of 1 or more, got {samples} and {batch_size}")
    return [min(batch_size, samples - start) for start in range(0, samples, batch_size)]


class _Collecting(torch.optim.Optimizer):
    """An optimizer whose step only notes the gradient, until ``finish`` steps with one made of them."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        self.rows: list[Tensor] = []

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters()]
        self.rows.append(torch.cat([g.double().flatten() for g in own]))

    @torch.no_grad()
    def finish(self, gradient: Tensor) -> None:
        parameters = self._parameters()
        total = sum(p.numel() for p in parameters)
        if gradient.shape != (total,):
            raise ValueError(f"expected a rule that returns one gradient [{total}], got shape {tuple(gradient.shape)}")
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
