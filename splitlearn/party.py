"""Party (what holds a stage) and Learner (the honest party)."""

import copy
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitlearn.guard import Guard, Guards
from splitlearn.misfit import MISFITS, Refused, why_no_loss, why_no_output
from splitlearn.randomness import Randomness
from splitlearn.turn import Turn

__all__ = ["Guard", "Guards", "Learner", "Loss", "Party"]

Loss = Callable[[Tensor, Tensor], Tensor]


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


class Learner:
    """The honest party: a stage, its optimizer, its guard and its own randomness.

    ``optimizer`` was built over the stage's parameters; None leaves the stage as it is. ``loss(output, label)``
    returns a scalar mean over the batch. ``seed`` and ``name`` start this party's own generator, from which
    dropout and guards draw; no party's randomness depends on where the others run. Without a seed it is 0, or drawn by
    chance where the guard's noise must stay secret (``Guard.secret``): who knows it draws the same noise.

    A step that was begun by ``forward`` and has not come ``backward`` is open. The next ``forward`` or ``learn``
    gives it up, and so does ``abandon``.
    """

    def __init__(
        self,
        name: str,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        guard: Guard | None = None,
        *,
        loss: Loss = cross_entropy,
        seed: int | None = None,
    ):
        self.name = name
        self.stage = stage
        self.optimizer = optimizer
        self.guard = guard if guard is not None else Guard()
        self.loss = loss
        self.steps = 0
        self._pending: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._turn = Turn()
        if not isinstance(self.guard, Guard):
            raise ValueError(f"{name}: expected a Guard, got {self.guard!r}; subclass splitlearn.Guard and pass one")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"{name}: expected an optimizer over the stage's parameters, got {optimizer!r}")
        if optimizer is not None:
            _check_owned(name, stage, optimizer)
        if seed is None:
            seed = secrets.randbits(48) if self.guard.secret else 0
        self._rng = Randomness(seed, name)
        self._predict_rng = Randomness(seed, name, "evaluation")  # of its own, so that evaluation changes nothing

    def forward(self, x: Tensor) -> Tensor:
        """Return the guarded activation as a fresh leaf that asks for a gradient; ``backward`` must follow."""
        self._check_gradients_on()
        self._turn.take(self)
        try:
            x = self._leaf(x)
            with self._rng.own(x.device):
                z = self._output(x)
                sent = self.guard.activation(z)
                if not isinstance(sent, Tensor) or len(sent) != len(z):
                    raise ValueError(
                        f"{self.name}: expected {self.guard!r} to return what is sent for {len(z)} samples, got "
                        f"{f'a tensor of shape {tuple(sent.shape)}' if isinstance(sent, Tensor) else repr(sent)}"
                    )
                penalty = self.guard.penalty(x, z)
            if z.requires_grad and not sent.requires_grad and (self.optimizer is not None or x.requires_grad):
                raise ValueError(
                    f"{self.name}: expected a guard that can be differentiated, but what it sends has no gradient; "
                    "go straight through: z + (sent - z).detach()"
                )
            if penalty is not None:
                self._check_number(penalty, "penalty")
            self._pending = (x, sent, penalty)
            return sent.detach().requires_grad_()
        except BaseException:
            self._turn.give(self)
            raise

    def backward(self, g: Tensor) -> Tensor | None:
        """Take the gradient of the last activation sent, step, and return the input's gradient if it asked."""
        if not self._turn.keep(self) or self._pending is None:
            raise ValueError(
                f"{self.name}: expected an open step, begun by forward; call forward(x) first (a step that keeps "
                "other sessions of its stage waiting too long is given up)"
            )
        x, sent, penalty = self._pending
        if g.shape != sent.shape:
            raise ValueError(
                f"{self.name}: expected a gradient of shape {tuple(sent.shape)}, got {tuple(g.shape)}; "
                "return the gradient of the activation that was sent"
            )
        if not (g.is_floating_point() and _is_finite(g)):
            raise ValueError(
                f"{self.name}: expected a finite floating-point gradient, got {g.dtype} with nan or inf, or of another "
                "type; the party above has diverged, or lies"
            )
        self._pending = None
        try:
            with self._rng.own(x.device):
                outputs, gradients = [], []
                if sent.requires_grad:
                    outputs, gradients = [sent], [g.to(sent.device)]
                if penalty is not None and penalty.requires_grad:
                    outputs.append(penalty)
                    gradients.append(torch.ones_like(penalty))
                if outputs:
                    self._step(outputs, gradients)
                return self.guard.gradient(_gradient(x)) if x.requires_grad else None
        finally:
            self._turn.give(self)

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss and, if ``z`` asks for it, its guarded gradient, after one optimizer step."""
        self._check_gradients_on()
        if self.guard.penalises:
            raise ValueError(
                f"{self.name}: expected a guard without a penalty on a party that learns, got {self.guard!r}; put it "
                "on the party that sends the activation"
            )
        self._turn.take(self)
        try:
            z = self._leaf(z)
            y = y.to(z.device)
            with self._rng.own(z.device):
                loss = self._mean_loss(self._output(z), y)
                if loss.requires_grad:
                    self._step([loss], [torch.ones_like(loss)])
                return loss.detach(), self.guard.gradient(_gradient(z), y) if z.requires_grad else None
        finally:
            self._turn.give(self)

    def abandon(self) -> None:
        """Give up the open step, if there is one: its backward will not come."""
        self._pending = None
        self._turn.give(self)

    def label(self, y: Tensor) -> Tensor:
        """Return what this party says its labels are."""
        with self._rng.own(y.device):
            return self.guard.label(y)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the guarded output in evaluation mode; the training state, each mode and randomness stay.

        It waits for no turn: an open step of a shared stage neither changes it nor is changed by it.
        """
        x = self._leaf(x)
        with self._predict_rng.own(x.device):  # nobody trains meanwhile, so that nobody sees the other mode
            modes = [(module, module.training) for module in self.stage.modules()]
            self.stage.eval()
            try:
                return self.guard.prediction(self._output(x)).detach()
            finally:
                for module, mode in modes:
                    module.training = mode

    def weights(self) -> dict[str, Tensor]:
        """Return clones of parameters and buffers."""
        return {name: tensor.detach().clone() for name, tensor in self.stage.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over parameters and buffers; names and shapes must match, or nothing is taken."""
        own = self.stage.state_dict()
        wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
        wrong += [name for name in weights if name not in own]
        if wrong:
            name = wrong[0]
            wanted, got = (tuple(side[name].shape) if name in side else "none" for side in (own, weights))
            more = f" and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
            raise ValueError(
                f"{self.name}: expected the weights of its own stage, {name!r} of shape {wanted}, got {got}{more}; "
                "cut one model for all parties"
            )
        self.stage.load_state_dict(weights)

    def session(self, name: str) -> Self:
        """Return a party that shares this one's stage, optimizer, guard and randomness, with its own open step.

        The stage serves one exchange at a time, from forward to backward (SplitFed V2); see ``Turn``.
        """
        other = copy.copy(self)
        other.name, other._pending = name, None
        return other

    def replica(self, name: str) -> Self:
        """Return an independent copy: its own stage, optimizer state and guard (SplitFed V1).

        Its randomness is its own too, so that no two replicas draw the same noise.
        """
        other = copy.copy(self)
        # One deepcopy of all: the copied optimizer then holds the copied stage's parameters.
        other.stage, other.optimizer, other.guard = copy.deepcopy((self.stage, self.optimizer, self.guard))
        other._rng, other._predict_rng = self._rng.fork(name), self._predict_rng.fork(name)
        other.name, other._pending, other._turn = name, None, Turn()
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on. Taken between steps, never between forward and backward."""
        if self._turn.taken:
            raise ValueError(
                f"{self.name}: expected no open step, got a forward without its backward; finish it or abandon() it"
            )
        return {
            "stage": self.weights(),
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else {},
            "guard": self.guard.state_dict(),
            "rng": self._rng.state_dict(),
            "predict_rng": self._predict_rng.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; the next step is then bit for bit the same. Open steps are void."""
        self._load_training(state)
        self.guard.load_state_dict(state["guard"])
        self._rng.load_state_dict(state["rng"])
        self._predict_rng.load_state_dict(state["predict_rng"])

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned, but for the randomness, which goes on: no noise is drawn twice."""
        self._load_training(state)
        self.guard.put_back(state["guard"])

    def _load_training(self, state: Mapping[str, Any]) -> None:
        if bool(state["optimizer"]) != (self.optimizer is not None):
            wanted, got = ("an", "none") if self.optimizer is not None else ("no", "one")
            raise ValueError(
                f"{self.name}: expected the state of {wanted} optimizer, got {got}; resume with the same parties"
            )
        self.load_weights(state["stage"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.steps = state["steps"]
        self._pending = None
        self._turn.void()

    def _leaf(self, x: Tensor) -> Tensor:
        """Return ``x`` on the stage's device, as a leaf that asks for a gradient if and only if ``x`` does."""
        parameter = next(self.stage.parameters(), None)
        leaf = x.detach() if parameter is None else x.detach().to(parameter.device)
        return leaf.requires_grad_(x.requires_grad)

    def _output(self, x: Tensor) -> Tensor:
        try:
            output = self.stage(x)
        except torch.OutOfMemoryError:
            raise
        except Refused as error:
            raise ValueError(f"{self.name}: {error}") from error
        except MISFITS as error:
            raise ValueError(f"{self.name}: {why_no_output(x, error)}") from error
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{self.name}: expected a stage that puts out one tensor, got a {type(output).__name__}; "
                "make a layer of your own that returns what is to cross"
            )
        return output

    def _mean_loss(self, output: Tensor, y: Tensor) -> Tensor:
        if not output.numel():
            raise ValueError(
                f"{self.name}: expected a batch of at least one sample, got outputs of shape {tuple(output.shape)}; "
                "skip empty batches, which have no mean loss"
            )
        if self.loss is cross_entropy and bool((y == -100).any()):
            raise ValueError(  # which torch would leave out without a word
                f"{self.name}: expected labels of 0 or more, got -100; leave out samples without a label"
            )
        try:
            loss = self.loss(output, y)
        except MISFITS as error:
            raise ValueError(f"{self.name}: {why_no_loss(output, y, error)}") from error
        self._check_number(loss, "loss")
        if output.requires_grad and not loss.requires_grad:
            raise ValueError(f"{self.name}: expected a loss that can be differentiated, got one without a gradient")
        return loss

    def _check_gradients_on(self) -> None:
        if not torch.is_grad_enabled():
            raise ValueError(
                f"{self.name}: expected to train with gradients on, got torch.no_grad(), under which nothing would be "
                "learned; leave it, or call predict"
            )

    def _check_number(self, value: Tensor, what: str) -> None:
        if value.numel() != 1:
            raise ValueError(
                f"{self.name}: expected a {what} of one number, got shape {tuple(value.shape)}; "
                "take the mean over the batch"
            )
        if not torch.isfinite(value):
            raise ValueError(
                f"{self.name}: expected a finite {what}, got {value.item()} at step {self.steps}; "
                "lower the learning rate, or look for non-finite inputs"
            )

    def _step(self, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        """Differentiate and update: ``gradients`` are those of the loss in ``outputs``."""
        if self.optimizer is None:
            torch.autograd.backward(outputs, gradients)
            for parameter in self.stage.parameters():
                parameter.grad = None
        else:
            self.optimizer.zero_grad()
            torch.autograd.backward(outputs, gradients)
            self.optimizer.step()
        self.steps += 1


def _is_finite(g: Tensor) -> bool:
    # A sum shows every nan and inf, at a tenth of the time; where it overflows itself, each entry is looked at.
    return math.isfinite(g.sum(dtype=torch.promote_types(g.dtype, torch.float32)).item()) or bool(
        torch.isfinite(g).all()
    )


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def _check_owned(name: str, stage: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(parameter) for parameter in stage.parameters()}
    foreign = sum(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"])
    if foreign:
        raise ValueError(
            f"{name}: expected an optimizer of its own stage's parameters, got {foreign} of another module; "
            "build it over stage.parameters(), after any deepcopy of the stage"
        )
