"""Gradient matching: how far a candidate's gradient is from the one seen, and the way down to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from attacks.gradients.updates import Update, some
from attacks.inversion.reconstruction import Bounds, Reconstruction, bounded, seeded
from splitlearn.misfit import MISFITS

__all__ = ["Attempt", "Matched", "check_attempts", "descended", "rebuilt", "signed_adam"]

CHUNK = 20  # iterations of L-BFGS between two looks at how it goes
STALLED = 0.99  # it stops where a chunk leaves more than this of the objective
EXACT = 1e-20  # of the gradient's square: closer says no more of an input (rounding alone makes 1e-26)
DECAYS = (3 / 8, 5 / 8, 7 / 8)  # of Adam's iterations, after which its step falls to a tenth (Geiping et al. 2020)
TAIL = 0.1  # share of Adam's iterations at the end over which convergence is judged


class Matched:
    """The gradient that was seen of ``model``, or of a part, in ``dtype``; and what another input's would be."""

    def __init__(self, model: nn.Module, update: Update, dtype: torch.dtype | None = None):
        self._model, self.count = model, update.count
        own = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if missing := [name for name in own if name not in update.weights]:
            raise LookupError(
                f"expected the update of a whole model, got nothing of {', '.join(missing)}; a server that sees the "
                "bottom's alone uses BottomGradientMatching, servers that collude put theirs together"
            )
        names = [name for name in own if name in update.gradient]
        weights = {name: _cast(update.weights[name], dtype) for name in model.state_dict() if name in update.weights}
        self._weights = weights | {name: weights[name].requires_grad_() for name in names}
        self._parameters = [self._weights[name] for name in names]
        self._seen = [_cast(update.gradient[name], dtype) for name in names]
        self.square = sum(g.square().sum().item() for g in self._seen)
        if not (names and isfinite(self.square) and self.square > 0):
            raise ValueError(
                "expected a finite gradient of the model's parameters that is not all 0, got none; the names must be "
                "the model's own, and a member that learned nothing gives nothing away"
            )
        self.device, self.dtype = self._parameters[0].device, self._parameters[0].dtype
        self.sent = update.gradient[names[0]].dtype

    def noise(self, input_shape: tuple[int, ...]) -> Tensor:
        """Return a start: normal inputs, as many as are behind the update, which ask for a gradient."""
        return torch.randn(self.count, *input_shape, device=self.device, dtype=self.dtype).requires_grad_()

    def output(self, x: Tensor) -> Tensor:
        """Return what the model, or the part of it, puts out; ``ValueError`` where it takes no such inputs."""
        try:
            return functional_call(self._model, self._weights, (x,))
        except torch.OutOfMemoryError:
            raise
        except MISFITS as error:
            told = " ".join(str(error).split())
            raise ValueError(
                f"expected the shape of one input that the model takes, got {tuple(x.shape[1:])} ({told}); set "
                "input_shape to that of the members' inputs"
            ) from error

    def gradient(self, output: Tensor, g: Tensor | None = None) -> list[Tensor]:
        """Return the parameters' gradient of a loss, or of an output under ``g``, to be differentiated again."""
        return list(torch.autograd.grad(output, self._parameters, g, create_graph=True))

    def of(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the gradient of the mean cross-entropy; ``y`` are labels [N], or shares of each class [N, C]."""
        return self.gradient(cross_entropy(self.output(x), y))

    def misfit(self, gradient: Sequence[Tensor]) -> Tensor:
        """Return the squared distance to the gradient seen, in units of its square."""
        return torch.stack([(a - b).square().sum() for a, b in zip(gradient, self._seen, strict=True)]).sum() / (
            self.square
        )

    def cosine_distance(self, gradient: Sequence[Tensor]) -> Tensor:
        """Return 1 less the cosine to the gradient seen, from 0 to 2."""
        dot = torch.stack([(a * b).sum() for a, b in zip(gradient, self._seen, strict=True)]).sum()
        square = torch.stack([a.square().sum() for a in gradient]).sum()
        return 1 - dot / (square * self.square + torch.finfo(dot.dtype).tiny).sqrt()


@dataclass(frozen=True)
class Attempt:
    """One descent: the inputs, their labels where they were found, the objective at both ends, whether it was done."""

    x: Tensor
    labels: Tensor | None
    first: float
    last: float
    converged: bool


def descended(objective: Callable[[], Tensor], variables: Sequence[Tensor], iterations: int) -> tuple[float, bool]:
    """Minimise by L-BFGS with a strong Wolfe search, in place; return the objective, and whether it came to rest.

    It rests where it is exact, or stalls. A chunk that went up, or off the numbers, is taken back.
    """

    def closure() -> float:
        value = objective()
        for variable, g in zip(variables, torch.autograd.grad(value, variables), strict=True):
            variable.grad = g
        return value.item()

    optimizer = torch.optim.LBFGS(
        variables, max_iter=CHUNK, history_size=100, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    value = closure()
    for _ in range(-(-iterations // CHUNK)):
        before, kept = value, [variable.detach().clone() for variable in variables]
        optimizer.step(closure)
        value = objective().item()
        if not value <= before:
            with torch.no_grad():
                for variable, old in zip(variables, kept, strict=True):
                    variable.copy_(old)
            return (before if isfinite(before) else inf), True
        if value > STALLED * before or value < EXACT:
            return value, True
    return value, False


def signed_adam(
    objective: Callable[[], Tensor],
    x: Tensor,
    others: Sequence[Tensor],
    *,
    iterations: int,
    lr: float,
    other_lr: float,
    bounds: Bounds | None,
) -> tuple[list[float], bool]:
    """Minimise by Adam, in place, on the sign of the gradient in ``x`` and on that in the ``others`` as it is.

    Return the objective at each iteration, and whether the tail lowered it by less than 1 % of the first.
    """
    groups: list[dict[str, Any]] = [{"params": [x]}, {"params": list(others), "lr": other_lr}]
    adam = torch.optim.Adam(groups, lr)
    decay = torch.optim.lr_scheduler.MultiStepLR(adam, [int(part * iterations) for part in DECAYS], 0.1)
    trace = []
    for _ in range(iterations):
        value = objective()
        slope, *slopes = torch.autograd.grad(value, [x, *others])
        x.grad = slope.sign()
        for other, g in zip(others, slopes, strict=True):
            other.grad = g
        adam.step()
        decay.step()
        with torch.no_grad():
            x.copy_(bounded(x, bounds))
        trace.append(value.item())
    trace.append(objective().item())
    tail = max(1, int(TAIL * iterations))
    return trace, trace[-1 - tail] - trace[-1] < 0.01 * trace[0]


def _best_of(attempt: Callable[[], Attempt], restarts: int, enough: float) -> tuple[Attempt, int]:
    """Return the attempt of the least objective, and how many were made: no more once one is at most ``enough``."""
    best = attempt()
    for made in range(1, restarts):
        if best.last <= enough:
            return best, made
        best = min(best, attempt(), key=lambda one: one.last)
    return best, restarts


def _reconstruction(found: Sequence[tuple[Attempt, int]], bounds: Bounds | None) -> Reconstruction:
    """Return the inputs of all updates, and what speaks for them: objectives a mean over updates, and the worst."""
    attempts = [attempt for attempt, _ in found]
    evidence: dict[str, float | str] = {
        "objective_first": mean(one.first for one in attempts),
        "objective_last": mean(one.last for one in attempts),
        "objective_worst": max(one.last for one in attempts),
        "attempts": mean(made for _, made in found),
        "converged": float(all(one.converged for one in attempts)),
    }
    labels = [one.labels for one in attempts if one.labels is not None]
    if labels:
        evidence["labels"] = " ".join(map(str, torch.cat(labels).tolist()))
    return Reconstruction(bounded(torch.cat([one.x for one in attempts]), bounds), evidence)


def rebuilt(
    updates: Sequence[Update],
    model: nn.Module,
    begun: Callable[[Matched, Update], Callable[[], Attempt]],
    *,
    restarts: int,
    enough: float,
    bounds: Bounds | None,
    seed: int,
    dtype: torch.dtype | None = None,
) -> Reconstruction:
    """Return the inputs behind each update: the best of several attempts; ``begun`` returns how to make one."""
    found = []
    for update in some(updates):
        matched = Matched(model, update, dtype)
        attempt = begun(matched, update)
        with seeded(seed, matched.device):
            found.append(_best_of(attempt, restarts, enough))
    return _reconstruction(found, bounds)


def check_attempts(iterations: int, restarts: int) -> None:
    """Raise ``ValueError`` where there is nothing to do."""
    if iterations < 1 or restarts < 1:
        raise ValueError(
            f"expected at least one iteration and one attempt, got {iterations} and {restarts}; leave them out for the "
            "defaults"
        )


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor.detach().clone()
    return cast.to(dtype) if dtype is not None and cast.is_floating_point() else cast
