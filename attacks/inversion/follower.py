"""Follower: a passive insider, which trains networks of its own beside the training, and a decoder for what crosses."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from attacks.inversion.encoders import stand_in, stepped
from attacks.inversion.insider import Insider
from attacks.inversion.networks import Network
from attacks.inversion.reconstruction import Bounds, auxiliary_inputs, bounded
from splitlearn import Encoder, Kind, Learner, View
from splitlearn.randomness import Randomness

__all__ = ["Decode", "Follower", "Following"]

Stage = Callable[[], nn.Module]

HELD_OUT = 0.15  # share of the auxiliary samples on which no network is trained
TAIL = 0.1  # share of the looks at these, at the end, over which convergence is judged
PACE = 0.05  # weight of a batch in the running mean and variance of the activations


@dataclass(frozen=True, kw_only=True)
class Following:
    """How a passive server trains networks of its own while the training goes on.

    ``stage`` makes the one in the client's place and, in the U shape, ``head`` the one in its head's; None are networks
    of no architecture but the shapes' (``stand_in``). Each training step of the client is followed by
    ``steps_per_batch`` of the server's own (Adam) on ``batch_size`` auxiliary samples.
    """

    stage: Stage | None = None
    head: Stage | None = None
    lr: float = 1e-3
    batch_size: int = 32
    steps_per_batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
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
        parameter = next(server.stage.parameters(), torch.empty(0))
        self.x = auxiliary_inputs(view, at_least=8, device=parameter.device)
        self.y = view.auxiliary_y.to(parameter.device)
        if self.y.shape != self.x.shape[:1] or self.y.is_floating_point():
            raise ValueError(
                f"expected one class label for each of {len(self.x)} auxiliary samples, got {self.y.dtype} of shape "
                f"{tuple(self.y.shape)}; this attack trains on cross-entropy"
            )
        self.settings, self.steps = settings, 0
        self._randomness = Randomness(settings.seed, "follower")
        self._sent: Tensor | None = None
        with self._randomness.own(parameter.device):
            held_out, rest = torch.randperm(len(self.x)).tensor_split([max(1, int(HELD_OUT * len(self.x)))])
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
        if (made := self.stage(self.x[:2]).shape[1:]) != z.shape[1:]:
            raise ValueError(
                f"expected a stage to activations of the shape {z_shape} of those seen, got {tuple(made)}; pass a "
                "stage of the victim's cut, or none"
            )
        self.optimizer = torch.optim.Adam([*self.stage.parameters(), *self.head.parameters()], settings.lr)

    def follow(self, z: Tensor, y: Tensor | None, top: nn.Module) -> None:
        """Take one step of its own, beside the client's ``z`` (and ``y``, where these were sent)."""
        x, own_y = self.batch()
        stepped(self.optimizer, cross_entropy(self.logits(top, self.stage(x)), own_y))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return some auxiliary samples and their labels."""
        rows = torch.randperm(len(self.x))[: self.settings.batch_size].to(self.x.device)
        return self.x[rows], self.y[rows]

    def logits(self, top: nn.Module, z: Tensor) -> Tensor:
        """Return what ``top``, and the head in the U shape, make of activations."""
        logits: Tensor = self.head(top(z))
        return logits

    def top(self) -> nn.Module:
        """Return the server's stage as it is now: a copy, which does not learn."""
        return copy.deepcopy(self.server.stage).requires_grad_(False)

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
        errors, tail = [mean_image, *errors], max(1, int(TAIL * len(errors)))
        return {
            "auxiliary_mse_mean_image": mean_image,
            "training_steps": float(self.steps),
            "converged": float(min(errors[:-tail]) - min(errors) < 0.01 * mean_image),
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


class Decode(nn.Module):
    """From a standardised activation and, where there are ``classes``, a label to an input; starts as the mean image.

    Built from auxiliary inputs ``x`` and the shape of an activation.
    """

    def __init__(self, network: Network, x: Tensor, z_shape: tuple[int, ...], bounds: Bounds | None, classes: int = 0):
        super().__init__()
        self.mean, self.spread = x.mean(0), (x - x.mean(0)).std() + torch.finfo(x.dtype).tiny
        self.network = network.build((z_shape[0] + classes, *z_shape[1:]), tuple(x.shape[1:])).to(x)
        self.classes, self.bounds = classes, bounds

    def unbounded(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the input as it comes, to be trained through."""
        if self.classes and y is not None:  # one channel a class, all ones where it is the label's
            told = one_hot(y, self.classes).to(z).reshape(len(z), self.classes, *[1] * (z.ndim - 2))
            z = torch.cat([z, told.expand(-1, -1, *z.shape[2:])], dim=1)
        return self.mean + self.spread * self.network(z)

    def misfit(self, z: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the mean squared error of what ``z`` decodes to, in units of the inputs' variance."""
        return mse_loss(self.unbounded(z, y), x) / self.spread**2

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the input, in its bounds."""
        return bounded(self.unbounded(z, y), self.bounds)


def _like(x_shape: tuple[int, ...], z: Tensor) -> nn.Module:
    """Return a network to activations like ``z``, which ends in ReLU where none of these is negative."""
    stage = stand_in(x_shape, tuple(z.shape[1:]))
    return stage if (z < 0).any() else stage.append(nn.ReLU())
