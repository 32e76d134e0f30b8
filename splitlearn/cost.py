"""Where to cut: the seconds and joules of device, network and cloud for each cut, from counted work and few constants.

The sum of both computations and of what crosses, layer by layer, as in Neurosurgeon: Kang et al. 2017 (ASPLOS).
Deviations: work is counted in kernels, not regressed by kinds of layers, and training is priced beside inference.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from splitlearn.devices import RADIOS, Device, Radio
from splitlearn.network import PROFILES, Profile

__all__ = [
    "Cost",
    "Kernel",
    "Layer",
    "compute_seconds",
    "constant",
    "count",
    "memory",
    "seconds_per",
    "split_cost",
    "units",
]

FLOAT_NBYTES = 4
FEW_CHANNELS = 8  # of input: fewer do not fill a vector of a usual processor (8 float32 in AVX2, 16 in AVX-512)
FEW_COLUMNS = 16  # of a product: the same
ON_DEMAND = frozenset({"call", "training call"})  # units that cost nothing where no factor says so

KINDS = {  # of the kernels that torch dispatches; what is not here is "other", bound by the memory that it moves
    "addmm": "linear",
    "mm": "linear",
    "bmm": "batched linear",
    "baddbmm": "batched linear",
    "max_pool2d_with_indices": "pooling",
    "native_batch_norm": "batch normalisation",
    "native_layer_norm": "normalisation",
    "_softmax": "normalisation",
    "gelu": "transcendental",
    "tanh": "transcendental",
    "sigmoid": "transcendental",
    "bernoulli_": "random",
    "embedding": "lookup",
    "_embedding_bag": "lookup",
}
UNTOLD = {  # kernels that multiply, by how much torch does not tell, and how to count them
    "_trilinear": "nn.Bilinear; write it as torch.einsum, or with nn.Linear",
    "mkldnn_rnn_layer": "torch.lstm; use nn.LSTM",
}
FREE = frozenset({"_unsafe_view", "empty", "empty_like", "lift_fresh"})  # move nothing, as views do


@dataclass(frozen=True)
class Kernel:
    """One operation of a forward pass: FLOPs, bytes of activations read and written, bytes of its weights.

    It reads its weights once, unless it is a "lookup" of rows, which training alone goes through, for the gradient.
    ``learns`` where its weights take a gradient, ``passes`` where a gradient goes on to its ``num_inputs``, which are
    two of a product of two activations: each gradient is one more kernel like it in a training step. ``written_nbytes``
    are bytes of memory that it filled and that nothing held before: none where it works in place.
    """

    kind: str
    flops: float = 0.0
    activation_nbytes: int = 0
    weights_nbytes: int = 0
    learns: bool = False
    passes: bool = True
    num_inputs: int = 1
    written_nbytes: int = 0

    @property
    def step(self) -> int:
        """Return how many kernels like it a training step runs."""
        return 1 + self.learns + self.passes * self.num_inputs


@dataclass(frozen=True)
class Layer:
    """What one top-level layer does to a batch, forward; ``output`` is a sample's shape, ``output_nbytes`` a batch's.

    ``flops`` are those of "convolution" and "linear" (every other matrix product); a multiply-add is two.
    ``operations`` is the number of ``kernels``, ``moved`` the bytes that they read and write, weights included.
    ``weights_nbytes`` leaves out weights that a layer before it has too.
    """

    name: str
    flops: Mapping[str, float]
    operations: int
    moved: float
    weights_nbytes: int
    output: tuple[int, ...]
    output_nbytes: int
    input_nbytes: int = 0
    kernels: tuple[Kernel, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Cost:
    """What one step costs at one cut. ``joules`` are the device's: computing, its radio, waiting.

    ``edge_memory`` are bytes of weights and activations: in training gradients of weights too, and all that any kernel
    wrote, of which autograd keeps half to all (on the models of ``splitlearn.models``; for an ``nn.LSTM`` oneDNN keeps
    up to half as much again); in inference what the largest kernel reads and writes, without what skips it meanwhile.
    Optimizer state is left out. ``modelled`` unless both ends were measured on the present machine. The network's share
    is always a model.
    """

    edge_seconds: float
    cloud_seconds: float
    up_seconds: float
    down_seconds: float
    joules: float
    up_nbytes: float
    down_nbytes: float
    edge_memory: int
    modelled: bool

    @property
    def seconds(self) -> float:
        """Return the sum: one after another, nothing overlaps."""
        return self.edge_seconds + self.cloud_seconds + self.up_seconds + self.down_seconds


def count(model: nn.Sequential, x: Tensor) -> list[Layer]:
    """Return what each top-level layer does to the batch ``x``, by running a copy of the model once, without gradient.

    In the mode that the model is in: dropout and batch norm do more while training. FLOPs are torch's own formulas
    (``torch.utils.flop_counter``). The model, its buffers, ``x`` and the global RNG stay as they are. ``ValueError``
    for kernels whose work cannot be told (``UNTOLD``).
    """
    _refuse_other_modules(model)
    model, x = copy.deepcopy(model), x.clone()  # a layer may work in place
    weights = {t.untyped_storage().data_ptr(): t.requires_grad for t in model.parameters()}
    layers, gradient, held = [], False, set[int]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, layer in ((name, layer) for name, layer in model._modules.items() if layer is not None):
            with _Kernels(weights, gradient) as counted, _unfused(layer):
                z = layer(x)
            if not isinstance(z, Tensor):
                raise ValueError(f"expected one tensor out of layer {name}, got {type(z).__name__}; wrap the layer")
            gradient = counted.gradient
            own = {id(weight): weight for weight in layer.parameters() if id(weight) not in held}
            held |= set(own)
            layers.append(_layer(name, sum(map(_nbytes, own.values())), x, z, tuple(counted.kernels)))
            x = z
    return layers


def units(layers: Sequence[Layer], *, training: bool = False) -> dict[str, float]:
    """Return how many units of each kind of work a stage is: "KIND operations", "KIND flops", "KIND moved", "call".

    Training counts a kernel once for the forward pass, once more where its weights learn and once more where a gradient
    goes on to an input, so a backward pass is twice the forward one, less what the first layers save; its units are
    named "training …". An empty stage has none. "KIND weights" are bytes of weights, beside those of "moved". A layer
    made by hand, without kernels, counts by its totals, and learns where it has weights.
    """
    prefix, total = "training " * training, defaultdict[str, float](float)
    for layer in layers:
        for kind, times, amounts in _amounts(layer, training):
            for unit, amount in amounts.items():
                if amount:
                    total[f"{prefix}{kind} {unit}"] += times * amount
    if total:
        total[f"{prefix}call"] = 1.0
    return dict(total)


def constant(unit: str) -> str:
    """Return which constant of a device prices a unit of work: "convolution", "linear", "moved" or "overhead"."""
    kind, _, what = unit.removeprefix("training ").rpartition(" ")
    if what == "flops":
        return "convolution" if kind.endswith("convolution") else "linear"
    return "moved" if what in ("moved", "weights") else "overhead"


def seconds_per(unit: str, device: Device) -> float:
    """Return what one unit of work costs by the device: its plain constant, times its factor for the unit."""
    name = constant(unit)
    plain = device.overhead if name == "overhead" else 1 / getattr(device, name)
    return plain * device.factors.get(unit, 0.0 if unit in ON_DEMAND else 1.0)


def compute_seconds(layers: Sequence[Layer], device: Device, *, training: bool = False) -> float:
    """Return the seconds that ``device`` takes for a batch; in training for a step, forward and backward.

    seconds = FLOPs / rate + bytes moved / bandwidth + operations · overhead, summed over the kernels, where a training
    step is one to three times the forward pass (``units``), and each unit is times the device's factor for it, if it
    has one. The optimizer's step is left out.
    """
    return sum(
        (amount * seconds_per(unit, device) for unit, amount in units(layers, training=training).items()), start=0.0
    )


def split_cost(
    layers: Sequence[Layer],
    at: int,
    *,
    edge: Device,
    cloud: Device,
    network: str | Profile,
    up_nbytes: float,
    down_nbytes: float,
    training: bool = False,
    radio: Radio | None = None,
) -> Cost:
    """Return the cost of one batch with ``at`` layers on the device: 0 is all in the cloud, ``len(layers)`` all here.

    ``up_nbytes`` and ``down_nbytes`` cross, in one frame each, or none where 0. A frame takes bytes · 8 / bandwidth +
    latency: a stream in full flow, without headers, losses and TCP's slow start, which ``network.Emulated`` has and
    which large frames feel on long ways. ``network`` is a profile or the name of one; ``radio`` that network's, unless
    given. The radio draws its base power while a frame is under way; its tail afterwards is left out.
    """
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= len(layers):
        raise ValueError(f"expected a cut between 0 and {len(layers)} layers, got {at!r}; 0 is all in the cloud")
    if not (up_nbytes >= 0 and down_nbytes >= 0):
        raise ValueError(f"expected bytes ≥ 0 each way, got {up_nbytes} up and {down_nbytes} down")
    profile, radio = _network(network, radio)
    edge_seconds = compute_seconds(layers[:at], edge, training=training)
    cloud_seconds = compute_seconds(layers[at:], cloud, training=training)
    up_seconds = 8 * up_nbytes / profile.up + profile.latency if up_nbytes else 0.0
    down_seconds = 8 * down_nbytes / profile.down + profile.latency if down_nbytes else 0.0
    crossing = up_seconds + down_seconds
    joules = (
        edge.watts * edge_seconds
        + edge.idle_watts * (cloud_seconds + crossing)
        + radio.base * crossing
        + 8 * (radio.up * up_nbytes + radio.down * down_nbytes)  # watts per bit/s, at the rate, for bits / rate
    )
    return Cost(
        edge_seconds=edge_seconds,
        cloud_seconds=cloud_seconds,
        up_seconds=up_seconds,
        down_seconds=down_seconds,
        joules=joules,
        up_nbytes=up_nbytes,
        down_nbytes=down_nbytes,
        edge_memory=memory(layers[:at], training=training),
        modelled=edge.modelled or cloud.modelled,
    )


class _Kernels(TorchDispatchMode):
    """Writes down the kernels that run, and whether a gradient has reached them."""

    def __init__(self, weights: Mapping[int, bool], gradient: bool):
        super().__init__()
        self.kernels: list[Kernel] = []
        self.gradient = gradient
        self._weights = weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name in FREE or any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns):
            if not any(map(self._is_weight, tree_leaves((args, kwargs)))):
                written = _new_nbytes(tree_leaves((args, kwargs)), tree_leaves(out))
                self.kernels.append(Kernel("view", passes=self.gradient, written_nbytes=written))
        else:
            self._add(name, func, args, kwargs, out)
        return out

    def _is_weight(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._weights

    def _add(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        own = [t for t in read if self._is_weight(t)]
        others = [t for t in read if not self._is_weight(t)]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        weights = sum(map(_nbytes, own))
        if name in UNTOLD:
            raise ValueError(f"expected layers whose work can be counted, got {UNTOLD[name]}")
        flops = flop_registry.get(func._overloadpacket)
        kind = _kind(name, read, written)
        rows = args[1].numel() * _nbytes(args[0]) // len(args[0]) if kind == "lookup" else 0  # that it reads
        learns = any(self._weights[t.untyped_storage().data_ptr()] for t in own)
        self.kernels.append(
            Kernel(
                kind,
                float(flops(*args, **kwargs, out_val=out)) if flops else 0.0,
                sum(map(_nbytes, [*others, *written])) + rows,
                weights,
                learns,
                self.gradient,
                2 if kind.endswith("linear") and not own else 1,
                _new_nbytes(read, written),
            )
        )
        self.gradient = self.gradient or learns


def _refuse_other_modules(model: nn.Module) -> None:
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"expected an nn.Sequential, got {type(model).__name__}; wrap its blocks: nn.Sequential(block1, block2, …)"
        )


@contextmanager
def _unfused(layer: nn.Module) -> Iterator[None]:
    """Keep torch from running attention, a transformer layer or an LSTM as one kernel, whose work it cannot tell."""
    before, enabled = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    recurs = any(isinstance(module, nn.LSTM) for module in layer.modules())  # others are slow without oneDNN
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(enabled and not recurs)  # mkldnn.flags sets TF32 too, which warns
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        torch._C._set_mkldnn_enabled(enabled)


def _kind(name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> str:
    if name == "convolution":
        return "narrow convolution" if read[1].shape[1] < FEW_CHANNELS else "convolution"
    kind = KINDS.get(name, "other")
    if kind == "pooling" and read[0].shape[-2] == 1:  # of signals: torch pools them faster where no gradient is wanted
        return "signal pooling"
    if kind == "linear" and written[0].shape[-1] < FEW_COLUMNS:
        return "narrow linear"
    return kind


def _layer(name: str, weights_nbytes: int, x: Tensor, z: Tensor, kernels: tuple[Kernel, ...]) -> Layer:
    flops = {"convolution": 0.0, "linear": 0.0}
    for kernel in kernels:
        flops["convolution" if kernel.kind.endswith("convolution") else "linear"] += kernel.flops
    return Layer(
        name=name,
        flops=flops,
        operations=len(kernels),
        moved=float(sum(_moved(kernel) for kernel in kernels)),
        weights_nbytes=weights_nbytes,
        output=tuple(z.shape[1:]),
        output_nbytes=FLOAT_NBYTES * z.numel(),
        input_nbytes=_nbytes(x),
        kernels=kernels,
    )


def _amounts(layer: Layer, training: bool) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Yield the kind of each kernel, how many like it a pass or step runs, and its units of work."""
    for kernel in layer.kernels:
        times = kernel.step if training else 1
        weights = float(kernel.weights_nbytes)
        if kernel.kind == "lookup":  # not in the forward pass
            weights = weights * (times - 1) / times
        amounts = {"operations": 1.0, "flops": kernel.flops, "moved": kernel.activation_nbytes, "weights": weights}
        yield kernel.kind, times, amounts
    if not layer.kernels:
        times = (3 if layer.weights_nbytes else 2) if training else 1
        for kind, flops in layer.flops.items():
            yield kind, times, {"flops": flops}
        yield "other", times, {"operations": layer.operations, "moved": layer.moved}


def _moved(kernel: Kernel) -> int:
    return kernel.activation_nbytes + (kernel.weights_nbytes if kernel.kind != "lookup" else 0)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _new_nbytes(read: Sequence[Any], written: Sequence[Any]) -> int:
    """Return the bytes of tensors written whose memory is that of none read."""
    known = {t.untyped_storage().data_ptr() for t in read if isinstance(t, Tensor)}
    new = (t for t in written if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known)
    return sum(map(_nbytes, new))


def _network(network: str | Profile, radio: Radio | None) -> tuple[Profile, Radio]:
    if isinstance(network, str):
        if network not in PROFILES:
            raise ValueError(f"expected one of {', '.join(PROFILES)}, got {network!r}; or give a network.Profile")
        return PROFILES[network], radio or RADIOS[network]
    name = next((name for name, profile in PROFILES.items() if profile == network), None)
    if radio is None and name is None:
        raise ValueError("expected a radio for a network of your own, got none; give radio=RADIOS['wifi'], or a Radio")
    return network, radio or RADIOS[str(name)]


def memory(layers: Sequence[Layer], *, training: bool = False) -> int:
    """Return the bytes that a stage takes: weights and the largest kernel's input and output; training, all outputs."""
    if not layers:
        return 0
    weights = sum(layer.weights_nbytes for layer in layers)
    if training:
        return 2 * weights + layers[0].input_nbytes + sum(map(_written, layers))
    return weights + max(map(_largest, layers))


def _written(layer: Layer) -> int:
    return sum(kernel.written_nbytes for kernel in layer.kernels) if layer.kernels else layer.output_nbytes


def _largest(layer: Layer) -> int:
    """Return the bytes of activations that the layer holds at once: its input and output, or those of a kernel."""
    inside = max((kernel.activation_nbytes for kernel in layer.kernels), default=0)
    return max(inside, layer.input_nbytes + layer.output_nbytes)
