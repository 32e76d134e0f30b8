"""The pseudo-client attack: a stage of the server's own, trained through its live top, that a decoder then undoes.

Gao & Zhang 2023, "PCAT: Functionality and data stealing from split learning by pseudo-client attack" (USENIX Security).
The server is honest but curious: it answers bit for bit as the honest one. It holds a few labelled samples and knows
nothing of the client's architecture. After each step of the training it takes one of its own: min over f~ of
cross-entropy(top(f~(x)), y) on auxiliary (x, y), its top as it then is and held still. At the end a decoder learns
f~(x) -> x, and is asked for what the client sent. Deviations:

- the decoder starts as the mean image, keeps the epoch of the least held-out error, and its learning rate follows one
  cycle; activations are standardised by a running mean and variance of the client's, so that a channel which is dead in
  the pseudo-client alone does not drown the rest;
- the auxiliary batch is drawn at random, whatever the labels of the client's batch;
- in the U shape the server simulates the client's head too, and trains it with f~.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from attacks.inversion.encoders import stand_in
from attacks.inversion.insider import Insider
from attacks.inversion.networks import Dense, Network
from attacks.inversion.reconstruction import Bounds, Reconstruction, auxiliary_inputs, bounded, seeded
from splitlearn import Encoder, Kind, Learner, View
from splitlearn.randomness import Randomness

__all__ = ["PCAT", "Decode", "Follower", "Following", "stepped"]

Stage = Callable[[], nn.Module]

AFFINE = Dense(depth=0)
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


@dataclass(frozen=True)
class PCAT(Following):
    """Labelled auxiliary samples. Trains a pseudo-client through the live server, then a decoder (``network``).

    The decoder is affine unless told otherwise: of the sizes tried, that one carries over from the pseudo-client to the
    client best. ``decoder_lr`` is the greatest learning rate of its cycle. ``bounds`` are the least and greatest value
    of an input, None where these are not known.
    """

    network: Network = AFFINE
    epochs: int = 30
    decoder_lr: float = 3e-3
    bounds: Bounds | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or not self.decoder_lr > 0:
            raise ValueError(
                f"expected at least one epoch and decoder_lr > 0, got {self.epochs} and {self.decoder_lr}; leave them "
                "out for the defaults"
            )

    def insider(self, server: Learner, view: View) -> "Follower":
        """Return the party that takes the server's place."""
        return _PseudoClient(self, server, view)


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


class _PseudoClient(Follower):
    settings: PCAT

    def __call__(self, view: View) -> Reconstruction:
        """Return what a decoder of the pseudo-client makes of the activations.

        ``evidence`` holds its error on held-out auxiliary samples through the pseudo-client, that of the mean image
        beside it, and ``converged`` where the last tenth of the epochs lowered it by less than 1 % of the mean image's.
        It cannot tell how near the pseudo-client came to the client.
        """
        z = view.activations().to(self.x)
        self.labels(z)  # an error where these are not the training's
        with seeded(self.settings.seed, z.device):
            decode = Decode(self.settings.network, self.x, tuple(z.shape[1:]), self.settings.bounds)
            errors = self._undone(decode)
        with torch.no_grad():
            x_hat = torch.cat([decode(self.running.standardised(part)) for part in z.split(256)])
        return Reconstruction(x_hat, {"auxiliary_mse": min(errors), **self.evidence(errors[0], errors[1:])})

    def _undone(self, decode: Decode) -> list[float]:
        """Train, keep the best epoch, and return the held-out error before and after each."""
        settings, (x, _) = self.settings, self.held_out
        encoder = Encoder(self.stage)
        with torch.no_grad():
            made, held_out = (self.running.standardised(encoder(samples)) for samples in (self.x, x))
        optimizer = torch.optim.Adam(decode.parameters(), settings.decoder_lr)
        steps = settings.epochs * -(-len(self.x) // settings.batch_size)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.decoder_lr, total_steps=steps)
        errors, best = [mse_loss(decode(held_out), x).item()], copy.deepcopy(decode.state_dict())
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(made)).to(made.device).split(settings.batch_size):
                stepped(optimizer, decode.misfit(made[rows], self.x[rows]))
                cycle.step()
            with torch.no_grad():
                errors.append(mse_loss(decode(held_out), x).item())
            if errors[-1] < min(errors[:-1]):
                best = copy.deepcopy(decode.state_dict())
        decode.load_state_dict(best)
        return errors


def stepped(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take a step down the gradient of ``loss``."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _like(x_shape: tuple[int, ...], z: Tensor) -> nn.Module:
    """Return a network to activations like ``z``, which ends in ReLU where none of these is negative."""
    stage = stand_in(x_shape, tuple(z.shape[1:]))
    return stage if (z < 0).any() else stage.append(nn.ReLU())
