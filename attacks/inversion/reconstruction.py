"""Inversion and Reconstruction: what an attack on the inputs is called with, and what it returns."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from splitlearn import View

__all__ = ["Inversion", "Reconstruction", "auxiliary_inputs", "bounded", "seeded"]

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Reconstruction:
    """Estimates of the private inputs, one for each activation in the view, and the signs that the attack was tried.

    ``x_hat`` is [N, *input shape], in the attack's bounds, chosen without the truth. ``evidence`` holds losses,
    what was selected on auxiliary samples, and ``converged``: 1 if more of the same would not have helped, else 0.
    """

    x_hat: Tensor
    evidence: Mapping[str, float | str]


class Inversion(Protocol):
    """A reconstruction attack: a frozen set of settings, called on a view."""

    def __call__(self, view: View) -> Reconstruction:
        """Return an estimate of the input behind each activation of the view's predict requests."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from torch's global generators as seeded, and put them back as they were: guards draw from these."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def auxiliary_inputs(view: View, *, at_least: int, device: torch.device) -> Tensor:
    """Return the attacker's own inputs on ``device``; ``ValueError`` if too few, or tokens, which have no gradient."""
    x = view.auxiliary_x.to(device)
    if len(x) < at_least or not x.is_floating_point():
        raise ValueError(
            f"expected at least {at_least} auxiliary samples of a floating-point type, got {len(x)} of {x.dtype}; "
            "grant more of them (this attack does not invert tokens)"
        )
    return x


def bounded(x: Tensor, bounds: Bounds | None) -> Tensor:
    """Return ``x`` cut off at the least and the greatest value an input can have, where these are known."""
    return x if bounds is None else x.clamp(*bounds)
