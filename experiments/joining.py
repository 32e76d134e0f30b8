"""The client of a deployment: it asks what training is offered, takes part, and goes on where it was killed."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from experiments.deployment import HELLO, Deployment, announced, client_learner, own_batches, parts_of, share_of
from splitlearn.frames import Kind
from splitlearn.remote import Remote
from splitlearn.service import Service, need
from splitlearn.transport import Connection, Credentials, LastingMember, held
from splitlearn.wire import Framed, Metered, serve

__all__ = ["Joined", "join"]


@dataclass(frozen=True)
class Joined:
    """What a client did: how many rounds it took part in, the mean loss of the last, the bytes it asked with."""

    rounds: int
    loss: float
    nbytes: int


def offered(connection: Connection, name: str) -> tuple[Deployment, str]:
    """Return the training that the server offers to the client of this name, and its run's name."""
    found = Remote("server", Framed(connection.ask), f"{name}/{HELLO}").ask(HELLO, {})
    text = bytes(need(found, Kind.PARAMETERS).tolist()).decode(errors="replace")
    deployment, run = announced(text)
    if name not in deployment.clients:
        raise ValueError(f"expected a training for {name}, got one for {', '.join(deployment.clients)}")
    return deployment, run


def join(
    name: str,
    address: str,
    credentials: Credentials,
    folder: Path,
    *,
    data_dir: Path | None = None,
    deadline: float = 60.0,
    patience: float = 60.0,
    told: Callable[[str], None] = lambda line: None,
) -> Joined:
    """Take part in the training that the server at ``address`` offers, until it ends.

    ``folder`` holds the client's checkpoint; over the same folder a client that was killed goes on in mid-round. The
    server's word decides on model, cut, rates and rounds; samples are the client's own equal share of the data set that
    is named, read from ``data_dir``. Raises ``ConnectionError`` where the server is away for longer than ``patience``.
    """
    connection = Connection(address, credentials, deadline=deadline, patience=patience, told=told)
    with closing(connection), held(folder / "state") as state:
        deployment, run = offered(connection, name)
        told(
            f"{deployment.protocol} on {deployment.data}, {deployment.rounds} rounds, {len(deployment.clients)} clients"
        )
        splits = parts_of(deployment, data_dir)
        meter = Metered(connection.ask)
        server = None if deployment.protocol == "fedavg" else Remote("server", Framed(meter), name)
        batches = own_batches(deployment, name, share_of(deployment, name, splits.private))
        path = state / f"{name}.safetensors"
        member = LastingMember(client_learner(deployment, name, splits), server, batches, path, run=run, told=told)
        connection.answer(serve(Service({name: member})), until=lambda: member.finished)
        return Joined(member.rounds, member.loss, meter.total_nbytes)
