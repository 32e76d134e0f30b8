"""What a sample leaves at each point of the split, in a few numbers that mean the same in every model.

Whoever asks about a sample has it, and so sends it and reads what crosses: the prediction, the activation below it, or
the gradient that comes back. Each point reads these off a view (``seen``), and makes the same of a model that the
attacker trained itself (``of``). Statistics do not depend on the order of channels, which is another in every model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitlearn import Kind, View

__all__ = ["ActivationPoint", "GradientPoint", "LogitPoint", "Point"]

PART = 256  # samples at a time
LEAST = 1e-30  # in place of 0, whose logarithm there is none


class Point(Protocol):
    """A place in the split, and the statistics [N, F], float64, of the samples that pass it."""

    @property
    def name(self) -> str:
        """What it is called."""

    def seen(self, view: View, y: Tensor) -> Tensor:
        """Return the statistics of what crossed for the candidates, whose labels are ``y`` [N], in their order."""

    def of(self, bottom: nn.Module, top: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the same of samples ``x`` with labels ``y`` in a model that the attacker holds."""


@dataclass(frozen=True)
class LogitPoint:
    """The outputs, read by whoever asks for predictions: φ = log p_y − log(1 − p_y), [N, 1].

    (Carlini et al. 2022, arXiv:2112.03570, section IV.C; computed from the logits, so that p_y = 1 is no infinity.)
    """

    name: str = "logits"

    def seen(self, view: View, y: Tensor) -> Tensor:
        """Return φ of the predictions that crossed."""
        return _margin(predictions(view, y), y)

    def of(self, bottom: nn.Module, top: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return φ of the model's outputs."""
        with torch.no_grad():
            return torch.cat([_margin(top(bottom(own)), labels) for own, labels in _parts(x, y)])


@dataclass(frozen=True)
class ActivationPoint:
    """The activation at the cut, read by the server; labels play no part.

    Log norm, log of the greatest and of the mean magnitude over the norm, and the share of entries above 0, [N, 4].
    """

    name: str = "activation"

    def seen(self, view: View, y: Tensor) -> Tensor:
        """Return the statistics of the activations that crossed in requests to predict."""
        _check_asks(view)
        z = view.activations(verb="predict")
        _check_count(len(z), y, "activation")
        return _shape_of(z, signs=True)

    def of(self, bottom: nn.Module, top: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the statistics of the bottom's output."""
        with torch.no_grad():
            return torch.cat([_shape_of(bottom(own), signs=True) for own, _ in _parts(x, y)])


@dataclass(frozen=True)
class GradientPoint:
    """The gradient at the cut of one sample's loss, read by whoever sent it to be learned from.

    Log norm, log of the greatest and of the mean magnitude over the norm, [N, 3]. What comes back is the gradient of a
    batch's mean loss, whose rows times the size of the batch are those of each sample where the stage above treats
    samples apart (batch norm in training does not).
    """

    name: str = "gradient"

    def seen(self, view: View, y: Tensor) -> Tensor:
        """Return the statistics of the gradients that came back in replies to learn requests."""
        _check_asks(view)
        rows = [len(g) * g for g in view.tensors(Kind.GRADIENT, verb="learn")]
        if not rows:
            raise LookupError(
                "this attack reads gradients in replies to learn requests, and none crossed; record the wire while the "
                "candidates are sent to be learned from"
            )
        g = torch.cat(rows)
        _check_count(len(g), y, "gradient")
        return _shape_of(g, signs=False)

    def of(self, bottom: nn.Module, top: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the statistics of the gradients of each sample's loss in the bottom's output."""
        found = []
        for own, labels in _parts(x, y):
            with torch.no_grad():
                z = bottom(own)
            leaf = z.detach().requires_grad_()
            (g,) = torch.autograd.grad(cross_entropy(top(leaf), labels, reduction="sum"), leaf)
            found.append(_shape_of(g, signs=False))
        return torch.cat(found)


def predictions(view: View, y: Tensor) -> Tensor:
    """Return the logits [N, C] that crossed for the candidates, one for each label in ``y``."""
    _check_asks(view)
    found = view.tensors(Kind.PREDICTION, verb="predict")
    if not found:
        raise LookupError(
            "this attack reads the replies to predict requests, and none crossed; record the wire while candidates are "
            "predicted"
        )
    logits = torch.cat(found)
    _check_count(len(logits), y, "prediction")
    return logits


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return log p_y − log(1 − p_y), [N, 1]: the label's logit less the log-sum-exp of the others."""
    places = y.to(logits.device)[:, None]
    own = logits.double().gather(1, places)
    others = logits.double().scatter(1, places, -torch.inf).logsumexp(1, keepdim=True)
    return (own - others).cpu()


def _shape_of(tensor: Tensor, *, signs: bool) -> Tensor:
    """Return, a row a sample: log norm, log of max |·| and of mean |·| over the norm, and the share of entries above 0.

    The last with ``signs`` alone. A row of zeros has the logarithm of the least number instead of none.
    """
    rows = tensor.detach().flatten(1).double()
    size = rows.norm(dim=1)
    scale = size.clamp(min=LEAST)
    columns = [size, rows.abs().amax(1) / scale, rows.abs().mean(1) / scale]
    found = [column.clamp(min=LEAST).log() for column in columns]
    return torch.stack([*found, *([(rows > 0).double().mean(1)] if signs else [])], 1).cpu()


def _parts(x: Tensor, y: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(x.split(PART), y.to(x.device).split(PART), strict=True)


def _check_asks(view: View) -> None:
    if not (view.threat.queries or view.threat.white_box):
        raise LookupError("this attack sends candidates of its own; grant that with Threat(queries=True)")


def _check_count(there: int, y: Tensor, what: str) -> None:
    if there != len(y):
        raise ValueError(
            f"expected one {what} for each of {len(y)} candidates, got {there}; record their requests alone, once, in "
            "the order of the labels"
        )
