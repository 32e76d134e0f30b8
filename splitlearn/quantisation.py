"""Fewer numbers at the cut and smaller weights below it, learned in training: layers, where codecs are for the wire.

None of this is a privacy mechanism: who sees what crosses trains on what crosses.
"""

import copy
from collections import OrderedDict
from math import sqrt

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from splitlearn.cut import cut

__all__ = ["LearnedQuantiser", "Pointwise", "baked", "narrowed", "quantisation_aware"]

MOST_BITS = 8
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
# Of these, output channels are not the weight's first dimension, or it goes by another name.
UNROUNDED = (
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip


class LearnedQuantiser(nn.Module):
    """The last layer of a bottom: [N, …] to the same shape on 2^``bits`` levels, whose step is learned (LSQ).

    Esser, McKinstry, Bablani, Appuswamy and Modha 2020 (arXiv:1902.08153), equations 1 to 3, with the gradient of the
    step scaled by 1/√(entries of a batch · highest level). Levels run from 0 to 2^bits − 1, as after a ReLU, or where
    the first training batch has negative entries from −2^(bits−1) to 2^(bits−1) − 1. The step starts at
    2·mean|z|/√(highest level) of that batch; before it there is none, and a prediction is a ``ValueError``. A batch of
    zeros alone starts nothing and passes. In a mean of members' weights the levels are signed once any member's are.

    Deviations: one step for the whole activation; the step is held above 0 by its magnitude. ``Palette(bits)`` carries
    what it puts out in so many bits an entry, exactly.
    """

    low: Tensor

    def __init__(self, bits: int):
        super().__init__()
        if not (type(bits) is int and 1 <= bits <= MOST_BITS):
            raise ValueError(f"expected whole bits from 1 to {MOST_BITS}, got {bits!r}; as in LearnedQuantiser(4)")
        self.bits = bits
        self.step = nn.Parameter(torch.tensor(0.0))  # 0: not started yet
        self.register_buffer("low", torch.tensor(0.0))  # 0, or negative: a float, so that averages include it

    def forward(self, z: Tensor) -> Tensor:
        """Return level · step, with the identity as the rounding's gradient and none beyond the ends."""
        if self.step.item() == 0 and not self._start(z.detach()):
            return z
        low, high = self._ends()
        step = self.step.abs()
        backward = torch.is_grad_enabled() and (z.requires_grad or step.requires_grad)
        if not backward and forward_ad.unpack_dual(z).tangent is None:
            return (z / step).clamp_(low, high).round_().add_(0.0).mul_(step)  # a zero without sign, as below
        scaled = step / sqrt(max(z.numel(), 1) * max(high, 1))
        step = step.detach() + (scaled - scaled.detach())  # its very value, and the gradient scaled
        levels = (z / step).clamp(low, high)
        return (levels + (levels.round() - levels).detach()) * step

    def _ends(self) -> tuple[int, int]:
        """Return the lowest and the highest level."""
        low = -(2 ** (self.bits - 1)) if self.low.item() < 0 else 0
        return low, low + 2**self.bits - 1

    @torch.no_grad()
    def _start(self, z: Tensor) -> bool:
        """Set sign and first step by ``z``, and return whether it told any."""
        if not self.training:
            raise ValueError("expected a quantiser that was trained, got one without a step; train a batch first")
        if not bool(z.any()):
            return False
        if bool((z < 0).any()):
            self.low.fill_(-(2 ** (self.bits - 1)))
        high = max(self._ends()[1], 1)
        self.step.fill_(max(2 * z.abs().mean().item() / sqrt(high), torch.finfo(z.dtype).tiny))
        return True


class Pointwise(nn.Linear):
    """A linear map of the channels at each place, [N, channels, …] to [N, features, …]; a 1×1 convolution.

    ``dim`` is the dimension of channels: 1, or -1 for tokens [N, T, D].
    """

    def __init__(self, channels: int, features: int, *, dim: int = 1):
        super().__init__(channels, features)
        self.dim = dim

    def forward(self, z: Tensor) -> Tensor:
        """Return the features."""
        return super().forward(z.movedim(self.dim, -1)).movedim(-1, self.dim).contiguous()


class _Rounded(nn.Module):
    """A weight on 2^bits − 1 levels about 0, each output channel by its greatest magnitude; straight-through."""

    def __init__(self, bits: int):
        super().__init__()
        self.most = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight."""
        rows = weight.detach().flatten(1)
        step = rows.abs().amax(1).div(self.most).reshape(-1, *[1] * (weight.ndim - 1))
        rounded = (weight.detach() / step.masked_fill(step == 0, 1)).round() * step
        return weight + (rounded - weight).detach()


def quantisation_aware(stage: nn.Module, bits: int = 8) -> nn.Module:
    """Return a copy of the stage whose weights are rounded to ``bits`` (2 to 8) in every pass, and trained through it.

    Quantisation-aware training (Jacob et al. 2018, arXiv:1712.05877): the optimizer, built over the copy's parameters,
    moves full weights; what computes is their rounding, symmetric about 0, each output channel on 2^bits − 1 levels,
    with the identity as gradient (Bengio et al. 2013). Biases and norms stay. ``baked`` gives the plain stage for the
    device. Deviations: activations within the stage are not rounded (a codec or a ``LearnedQuantiser`` does that at the
    cut); norms are not folded in. Computing is simulated in floating point: what is saved is the size of the weights. A
    stage with other weights (transposed convolutions, attention of several heads, recurrence) is a ``ValueError``.
    """
    if not (type(bits) is int and 2 <= bits <= MOST_BITS):
        raise ValueError(f"expected whole bits from 2 to {MOST_BITS} for weights, got {bits!r}")
    aware = copy.deepcopy(stage)
    if unfit := [(name, type(one).__name__) for name, one in aware.named_modules() if isinstance(one, UNROUNDED)]:
        name, kind = unfit[0]
        raise ValueError(
            f"expected weights of linear layers, convolutions and embeddings to round, got layer {name!r}, "
            f"{kind}; cut below it, or train without rounded weights"
        )
    layers = [layer for layer in aware.modules() if isinstance(layer, WEIGHTED)]
    if not layers:
        raise ValueError("expected a stage with weights (linear, convolution, embedding) to round, got none")
    if any(is_parametrized(layer, "weight") for layer in layers):
        raise ValueError("expected a stage of plain weights, got one that rounds them already; baked(stage) first")
    for layer in layers:
        register_parametrization(layer, "weight", _Rounded(bits))
    return aware


def baked(stage: nn.Module) -> nn.Module:
    """Return a copy of a quantisation-aware stage as a plain one, whose weights are the rounded ones."""
    plain = copy.deepcopy(stage)
    for layer in plain.modules():
        if isinstance(layer, WEIGHTED) and is_parametrized(layer, "weight"):
            # Not remove_parametrizations, which takes the weight from the class that the copy shares with the stage.
            weight = layer.weight.detach().clone()
            del layer.parametrizations
            layer.__class__ = type(layer).__bases__[0]
            layer.register_parameter("weight", nn.Parameter(weight))
    return plain


def narrowed(model: nn.Sequential, at: int | str, features: int, x: Tensor) -> tuple[nn.Sequential, nn.Sequential]:
    """Return bottom and top of ``model`` cut at ``at``, with a bottleneck of ``features`` channels across the cut.

    The bottom ends in a layer ``narrow``, the top begins with ``widen`` back to all channels, both ``Pointwise``: a
    learned compression (BottleNet, Eshratifar, Esmaili & Pedram 2019, arXiv:1902.01000). They are new and to be
    trained; all other layers share the model's parameters. ``x`` is a sample batch that says what crosses; of three
    dimensions it is a signal [N, C, L] below a one-dimensional convolution, and else tokens [N, T, C]. Deviations: no
    lossy image coder behind it, channels alone are reduced.
    """
    bottom, top = cut(model, at)
    with torch.no_grad():
        z = copy.deepcopy(bottom).eval()(x)
    dim = -1 if z.ndim == 3 and not any(isinstance(layer, nn.Conv1d) for layer in bottom.modules()) else 1
    channels = z.shape[dim]
    if not 1 <= features < channels:
        raise ValueError(
            f"expected fewer features than the {channels} channels that cross at {at!r}, at least one, got {features}"
        )
    if clash := {"narrow", "widen"} & {*bottom._modules, *top._modules}:
        raise ValueError(f"expected a model without layers named {', '.join(sorted(clash))}; rename them")
    narrow = Pointwise(channels, features, dim=dim).to(z.device, z.dtype)
    widen = Pointwise(features, channels, dim=dim).to(z.device, z.dtype)
    below = nn.Sequential(OrderedDict([*bottom._modules.items(), ("narrow", narrow)]))
    above = nn.Sequential(OrderedDict([("widen", widen), *top._modules.items()]))
    return below, above
