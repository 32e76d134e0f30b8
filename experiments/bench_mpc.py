"""The benchmark of computing on shares: a linear layer against CrypTen alone, its bytes and error, and an epoch."""

import statistics
import time
from typing import Any

import torch
from torch import nn

from experiments.timing import median_ratio, paired_seconds
from privacy.mpc import Servers, SharedStage
from privacy.mpc.baselines import RawCrypten

__all__ = ["mpc_overhead_figures"]

BATCH, FEATURES, OUTPUTS = 64, 256, 10
ROUNDS = 60
DIGITS, EPOCH_BATCH = 800, 32
CUT, HIDDEN = 1024, 64  # the top of the digits CNN above its flattening: two layers
DRAWS = 20  # of inputs, for the greatest error


def mpc_overhead_figures(*, rounds: int = ROUNDS, samples: int = DIGITS) -> dict[str, Any]:
    """Return ratios, bytes, rounds and errors of one run, and seconds for information.

    ``linear_over_raw_crypten``: 64 rows of 256 to 10 outputs, online, over loopback, with a dealer; ours from the
    client's activation to the client's output, both frames and both halves of the shares included, over CrypTen's own
    sharing, product and reveal at its first party; the median ratio of neighbours. ``linear_bytes`` and
    ``linear_rounds`` are by CrypTen's counters at server 0, the dealer's answers included (bytes sent and received);
    ``linear_socket_bytes`` what all three have sent by the kernel's. ``client_bytes``: both wires, both ways.
    ``max_error``: against float64, over 20 draws. ``epoch_s``: 800 digits at batches of 32 through a top of two layers,
    1024 → 64 → 10, forward, loss, backward and step on shares; ``epoch_u_shaped_s`` with the loss at the client.
    """
    torch.manual_seed(0)
    layer, x = nn.Linear(FEATURES, OUTPUTS), torch.randn(BATCH, FEATURES)
    with Servers() as servers, RawCrypten(BATCH, FEATURES, OUTPUTS) as raw:
        stage = SharedStage(servers, layer)
        inner: list[float] = []  # CrypTen's own clock: what it takes to ask its processes does not count
        seconds = paired_seconds(
            {"ours": lambda: stage.predict(x), "theirs": lambda: inner.append(raw.product()["seconds"])}, rounds
        )
        theirs = inner[-rounds:]
        figures = {
            "linear_over_raw_crypten": median_ratio(seconds["ours"], theirs),
            "linear_ms": 1000 * statistics.median(seconds["ours"]),
            "raw_crypten_ms": 1000 * statistics.median(theirs),
            **_counts(servers, stage, x),
            "raw_crypten_bytes": round(raw.product()["nbytes"]),
            "max_error": max(_error(stage, layer) for _ in range(DRAWS)),
            "raw_crypten_error": raw.product()["error"],
        }
    with Servers() as servers:  # alone on the machine
        epochs = {f"epoch{name}_s": _epoch(servers, samples, shaped=bool(name)) for name in ("", "_u_shaped")}
    return figures | epochs | {"threads": torch.get_num_threads()}


def _counts(servers: Servers, stage: SharedStage, x: torch.Tensor) -> dict[str, Any]:
    for meter in stage.meters:
        meter.clear()
    servers.count_anew()
    stage.predict(x)
    costs = servers.costs()
    return {
        "linear_bytes": round(costs.parties["server 0"]["nbytes"]),
        "linear_rounds": costs.rounds,
        "linear_socket_bytes": costs.socket_nbytes,
        "client_bytes": sum(meter.total_nbytes for meter in stage.meters),
    }


def _error(stage: SharedStage, layer: nn.Linear) -> float:
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    right = x @ layer.weight.detach().double().T + layer.bias.detach().double()
    return float((stage.predict(x) - right).abs().max())


def _epoch(servers: Servers, samples: int, *, shaped: bool) -> float:
    top = nn.Sequential(nn.Linear(CUT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))
    stage = SharedStage(servers, top, lr=0.05, momentum=0.9)
    z, y = torch.rand(samples, CUT, requires_grad=True), torch.randint(0, OUTPUTS, (samples,))
    stage.predict(z[:1])  # the first answer waits seconds for what is set up on demand
    begun = time.perf_counter()
    for rows in torch.arange(samples).split(EPOCH_BATCH):
        own = z[rows].detach().requires_grad_()
        if shaped:
            out = stage.forward(own)
            nn.functional.cross_entropy(out, y[rows]).backward()
            assert out.grad is not None
            stage.backward(out.grad)
        else:
            stage.learn(own, y[rows])
    return time.perf_counter() - begun
