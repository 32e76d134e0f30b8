"""What homomorphic encryption on the cut costs, against TenSEAL's own tensors in the same run."""

import resource
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.timing import Step, median_ratio, paired_seconds
from privacy.he import FAST, PRECISE, CipherHolder, EncryptedLayer, Keys, LayerHolder, Parameters, tight
from privacy.he.baselines import by_ckks_tensor, by_ckks_vector, high_level_context
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.wire import Framed, Metered, serve

__all__ = ["he_overhead_figures"]

BATCH, FEATURES, OUTPUTS = 64, 256, 10
SMALL_BATCH, SMALL_OUTPUTS = 4, 5
EPOCH_BATCHES = 207  # of 64, of 13,245 beats
VECTOR_ROWS = 2  # that the slowest baseline is timed on; the rest are taken to be as slow
# Of ours in a row, for one of theirs: an epoch has hundreds of batches of 64, and thousands of 4.
REPEATS = {"forward": 10, "backward": 10, "small": 50, "vector": 10}
SLOW_ROUNDS, FAST_ROUNDS = 5, 40


def he_overhead_figures(*, slow_rounds: int = SLOW_ROUNDS, fast_rounds: int = FAST_ROUNDS) -> dict[str, Any]:
    """Return how much faster the packed layer is than TenSEAL's own tensors, its bytes and errors, and an epoch's cost.

    Client and server together, real frames in between, weights that change every step, as in training; preset ``fast``
    unless a key says otherwise. ``speedup_over_ckks_tensor``: 64 rows of 256 to 10 outputs against
    ``ckks_tensor(batch=True).mm`` at 8192 [60, 40, 40, 60], encryption and decryption included;
    ``speedup_over_ckks_vector``: against one ``ckks_vector.mm`` a row, timed on 2 rows of 64;
    ``backward_speedup_over_ckks_tensor``: the gradient's product, 64 rows of 10 to 256;
    ``small_speedup_over_split_ways``: 4 rows of 256 to 5 against one ciphertext a feature. Bytes of ``forward``,
    ``backward`` and ``small`` are at ``tight``, both directions, without frames' headers, whole replies unless
    truncated. ``encw_over_plain_weights``: 64 rows of 256 to 5, encrypted weights over plain ones. ``epoch_*``: 207
    batches of 64, 256 to 5, forward and backward.
    """
    torch.manual_seed(0)
    big, small = torch.randn(BATCH, FEATURES), torch.randn(SMALL_BATCH, FEATURES)
    g = torch.randn(BATCH, OUTPUTS) / BATCH
    layer, narrow = nn.Linear(FEATURES, OUTPUTS), nn.Linear(FEATURES, SMALL_OUTPUTS)
    context = high_level_context()
    m = layer.weight.detach().double().numpy().T
    few = narrow.weight.detach().double().numpy().T
    forward, back, little = _Timed(layer, big), _Timed(layer, big), _Timed(narrow, small)
    back.product()  # a gradient goes back through the weights of a product
    # Neighbours in one run, so that the machine's mood cancels.
    pairs = {
        "forward": (forward.product, by_ckks_tensor(context, big.double().numpy(), m)),
        "backward": (lambda: back.product_back_alone(g), by_ckks_tensor(context, g.double().numpy(), m.T.copy())),
        "small": (little.product, by_ckks_tensor(context, small.double().numpy(), few)),
        "vector": (forward.product, by_ckks_vector(context, big[:VECTOR_ROWS].double().numpy(), m)),
    }
    seconds = {
        name: paired_seconds({"ours": partial(_repeated, ours, REPEATS[name]), "theirs": theirs}, slow_rounds)
        for name, (ours, theirs) in pairs.items()
    }
    speedups = {name: REPEATS[name] * median_ratio(one["theirs"], one["ours"]) for name, one in seconds.items()}
    each = {name: 1000 / REPEATS[name] * statistics.median(one["ours"]) for name, one in seconds.items()}
    weights = {"plain": _Timed(narrow, big).product, "encw": _encrypted_weights(narrow, big)}
    compared = paired_seconds(weights, fast_rounds)
    return {
        "speedup_over_ckks_tensor": speedups["forward"],
        "speedup_over_ckks_vector": speedups["vector"] * BATCH / VECTOR_ROWS,
        "backward_speedup_over_ckks_tensor": speedups["backward"],
        "small_speedup_over_split_ways": speedups["small"],
        **_sizes(layer, narrow, big, small, g),
        "rms_fast": _rms(FAST, layer, big),
        "rms_precise": _rms(PRECISE, layer, big),
        "encw_over_plain_weights": median_ratio(compared["encw"], compared["plain"]),
        **_epoch(narrow, big),
        "forward_ms": each["forward"],
        "backward_ms": each["backward"],
        "small_forward_ms": each["small"],
        "encw_forward_ms": 1000 * statistics.median(compared["encw"]),
        "ckks_tensor_ms": 1000 * statistics.median(seconds["forward"]["theirs"]),
        "memory_growth_mb": _memory_growth(narrow, small),
        "threads": torch.get_num_threads(),
    }


def _repeated(step: Step, times: int) -> None:
    for _ in range(times):
        step()


class _Timed:
    """An encrypted layer across real frames, whose weights move before each product, as in training."""

    def __init__(self, layer: nn.Linear, x: Tensor, parameters: Parameters = FAST, *, truncated: bool = True):
        self.own = nn.Linear(layer.in_features, layer.out_features)
        self.own.load_state_dict(layer.state_dict())
        self.x = x
        self.holder = LayerHolder("server", self.own)
        self.meter = Metered(serve(Service({"server": self.holder})))
        holder = Remote("server", Framed(self.meter), "server")
        self.layer = EncryptedLayer(Keys(parameters), holder, truncated=truncated)

    def product(self) -> Tensor:
        """Return the layer's output for the inputs, after a step of the weights too small to matter."""
        with torch.no_grad():
            self.own.weight.mul_(1 + 1e-7)
        out, self.way_back = self.layer.product(self.x, returns=True)
        return out

    def product_back(self, g: Tensor) -> Tensor:
        """Return the gradient of the inputs through the weights of the last product."""
        return self.layer.product_back(g, self.way_back)

    def product_back_alone(self, g: Tensor) -> Tensor:
        """Return the same, all plaintexts of weights made anew."""
        self.holder.forget()
        return self.product_back(g)

    def nbytes(self, run: Callable[[], object]) -> int:
        """Return the bytes of ciphertexts that ``run`` sends, both ways."""
        self.meter.clear()
        run()
        return sum(counts["ciphertext"] for counts in self.meter.nbytes.values())


def _encrypted_weights(layer: nn.Linear, x: Tensor) -> Callable[[], Tensor]:
    holder = Remote("server", Framed(serve(Service({"server": CipherHolder("server", layer)}))), "server")
    encrypted = EncryptedLayer(Keys(FAST), holder, update="encrypted", layer=layer, rows=len(x))

    def product() -> Tensor:
        with torch.no_grad():
            return encrypted(x)

    return product


def _sizes(layer: nn.Linear, narrow: nn.Linear, big: Tensor, small: Tensor, g: Tensor) -> dict[str, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on both ends, of the preset that is asked for here
        edge = tight()
        whole, cut = _Timed(layer, big, edge, truncated=False), _Timed(layer, big, edge)
        little = _Timed(narrow, small, edge, truncated=False)
    found = {
        "forward_bytes": whole.nbytes(whole.product),
        "forward_bytes_truncated": cut.nbytes(cut.product),
        "backward_bytes": whole.nbytes(lambda: whole.product_back(g)),
        "backward_bytes_truncated": cut.nbytes(lambda: cut.product_back(g)),
        "small_forward_bytes": little.nbytes(little.product),
    }
    usual = _Timed(layer, big)
    return {**found, "forward_bytes_fast": usual.nbytes(usual.product)}


def _rms(parameters: Parameters, layer: nn.Linear, x: Tensor) -> float:
    """Return the error of the layer's output against float64."""
    timed = _Timed(layer.double(), x.double(), parameters)
    timed.own.double()
    with torch.no_grad():
        error = timed.layer(x.double()) - timed.own(x.double())
    layer.float()
    return float(error.square().mean().sqrt())


def _epoch(narrow: nn.Linear, x: Tensor) -> dict[str, float]:
    """Return bytes, all frames counted, and seconds of an epoch's forward and backward products."""
    timed = _Timed(narrow, x)
    timed.meter.clear()
    g = torch.randn(len(x), narrow.out_features) / len(x)
    for _ in range(EPOCH_BATCHES):
        timed.product()
        timed.product_back(g)
    return {"epoch_bytes": timed.meter.total_nbytes, "epoch_crypto_s": sum(timed.layer.seconds.values())}


def _memory_growth(narrow: nn.Linear, x: Tensor) -> float:
    """Return by how much the process has grown over 1,000 products, in MB, after 50 to settle."""
    timed = _Timed(narrow, x)
    for _ in range(50):
        timed.product()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        timed.product()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
