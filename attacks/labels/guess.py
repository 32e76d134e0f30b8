"""What a label attack returns, and what it goes by: the pairs of activation and gradient of each batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from splitlearn import Kind, View

__all__ = ["Crossed", "LabelGuess", "crossed"]


@dataclass(frozen=True)
class LabelGuess:
    """Guesses at the labels of all samples, in the order in which they crossed.

    ``labels`` [N] are whole numbers; where ``named`` is false they are clusters, whose names the attack does not know.
    ``scores`` [N], for two classes, are the higher the likelier label 1 is.
    """

    labels: Tensor | None = None
    scores: Tensor | None = None
    named: bool = True
    evidence: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Crossed:
    """One batch: the activation [n, …] that went to whoever holds the labels, and the gradient that came back.

    ``ids`` [n] are the samples' numbers, where they crossed.
    """

    z: Tensor
    g: Tensor
    ids: Tensor | None = None


def crossed(view: View) -> list[Crossed]:
    """Return the batches of a training, in order: of a vertical client's wire, or of the U shape's server.

    Each is a forward request, whose reply is the activation that goes on to the labels, and the backward request
    that brings its gradient. Raises ``LookupError`` where none crossed.
    """
    view.tensors(Kind.ACTIVATION)  # what the threat withholds is an error that names it
    view.tensors(Kind.GRADIENT)
    found: list[Crossed] = []
    z: Tensor | None = None
    ids: Tensor | None = None
    for exchange in view.exchanges:
        request, reply = exchange.request, exchange.reply
        if request.verb == "forward" and Kind.ACTIVATION in reply.tensors:
            z, asked = reply.tensors[Kind.ACTIVATION].clone(), request.tensors.get(Kind.INPUT)
            ids = asked if asked is not None and asked.ndim == 1 else None  # else tokens
        elif request.verb == "backward" and z is not None:
            found.append(Crossed(z, request.tensors[Kind.GRADIENT].clone(), ids))
            z = None
    if not found:
        raise LookupError(
            "this attack reads forward and backward requests of whoever has no labels, and none crossed; record the "
            "wire of a vertical client, or of the server in the U shape, while it trains"
        )
    return found
