"""Learning one task after the other: replay, elastic weight consolidation, and what is forgotten.

Both go in at a party: replay in the batches, elasticity before the optimizer's steps. So any protocol, split or
federated, learns with them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from splitlearn.paradigms.hooks import add_before_steps, trained
from splitlearn.party import Learner

__all__ = ["Elastic", "Forgetting", "Replay", "Replayed", "fisher", "forgetting"]


class Replay:
    """A reservoir of samples seen, each with the same chance to be in it.

    (Vitter 1985; for replay Chaudhry et al. 2019, arXiv:1902.10486.) It keeps raw samples of earlier tasks on the
    device: a leak where the device is not trusted, no message more.
    """

    def __init__(self, capacity: int, seed: int):
        if capacity < 1:
            raise ValueError(f"expected room for a sample or more, got {capacity}")
        self.capacity, self.seen = capacity, 0
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []
        self._draws = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Show it a batch."""
        for one, label in zip(x, y, strict=True):
            self.seen += 1
            if len(self.x) < self.capacity:
                self.x.append(one.clone())
                self.y.append(label.clone())
                continue
            place = int(torch.randint(self.seen, (), generator=self._draws))
            if place < self.capacity:
                self.x[place], self.y[place] = one.clone(), label.clone()

    def draw(self, count: int) -> tuple[Tensor, Tensor] | None:
        """Return up to ``count`` samples without replacement, or None where it is empty."""
        if not self.x:
            return None
        rows = torch.randperm(len(self.x), generator=self._draws)[:count].tolist()
        return torch.stack([self.x[row] for row in rows]), torch.stack([self.y[row] for row in rows])

    def state_dict(self) -> dict[str, Any]:
        """Return samples, count and draws."""
        return {"x": list(self.x), "y": list(self.y), "seen": self.seen, "draws": self._draws.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.x, self.y, self.seen = list(state["x"]), list(state["y"]), state["seen"]
        self._draws.set_state(state["draws"])


class Replayed:
    """Batches of the present task with as many samples of earlier ones behind them.

    What is drawn is from before this task: it is shown to the memory by ``remember`` when the task is over.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], memory: Replay, *, share: float = 1.0):
        if not share > 0:
            raise ValueError(f"expected a share above 0 of a batch to replay, got {share}")
        self.batches, self.memory, self.share = batches, memory, share

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch."""
        for x, y in self.batches:
            old = self.memory.draw(max(1, round(self.share * len(x))))
            yield (x, y) if old is None else (torch.cat([x, old[0]]), torch.cat([y, old[1]]))

    def remember(self) -> None:
        """Show this task's samples to the memory, once each."""
        for x, y in self.batches:
            self.memory.add(x, y)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory's state, and that of the batches where they have one."""
        batches = self.batches.state_dict() if hasattr(self.batches, "state_dict") else {}
        return {"memory": self.memory.state_dict(), "batches": batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.memory.load_state_dict(state["memory"])
        if hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(state["batches"])


class Elastic:
    """Holds a party's parameters where earlier tasks need them (EWC, Kirkpatrick et al. 2017, arXiv:1612.00796).

    The loss has λ/2·Σ F·(w − w*)² more, over all tasks that were ``consolidate``d, F their Fisher information. Of a
    split model each party holds its own half, from gradients that it sees anyway.
    """

    def __init__(self, learner: Learner, strength: float):
        if not 0 <= strength < float("inf"):
            raise ValueError(f"{learner.name}: expected a strength of 0 or more, got {strength}")
        self.strength = strength
        self._parameters = trained(learner)
        self._tasks: list[tuple[Sequence[Tensor], list[Tensor]]] = []
        add_before_steps(learner, self._pull)

    def consolidate(self, information: Sequence[Tensor]) -> None:
        """Hold on to the parameters as they are now, each entry by its information; see ``fisher``."""
        if [one.shape for one in information] != [own.shape for own in self._parameters]:
            raise ValueError("expected information of each parameter's shape; take it with fisher(…) of this learner")
        self._tasks.append((list(information), [own.detach().clone() for own in self._parameters]))

    def state_dict(self) -> dict[str, Any]:
        """Return the tasks that were consolidated."""
        return {"tasks": [(list(information), list(own)) for information, own in self._tasks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._tasks = [(list(information), list(own)) for information, own in state["tasks"]]

    def _pull(self) -> list[Tensor] | None:
        if not self._tasks:
            return None
        return [
            sum((self.strength * f[place] * (own - w[place]) for f, w in self._tasks), torch.zeros_like(own))
            for place, own in enumerate(self._parameters)
        ]


def fisher(
    learners: Sequence[Learner], step: Callable[[Tensor, Tensor], object], x: Tensor, y: Tensor
) -> list[list[Tensor]]:
    """Return each learner's empirical Fisher information, a tensor a parameter: its mean squared gradient over samples.

    ``step(x, y)`` is a step of any protocol in which each learner itself, no session of it, steps once; it is made for
    one sample at a time, and moves neither parameters nor buffers. Penalties and corrections are not in it. Labels are
    the true ones (Kirkpatrick et al. draw the model's own: deviation, and common).
    Across a wire it costs one step's messages a sample.
    """
    optimizers = [learner.optimizer for learner in learners]
    sums = [_Squares(trained(learner)) for learner in learners]
    if not len(x) or len(x) != len(y):
        raise ValueError(f"expected a sample or more and as many labels, got {len(x)} and {len(y)}")
    before = [learner.weights() for learner in learners]
    try:
        for learner, own in zip(learners, sums, strict=True):
            learner.optimizer = own
        for one in range(len(x)):
            step(x[one : one + 1], y[one : one + 1])
            if missed := [lr.name for lr, own in zip(learners, sums, strict=True) if own.steps != one + 1]:
                raise ValueError(
                    f"expected a step of each learner a sample, got none, or several, of {', '.join(missed)}; pass the "
                    "learners that the protocol steps, and no others"
                )
    finally:
        for learner, optimizer, weights in zip(learners, optimizers, before, strict=True):
            learner.optimizer = optimizer
            learner.load_weights(weights)
    return [[total / len(x) for total in own.totals] for own in sums]


class _Squares(torch.optim.Optimizer):
    """In an optimizer's place: adds up squared gradients and moves nothing."""

    def __init__(self, parameters: Sequence[Tensor]):
        super().__init__(parameters, {})
        self._parameters = list(parameters)
        self.totals = [torch.zeros_like(own) for own in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for total, own in zip(self.totals, self._parameters, strict=True):
            if own.grad is not None:
                total += own.grad.square()


@dataclass(frozen=True)
class Forgetting:
    """Of a sequence of T tasks: mean accuracy at the end, forgetting and backward transfer over the first T − 1.

    ``learned`` is the mean over all tasks of the accuracy right after each was learned: what was there to forget.
    Forgetting is a task's best accuracy since it was learned and before the last task, less that at the end, −1 to 1
    (Chaudhry et al. 2018, arXiv:1801.10112); backward transfer that at the end less that right after it was learned
    (Lopez-Paz & Ranzato 2017, arXiv:1706.08840).
    """

    accuracy: float
    forgetting: float
    backward_transfer: float
    learned: float


def forgetting(accuracies: Sequence[Sequence[float]]) -> Forgetting:
    """Return what was forgotten: ``accuracies[i][j]`` is that on task j after task i was learned, all T × T of them."""
    tasks = len(accuracies)
    if tasks < 2 or any(len(row) != tasks for row in accuracies):
        raise ValueError(f"expected a square table of accuracies over 2 tasks or more, got {tasks} rows")
    last, old = accuracies[-1], range(tasks - 1)
    best = [max(accuracies[row][task] for row in range(task, tasks - 1)) for task in old]
    return Forgetting(
        sum(last) / tasks,
        sum(best[task] - last[task] for task in old) / (tasks - 1),
        sum(last[task] - accuracies[task][task] for task in old) / (tasks - 1),
        sum(accuracies[task][task] for task in range(tasks)) / tasks,
    )
