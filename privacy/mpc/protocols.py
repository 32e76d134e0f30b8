"""Protocols on shares, one function a training step, and who learns what in each of them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from privacy.mpc.party import SharedStage, StageClient
from splitlearn.party import Party
from splitlearn.protocols import u_shaped, vanilla

__all__ = ["LEARNS", "JoinedOnShares", "mpc_2pc", "mpc_inference", "mpc_u_shaped", "mpc_vertical"]

MASKED = "uniformly random shares, masked values, shapes, the learning rate, how often and when"
DEALT = "shapes and kinds of products, how many bits are cut off (so the magnitudes of momentum and lr over the batch)"
LEARNS: Mapping[str, Mapping[str, list[str]]] = {
    "mpc_2pc": {
        "server 0": [MASKED], "server 1": [MASKED], "dealer": [DEALT],
        "client": ["the gradient at the cut", "the mean loss, if agreed", "the weights, which are its own"],
    },
    "mpc_u_shaped": {
        "server 0": [MASKED], "server 1": [MASKED], "dealer": [DEALT],
        "client": ["the outputs of the servers' stage", "the gradient at the cut", "the weights, which are its own"],
    },
    "mpc_inference": {
        "server 0": [MASKED], "server 1": [MASKED], "dealer": [DEALT],
        "client": ["the outputs, and what they tell of the weights"], "owner of the model": ["nothing"],
    },
    "mpc_vertical": {
        "server 0": [MASKED], "server 1": [MASKED], "dealer": [DEALT],
        "each client": ["the gradient of its own part of the cut"],
        "owner of labels and model": [
            "the mean loss, if agreed", "the weights, which are its own, and what their steps tell of few samples",
        ],
    },
    "secure_mean": {
        "server 0": ["uniformly random shares and shapes"], "server 1": ["uniformly random shares and shapes"],
        "fed server": ["the mean of the members' weights", "how many samples each has"],
    },
}  # fmt: skip


def mpc_2pc(client: Party, servers: SharedStage, x: Tensor, y: Tensor) -> Tensor:
    """Two servers train the top on shares of activations and labels, the loss included; 2-party Beaver products.

    (SecureML, Mohassel and Zhang 2017, eprint 2017/396; CrypTen, Knott et al. 2021, arXiv:2109.00984.) ``x`` (batch, …)
    and ``y`` (batch,) are the client's. Returns the mean loss, nan where it is revealed to nobody. ``LEARNS`` says who
    learns what; see ``Servers`` for what must hold. Deviation from SecureML: a dealer makes the triples, and
    cross-entropy is computed by CrypTen's approximations.
    """
    return vanilla(client, servers, x, y)


def mpc_u_shaped(bottom: Party, servers: SharedStage, head: Party, x: Tensor, y: Tensor) -> Tensor:
    """Two servers hold the middle on shares; outputs are revealed to the client, who has head, labels and loss.

    No exponential is approximated, so that it is exact to fixed point, and several times faster than ``mpc_2pc``.
    ``x`` (batch, …) and ``y`` (batch,) are the client's; returns the mean loss.
    """
    return u_shaped(bottom, servers, head, x, y)


def mpc_inference(client: Party, servers: StageClient, x: Tensor) -> Tensor:
    """Return a trained top's outputs for the client's ``x`` (batch, …); whoever owns the top learns nothing of them."""
    return servers.predict(client.predict(x))


def mpc_vertical(
    servers: SharedStage, sessions: Sequence[StageClient], clients: Sequence[Party], ids: Tensor, y: Tensor
) -> Tensor:
    """Each client shares the activation of its own features of the samples ``ids``; the top sees them side by side.

    ``sessions`` are the clients' own, ``servers.client(name)``, in their order; ``y`` (batch,) belongs to whoever
    opened ``servers``. Unlike in ``vertical``, nobody is shown a client's activation, and no client another's gradient;
    whoever opened the stage may read its weights between steps, which tell of batches of few samples. Returns the mean
    loss, nan where it is revealed to nobody.
    """
    activations = _offered(sessions, [client.forward(ids) for client in clients])
    loss = servers.learn_joined(sessions, y)
    for client, session, z in zip(clients, sessions, activations, strict=True):
        client.backward(session.collect(z))
    return loss


class JoinedOnShares:
    """Vertical clients and the stage that they share into, asked as one, for ``predict`` and ``evaluate``."""

    def __init__(self, servers: SharedStage, sessions: Sequence[StageClient], clients: Sequence[Party]):
        self.name, self._servers, self._sessions, self._clients = "joined", servers, list(sessions), list(clients)

    def predict(self, x: Tensor) -> Tensor:
        """Return the outputs for the samples numbered ``x``, revealed to whoever opened the stage."""
        _offered(self._sessions, [client.predict(x) for client in self._clients])
        return self._servers.predict_joined(self._sessions)


def _offered(sessions: Sequence[StageClient], activations: list[Tensor]) -> list[Tensor]:
    if len(sessions) != len(activations) or not sessions:
        raise ValueError(f"expected one session a client, got {len(sessions)} for {len(activations)} clients")
    for session, z in zip(sessions, activations, strict=True):
        session.offer(z)
    return activations
