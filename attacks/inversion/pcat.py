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
from dataclasses import dataclass

import torch
from torch.nn.functional import mse_loss

from attacks.inversion.decode import Decode
from attacks.inversion.encoders import stepped
from attacks.inversion.follower import Follower, Following
from attacks.inversion.networks import Dense, Network
from attacks.inversion.reconstruction import Reconstruction, seeded
from splitlearn import Learner, View

__all__ = ["PCAT"]

AFFINE = Dense(depth=0)


@dataclass(frozen=True)
class PCAT(Following):
    """Labelled auxiliary samples. Trains a pseudo-client through the live server, then a decoder (``network``).

    The decoder is affine unless told otherwise: of the sizes tried, that one carries over from the pseudo-client to the
    client best. ``decoder_lr`` is the greatest learning rate of its cycle.
    """

    network: Network = AFFINE
    epochs: int = 30
    decoder_lr: float = 3e-3

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
        held_out = self.running.standardised(self.made(x))
        optimizer = torch.optim.Adam(decode.parameters(), settings.decoder_lr)
        steps = settings.epochs * -(-len(self.x) // settings.batch_size)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.decoder_lr, total_steps=steps)
        errors, best = [mse_loss(decode(held_out), x).item()], copy.deepcopy(decode.state_dict())
        for _ in range(settings.epochs):
            made = self.running.standardised(self.made(self.x))  # in every epoch: a guard's noise is drawn anew
            for rows in torch.randperm(len(made)).to(made.device).split(settings.batch_size):
                stepped(optimizer, decode.misfit(made[rows], self.x[rows]))
                cycle.step()
            with torch.no_grad():
                errors.append(mse_loss(decode(held_out), x).item())
            if errors[-1] < min(errors[:-1]):
                best = copy.deepcopy(decode.state_dict())
        decode.load_state_dict(best)
        return errors
