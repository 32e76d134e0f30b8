"""What an update gives away: one local step of SGD from known weights is a gradient.

FedAvg's server reads the weights that a member starts from and ends at. After one step without momentum or weight
decay they differ by lr times the gradient of the mean loss, and lr is public. SplitFed's fed server reads those of the
client's stages alone; where it colludes with the main server, one view holds both wires, and the parts are put
``together``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from splitlearn import Kind, View
from splitlearn.service import named
from splitlearn.wire import Exchange

__all__ = ["Seen", "Update", "own_update", "seen_update", "seen_updates", "some", "together"]


@dataclass(frozen=True)
class Update:
    """The weights and buffers before a step, the gradient in what was sent back, and how many samples are behind it."""

    weights: dict[str, Tensor]
    gradient: dict[str, Tensor]
    count: int


Seen = Callable[[View], Sequence[Update]]  # how an attack reads its view: partial(seen_updates, lr=…)


def seen_updates(view: View, *, lr: float) -> list[Update]:
    """Return the updates of the view's rounds, in the order in which they crossed.

    ``lr`` is the members' learning rate. A member that takes several steps, or keeps momentum, sends a sum of
    gradients at several weights, which is taken for one here: the server cannot tell.
    """
    if not (isfinite(lr) and lr > 0):
        raise ValueError(f"expected the members' learning rate, above 0, got {lr}; it is public")
    rounds = [exchange for exchange in view.exchanges if exchange.request.verb in ("round", "update")]
    view.tensors(Kind.WEIGHTS)  # what is not granted is an error that names the grant
    view.tensors(Kind.COUNT)
    if any(exchange.request.verb == "update" for exchange in rounds):
        view.tensors(Kind.UPDATE)
    if not rounds:
        raise LookupError("this attack reads the updates of rounds, and none crossed; record the members' wires")
    return [_update(exchange, lr) for exchange in rounds]


def seen_update(view: View, *, lr: float) -> Update:
    """Return the update of the view's one round; ``LookupError`` where it holds several."""
    found = seen_updates(view, lr=lr)
    if len(found) > 1:
        raise LookupError(f"expected one round in the view, got {len(found)}; read them with seen_updates")
    return found[0]


def some(updates: Sequence[Update]) -> Sequence[Update]:
    """Return the updates; ``LookupError`` where there are none."""
    if not updates:
        raise LookupError("expected at least one update in the view, got none; record the members' wires")
    return updates


def own_update(view: View, stage: nn.Module) -> Update:
    """Return the update of the main server's own ``stage``, given as it was before the view's one training step.

    In the U shape from the activation that was sent to it and the gradient that came back; in vanilla training from
    the activation and the labels, under cross-entropy.
    """
    found: list[tuple[Tensor, Tensor, Tensor | None]] = []
    z = None
    view.tensors(Kind.ACTIVATION)
    for request in (exchange.request for exchange in view.exchanges):
        if request.verb == "forward" and Kind.ACTIVATION in request.tensors:
            z = request.tensors[Kind.ACTIVATION]
        elif request.verb == "backward" and z is not None:
            view.tensors(Kind.GRADIENT)
            with torch.enable_grad():
                h = stage(z)
            found.append((z, h, request.tensors[Kind.GRADIENT]))
        elif request.verb == "learn":
            view.tensors(Kind.LABEL)
            z = request.tensors[Kind.ACTIVATION]
            with torch.enable_grad():
                found.append((z, cross_entropy(stage(z), request.tensors[Kind.LABEL]), None))
    if len(found) != 1:
        raise LookupError(f"this reads one training step of the main server's, got {len(found)}; record one round")
    z, output, g = found[0]
    names, parameters = zip(*stage.named_parameters(), strict=True)
    gradient = torch.autograd.grad(output, parameters, g)
    weights = {name: tensor.detach().clone() for name, tensor in stage.state_dict().items()}
    return Update(weights, dict(zip(names, gradient, strict=True)), len(z))


def together(*parts: Update) -> Update:
    """Return the update of the whole model, put together from those of its stages."""
    weights = {name: tensor for part in parts for name, tensor in part.weights.items()}
    gradient = {name: tensor for part in parts for name, tensor in part.gradient.items()}
    counts = {part.count for part in parts}
    if len(weights) != sum(len(part.weights) for part in parts) or len(counts) != 1:
        raise ValueError(
            f"expected stages of one model, no entry twice, and one number of samples, got {len(weights)} entries of "
            f"{sum(len(part.weights) for part in parts)} and counts {sorted(counts)}; pass the parts of one step"
        )
    return Update(weights, gradient, counts.pop())


def _update(exchange: Exchange, lr: float) -> Update:
    before = named(exchange.request.tensors, Kind.WEIGHTS)
    after, moved = named(exchange.reply.tensors, Kind.WEIGHTS), named(exchange.reply.tensors, Kind.UPDATE)
    steps = {name: before[name] - w for name, w in after.items() if name in before and w.is_floating_point()}
    steps |= {name: -change for name, change in moved.items()}
    if not steps or Kind.COUNT not in exchange.reply.tensors:
        raise LookupError("expected weights and a count in the answer to a round, got none; the member sent no update")
    gradient = {name: step / lr for name, step in steps.items()}
    return Update({name: w.clone() for name, w in before.items()}, gradient, int(exchange.reply.tensors[Kind.COUNT]))
