"""Split training, one function a protocol, one call a training step. Each party may be here or across a wire."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from splitlearn.party import Party
from splitlearn.remote import Remote

__all__ = ["Join", "Joined", "concatenated", "parallel", "summed", "u_shaped", "vanilla", "vertical"]

Join = Callable[[Sequence[Tensor]], Tensor]


def vanilla(client: Party, server: Party, x: Tensor, y: Tensor) -> Tensor:
    """The server holds the top stage and learns the labels (Gupta & Raskar 2018, arXiv:1810.06060).

    ``x`` (batch, …) and ``y`` (batch,) are the client's; returns the mean loss over the batch.
    """
    z = client.forward(x)
    loss, g = server.learn(z, client.label(y))
    client.backward(_needed(g, server))
    return loss


def u_shaped(bottom: Party, server: Party, head: Party, x: Tensor, y: Tensor) -> Tensor:
    """The client holds bottom and head, so labels stay with it (Vepakomma et al. 2018, arXiv:1812.00564).

    The server holds the middle stage and sees activations and gradients; returns the mean loss.
    """
    z = bottom.forward(x)
    h = server.forward(z)
    loss, g = head.learn(h, head.label(y))
    g = server.backward(_needed(g, head))
    bottom.backward(_needed(g, server))
    return loss


def vertical(owner: Party, clients: Sequence[Party], ids: Tensor, y: Tensor, *, join: Join) -> Tensor:
    """Each client holds some features of the samples ``ids``; the owner holds labels and the top stage.

    (Vepakomma et al. 2018, arXiv:1812.00564.) An owner without features is the label-only server; one with
    features is itself among the clients. Remote clients are asked at once. Returns the mean loss.
    """
    if not clients:
        raise ValueError("expected at least one client that holds features, got none")
    parts = _at_once(clients, [partial(client.forward, ids) for client in clients])
    joined = join(parts)
    z = joined.detach().requires_grad_()
    loss, g = owner.learn(z, owner.label(y))
    gradients = torch.autograd.grad(joined, parts, _needed(g, owner))
    _at_once(clients, [partial(client.backward, part) for client, part in zip(clients, gradients, strict=True)])
    return loss


class Joined:
    """The clients of ``vertical`` asked as one, for ``predict`` and ``evaluate``: [Joined(clients, join), owner]."""

    def __init__(self, clients: Sequence[Party], join: Join):
        self.name, self._clients, self._join = "joined", list(clients), join

    def predict(self, x: Tensor) -> Tensor:
        """Return the joined activations of the samples numbered ``x``."""
        return self._join(_at_once(self._clients, [partial(client.predict, x) for client in self._clients]))


def parallel(clients: Sequence[Party], server: Party, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One server pass over all clients' activations, each client's gradient sent back to it (Jeon & Kim 2020).

    ("Privacy-sensitive parallel split learning", ICOIN 2020.) ``batches`` holds one (x, y) a client; returns
    the mean loss over all samples, of which each client receives its part of the gradient.
    """
    if len(clients) != len(batches) or not clients:
        raise ValueError(f"expected one batch a client, got {len(batches)} for {len(clients)} clients")
    parts = _at_once(clients, [partial(client.forward, x) for client, (x, _) in zip(clients, batches, strict=True)])
    z = torch.cat([part.detach() for part in parts]).requires_grad_()
    y = torch.cat([client.label(y) for client, (_, y) in zip(clients, batches, strict=True)])
    loss, g = server.learn(z, y)
    gradients = _needed(g, server).split([len(part) for part in parts])
    _at_once(clients, [partial(client.backward, part) for client, part in zip(clients, gradients, strict=True)])
    return loss


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Return the activations side by side along the second dimension."""
    return torch.cat(list(parts), dim=1)


def summed(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of the activations, which must be of one shape."""
    if any(part.shape != parts[0].shape for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"expected activations of one shape to add up, got {shapes}; or join them with concatenated")
    return torch.stack(list(parts)).sum(0)


def _at_once(parties: Sequence[Party], calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return the results in order; where a party is across a wire, all are asked at once, not in turn."""
    if not any(isinstance(party, Remote) for party in parties):
        return [call() for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


def _needed(g: Tensor | None, party: Party) -> Tensor:
    if g is None:
        raise ValueError(
            f"{party.name}: expected the gradient of its input, got none; hand it an activation that asks for one"
        )
    return g
