"""Split training in which no gradient crosses: the client has a loss of its own."""

from torch import Tensor

from splitlearn.party import Party

__all__ = ["local_loss"]


def local_loss(client: Party, head: Party, server: Party, x: Tensor, y: Tensor) -> Tensor:
    """The client's bottom learns from an auxiliary head of its own, the server from what it is sent.

    (Han et al. 2021, "Accelerating federated learning with split learning on locally generated losses"; greedy layers
    of Belilovsky et al. 2019, arXiv:1812.11446.) One message up a batch, activation and labels, and no gradient down,
    so that the client never waits for the server. ``client`` and ``head`` are the client's, the head's input as wide as
    the activation. Returns the server's mean loss over the batch. What the server sees is what it sees in ``vanilla``.
    """
    z = client.forward(x)
    y = client.label(y)
    _, g = head.learn(z, y)
    if g is None:
        raise ValueError(f"{head.name}: expected the gradient of its input, got none")
    client.backward(g)
    return server.learn(z.detach(), y)[0]
