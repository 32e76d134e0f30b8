"""A stage on shares: its layers by CrypTen's products and comparisons, forward, backward and one step of SGD.

Only the servers' processes import this. Each layer's own graph is kept apart, so that the time that each takes in
either direction is known, and nothing is kept where no gradient comes back.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor

from privacy.mpc.layers import Layer
from privacy.mpc.seat import crypten, exact_truncation, truncated
from privacy.mpc.sharing import BITS, WEIGHT_BITS

__all__ = ["OPERATIONS", "Clock", "Evaluated", "fresh", "of_share", "softmax"]

LEAST_FACTOR_BITS = 40  # so many bits the least learning rate over the batch has before its first digit that counts
FAR_BELOW = 64
Shared: Any = crypten.mpc.MPCTensor
OPERATIONS = {
    "Linear": "linear", "Conv1d": "linear", "Conv2d": "linear", "ReLU": "relu", "LeakyReLU": "relu",
    "MaxPool1d": "pool", "MaxPool2d": "pool", "AvgPool2d": "pool", "Flatten": "shape", "Identity": "shape",
}  # fmt: skip


class Clock:
    """Seconds by operation."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, operation: str) -> Iterator[None]:
        """Add what the block takes."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[operation] += time.perf_counter() - begun


class Evaluated:
    """This server's half of a stage: shares of its weights, and of what a gradient needs to come back.

    ``masters`` are the weights with 32 bits of fraction, in which steps add up; products take them cut to 16, or the
    many small steps of a training would be lost.
    """

    def __init__(self, layers: Sequence[Layer], masters: Mapping[str, Tensor], clock: Clock):
        self.layers = list(layers)
        self.load(masters)
        self.momentum: dict[str, Tensor] = {}
        self._clock = clock
        self._kept: list[tuple[Layer, Any, Any]] | None = None

    @property
    def open(self) -> bool:
        """Whether a step has gone forward and not come back."""
        return self._kept is not None

    def load(self, masters: Mapping[str, Tensor]) -> None:
        """Take over shares of weights."""
        self.masters = dict(masters)
        cut = _truncated(self.masters, WEIGHT_BITS - BITS)
        self.weights = {name: of_share(share) for name, share in cut.items()}

    @property
    def out_shape(self) -> Any:
        """The shape of what the open step put out."""
        assert self._kept is not None
        return self._kept[-1][2].share.shape

    def abandon(self) -> None:
        """Give up the open step."""
        self._kept = None

    def forward(self, x: Tensor, *, keep: bool) -> Any:
        """Return the stage's output on shares; with ``keep`` a gradient may come back."""
        own, kept = of_share(x), []
        for layer in self.layers:
            parameters = {name.rpartition(".")[2]: one for name, one in self._of(layer).items()}
            with self._clock.on(OPERATIONS[layer.kind]), exact_truncation() if keep else nullcontext():
                if keep:
                    own = of_share(own.share)  # a leaf: CrypTen's detach() keeps what it came from
                    own.requires_grad = True
                    for one in parameters.values():
                        one.requires_grad, one.grad = True, None
                    out = APPLIED[layer.kind](own, parameters, layer.settings)
                    kept.append((layer, own, out))
                else:
                    with crypten.no_grad():
                        out = APPLIED[layer.kind](own, parameters, layer.settings)
            own = out
        self._kept = kept if keep else self._kept
        return of_share(own.share)

    def backward(self, g: Any) -> Any:
        """Return the gradient of the stage's input; that of each weight is then in its ``grad``."""
        assert self._kept is not None
        kept, self._kept = self._kept, None
        for layer, x, out in reversed(kept):
            with self._clock.on(OPERATIONS[layer.kind]), exact_truncation():
                out.backward(grad_input=g)
                g = x.grad
        return g

    def step(self, rate: float, momentum: float) -> None:
        """Take one step of SGD, as torch's: v ← momentum·v + g, w ← w − rate·v."""
        with self._clock.on("update"):
            changes = {name: weight.grad.share for name, weight in self.weights.items()}
            if momentum:
                before = _scaled(self.momentum, momentum, BITS)
                self.momentum = {n: g + before[n] if n in before else g for n, g in changes.items()}
                changes = self.momentum
            steps = _scaled(changes, rate, WEIGHT_BITS)
            self.load({name: master - steps[name] for name, master in self.masters.items()})

    def _of(self, layer: Layer) -> dict[str, Any]:
        return {name: one for name, one in self.weights.items() if name.rpartition(".")[0] == layer.name}


def of_share(share: Tensor) -> Any:
    """Return CrypTen's tensor of this server's share."""
    return Shared.from_shares(share)


def fresh(tensor: Any) -> Tensor:
    """Return this server's share, masked anew: of the way that it was computed it then says nothing."""
    zero = crypten.mpc.primitives.ArithmeticSharedTensor.PRZS(tuple(tensor.share.shape))
    return tensor.share + zero.share


def softmax(logits: Any) -> Any:
    """Return the softmax over the second dimension; CrypTen's own, whose exponential turns back up below −512.

    What is 64 and more below the greatest is taken to be 64 below, which fixed point has as 0. The reciprocal is of the
    mean over the classes, from 1 / classes to 1: that of their sum would have few digits, and its square none.
    """
    classes = logits.size(1)
    below = logits.sub(logits.max(1, keepdim=True)[0]).add(FAR_BELOW).relu().sub(FAR_BELOW)
    shares = below.exp()
    with crypten.cfg.temp_override({"functions.reciprocal_all_pos": True}):
        return shares.mul(shares.sum(1, keepdim=True).div(classes).reciprocal()).div(classes)


def _scaled(shares: Mapping[str, Tensor], factor: float, bits: int) -> dict[str, Tensor]:
    """Return shares of a public multiple with so many bits of fraction; 16 bits of the factor count, down to 2^-40."""
    extra = min(LEAST_FACTOR_BITS, max(0, ceil(-log2(factor)))) if factor > 0 else 0
    multiple = round(factor * (1 << (BITS + extra)))
    return _truncated({name: share * multiple for name, share in shares.items()}, 2 * BITS + extra - bits)


def _truncated(shares: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Return the shares with so many bits less of fraction, all at one opening."""
    if not shares or not bits:
        return dict(shares)
    every = truncated(torch.cat([share.flatten() for share in shares.values()]), bits)
    parts = every.split([share.numel() for share in shares.values()])
    return {name: part.reshape(shares[name].shape) for name, part in zip(shares, parts, strict=True)}


def _linear(x: Any, own: Mapping[str, Any], _: Mapping[str, Any]) -> Any:
    return _biased(x.matmul(own["weight"].t()), own, 0)


def _convolved(x: Any, own: Mapping[str, Any], settings: Mapping[str, Any], *, dims: int) -> Any:
    convolve = x.conv1d if dims == 1 else x.conv2d
    how = {name: settings[name] for name in ("stride", "padding", "dilation", "groups")}
    return _biased(convolve(own["weight"], **how), own, dims)


def _biased(out: Any, own: Mapping[str, Any], dims: int) -> Any:
    return out if "bias" not in own else out + own["bias"].reshape(-1, *[1] * dims)


def _leaky(x: Any, _: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    slope = float(settings["negative_slope"])
    return x.relu().mul(1 - slope) + x.mul(slope)


def _pooled(pool: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    kernel, stride = (_pair(settings[name]) for name in ("kernel_size", "stride"))
    return pool(kernel, stride=stride)


def _pooled_1d(x: Any, _: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    kernel, stride = (one[0] if isinstance(one := settings[n], tuple) else one for n in ("kernel_size", "stride"))
    return x.unsqueeze(-2).max_pool2d((1, kernel), stride=(1, stride)).squeeze(-2)


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


APPLIED: dict[str, Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Any]] = {
    "Linear": _linear,
    "Conv1d": lambda x, own, settings: _convolved(x, own, settings, dims=1),
    "Conv2d": lambda x, own, settings: _convolved(x, own, settings, dims=2),
    "ReLU": lambda x, own, settings: x.relu(),
    "LeakyReLU": _leaky,
    "MaxPool1d": _pooled_1d,
    "MaxPool2d": lambda x, own, settings: _pooled(x.max_pool2d, settings),
    "AvgPool2d": lambda x, own, settings: _pooled(x.avg_pool2d, settings),
    "Flatten": lambda x, own, settings: x.reshape(x.size(0), -1),
    "Identity": lambda x, own, settings: x.clone(),
}
