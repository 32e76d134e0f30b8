"""Arms of a controller: cuts and codecs, what each costs under a trace, and what is known before one is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from splitlearn.codecs import Int8, TopK, through
from splitlearn.controllers import Disjoint, Game, Matrix
from splitlearn.cost import Layer, compute_seconds, split_cost
from splitlearn.cut import cut, layer_names
from splitlearn.devices import Device, Radio
from splitlearn.frames import Codec, Kind, Message, encode
from splitlearn.network import PROFILES
from splitlearn.traces import Trace

__all__ = [
    "BATTERY", "CODECS", "LATENCY", "LEAST", "LOAD", "UP", "Apart", "Arm", "Shared", "arms_of", "check_memory",
    "contexts_of", "costs_of", "switching",
]  # fmt: skip

CODECS: dict[str, Codec | None] = {"none": None, "int8": Int8(), "top0.1": TopK(0.1)}
UP, DOWN, LATENCY, LOAD, BATTERY = range(5)  # columns of a context
LEAST = 0.1  # of the battery, below which joules get no dearer


@dataclass(frozen=True)
class Arm:
    """A cut and a codec: ``at`` layers on the device, and the frames of one request's activation and answer."""

    cut: str
    codec: str
    at: int
    up_nbytes: int
    down_nbytes: int
    accuracy: float

    @property
    def name(self) -> str:
        """Cut and codec."""
        return f"{self.cut}/{self.codec}"


def arms_of(
    model: nn.Sequential,
    layers: Sequence[Layer],
    x: Tensor,
    y: Tensor,
    request: Tensor,
    *,
    edge: Device,
    cloud: Device,
    tolerance: float,
) -> tuple[list[Arm], list[str]]:
    """Return the arms to choose among, shallowest first, and a line on each kind of others.

    Accuracy is that of the trained model with the codec on the cut, on (x, y), and may be ``tolerance`` below the
    model's own. Bytes are those of real frames of ``request``. A place must be one that ``cut`` takes; an arm must fit
    the device's memory, and not be beaten by one that has no more layers on the device, sends no more bytes and whose
    other layers the cloud computes no slower than the device.
    """
    found: list[Arm] = []
    kinds = ("cannot be cut", "lose too much accuracy", "do not fit the device", "are beaten")
    reasons: dict[str, list[str]] = {kind: [] for kind in kinds}
    with torch.no_grad():
        whole = _accuracy(model(x), y)
        for at, name in enumerate(layer_names(model), start=1):
            try:
                bottom, top = cut(model, name)
            except ValueError:  # tied weights, or a layer that works in place
                reasons["cannot be cut"].append(name)
                continue
            memory = _memory(layers, at, edge)
            z, sent = bottom(x), bottom(request)
            answer = len(encode(Message("predict", {Kind.PREDICTION: top(sent)})))
            for codec_name, codec in CODECS.items():
                accuracy = _accuracy(top(z if codec is None else through(codec, z)), y)
                nbytes = len(encode(Message("predict", {Kind.ACTIVATION: sent}), codec))
                arm = Arm(name, codec_name, at, nbytes, answer, accuracy)
                if accuracy < whole - tolerance:
                    reasons["lose too much accuracy"].append(f"{arm.name} {accuracy:.3f}")
                elif memory > edge.memory:
                    reasons["do not fit the device"].append(arm.name)
                else:
                    found.append(arm)
    spent = {
        arm.at: compute_seconds(layers[: arm.at], edge) + compute_seconds(layers[arm.at :], cloud) for arm in found
    }
    kept = [arm for arm in found if not any(_beats(other, arm) and spent[other.at] <= spent[arm.at] for other in found)]
    reasons["are beaten"] = [arm.name for arm in found if arm not in kept]
    lines = [f"arms that {reason}: {', '.join(names)}" for reason, names in reasons.items() if names]
    if not kept:
        raise ValueError(f"expected an arm that fits {edge.name} and is accurate, got none; take another device")
    return kept, lines


def check_memory(layers: Sequence[Layer], edge: Device) -> None:
    """Refuse a device that no cut of the counted layers fits: ``ValueError``."""
    least = min(_memory(layers, at, edge) for at in range(1, len(layers)))
    if least > edge.memory:
        raise ValueError(
            f"expected a device that holds a layer and a request's activations, {least:,} bytes, got {edge.name} with "
            f"{edge.memory:,}; take another device or fewer samples a request"
        )


def _memory(layers: Sequence[Layer], at: int, edge: Device) -> int:
    return split_cost(layers, at, edge=edge, cloud=edge, network="wifi", up_nbytes=0, down_nbytes=0).edge_memory


def _beats(one: Arm, other: Arm) -> bool:
    return (one.at, one.up_nbytes) != (other.at, other.up_nbytes) and (
        one.at <= other.at and one.up_nbytes <= other.up_nbytes
    )


def _accuracy(output: Tensor, y: Tensor) -> float:
    return float((output.argmax(1) == y).double().mean())


def costs_of(
    trace: Trace,
    layers: Sequence[Layer],
    arms: Sequence[Arm],
    *,
    edge: Device,
    cloud: Device,
    radio: Radio,
    joule_price: float,
) -> Matrix:
    """Return what each arm would cost at each time, [T, A]: seconds + λ · joules, as ``split_cost`` has them.

    Its seconds and joules are linear in load, latency and 1 / bandwidth, so that it is asked once an arm.
    """
    columns = []
    price = joule_price / np.maximum(trace.battery, LEAST)
    for arm in arms:
        alone = split_cost(layers, arm.at, edge=edge, cloud=cloud, network="lan", up_nbytes=0, down_nbytes=0)
        computing = trace.load * alone.edge_seconds
        crossing = 8 * arm.up_nbytes / trace.up + 8 * arm.down_nbytes / trace.down + 2 * trace.latency
        joules = (
            edge.watts * computing
            + edge.idle_watts * (alone.cloud_seconds + crossing)
            + radio.base * crossing
            + 8 * (radio.up * arm.up_nbytes + radio.down * arm.down_nbytes)
        )
        columns.append(computing + alone.cloud_seconds + crossing + price * joules)
    return np.stack(columns, 1)


def contexts_of(trace: Trace, network: str, *, noise: float, seed: int) -> Matrix:
    """Return what is known before each request [T, 5]: up, down, latency, load, battery, of the request before it.

    All but the battery are off by log-normal noise. Before the first request they are the network's usual figures, on
    an idle device, fully charged.
    """
    true = np.stack([trace.up, trace.down, trace.latency, trace.load, trace.battery], 1)
    usual = PROFILES[network]
    before = np.array([usual.up, usual.down, usual.latency, 1.0, 1.0])
    seen = np.concatenate([before[None], true[:-1]])
    seen[:, :BATTERY] *= np.exp(np.random.default_rng([seed, 1]).normal(0, noise, (len(seen), BATTERY)))
    return seen


def switching(layers: Sequence[Layer], arms: Sequence[Arm], network: str) -> Matrix:
    """Return the seconds that a change of arms costs, [A, A]: the weights that move up or down, and a latency."""
    profile = PROFILES[network]
    switch = np.zeros((len(arms), len(arms)))
    for row, old in enumerate(arms):
        for column, new in enumerate(arms):
            low, high = sorted((old.at, new.at))
            nbytes = sum(layer.weights_nbytes for layer in layers[low:high])
            if nbytes:
                switch[row, column] = profile.latency + 8 * nbytes / (profile.down if new.at > old.at else profile.up)
    return switch


@dataclass(frozen=True, eq=False)
class Shared:
    """Features of arms that share what is learnt: work times load, bytes over bandwidth, and both times 1 / battery.

    ``work`` are an arm's modelled seconds on an idle device, ``bits`` what it sends; the regression finds what either
    is worth. Each feature is divided by its ``scale`` [9].
    """

    work: Matrix
    bits: Matrix
    scale: Matrix

    @classmethod
    def fitted(cls, games: Sequence[Game], arms: Sequence[Arm], layers: Sequence[Layer], edge: Device) -> "Shared":
        """Return it with features of mean size 1 over the training contexts."""
        work = [
            split_cost(layers, arm.at, edge=edge, cloud=edge, network="lan", up_nbytes=0, down_nbytes=0).edge_seconds
            for arm in arms
        ]
        plain = cls(np.array(work), np.array([8.0 * arm.up_nbytes for arm in arms]), np.ones(9))
        sizes = [np.abs(plain(context)).mean(0) for _, contexts in games for context in contexts]
        return replace(plain, scale=np.maximum(np.mean(sizes, 0), 1e-12))

    def __call__(self, context: Matrix) -> Matrix:
        """Return [A, 9]."""
        need = 1 / max(context[BATTERY], LEAST)
        one = np.ones_like(self.work)
        working, sending = self.work * context[LOAD], self.bits / context[UP]
        plain = (one, one * context[LATENCY], working, sending)
        found = (*plain, *(need * column for column in plain), need * self.bits)
        return np.stack(found, 1) / self.scale


@dataclass(frozen=True, eq=False)
class Apart:
    """Features with weights of its own for each arm, of which it knows nothing: 1 / up, latency, load, 1 / battery."""

    disjoint: Disjoint

    @classmethod
    def fitted(cls, games: Sequence[Game], arms: Sequence[Arm]) -> "Apart":
        """Return it with features of mean size 1 over the training contexts."""
        sizes = [cls._plain(context) for _, contexts in games for context in contexts]
        return cls(Disjoint(len(arms), np.mean(sizes, 0)))

    @staticmethod
    def _plain(context: Matrix) -> Matrix:
        plain = np.array([1.0, 1 / context[UP], context[LATENCY], context[LOAD]])
        return np.concatenate([plain, plain / max(context[BATTERY], LEAST)])

    def __call__(self, context: Matrix) -> Matrix:
        """Return [A, 8 · A]."""
        return self.disjoint(self._plain(context))
