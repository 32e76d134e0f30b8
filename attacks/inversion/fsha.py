"""FSHA: a malicious server that trains the client's stage into the encoder of its own autoencoder.

Pasquini, Ateniese & Bernaschi 2021, "Unleashing the tiger: inference attacks on split learning" (CCS,
arXiv:2012.02670). The attacker has unlabelled samples of its own. On these it trains a pilot (input -> activation) and
a decoder (activation -> input) as an autoencoder. A critic (WGAN-GP) learns to tell the pilot's activations from the
client's, and the client is sent the gradient by which its activations look more like the pilot's: the decoder then
reads these too. For property inference a classifier of some attribute reads them. Deviations:

- the pilot's activations are scaled to a multiple of the spread of the first batch that the client sent, and a pilot of
  no known architecture ends in a ReLU where that batch has no negative entry: no client is pulled to what it cannot
  reach;
- for property inference the decoder stays, beside the classifier: pilots that keep nothing but the attribute can be
  followed the wrong way round;
- the decoder starts as the mean image, and its error is in units of the inputs' variance;
- with ``guard`` the pilot's activations pass, once scaled, through what the client does to its own, so that critic and
  decoder see the two alike. The paper has no defense; that an attack is to be judged by what knows the defense is
  Tramèr et al. 2020, arXiv:2002.08347;
- learning rates and penalty suit small networks (the paper: 1e-5 for the client and the autoencoder, 1e-4 for the
  critic, 500), and the critic's optimizer has Adam's β at 0.5 and 0.9.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from attacks.inversion.decode import Decode
from attacks.inversion.encoders import Critic, gradient_penalty, guarded, stand_in, stepped
from attacks.inversion.insider import Infiltration, Insider
from attacks.inversion.judging import fall, parted, tail
from attacks.inversion.networks import Dense, Network, suited
from attacks.inversion.reconstruction import (
    Bounds,
    Reconstruction,
    auxiliary_inputs,
    auxiliary_labels,
    check_bounds,
    seeded,
)
from splitlearn import Guard, Kind, Learner, View
from splitlearn.randomness import Randomness

__all__ = ["FSHA", "FSHAProperty", "Hijacker", "Hijacking", "Inference", "PropertyHijacker"]

Shape = tuple[int, ...]
Pilot = Callable[[], nn.Module]

CLASSIFIER = Dense(128, 1)
BETAS = (0.5, 0.9)  # Adam's, of the critic
WIDTH = 16  # channels of critic and decoder, and of a pilot of no known architecture


@dataclass(frozen=True, kw_only=True)
class Hijacking(Infiltration):
    """How a malicious server trains networks of its own, one step (Adam) a step of the client.

    ``network`` is the decoder, None one that suits the inputs (``suited``); ``bounds`` are the least and greatest value
    of an input, None where these are not known. ``pilot`` makes the network in the client's place, None one of no
    architecture but the shapes' (``stand_in``). It learns at ``lr``, with what reads its activations, on ``batch_size``
    auxiliary samples; these activations spread ``spread`` times as far as the client's first. A stage of one
    convolution does not follow so far, nor any pilot but one of its own architecture: take a spread of 1 and ``pilot``
    there. ``penalty`` is the weight of the critic's gradient penalty: a greater one (50) is slower, and the gradients
    tell less of the samples. ``gradient_scale`` multiplies what is sent: against a client that adds a penalty of its
    own to the loss, as NoPeek does, a great one makes the lie outweigh it.

    ``guard`` is what the client is known to do to its activations, of the same shape before and after: it is put behind
    the pilot. Whether that helps depends on the guard: on digits it more than doubled the advantage against dropout and
    top-k, and lowered it against noise. Try both.
    """

    network: Network | None = None
    pilot: Pilot | None = None
    bounds: Bounds | None = (0.0, 1.0)
    lr: float = 1e-3
    critic_lr: float = 3e-3
    penalty: float = 10.0
    spread: float = 10.0
    batch_size: int = 64
    gradient_scale: float = 1.0
    guard: Guard = field(default_factory=Guard)
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        positive = (self.lr, self.critic_lr, self.spread, self.gradient_scale)
        if not all(value > 0 for value in positive) or not self.penalty >= 0 or self.batch_size < 1:
            raise ValueError(
                f"expected learning rates, spread and gradient_scale > 0, a penalty of 0 or more and at least one "
                f"sample a batch, got {positive}, {self.penalty} and {self.batch_size}; leave them out for the defaults"
            )


@dataclass(frozen=True, kw_only=True)
class FSHA(Hijacking):
    """Malicious server, unlabelled auxiliary samples. Puts an insider in the server's place, which rebuilds inputs.

    For vanilla and U-shaped training. Of its gradients alone the client is lied to: the honest server is trained on the
    client's activations beside the attack, and the loss, the predictions and, in the U shape, the middle's output are
    that server's, so that the training seems to go well. (The paper's client sees gradients only.)

    A client of dense layers alone, as for tables, may match the pilot's activations in distribution and not sample by
    sample: on breast_cancer it rebuilt nothing, though its autoencoder did (Semenov et al. 2024, arXiv:2412.11689,
    found such clients hard to invert too). ``URVFL``, which knows labels, is a little better than the mean there.
    """

    def insider(self, server: Learner, view: View) -> "Hijacker":
        """Return the party that takes the server's place."""
        return Hijacker(self, server, view)


@dataclass(frozen=True, kw_only=True)
class FSHAProperty(FSHA):
    """Malicious server, auxiliary samples labelled with an attribute, 0 to ``classes`` − 1. Infers it of private ones.

    The attribute (``auxiliary_y``) need not be what the client trains for. ``classifier`` reads it from activations,
    and is trained with the autoencoder. What the client sees is as in ``FSHA``.
    """

    classes: int
    classifier: Network = CLASSIFIER

    def insider(self, server: Learner, view: View) -> "PropertyHijacker":
        """Return the party that takes the server's place."""
        return PropertyHijacker(self, server, view)


@dataclass(frozen=True)
class Inference:
    """Scores of an attribute's classes [N, classes], one row an activation in the view, and signs that it was tried."""

    scores: Tensor
    evidence: Mapping[str, float | str]


class Hijacker(Insider):
    """The server of FSHA: keeps a party's methods, trains the honest server beside, and lies in its gradients alone.

    Its networks are built once the first activation tells their shapes, and draw from a randomness of their own. The
    decoder is used as the last step left it.
    """

    def __init__(self, settings: Hijacking, server: Learner, view: View):
        super().__init__(server)
        self.settings = settings
        view.tensors(Kind.ACTIVATION)  # an error where the threat does not let it read these
        self.x = auxiliary_inputs(view, at_least=16, like=next(server.stage.parameters(), None), bounds=settings.bounds)
        self.randomness = Randomness(settings.seed, server.name, type(self).__name__)
        with self.randomness.own(self.x.device):
            self.held_out, self.rest = parted(len(self.x), self.x.device, at_least=2)
        self.errors: list[float] = []  # of the autoencoder in training, in units of the inputs' variance
        self.gaps: list[float] = []  # by how much more the critic takes the pilot's activations for real
        self._z: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the honest middle stage's output."""
        self._z = x.detach()
        return self.server.forward(x)

    def backward(self, g: Tensor) -> Tensor | None:
        """Have the honest middle stage learn; return a lie in place of the activation's gradient."""
        honest, z = self.server.backward(g), self._z
        self._z = None
        return None if honest is None or z is None else self.answer(z, None, honest)

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Have the honest server learn; return its loss, and a lie in place of the gradient."""
        loss, honest = self.server.learn(z, y)
        return loss, None if honest is None else self.answer(z.detach(), y, honest, loss)

    def answer(self, z: Tensor, y: Tensor | None, honest: Tensor, loss: Tensor | None = None) -> Tensor:
        """Take a step of the attack; return what is sent in place of the ``honest`` gradient."""
        return self.settings.gradient_scale * self.hijacked(z.to(honest), y)

    def hijacked(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Train the attacker's networks on ``z`` (and its labels); return the gradient that pulls it to the pilot's."""
        with self.randomness.own(z.device):
            if not self.errors:
                self.build(z)
            self.adapt(z, y)
        return self.pull(z, y)

    def build(self, z: Tensor) -> None:
        """Make the networks for activations like ``z``."""
        settings, shape = self.settings, tuple(z.shape[1:])
        self.shape, self.x = shape, self.x.to(z)
        if settings.pilot is not None:
            pilot = settings.pilot()
        else:
            pilot = stand_in(tuple(self.x.shape[1:]), shape, width=WIDTH)
            pilot = nn.Sequential(pilot, nn.ReLU()) if z.min() >= 0 else pilot
        pilot = _Scaled(pilot, settings.spread * z.std(correction=0).item())
        self.pilot = guarded(pilot, settings.guard).to(z)
        x = self.x[self.rest]
        self.decode = Decode(suited(settings.network, tuple(x.shape[1:]), width=WIDTH), x, shape, settings.bounds)
        self.optimizer = torch.optim.Adam([*self.pilot.parameters(), *self.decode.parameters()], settings.lr)
        self.critic = Critic(shape, width=WIDTH).to(z)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), settings.critic_lr, BETAS)

    def adapt(self, z: Tensor, y: Tensor | None) -> None:
        """Take one step of pilot and reader, and one of the critic, which tells the pilot's activations from ``z``."""
        rows = self.batch()
        made = self.pilot(self.x[rows])
        error = self.misfit(made, rows)
        stepped(self.optimizer, error)
        self.errors.append(error.item())
        loss, gap = self.criticism(made.detach(), z)
        stepped(self.critic_optimizer, loss)
        self.gaps.append(gap)

    def criticism(self, made: Tensor, z: Tensor) -> tuple[Tensor, float]:
        """Return the critic's loss (WGAN-GP, Gulrajani et al. 2017, arXiv:1704.00028), and the gap that it finds."""
        gap, both = self.critic(made).mean() - self.critic(z).mean(), min(len(made), len(z))
        return self.settings.penalty * gradient_penalty(self.critic, made[:both], z[:both]) - gap, gap.item()

    def pull(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the gradient that the client is sent: of how little its activations look like the pilot's."""
        (g,) = torch.autograd.grad(-self.critic(leaf := z.detach().requires_grad_()).mean(), leaf)
        return g

    def misfit(self, z: Tensor, rows: Tensor) -> Tensor:
        """Return the error of these rows of the auxiliary samples, rebuilt from ``z``, in units of their variance."""
        return self.decode.misfit(z, self.x[rows])

    def batch(self) -> Tensor:
        """Return the rows of some auxiliary samples to train on."""
        picked = torch.randint(len(self.rest), (self.settings.batch_size,))
        return self.rest[picked.to(self.rest.device)]

    @torch.no_grad()
    def __call__(self, view: View) -> Reconstruction:
        """Return what the decoder makes of the activations.

        ``evidence`` holds the autoencoder's held-out error and that of the mean image. It cannot tell whether the
        client's activations of an input are the pilot's of the same; ``critic_gap`` says how far the two are apart as a
        whole.
        """
        z, held_out = self.received(view), self.x[self.held_out]
        x_hat = torch.cat([self.decode(part) for part in z.split(256)])
        rebuilt = self.decode(self._piloted(held_out))
        errors = {
            "auxiliary_mse": mse_loss(rebuilt, held_out).item(),
            "auxiliary_mse_mean_image": mse_loss(self.decode.mean.expand_as(held_out), held_out).item(),
        }
        return Reconstruction(x_hat, {**errors, **self.evidence()})

    @torch.no_grad()
    def received(self, view: View) -> Tensor:
        """Return the activations of the view's predict requests, once there was a training to read them by."""
        z = view.activations()
        if not self.gaps:
            raise LookupError("expected a server that took part in a training, got none yet; train with it first")
        if z.shape[1:] != self.shape:
            raise ValueError(
                f"expected activations of the shape {self.shape} that crossed in training, got {tuple(z.shape[1:])}; "
                "record the same wire"
            )
        return z.to(self.x)

    def _piloted(self, x: Tensor) -> Tensor:
        """Return the pilot's activations, a guard's noise drawn by the seed."""
        with seeded(self.settings.seed, x.device):
            z: Tensor = self.pilot(x)
        return z

    @torch.no_grad()
    def evidence(self) -> dict[str, float | str]:
        """Return the signs that it was tried.

        Converged where neither the autoencoder's error fell, by 1 % of where it began, nor the critic's gap, by 10 % of
        where it was greatest, over the last tenth of the steps. A gap that stays great says that the client was not
        pulled all the way.
        """
        still = fall(self.errors) < 0.01 * self.errors[0] and fall(self.gaps) < 0.1 * abs(max(self.gaps))
        return {
            "critic_gap": mean(self.gaps[-tail(self.gaps) :]),
            "critic_gap_greatest": max(self.gaps),
            "training_steps": float(len(self.gaps)),
            "converged": float(still),
        }


class PropertyHijacker(Hijacker):
    """The server of FSHA's property inference: ``infer`` returns the attribute, a call still rebuilds inputs."""

    def __init__(self, settings: FSHAProperty, server: Learner, view: View):
        super().__init__(settings, server, view)
        self.classes, self.classifier = settings.classes, settings.classifier
        self.y = auxiliary_labels(view, self.x.device, self.classes)

    def build(self, z: Tensor) -> None:
        """Make the networks, the classifier too."""
        super().build(z)
        self.classify = self.classifier.build(self.shape, (self.classes,)).to(z)
        self.optimizer.add_param_group({"params": self.classify.parameters()})

    def misfit(self, z: Tensor, rows: Tensor) -> Tensor:
        """Return the error of the rebuilt inputs, and the cross-entropy of the attribute."""
        return super().misfit(z, rows) + cross_entropy(self.classify(z), self.y[rows])

    @torch.no_grad()
    def infer(self, view: View) -> Inference:
        """Return the scores of the attribute; ``evidence`` holds the accuracy on held-out auxiliary samples."""
        z = self.received(view)
        guess = self.classify(self._piloted(self.x[self.held_out])).argmax(1)
        accuracy = (guess == self.y[self.held_out]).double().mean().item()
        scores = torch.cat([self.classify(part) for part in z.split(256)])
        return Inference(scores, {"auxiliary_accuracy": accuracy, **self.evidence()})


class _Scaled(nn.Module):
    """A network whose activations have the standard deviation ``std`` over every batch."""

    def __init__(self, network: nn.Module, std: float):
        super().__init__()
        self.network, self.std = network, std

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.network(x)
        return z * (self.std / (z.std(correction=0) + torch.finfo(z.dtype).tiny))


def as_long_as(honest: Tensor, lie: Tensor) -> Tensor:
    """Return the ``lie`` at the norm of the ``honest`` gradient."""
    return honest.norm() / (lie.norm() + torch.finfo(lie.dtype).tiny) * lie
