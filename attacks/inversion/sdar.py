"""SDAR: a simulator of the client's stage and its decoder, each regularised by a critic, beside the training.

Zhu, Luo, Wu, Jiang, Xiao & Ooi 2025, "Passive inference attacks on split learning via adversarial regularization"
(NDSS, arXiv:2310.10483). The server is honest but curious: it answers bit for bit as the honest one. It holds labelled
auxiliary samples (x, y), and after each step of the training, in which z came (and its labels), it trains:

- the simulator f~ on cross-entropy(top(f~(x)), y) + λ1 · −log D1(f~(x), y), its top as it then is and held still;
- the critic D1 to tell f~(x) from z, both with their labels;
- the decoder g~ on ‖g~(f~(x), y) − x‖² + λ2 · −log D2(g~(z), ·), and the critic D2 to tell g~(z) from x.

The decoder is then asked for what the client sent. A request to predict carries no label: the one that the server's top
gives to the activation stands in for it. In the U shape no label crosses: the server simulates the client's head too
and trains it with f~, decoder and critics are told no labels, and ``labels`` returns what the simulated head says.

Deviations: decoder and critics read activations standardised by a running mean and variance of the client's; the
decoder starts as the mean image, and its squared error is in units of the inputs' variance; the critics' learning rates
are not multiplied by λ, and the simulator's and theirs have Adam's β1 at 0.5; a simulator of no known architecture ends
in ReLU where the first activation has no negative entry; in the U shape no auxiliary label is flipped; the decoder
learns from what the simulator made before its step, which spares a pass (on one seed of digits .015, after it .018).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from attacks.inversion.decode import Decode
from attacks.inversion.encoders import Critic, stepped
from attacks.inversion.follower import Follower, Following
from attacks.inversion.networks import Network
from attacks.inversion.reconstruction import Reconstruction, seeded
from splitlearn import Learner, View

__all__ = ["SDAR"]

EVERY = 25  # training steps between two looks at the held-out samples
CRITIC = 32  # channels of each critic
BETAS = (0.5, 0.999)  # Adam's, of the simulator and the critics


@dataclass(frozen=True)
class SDAR(Following):
    """Labelled auxiliary samples. Trains simulator, decoder (``network``) and two critics beside the live server.

    ``simulator_weight`` is the paper's λ1 and ``decoder_weight`` its λ2, of which 0 leaves the critic out.
    ``conditional`` tells decoder and critics the labels, where the server is sent these. ``network`` None is one that
    suits the inputs.
    """

    network: Network | None = None
    conditional: bool = True
    simulator_weight: float = 0.02
    decoder_weight: float = 1e-5
    decoder_lr: float = 5e-4
    simulator_critic_lr: float = 1e-3
    decoder_critic_lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        lrs = (self.decoder_lr, self.simulator_critic_lr, self.decoder_critic_lr)
        weights = (self.simulator_weight, self.decoder_weight)
        if not all(lr > 0 for lr in lrs) or not all(weight >= 0 for weight in weights):
            raise ValueError(
                f"expected learning rates > 0 and weights of 0 or more, got {lrs} and {weights}; leave them out for "
                "the defaults"
            )

    def insider(self, server: Learner, view: View) -> "Simulating":
        """Return the party that takes the server's place."""
        return Simulating(self, server, view)


class Simulating(Follower):
    """The server of SDAR. Its decoder goes on learning with the client, and is used as the last step left it."""

    settings: SDAR

    errors: list[float]

    def build(self, z: Tensor, output: Tensor, *, labelled: bool) -> None:
        """Make the networks for activations like ``z``, which the server's stage turns into ``output``."""
        super().build(z, output, labelled=labelled)
        settings, x_shape, z_shape = self.settings, tuple(self.x.shape[1:]), tuple(z.shape[1:])
        classes = output.shape[1] if settings.conditional and labelled else 0
        self.decode, self.errors = Decode(settings.network, self.x, z_shape, settings.bounds, classes=classes), []
        self.simulator_critic = Critic(z_shape, classes=classes, width=CRITIC).to(z)
        self.decoder_critic = Critic(x_shape, classes=classes, width=CRITIC).to(z)
        adam = torch.optim.Adam
        self.optimizer = adam([*self.stage.parameters(), *self.head.parameters()], settings.lr, BETAS)
        self.decode_optimizer = adam(self.decode.parameters(), settings.decoder_lr)
        self.simulator_critic_optimizer = adam(self.simulator_critic.parameters(), settings.simulator_critic_lr, BETAS)
        self.decoder_critic_optimizer = adam(self.decoder_critic.parameters(), settings.decoder_critic_lr, BETAS)

    def follow(self, z: Tensor, y: Tensor | None, top: nn.Module) -> None:
        """Take one step of simulator, decoder and critics, beside the client's ``z`` (and ``y``, where it was sent)."""
        settings, (x, own_y) = self.settings, self.batch()
        loss, made = self.simulated(top, x, own_y)
        real, fake = self.running.standardised(z), self.running.standardised(made)
        if settings.simulator_weight:
            _judge(self.simulator_critic, self.simulator_critic_optimizer, (real, y), (fake, own_y))
            loss = loss + settings.simulator_weight * softplus(-self.simulator_critic(fake, own_y)).mean()
        stepped(self.optimizer, loss)
        loss = self.decode.misfit(fake.detach(), x, own_y)
        if settings.decoder_weight:
            rebuilt = self.decode.unbounded(real, y)
            _judge(self.decoder_critic, self.decoder_critic_optimizer, (x, own_y), (rebuilt, y))
            loss = loss + settings.decoder_weight * softplus(-self.decoder_critic(rebuilt, y)).mean()
        stepped(self.decode_optimizer, loss)
        if self.steps % EVERY == 0:
            self.errors.append(self._held_out_error())

    @torch.no_grad()
    def __call__(self, view: View) -> Reconstruction:
        """Return what the decoder makes of the activations.

        ``evidence`` holds its error on held-out auxiliary samples through the simulator, that of the mean image beside
        it, and ``converged`` where the last tenth of the training lowered the least such error by less than 1 % of the
        mean image's. It cannot tell how near the simulator came to the client.
        """
        z, (x, _) = view.activations().to(self.x), self.held_out
        y = self.labels(z)
        parts = zip(self.running.standardised(z).split(256), y.split(256), strict=True)
        x_hat = torch.cat([self.decode(*part) for part in parts])
        mean_image = mse_loss(self.decode.mean.expand_as(x), x).item()
        evidence = {"auxiliary_mse": self._held_out_error(), **self.evidence(mean_image, self.errors)}
        return Reconstruction(x_hat, evidence)

    @torch.no_grad()
    def _held_out_error(self) -> float:
        x, y = self.held_out
        with seeded(self.settings.seed, x.device):
            made = self.running.standardised(self.made(x))
        return mse_loss(self.decode(made, y), x).item()


Labelled = tuple[Tensor, Tensor | None]


def _judge(critic: Critic, optimizer: torch.optim.Optimizer, real: Labelled, made: Labelled) -> None:
    """Take a step of the critic towards telling what is real from what was made."""
    found, forged = critic(real[0].detach(), real[1]), critic(made[0].detach(), made[1])
    stepped(optimizer, softplus(-found).mean() + softplus(forged).mean())
