"""The inverse network: a decoder trained on what the victim's path makes of the attacker's own inputs.

He, Zhang & Lee 2019, "Model inversion attacks against collaborative inference" (ACSAC), the query-access attack:
min over g of ‖g(f(x)) − x‖² on auxiliary x. Deviations, each of which makes it stronger:

- the auxiliary activations are asked for anew in every epoch, so that a guard's noise is never the same twice;
- it starts as the mean image, and keeps the epoch with the least error on auxiliary samples held out;
- the learning rate follows one cycle (Smith & Topin 2018, arXiv:1708.07120) in place of halving every 20 epochs;
- activations and inputs are standardised by the auxiliary ones.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from attacks.inversion.decode import Decode
from attacks.inversion.encoders import stepped
from attacks.inversion.judging import converged, parted
from attacks.inversion.networks import CONV, Convolutional, Dense, Network
from attacks.inversion.reconstruction import Bounds, Reconstruction, auxiliary_inputs, check_bounds, seeded
from splitlearn import View

__all__ = ["Convolutional", "Decoder", "Dense", "decoder_family"]


@dataclass(frozen=True)
class Decoder:
    """Query access and auxiliary samples. Trains ``network`` to undo the victim's path, with Adam.

    ``lr`` is the greatest learning rate of the cycle. ``bounds`` are the least and greatest value of an input,
    None where these are not known.
    """

    network: Network
    epochs: int = 50
    lr: float = 3e-3
    batch_size: int = 32
    bounds: Bounds | None = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self.bounds)
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise ValueError(
                f"expected at least one epoch, one sample a batch and lr > 0, got {self.epochs}, {self.batch_size} "
                f"and {self.lr}; leave them out for the defaults"
            )

    def __call__(self, view: View) -> Reconstruction:
        """Return the estimates; ``evidence`` holds the held-out error (MSE) and that of the mean image beside it."""
        z = view.activations()
        auxiliary = auxiliary_inputs(view, at_least=8, like=z, bounds=self.bounds)
        with seeded(self.seed, z.device):
            held_out, rest = (auxiliary[rows] for rows in parted(len(auxiliary), z.device))
            asked = _asked(view, rest)
            if asked.shape[1:] != z.shape[1:]:
                raise ValueError(
                    f"expected queries to come back in the shape {tuple(z.shape[1:])} of the activations seen, got "
                    f"{tuple(asked.shape[1:])}; grant auxiliary samples of the private ones' shape"
                )
            decode = Decode(self.network, rest, tuple(z.shape[1:]), self.bounds, seen=asked)
            errors = self._train(decode, view, rest, held_out)
        with torch.no_grad():
            x_hat = torch.cat([decode(part) for part in z.split(256)])
        return Reconstruction(x_hat, _evidence(errors))

    def _train(self, decode: Decode, view: View, x: Tensor, held_out: Tensor) -> list[float]:
        """Train, leave the best epoch's weights in place, and return the held-out error before and after each epoch."""
        optimizer = torch.optim.Adam(decode.parameters(), self.lr)
        steps = self.epochs * -(-len(x) // self.batch_size)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        errors, best = [_error(decode, view, held_out)], copy.deepcopy(decode.state_dict())
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x)).to(x.device).split(self.batch_size):
                stepped(optimizer, decode.misfit(view.query(x[rows]), x[rows]))
                cycle.step()
            errors.append(_error(decode, view, held_out))
            if errors[-1] < min(errors[:-1]):
                best = copy.deepcopy(decode.state_dict())
        decode.load_state_dict(best)
        return errors


def decoder_family(input_shape: tuple[int, ...], *, seed: int = 0) -> dict[str, Decoder]:
    """Return decoders of several sizes for inputs of this shape, by name; a report takes the worst of them.

    Which size does best depends on the protection: noise favours few parameters, a deep cut many.
    """
    family = {
        "decoder-affine": Decoder(Dense(depth=0), epochs=40, lr=2e-3, seed=seed),
        "decoder-dense": Decoder(Dense(256, 1), epochs=30, lr=2e-3, seed=seed),
    }
    if len(input_shape) - 1 in CONV:
        return {**family, "decoder-conv": Decoder(Convolutional(32, 1), epochs=25, lr=5e-3, seed=seed)}
    return {**family, "decoder-deep": Decoder(Dense(256, 3), epochs=40, lr=2e-3, seed=seed)}


def _asked(view: View, x: Tensor) -> Tensor:
    return torch.cat([view.query(part) for part in x.split(256)])


@torch.no_grad()
def _error(decode: Decode, view: View, x: Tensor) -> float:
    return mse_loss(decode(_asked(view, x)), x).item()


def _evidence(errors: list[float]) -> dict[str, float | str]:
    return {
        "auxiliary_mse": min(errors),
        "auxiliary_mse_mean_image": errors[0],
        "best_epoch": float(errors.index(min(errors))),
        "converged": converged(errors),
    }
