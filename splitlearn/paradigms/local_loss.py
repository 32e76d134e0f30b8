"""Split training in which no gradient crosses: the client has a loss of its own."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from splitlearn.members import Member
from splitlearn.party import Learner, Party

__all__ = ["LocalLossMember", "local_loss"]


def local_loss(client: Party, head: Party, server: Party, x: Tensor, y: Tensor) -> Tensor:
    """The client's bottom learns from an auxiliary head of its own, the server from what it is sent.

    (Han et al. 2021, "Accelerating federated learning with split learning on locally generated losses"; greedy layers
    of Belilovsky et al. 2019, arXiv:1812.11446.) One message up a batch, activation and labels, and no gradient down,
    so that the client never waits for the server. ``client`` and ``head`` are the client's, the head's input as wide as
    the activation. Returns the server's mean loss over the batch. What the server sees is what it sees in ``vanilla``;
    on a wire an activation that asks for no gradient is of the kind ``input``, and views and codecs go by that.
    """
    z = client.forward(x)
    y = client.label(y)
    _, g = head.learn(z, y)
    if g is None:
        raise ValueError(f"{head.name}: expected the gradient of its input, got none")
    client.backward(g)
    return server.learn(z.detach(), y)[0]


class LocalLossMember(Member):
    """A member of a split federation whose bottom learns from ``head``, its own, and which is sent no gradient.

    The head stays with the member; the fed server averages bottoms. See ``local_loss``.
    """

    def __init__(
        self,
        learner: Learner,
        head: Learner,
        server: Party,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        local: Collection[str] = (),
    ):
        super().__init__(learner, server, batches, local=local)
        self.head = head

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on one batch; return the server's mean loss."""
        if self.server is None:
            raise ValueError(f"{self.name}: expected a server to send activations to, got none")
        try:
            return local_loss(self.learner, self.head, self.server, x, y).item()
        except BaseException:
            self.learner.abandon()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the learner's state, the head's, and that of the batches where they have one."""
        return {**super().state_dict(), "head": self.head.state_dict()}

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned, but for randomness, which goes on."""
        super().put_back(state)
        self.head.put_back(state["head"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        super().load_state_dict(state)
        self.head.load_state_dict(state["head"])
