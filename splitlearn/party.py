"""Party (what holds a stage), Learner (the honest party) and Guard (what a party does to what it sends)."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["Features", "Guard", "Guards", "Learner", "Party"]

Loss = Callable[[Tensor, Tensor], Tensor]
TURN_SECONDS = 60.0  # how long a session waits for another one that shares its stage


class Party(Protocol):
    """What holds a stage. Honest parties learn; a malicious one keeps these methods and lies."""

    name: str

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's output as a fresh leaf that asks for a gradient; ``backward`` must follow."""

    def backward(self, g: Tensor) -> Tensor | None:
        """Take the gradient of the last output, update, and return the input's gradient if it asked for one."""

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take activations and labels, update, and return the mean loss and, if ``z`` asks for it, its gradient."""

    def label(self, y: Tensor) -> Tensor:
        """Return what this party says its labels are. Local only."""

    def predict(self, x: Tensor) -> Tensor:
        """Return the stage's output in evaluation mode, without a gradient; nothing of the training state moves."""

    def weights(self) -> dict[str, Tensor]:
        """Return clones of parameters and buffers."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over parameters and buffers; names and shapes must match."""


class Guard:
    """What a party does to what it sends: nothing, until a method is overridden.

    ``activation`` and ``penalty`` run inside the graph, so that training goes through them; one that cannot be
    differentiated defines its own straight-through gradient. Randomness comes from torch's global generator,
    which a ``Learner`` swaps for its own.
    """

    def activation(self, z: Tensor) -> Tensor:
        """Return what is sent in place of the activation ``z`` (batch first)."""
        return z

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what is sent in place of the gradient ``g``; ``y`` are the labels where this party knows them."""
        return g

    def label(self, y: Tensor) -> Tensor:
        """Return what is sent in place of the labels ``y``."""
        return y

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Return a scalar added to the loss of the party that sends ``z`` for its input ``x``, or None."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must carry: tensors, numbers, strings and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""


class Guards(Guard):
    """Several guards as one, applied in the order given; their penalties add up."""

    def __init__(self, *guards: Guard):
        self.guards = guards

    def activation(self, z: Tensor) -> Tensor:
        """Return ``z`` passed through every guard."""
        for guard in self.guards:
            z = guard.activation(z)
        return z

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
        return torch.stack(terms).sum() if terms else None

    def state_dict(self) -> dict[str, Any]:
        """Return each guard's state under its position."""
        return {str(number): guard.state_dict() for number, guard in enumerate(self.guards)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        for number, guard in enumerate(self.guards):
            guard.load_state_dict(state[str(number)])


class _Turn:
    """One exchange at a time on a stage that several sessions share, from forward to backward."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: str | None = None

    def take(self, session: str) -> None:
        if self._holder == session:
            return
        if not self._lock.acquire(timeout=TURN_SECONDS):
            raise ValueError(
                f"{session}: waited {TURN_SECONDS:.0f} s for the shared stage, held by {self._holder}; "
                "finish each forward with its backward"
            )
        self._holder = session

    def give(self) -> None:
        if self._holder is not None:
            self._holder = None
            self._lock.release()


class Learner:
    """The honest party: a stage, its optimizer, its guard and its own randomness.

    ``optimizer`` was built over the stage's parameters; None leaves the stage as it is. ``loss(output, label)``
    returns a scalar mean over the batch. ``seed`` starts this party's own generator, from which dropout and
    guards draw; no party's randomness depends on where the others run.
    """

    def __init__(
        self,
        name: str,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        guard: Guard | None = None,
        *,
        loss: Loss = cross_entropy,
        seed: int = 0,
    ):
        self.name = name
        self.stage = stage
        self.optimizer = optimizer
        self.guard = guard if guard is not None else Guard()
        self.loss = loss
        self.steps = 0
        self._rng = _Randomness(seed)
        self._predict_rng = _Randomness(seed + 1_000_003)  # evaluation draws from its own, so that it changes nothing
        self._pending: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._turn = _Turn()

    def forward(self, x: Tensor) -> Tensor:
        """Return the guarded activation as a fresh leaf that asks for a gradient; ``backward`` must follow."""
        self._turn.take(self.name)
        try:
            x = self._leaf(x)
            with self._rng.own(), _explained(self.name, x):
                z = self.stage(x)
                sent = self.guard.activation(z)
                penalty = self.guard.penalty(x, z)
        except BaseException:
            self._turn.give()
            raise
        self._pending = (x, sent, penalty)
        return sent.detach().requires_grad_()

    def backward(self, g: Tensor) -> Tensor | None:
        """Take the gradient of the last activation sent, step, and return the input's gradient if it asked."""
        if self._pending is None:
            raise ValueError(f"{self.name}: expected a forward before this backward; call forward(x) first")
        x, sent, penalty = self._pending
        if g.shape != sent.shape:
            raise ValueError(
                f"{self.name}: expected a gradient of shape {tuple(sent.shape)}, got {tuple(g.shape)}; "
                "return the gradient of the activation that was sent"
            )
        self._pending = None
        try:
            with self._rng.own():
                if sent.requires_grad:
                    outputs, gradients = [sent], [g.to(sent.device)]
                    if penalty is not None and penalty.requires_grad:
                        outputs.append(penalty)
                        gradients.append(torch.ones_like(penalty))
                    self._step(lambda: torch.autograd.backward(outputs, gradients))
                return self.guard.gradient(_gradient(x)) if x.requires_grad else None
        finally:
            self._turn.give()

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss and, if ``z`` asks for it, its guarded gradient, after one optimizer step."""
        self._turn.take(self.name)
        try:
            z = self._leaf(z)
            y = y.to(z.device)
            with self._rng.own():
                with _explained(self.name, z, y):
                    loss = self.loss(self.stage(z), y)
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"{self.name}: expected a finite loss, got {loss.item()} at step {self.steps}; "
                        "lower the learning rate, or look for non-finite inputs"
                    )
                self._step(loss.backward)
                return loss.detach(), self.guard.gradient(_gradient(z), y) if z.requires_grad else None
        finally:
            self._turn.give()

    def label(self, y: Tensor) -> Tensor:
        """Return what this party says its labels are."""
        with self._rng.own():
            return self.guard.label(y)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the guarded output in evaluation mode; the training state, each mode and randomness stay."""
        modes = [(module, module.training) for module in self.stage.modules()]
        self.stage.eval()
        try:
            x = self._leaf(x)
            with self._predict_rng.own(), _explained(self.name, x):
                return self.guard.activation(self.stage(x)).detach()
        finally:
            for module, mode in modes:
                module.training = mode

    def weights(self) -> dict[str, Tensor]:
        """Return clones of parameters and buffers."""
        return {name: tensor.detach().clone() for name, tensor in self.stage.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over parameters and buffers; names and shapes must match."""
        try:
            self.stage.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{self.name}: expected the weights of its own stage; {_one_line(error)}") from error

    def session(self, name: str) -> Self:
        """Return a party that shares this one's stage, optimizer, guard and randomness, with its own pending step.

        The stage serves one exchange at a time, from forward to backward (SplitFed V2).
        """
        other = copy.copy(self)
        other.name, other._pending = name, None
        return other

    def replica(self, name: str) -> Self:
        """Return an independent copy: its own stage, optimizer state, guard and randomness (SplitFed V1)."""
        other = copy.copy(self)
        parts = (self.stage, self.optimizer, self.guard, self._rng, self._predict_rng)
        # One deepcopy of all: the copied optimizer then holds the copied stage's parameters.
        other.stage, other.optimizer, other.guard, other._rng, other._predict_rng = copy.deepcopy(parts)
        other.name, other._pending, other._turn = name, None, _Turn()
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on. Taken between steps, never between forward and backward."""
        if self._pending is not None:
            raise ValueError(f"{self.name}: expected no open step, got a forward without its backward; finish the step")
        return {
            "stage": self.weights(),
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else {},
            "guard": self.guard.state_dict(),
            "rng": self._rng.state_dict(),
            "predict_rng": self._predict_rng.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; the next step is then bit for bit the same."""
        self.load_weights(state["stage"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.guard.load_state_dict(state["guard"])
        self._rng.load_state_dict(state["rng"])
        self._predict_rng.load_state_dict(state["predict_rng"])
        self.steps = state["steps"]
        self._pending = None

    def _leaf(self, x: Tensor) -> Tensor:
        """Return ``x`` on the stage's device, as a leaf that asks for a gradient if and only if ``x`` does."""
        parameter = next(self.stage.parameters(), None)
        leaf = x.detach() if parameter is None else x.detach().to(parameter.device)
        return leaf.requires_grad_(x.requires_grad)

    def _step(self, differentiate: Callable[[], None]) -> None:
        if self.optimizer is None:
            differentiate()
            for parameter in self.stage.parameters():
                parameter.grad = None
        else:
            self.optimizer.zero_grad()
            differentiate()
            self.optimizer.step()
        self.steps += 1


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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.learner.load_state_dict(state)

    def _rows(self, ids: Tensor) -> Tensor:
        if ids.dtype != torch.int64 or ids.ndim != 1:
            raise ValueError(f"{self.name}: expected a row of int64 sample numbers, got {ids.dtype} of {ids.ndim} dims")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.x):
            raise ValueError(f"{self.name}: expected sample numbers below {len(self.x)}, got {int(ids.max())}")
        return self.x[ids]


class _Randomness:
    """A generator state of one party's own, swapped in for torch's global one while that party works.

    The global generator serves one party of this process at a time; threads that wait for a network do not hold it.
    """

    _working = threading.RLock()

    def __init__(self, seed: int):
        self._cpu = torch.Generator().manual_seed(seed).get_state()
        self._cuda: Tensor | None = None
        self._seed = seed

    @contextmanager
    def own(self) -> Iterator[None]:
        cuda = torch.cuda.is_available()
        with self._working:
            outside = torch.get_rng_state()
            torch.set_rng_state(self._cpu)
            if cuda:
                outside_cuda = torch.cuda.get_rng_state()
                if self._cuda is None:
                    torch.cuda.manual_seed(self._seed)
                else:
                    torch.cuda.set_rng_state(self._cuda)
            try:
                yield
            finally:
                self._cpu = torch.get_rng_state()
                torch.set_rng_state(outside)
                if cuda:
                    self._cuda = torch.cuda.get_rng_state()
                    torch.cuda.set_rng_state(outside_cuda)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"cpu": self._cpu.clone(), "seed": self._seed}
        return state if self._cuda is None else {**state, "cuda": self._cuda.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._cpu, self._seed, self._cuda = state["cpu"].clone(), state["seed"], state.get("cuda")


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def _explained(name: str, x: Tensor, y: Tensor | None = None) -> Iterator[None]:
    """Turn torch's errors on a tensor that does not fit into one line that names the party and the fix."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        text = _one_line(error)
        if "out of bounds" in text and y is not None:
            fix = f"expected labels that index the outputs, got labels from {int(y.min())} to {int(y.max())}"
            hint = "match the last layer's width to the number of classes"
        elif "more than 1 value per channel" in text:
            fix, hint = (
                f"expected more than one sample, got a batch of {len(x)}",
                "batch norm needs more: drop_last=True",
            )
        else:
            fix = f"its stage does not fit an input of shape {tuple(x.shape)} and type {x.dtype}"
            hint = "cut one model for all parties, and send what the stage below puts out"
        raise ValueError(f"{name}: {fix} ({text}); {hint}") from error
