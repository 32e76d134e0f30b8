"""Follower: a passive insider, which trains networks of its own beside the training, and a decoder for what crosses."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attacks.inversion.encoders import guarded, stand_in, stepped
from attacks.inversion.insider import Infiltration, Insider
from attacks.inversion.judging import converged, parted
from attacks.inversion.reconstruction import Bounds, auxiliary_inputs, auxiliary_labels, check_bounds
from splitlearn import Encoder, Guard, Kind, Learner, View
from splitlearn.randomness import Randomness

__all__ = ["Follower", "Following"]

Stage = Callable[[], nn.Module]

PACE = 0.05  # weight of a batch in the running mean and variance of the activations


@dataclass(frozen=True, kw_only=True)
class Following(Infiltration):
    """How a passive server trains networks of its own while the training goes on.

    ``stage`` makes the one in the client's place and, in the U shape, ``head`` the one in its head's; None are networks
    of no architecture but the shapes' (``stand_in``). Each training step of the client is followed by
    ``steps_per_batch`` of the server's own (Adam) on ``batch_size`` auxiliary samples. ``bounds`` are the least and
    greatest value of an input, None where these are not known.

    ``guard`` is what the client is known to do to its activations, of the same shape before and after, and to its loss:
    simulated activations pass through it, and its penalty is added to the simulator's loss (as SDAR's authors do
    against NoPeek).
    """

    stage: Stage | None = None
    head: Stage | None = None
    lr: float = 1e-3
    batch_size: int = 32
    steps_per_batch: int = 1
    bounds: Bounds | None = (0.0, 1.0)
    guard: Guard = field(default_factory=Guard)
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        if not self.lr > 0 or min(self.batch_size, self.steps_per_batch) < 1:
            raise ValueError(
                f"expected lr > 0, at least one sample a batch and one step, got {self.lr}, {self.batch_size} and "
                f"{self.steps_per_batch}; leave them out for the defaults"
            )


class Follower(Insider):
    """Answers as the honest server does, and takes steps of its own after each step of the training.

    A step of the training is a ``learn``, or a ``forward`` and its ``backward``. What it does touches neither the
    server's stage, of which it holds copies, nor any randomness but its own. Networks are built once the first
    activation tells their shapes.
    """

    stage: nn.Module  # f~, and the head that it simulates: nothing where the server is sent the labels
    head: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, settings: Following, server: Learner, view: View):
        super().__init__(server)
        view.tensors(Kind.ACTIVATION)  # an error where the threat does not let it read them
        like = next(server.stage.parameters(), None)
        self.x = auxiliary_inputs(view, at_least=8, like=like, bounds=settings.bounds)
        self.y = auxiliary_labels(view, self.x.device)
        self.guard = settings.guard.simulated()
        self.settings, self.steps = settings, 0
        self._randomness = Randomness(settings.seed, "follower")
        self._sent: Tensor | None = None
        with self._randomness.own(self.x.device):
            held_out, rest = parted(len(self.x), self.x.device)
        self.x, self.y, self.held_out = self.x[rest], self.y[rest], (self.x[held_out], self.y[held_out])

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the honest answer, and follow."""
        answer = super().learn(z, y)
        self._followed(z, y)
        return answer

    def forward(self, x: Tensor) -> Tensor:
        """Return the honest answer, and keep what was sent until its gradient comes."""
        output = super().forward(x)
        self._sent = x
        return output

    def backward(self, g: Tensor) -> Tensor | None:
        """Return the honest answer, and follow."""
        answer = super().backward(g)
        if self._sent is not None:
            sent, self._sent = self._sent, None
            self._followed(sent, None)
        return answer

    def build(self, z: Tensor, output: Tensor, *, labelled: bool) -> None:
        """Make the networks for activations like ``z``, which the server's stage turns into ``output``."""
        x_shape, z_shape, flat = tuple(self.x.shape[1:]), tuple(z.shape[1:]), output[0].numel()
        settings, classes = self.settings, int(self.y.max()) + 1
        self.stage = settings.stage() if settings.stage else _like(x_shape, z)
        self.head = nn.Identity()
        if not labelled:
            self.head = settings.head() if settings.head else stand_in((flat,), (classes,))
        self.stage.to(self.x), self.head.to(self.x)
        if (made := self.guard.activation(self.stage(self.x[:2])).shape[1:]) != z.shape[1:]:
            raise ValueError(
                f"expected a stage to activations of the shape {z_shape} of those seen, got {tuple(made)}; pass a "
                "stage of the victim's cut, or none"
            )
        self.optimizer = torch.optim.Adam([*self.stage.parameters(), *self.head.parameters()], settings.lr)

    def follow(self, z: Tensor, y: Tensor | None, top: nn.Module) -> None:
        """Take one step of its own, beside the client's ``z`` (and ``y``, where these were sent)."""
        loss, _ = self.simulated(top, *self.batch())
        stepped(self.optimizer, loss)

    def simulated(self, top: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss that the client would have on (x, y), its guard's penalty included, and what it would send.

        Raises ``ValueError`` for labels that the top has no output for.
        """
        z = self.stage(x)
        made = self.guard.activation(z)
        logits, penalty = self.logits(top, made), self.guard.penalty(x, z)
        if (most := int(y.max())) >= logits.shape[1]:
            raise ValueError(
                f"{self.name}: expected auxiliary labels from 0 to {logits.shape[1] - 1}, as the outputs, got {most}; "
                "grant labels of the classes that the client trains for"
            )
        loss = cross_entropy(logits, y)
        return loss if penalty is None else loss + penalty, made

    @torch.no_grad()
    def made(self, x: Tensor) -> Tensor:
        """Return simulated activations of ``x``, through the guard, in evaluation mode."""
        z: Tensor = Encoder(guarded(self.stage, self.guard))(x)
        return z

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return some auxiliary samples and their labels."""
        rows = torch.randperm(len(self.x))[: self.settings.batch_size].to(self.x.device)
        return self.x[rows], self.y[rows]

    def logits(self, top: nn.Module, z: Tensor) -> Tensor:
        """Return what ``top``, and the head in the U shape, make of activations."""
        logits: Tensor = self.head(top(z))
        return logits

    def top(self) -> nn.Module:
        """Return the server's stage as it is now: a copy in evaluation mode, which does not learn."""
        return copy.deepcopy(self.server.stage).requires_grad_(False).eval()

    @torch.no_grad()
    def labels(self, z: Tensor) -> Tensor:
        """Return the label of each activation by the server's stage and, in the U shape, the head that it simulates.

        Raises ``ValueError`` where no training was followed, or one of activations of another shape.
        """
        if not self.steps:
            raise ValueError(
                f"{self.name}: expected to have taken part in a training, got no step; train with the insider in the "
                "server's place, then call it"
            )
        if z.shape[1:] != self._shape:
            raise ValueError(
                f"{self.name}: expected activations of the shape {tuple(self._shape)} of the training, got "
                f"{tuple(z.shape[1:])}; record the wire of the same cut"
            )
        return Encoder(nn.Sequential(self.server.stage, self.head))(z.to(self.x)).argmax(1)

    def evidence(self, mean_image: float, errors: Sequence[float]) -> dict[str, float]:
        """Return the signs that it was tried, by the held-out errors in turn and that of the mean image."""
        return {
            "auxiliary_mse_mean_image": mean_image,
            "training_steps": float(self.steps),
            "converged": converged([mean_image, *errors]),
        }

    def _followed(self, z: Tensor, y: Tensor | None) -> None:
        z = z.detach().to(self.x.device).clone()
        with self._randomness.own(self.x.device):
            top = self.top()
            if not self.steps:
                self.x, self.held_out = self.x.to(z), (self.held_out[0].to(z), self.held_out[1])
                self.running, self._shape = Running(z), z.shape[1:]
                self.build(z, top(z), labelled=y is not None)
            self.running.look_at(z)
            for _ in range(self.settings.steps_per_batch):
                self.follow(z, y if y is None else y.to(z.device), top)
        self.steps += 1


class Running:
    """Mean and variance of the client's activations, one a channel, of which the last batches weigh most."""

    def __init__(self, z: Tensor):
        self.over = [0, *range(2, z.ndim)]  # or one a column, where there are no places
        self.mean, self.square = (power.mean(self.over, keepdim=True) for power in (z, z.square()))

    def look_at(self, z: Tensor) -> None:
        """Move towards these activations'."""
        self.mean = self.mean.lerp(z.mean(self.over, keepdim=True), PACE)
        self.square = self.square.lerp(z.square().mean(self.over, keepdim=True), PACE)

    def standardised(self, z: Tensor) -> Tensor:
        """Return activations, the client's or simulated ones, in units of the client's; a dead channel stays small."""
        variance = (self.square - self.mean.square()).clamp(min=0)
        return (z - self.mean) / (variance + 1e-2 * variance.mean() + torch.finfo(z.dtype).tiny).sqrt()


def _like(x_shape: tuple[int, ...], z: Tensor) -> nn.Module:
    """Return a network to activations like ``z``, which ends in ReLU where none of these is negative."""
    stage = stand_in(x_shape, tuple(z.shape[1:]))
    return stage if (z < 0).any() else stage.append(nn.ReLU())
