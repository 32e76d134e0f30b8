"""ResSFL: a bottom that was made resistant by an expert before the clients' training starts from it.

Li, Rakin, Chen, He, Fan & Chakrabarti 2022, "ResSFL: a resistance transfer framework for defending model inversion
attack in split federated learning" (arXiv:2205.04007).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from defenses.adversarial import Proxy, check_decoder_settings, proxy_decoder
from splitlearn import Batches, Guard, Learner, epochs_of, fit, vanilla
from splitlearn.metrics import ssim_per_sample

__all__ = ["ResSFL", "narrowed", "pretrain_resistant"]

FLAT, SPATIAL = (nn.Linear, nn.Conv1d, nn.Flatten), (nn.Conv2d, nn.ConvTranspose2d)  # layers by what they put out


@dataclass(frozen=True, eq=False)
class ResSFL(Guard):
    """Adds ``weight`` · max(0, SSIM(decoder(z), x) − ``threshold``) to the sender's loss.

    z is what it sends for its images x, on [0, 1] and of at least 7×7 pixels; SSIM is the mean over the batch. The
    decoder is the guard's own and goes with its state, as that of ``AdversarialRepresentation``, which with a
    ``ceiling`` is the paper's variant by MSE.
    Use it in ``pretrain_resistant``, and again, with a small learning rate, in the clients' training.

    Deviation: the decoder learns by MSE, whatever the penalty goes by.

    It bounds nothing: resistance is to one decoder. Who knows it retrains one, or a stronger one, on the trained
    bottom; report the worst of a family.
    """

    weight: float = 0.3
    threshold: float = 0.5
    steps: int = 1
    lr: float = 1e-3
    build: Callable[[tuple[int, ...], tuple[int, ...]], nn.Module] = field(default=proxy_decoder, repr=False)
    proxy: Proxy = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight >= 0 and -1 <= self.threshold < 1):
            raise ValueError(
                f"expected a finite weight of 0 or more and a threshold (an SSIM) of at least -1 and below 1, got "
                f"{self.weight} and {self.threshold}; leave them out for the paper's"
            )
        check_decoder_settings(self.steps, self.lr)
        object.__setattr__(self, "proxy", Proxy(self.build, self.lr))

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Return the penalty, a scalar, after the decoder's steps (none without gradients)."""
        if torch.is_grad_enabled():
            self.proxy.fit(x, z, self.steps)
        return self.weight * relu(ssim_per_sample(x.detach(), self.proxy(x, z)).mean() - self.threshold)

    def state_dict(self) -> dict[str, Any]:
        """Return decoder and optimizer."""
        return self.proxy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.proxy.load_state_dict(state)


def narrowed(
    bottom: nn.Sequential, top: nn.Sequential, channels: int, narrow: int = 8
) -> tuple[nn.Sequential, nn.Sequential]:
    """Return bottom and top with a bottleneck at their cut: a convolution of ``channels`` to ``narrow``, and one back.

    For activations [N, channels, H, W]. The stages share the layers of those given, which keep their names. No ReLU
    follows: under the penalty one dies, and nothing crosses any more. ``ValueError`` for a bottom that puts out none.
    """
    if narrow < 1:
        raise ValueError(f"expected at least one channel at the cut, got {narrow}; the paper has 8")
    _check_channels(bottom, channels)
    squeeze, widen = nn.Conv2d(channels, narrow, 3, padding=1), nn.Conv2d(narrow, channels, 3, padding=1)
    below = OrderedDict([*bottom._modules.items(), ("squeeze", squeeze)])
    above = OrderedDict([("widen", widen), *top._modules.items()])
    return nn.Sequential(below), nn.Sequential(above)


def _check_channels(bottom: nn.Sequential, channels: int) -> None:
    """Refuse a bottom whose last layer puts out no [N, channels, H, W], as far as its layers tell."""
    last = [layer for layer in bottom.modules() if isinstance(layer, (*FLAT, *SPATIAL, nn.Unflatten))][-1:]
    if any(isinstance(layer, FLAT) or getattr(layer, "out_channels", channels) != channels for layer in last):
        raise ValueError(
            f"expected a bottom that puts out images of {channels} channels, got one that ends in {last[0]}; cut "
            "below the layers that flatten, and say how many channels cross there"
        )


def pretrain_resistant(
    bottom: nn.Module,
    top: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    guard: Guard | None = None,
    epochs: int = 40,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of ``bottom`` that an expert trained against a decoder on its own labelled samples x, y.

    The expert runs both stages on data that is not the clients' (the paper: another data set), with ``guard``, by
    default ``ResSFL()``. Clients start from the result: frozen (no optimizer), or trained on with a guard of
    their own. The penalty may win over the task before that is learned; more epochs, or stages that know the task
    already, help.
    """
    guard = guard if guard is not None else ResSFL()
    bottom, top = deepcopy(bottom), deepcopy(top)
    adam = torch.optim.Adam
    client = Learner("expert", bottom, adam(bottom.parameters(), lr), guard, seed=seed)
    server = Learner("expert's top", top, adam(top.parameters(), lr), seed=seed)
    batches = Batches(x, y, batch_size=batch_size, seed=seed)
    fit(epochs_of(partial(vanilla, client, server), batches), epochs=epochs)
    return bottom
