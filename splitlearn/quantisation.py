"""Fewer numbers at the cut and smaller weights below it, learned in training: layers, where codecs are for the wire.

None of this is a privacy mechanism: who sees what crosses trains on what crosses.
"""

import copy
from collections import OrderedDict
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from splitlearn.cut import cut

__all__ = ["LearnedQuantiser", "baked", "narrowed", "quantisation_aware"]

MOST_BITS = 8
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class LearnedQuantiser(nn.Module):
    """The last layer of a bottom: [N, …] to the same shape on 2^``bits`` levels, whose step is learned (LSQ).

    Esser, McKinstry, Bablani, Appuswamy and Modha 2020 (arXiv:1902.08153), equations 1 to 3, with the gradient of the
    step scaled by 1/√(entries of a batch · highest level). Levels run from 0 to 2^bits − 1, as after a ReLU, or with
    ``signed`` from −2^(bits−1) to 2^(bits−1) − 1. The step starts at 2·mean|z|/√(highest level) of the first training
    batch; before that there is none, and a prediction is a ``ValueError``.

    Deviations: one step for the whole activation; the step is held above 0 by its magnitude. ``Palette(bits)`` carries
    what it puts out in so many bits an entry, exactly.
    """

    def __init__(self, bits: int, *, signed: bool = False):
        super().__init__()
        if not (type(bits) is int and 1 <= bits <= MOST_BITS):
            raise ValueError(f"expected whole bits from 1 to {MOST_BITS}, got {bits!r}; as in LearnedQuantiser(4)")
        self.low: int = -(2 ** (bits - 1)) if signed else 0
        self.high: int = self.low + 2**bits - 1
        self.step = nn.Parameter(torch.tensor(0.0))  # 0: not started yet

    def forward(self, z: Tensor) -> Tensor:
        """Return level · step, with the identity as the rounding's gradient and none beyond the ends."""
        top = max(self.high, 1)
        if self.step.item() == 0:
            if not self.training:
                raise ValueError("expected a quantiser that was trained, got one without a step; train a batch first")
            with torch.no_grad():
                self.step.fill_(max(2 * z.abs().mean().item() / sqrt(top), torch.finfo(z.dtype).tiny))
        scale = 1 / sqrt(z.numel() * top)
        step = self.step.abs()
        step = (step - step * scale).detach() + step * scale  # its value, and a gradient of ``scale`` times it
        levels = (z / step).clamp(self.low, self.high)
        return (levels + (levels.round() - levels).detach()) * step


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
    cut); norms are not folded in. Computing is simulated in floating point: what is saved is the size of the weights.
    """
    if not (type(bits) is int and 2 <= bits <= MOST_BITS):
        raise ValueError(f"expected whole bits from 2 to {MOST_BITS} for weights, got {bits!r}")
    aware = copy.deepcopy(stage)
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

    The bottom ends in a layer ``narrow`` (a 1×1 convolution for [N, C, …], a linear map for [N, C] and tokens
    [N, T, C]), the top begins with ``widen`` back to C: a learned compression (BottleNet, Eshratifar, Esmaili & Pedram
    2019, arXiv:1902.01000). Both are new and to be trained; all other layers share the model's parameters. ``x`` is a
    sample batch that says what crosses. Deviations: no lossy image coder behind it, channels alone are reduced.
    """
    bottom, top = cut(model, at)
    with torch.no_grad():
        z = copy.deepcopy(bottom).eval()(x)
    linear = z.ndim == 2 or (z.ndim == 3 and not _is_signal(bottom))
    channels = z.shape[-1] if linear else z.shape[1]
    if not 1 <= features < channels:
        raise ValueError(
            f"expected fewer features than the {channels} channels that cross at {at!r}, at least one, got {features}"
        )
    if clash := {"narrow", "widen"} & {*bottom._modules, *top._modules}:
        raise ValueError(f"expected a model without layers named {', '.join(sorted(clash))}; rename them")
    narrow, widen = (
        _pointwise(z.ndim, linear, *widths).to(z.device, z.dtype)
        for widths in ((channels, features), (features, channels))
    )
    below = nn.Sequential(OrderedDict([*bottom._modules.items(), ("narrow", narrow)]))
    above = nn.Sequential(OrderedDict([("widen", widen), *top._modules.items()]))
    return below, above


def _is_signal(bottom: nn.Module) -> bool:
    return any(isinstance(layer, nn.Conv1d) for layer in bottom.modules())


def _pointwise(dims: int, linear: bool, width_in: int, width: int) -> nn.Module:
    if linear:
        return nn.Linear(width_in, width)
    makers: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    if dims not in makers:
        raise ValueError(f"expected activations of two to five dimensions, got {dims}; cut elsewhere")
    return makers[dims](width_in, width, 1)
