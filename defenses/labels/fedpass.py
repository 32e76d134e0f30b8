"""FedPass: layers of the owner's stage that scale and shift by secret passports.

Gu, Luo, Kang, Fan & Yang 2023, "FedPass: privacy-preserving vertical federated deep learning with adaptive obfuscation"
(arXiv:2301.12623).
"""

import copy
import secrets
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear

from splitlearn.randomness import Randomness

__all__ = ["FedPass", "PassportLinear"]


@dataclass(frozen=True)
class FedPass:
    """Called on a stage, returns a copy whose linear layers are ``PassportLinear``; ValueError where there is none.

    Each passport's entries are drawn from N(μ, ``std``²), with a μ for each entry from U(−``reach``, 0); a layer has
    ``passports`` of them for its scale and as many for its shift. They come from ``seed``, by chance without one, and
    stay the same. They are buffers of the stage: whoever gets its weights gets them.

    It protects labels from who reads gradients, or completes the model, without the passports: gradients that come
    through a layer are scaled by numbers, some of them negative, that the attacker does not know, and the bottom is
    trained for a top that nobody can guess. It is obfuscation, and bounds nothing: scale and shift are the same for all
    samples, so that gradients of one label stay alike (clustering, the cosine to a known one, norms), and model
    completion with some labels trains a top of its own, which needs no passport.

    Deviations: passports in the owner's linear layers alone, none in the client's bottom nor in convolutions; a
    layer's own bias falls away, as the shift takes its place; the average is over passports.
    """

    reach: float = 10.0
    std: float = 1.0
    passports: int = 4
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (
            isfinite(self.reach) and isfinite(self.std) and self.reach > 0 and self.std >= 0 and self.passports > 0
        ):
            raise ValueError(
                f"expected a finite reach above 0, a finite std of 0 or more and at least one passport, got "
                f"{self.reach}, {self.std} and {self.passports}; leave them out for the defaults"
            )

    def __call__(self, stage: nn.Module) -> nn.Module:
        """Return a copy of ``stage`` with a passport in each linear layer; the layers' weights start as they are."""
        whole = nn.Sequential(copy.deepcopy(stage))
        found = [(owner, name) for owner in whole.modules() for name, part in owner.named_children() if _plain(part)]
        if not found:
            raise ValueError(
                f"expected a stage with a linear layer, got {type(stage).__name__} without one; cut below one"
            )
        drawn = Randomness(secrets.randbits(48) if self.seed is None else self.seed, "fedpass")
        with drawn.own(torch.device("cpu")):
            for owner, name in found:
                setattr(owner, name, PassportLinear(getattr(owner, name), self))
        return whole[0]


class PassportLinear(nn.Module):
    """γ ⊙ (W x) + β for x [n, *, in]; γ and β [out] are what an autoencoder makes of W times the layer's passports.

    γ = mean over passports s of D(LeakyReLU(E(W s))), and β alike with passports of its own; E and D are linear maps
    without bias, to a quarter of the width and back, shared by both, and trained with W.
    """

    scale_passports: Tensor
    shift_passports: Tensor

    def __init__(self, layer: nn.Linear, settings: FedPass):
        super().__init__()
        self.weight = layer.weight
        width = layer.out_features
        hidden = max(1, width // 4)
        self.encode, self.decode = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        for name in ("scale_passports", "shift_passports"):
            centre = -settings.reach * torch.rand(layer.in_features)
            passports = centre + settings.std * torch.randn(settings.passports, layer.in_features)
            self.register_buffer(name, passports.to(layer.weight))
        self.to(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled and shifted product."""
        return self._made_of(self.scale_passports) * linear(x, self.weight) + self._made_of(self.shift_passports)

    def _made_of(self, passports: Tensor) -> Tensor:
        hidden = leaky_relu(self.encode(linear(passports, self.weight)))
        made: Tensor = self.decode(hidden)
        return made.mean(0)


def _plain(part: nn.Module) -> bool:
    return type(part) is nn.Linear
