"""What a filter says of samples, and how right it is: per sample and per client."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rates", "Suspects", "flagged_shares", "rates"]


@dataclass(frozen=True)
class Suspects:
    """A filter's verdict: ``scores`` [N], higher is more suspicious, and ``flagged`` [N], those to be left out."""

    scores: Tensor
    flagged: Tensor


@dataclass(frozen=True)
class Rates:
    """How right a verdict is: the share of the poisoned that is flagged (``tpr``), and of the honest (``fpr``)."""

    tpr: float
    fpr: float


def rates(flagged: Tensor, truth: Tensor) -> Rates:
    """Return the true and the false positive rate of ``flagged`` [N] against ``truth`` [N], both boolean.

    A rate over nobody is nan. Samples and clients alike: it goes by one mask an entry.
    """
    if flagged.dtype != torch.bool or truth.dtype != torch.bool or flagged.shape != truth.shape or flagged.ndim != 1:
        raise ValueError(
            f"expected two boolean masks [N] of one length, got {_described(flagged)} and {_described(truth)}; "
            "compare scores with a threshold first"
        )
    return Rates(_share(flagged[truth]), _share(flagged[~truth]))


def flagged_shares(flagged: Tensor, clients: Sequence[str]) -> dict[str, float]:
    """Return the share of each client's samples that is flagged; ``clients`` names the client of every sample."""
    if flagged.dtype != torch.bool or flagged.shape != (len(clients),):
        raise ValueError(
            f"expected a boolean mask with one entry for each of {len(clients)} clients' names, got "
            f"{_described(flagged)}; name the client of every sample"
        )
    counts: dict[str, list[int]] = {}
    for client, is_flagged in zip(clients, flagged.tolist(), strict=True):
        count = counts.setdefault(client, [0, 0])
        count[0] += is_flagged
        count[1] += 1
    return {client: hits / total for client, (hits, total) in counts.items()}


def check_samples(z: Tensor, y: Tensor) -> Tensor:
    """Return activations [N, …] as finite float64 rows [N, d] on the CPU, or raise ``ValueError``."""
    if y.ndim != 1 or y.is_floating_point() or z.ndim < 2 or len(z) != len(y) or not len(y):
        raise ValueError(
            f"expected activations [N, …] and as many class labels [N], got {_described(z)} and {_described(y)}"
        )
    rows = z.detach().flatten(1).to("cpu", torch.float64)
    if not torch.isfinite(rows).all():
        bad = int((~torch.isfinite(rows)).any(1).sum())
        raise ValueError(f"expected finite activations, got nan or inf in {bad} samples; leave those out before")
    return rows


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if len(mask) else float("nan")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
