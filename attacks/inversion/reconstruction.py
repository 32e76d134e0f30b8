"""Inversion and Reconstruction: what an attack on the inputs is called with, and what it returns."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from splitlearn import View

__all__ = [
    "Inversion", "Reconstruction", "auxiliary_inputs", "auxiliary_labels", "bounded", "check_bounds", "seeded",
]  # fmt: skip

Bounds = tuple[float, float]
SLACK = 1e-6  # of the bounds' span, by which rounding may take a sample beyond them


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


def auxiliary_inputs(
    view: View, *, at_least: int, like: Tensor | None, bounds: Bounds | None, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Return the attacker's own inputs, of ``like``'s device and type: [M, *shape], finite and in their bounds.

    ``ValueError`` says which of these they are not, that they are too few, or tokens, which have no gradient.
    """
    check_bounds(bounds)
    x = view.auxiliary_x
    if not isinstance(x, Tensor) or x.ndim == 0 or len(x) < at_least or not x.is_floating_point():
        got = f"{len(x)} of {x.dtype}" if isinstance(x, Tensor) and x.ndim else type(x).__name__
        raise ValueError(
            f"expected at least {at_least} auxiliary samples of a floating-point type, got {got}; "
            "grant more of them (this attack does not invert tokens)"
        )
    if x.ndim < 2 or (shape is not None and tuple(x.shape[1:]) != shape):
        wanted = "[M, *input shape]" if shape is None else f"of shape {shape} each"
        raise ValueError(
            f"expected auxiliary samples {wanted}, got {tuple(x.shape)}; grant inputs of the victim's shape"
        )
    if not x.isfinite().all():
        raise ValueError("expected finite auxiliary samples, got nan or inf; leave these samples out")
    low, high = x.min().item(), x.max().item()
    if bounds is not None:
        slack = SLACK * (bounds[1] - bounds[0])
        if low < bounds[0] - slack or high > bounds[1] + slack:
            raise ValueError(
                f"expected auxiliary samples within the bounds {bounds}, got values from {low:.3g} to {high:.3g}; "
                "pass bounds=None, or the bounds of your inputs"
            )
    return x if like is None else x.to(like)


def auxiliary_labels(view: View, device: torch.device, classes: int | None = None) -> Tensor:
    """Return the class labels of the attacker's own inputs, on ``device``: whole numbers from 0 [M].

    ``ValueError`` where they are none, not one a sample, or not below ``classes``.
    """
    y, num = view.auxiliary_y, len(view.auxiliary_x)
    fits = isinstance(y, Tensor) and y.shape == (num,) and num > 0 and not (y.is_floating_point() or y.is_complex())
    if fits and int(y.min()) >= 0 and (classes is None or int(y.max()) < classes):
        return y.to(device).long()
    got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
    span = f" from {int(y.min())} to {int(y.max())}" if fits else ""
    wanted = "labels from 0 up" if classes is None else f"labels from 0 to {classes - 1}"
    fix = "number the classes" if classes is None else "number the classes, or set classes"
    raise ValueError(f"expected one class label for each of {num} auxiliary samples, {wanted}, got {got}{span}; {fix}")


def check_bounds(bounds: Bounds | None) -> None:
    """Raise ``ValueError`` unless the bounds are a least and a greater, greatest value of an input, or None."""
    if bounds is not None and not (isfinite(bounds[0]) and isfinite(bounds[1]) and bounds[0] < bounds[1]):
        raise ValueError(f"expected bounds (least, greatest), got {bounds}; pass bounds=None where these are not known")


def bounded(x: Tensor, bounds: Bounds | None) -> Tensor:
    """Return ``x`` cut off at the least and the greatest value an input can have, where these are known."""
    return x if bounds is None else x.clamp(*bounds)
