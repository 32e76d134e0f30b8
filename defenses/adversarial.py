"""Training against a decoder: the client holds one of its own, and learns activations that it fails on.

Adversarial representation learning as in Xiao et al. 2020, "Adversarial learning of privacy-preserving and
task-oriented representations" (AAAI), here with the party's own loss for the task.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from splitlearn import Guard

__all__ = ["AdversarialRepresentation", "Proxy", "proxy_decoder"]

Shape = tuple[int, ...]
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}  # by the number of dimensions convolved over
WIDTH, HIDDEN = 32, 256


def proxy_decoder(z_shape: Shape, x_shape: Shape) -> nn.Sequential:
    """Return a decoder from activations [N, *z_shape] to inputs [N, *x_shape].

    Three convolutions of 32 channels, at the input's scale from the second on; where either shape has no places, two
    linear layers of 256 hidden units.
    """
    places = len(x_shape) - 1
    if places not in CONV or len(z_shape) != len(x_shape):
        hidden = [nn.Flatten(), nn.Linear(prod(z_shape), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, prod(x_shape))]
        return nn.Sequential(*hidden, nn.Unflatten(1, x_shape))
    conv = CONV[places]
    layers = [conv(z_shape[0], WIDTH, 3, padding=1), nn.ReLU()]
    layers += [nn.Upsample(x_shape[1:])] if z_shape[1:] != x_shape[1:] else []
    layers += [conv(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), conv(WIDTH, x_shape[0], 3, padding=1)]
    return nn.Sequential(*layers)


class Proxy:
    """A decoder of the client's own, trained by Adam on what passes: the attacker whom a guard trains against.

    ``build`` makes it of the shapes of the first activation and input, without moving torch's generators. It stands for
    one attacker of one size: another one, or this one trained longer, does better.
    """

    def __init__(self, build: Callable[[Shape, Shape], nn.Module], lr: float):
        self.build, self.lr = build, lr
        self._decoder: nn.Module | None = None
        self._optimizer: torch.optim.Adam | None = None
        self._loaded: Mapping[str, Any] = {}

    def fit(self, x: Tensor, z: Tensor, steps: int) -> None:
        """Train on this batch, ``steps`` times."""
        decoder, optimizer = self._ready(x, z)
        z, x = z.detach(), x.detach()
        decoder.requires_grad_(True)
        for _ in range(steps):
            optimizer.zero_grad()
            mse_loss(decoder(z), x).backward()
            optimizer.step()
        optimizer.zero_grad()
        decoder.requires_grad_(False)  # at rest: a penalty's gradient is the stage's alone

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the estimates of ``x``, with a gradient in ``z`` and none in the decoder."""
        found: Tensor = self._ready(x, z)[0](z)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return decoder and optimizer, or nothing before the first batch."""
        if self._decoder is None or self._optimizer is None:
            return dict(self._loaded)
        return {
            "decoder": {name: tensor.detach().clone() for name, tensor in self._decoder.state_dict().items()},
            "optimizer": deepcopy(self._optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned, once the next batch says shapes and device."""
        self._decoder, self._optimizer, self._loaded = None, None, deepcopy(dict(state))

    def _ready(self, x: Tensor, z: Tensor) -> tuple[nn.Module, torch.optim.Adam]:
        if self._decoder is None or self._optimizer is None:
            if not x.is_floating_point():
                raise ValueError(
                    f"expected inputs of a floating-point type to rebuild, got {x.dtype}; embed tokens first"
                )
            with torch.random.fork_rng(devices=[]):  # a guard of weight 0 then changes nothing
                decoder = self.build(tuple(z.shape[1:]), tuple(x.shape[1:])).to(z).requires_grad_(False)
            optimizer = torch.optim.Adam(decoder.parameters(), self.lr)
            if self._loaded:
                decoder.load_state_dict(self._loaded["decoder"])
                optimizer.load_state_dict(deepcopy(self._loaded["optimizer"]))
            self._decoder, self._optimizer, self._loaded = decoder, optimizer, {}
        return self._decoder, self._optimizer


@dataclass(frozen=True, eq=False)
class AdversarialRepresentation(Guard):
    """Adds −``weight`` · min(MSE(decoder(z), x), ``ceiling``) to the loss of the party that sends z for its input x.

    The decoder is the guard's own: before each penalty it takes ``steps`` steps of Adam (``lr``) on the same batch.
    It goes with the guard's state, so that a checkpoint resumes it, and to each replica as a copy. ``ceiling`` is the
    error beyond which nothing is gained; without one it is the batch's variance, the error of its mean input, since
    the MSE alone would have activations run away from a decoder that is a step behind. What is sent stays as it is.
    The decoder sees the stage's output, without what another guard adds.

    It bounds nothing: it hides from one decoder, which may be worse than the attacker's. Who knows it retrains a
    decoder on the trained stage, as ``attacks.Decoder`` does, or a larger one; a server that lies about gradients
    outweighs the penalty by scaling its own. Report the worst of a family of decoders.
    """

    weight: float
    ceiling: float | None = None
    steps: int = 1
    lr: float = 1e-3
    build: Callable[[Shape, Shape], nn.Module] = field(default=proxy_decoder, repr=False)
    proxy: Proxy = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"expected a finite weight of 0 or more, got {self.weight}; 1 is a start")
        if self.ceiling is not None and not self.ceiling > 0:
            raise ValueError(f"expected a ceiling (an MSE) above 0, got {self.ceiling}; leave it out for the variance")
        check_decoder_settings(self.steps, self.lr)
        object.__setattr__(self, "proxy", Proxy(self.build, self.lr))

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Return the penalty, a scalar, after the decoder's steps (none without gradients)."""
        if torch.is_grad_enabled():
            self.proxy.fit(x, z, self.steps)
        error = mse_loss(self.proxy(x, z), x.detach())
        ceiling = (x - x.mean(0)).detach().square().mean() if self.ceiling is None else self.ceiling
        return -self.weight * error.clamp(max=ceiling)

    def state_dict(self) -> dict[str, Any]:
        """Return decoder and optimizer."""
        return self.proxy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.proxy.load_state_dict(state)


def check_decoder_settings(steps: int, lr: float) -> None:
    """Raise ``ValueError`` unless a decoder of these settings trains."""
    if steps < 1 or not (isfinite(lr) and lr > 0):
        raise ValueError(f"expected at least one step of the decoder and a finite lr above 0, got {steps} and {lr}")
