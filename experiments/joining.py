"""The client of a deployment: it asks what training is offered, takes part, and goes on where it was killed."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from experiments.deployment import client_learner, own_batches, parts_of, share_of
from experiments.greeting import BOTH, FED, MAIN, offered
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.transport import Connection, Credentials, LastingMember, held
from splitlearn.wire import Framed, Metered, serve

__all__ = ["Joined", "join"]


@dataclass(frozen=True)
class Joined:
    """What a client did: how many rounds it took part in, the mean loss of the last, the bytes it asked with."""

    rounds: int
    loss: float
    nbytes: int


def join(
    name: str,
    address: str,
    credentials: Credentials,
    folder: Path,
    *,
    fed_server: str | None = None,
    data_dir: Path | None = None,
    deadline: float = 60.0,
    patience: float = 60.0,
    told: Callable[[str], None] = lambda line: None,
) -> Joined:
    """Take part in the training that the server at ``address`` offers, until it ends.

    A fed server that is apart is at ``fed_server``; both servers must offer the same. ``folder`` holds the client's
    checkpoint; over the same folder a client that was killed goes on in mid-round. The server's word decides on model,
    cut, rates and rounds; samples are the client's own equal share of the data set that is named, read from
    ``data_dir``. Raises ``ConnectionError`` where a server is away for longer than ``patience``.
    """
    with ExitStack() as stack:

        def connected(to: str) -> Connection:
            connection = Connection(to, credentials, deadline=deadline, patience=patience, told=told)
            stack.callback(connection.close)
            return connection

        main = fed = connected(address)
        offer = offered(main, name, BOTH if fed_server is None else MAIN)
        deployment, run, salt = offer.deployment, offer.run, ""
        if fed_server is not None:
            fed = connected(fed_server)
            other = offered(fed, name, FED)
            salt = other.salt
            if (other.deployment, other.run) != (deployment, run):
                raise ValueError(
                    f"expected one training of main and fed server, got another one at {fed_server} than at {address}; "
                    "look at --server and --fed-server"
                )
        state = stack.enter_context(held(folder / "state"))
        told(
            f"{deployment.protocol} on {deployment.data}, {deployment.rounds} rounds, {len(deployment.clients)} clients"
        )
        splits = parts_of(deployment, data_dir)
        meter = Metered(main.ask)
        server = None if deployment.protocol == "fedavg" else Remote("server", Framed(meter), name)
        batches = own_batches(deployment, name, share_of(deployment, name, splits.private))
        path = state / f"{name}.safetensors"
        learner = client_learner(deployment, name, splits)
        member = LastingMember(learner, server, batches, path, run=run, salt=salt, told=told)
        fed.answer(serve(Service({name: member})), until=lambda: member.finished)
        return Joined(member.rounds, member.loss, meter.total_nbytes)
