"""The commands of parties on machines of their own: certificates, the server or both servers apart, a client."""

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from experiments.deployment import Deployment
    from experiments.serving import Served

__all__ = ["certs", "client", "fed_server", "server"]

Certs = Annotated[Path, typer.Option("--certs", metavar="DIR", help="Folder with certificates; see splitlearn certs.")]
DataDir = Annotated[
    Path | None, typer.Option(envvar="SPLITLEARN_DATA", metavar="DIR", help="Folder with the data sets' files.")
]
Deadline = Annotated[float, typer.Option(help="Seconds a client may take for a round; then it is left out of it.")]
Patience = Annotated[float, typer.Option(help="Seconds to wait for a server that is away.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for state, model, record and report.")]
OwnSeed = Annotated[
    int | None,
    typer.Option("--own-seed", help="For trials: what this server's half starts from. Default: by chance, a secret."),
]
SERVER = "server"  # the name in the server's certificate


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder; it keeps the authority that is there.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[CLIENT]…", help="A certificate for each.")] = None,
    hosts: Annotated[
        str, typer.Option(metavar="HOST,…", help="Names or addresses by which clients reach the server.")
    ] = "",
    fed_hosts: Annotated[
        str, typer.Option(metavar="HOST,…", help="The same for a fed server that is apart from the main server.")
    ] = "",
) -> None:
    """Make certificates for mutual TLS: an authority, the server's (--hosts) and the clients'."""
    from experiments.deployment import FED_SERVER
    from splitlearn.transport import issue, make_authority

    reached = {SERVER: _words(hosts), FED_SERVER: _words(fed_hosts)}
    reached = {name: own for name, own in reached.items() if own}
    if not reached and not names:
        raise ValueError(
            "expected clients or --hosts to certify, got none; for example: certs DIR a b --hosts localhost"
        )
    for name, option in ((SERVER, "--hosts"), (FED_SERVER, "--fed-hosts")):
        if name in (names or []):
            raise ValueError(f"expected a client's name, got {name}, which is a server's; give {option} for that one")
    make_authority(folder)
    for name, own in reached.items():
        issue(folder, name, hosts=own, asks=name == FED_SERVER)
    for name in names or []:
        issue(folder, name)
    for name in [*reached, *(names or [])]:
        typer.echo(f"{folder / name}.crt and .key: for {name} alone, with authority.crt")
    typer.echo(f"{folder}/authority.key signs for everybody: keep it here")


def server(
    clients: Annotated[str, typer.Option(metavar="NAME,…", help="The clients, by the names in their certificates.")],
    folder: Certs = Path("certs"),
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "localhost:50051",
    protocol: Annotated[
        str, typer.Option(metavar="NAME", help="splitfed_v1, splitfed_v2, in_turn or fedavg.")
    ] = "splitfed_v1",
    data: Annotated[str, typer.Option(metavar="NAME", help="The data set whose shape the model fits.")] = "digits",
    data_dir: DataDir = None,
    cut: Annotated[str, typer.Option(metavar="LAYER", help="Last layer below the cut.")] = "default",
    rounds: Annotated[int, typer.Option(help="Rounds of training.", min=1)] = 10,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.", min=1)] = 32,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="sgd (with momentum) or adam.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the model, the batches and the shares.")] = 0,
    deadline: Deadline = 600.0,
    apart: Annotated[
        bool, typer.Option("--apart", help="Be the main server alone; the fed server, and --deadline, are another's.")
    ] = False,
    own_seed: OwnSeed = None,
    out: Out = Path("runs/server"),
) -> None:
    """Offer a training to clients on other machines; after a stop or a crash the same command goes on."""
    from experiments.deployment import Deployment

    deployment = Deployment(_words(clients), protocol, data, cut, rounds, batch_size, optimizer, lr, seed, apart)
    if own_seed is not None and not apart:
        raise ValueError("expected --own-seed of a server with --apart, got it without; give --seed, or --apart too")
    if apart:
        _main_server(deployment, address, folder, out, data_dir, own_seed)
    else:
        _server(deployment, address, folder, out, data_dir, deadline)


def _server(
    deployment: "Deployment", address: str, folder: Path, out: Path, data_dir: Path | None, deadline: float
) -> None:
    from experiments import report
    from experiments.served import keep
    from experiments.serving import Server
    from splitlearn.transport import Credentials

    with _stopping():
        running = Server(
            deployment, address, Credentials.read(folder, SERVER), out, data_dir=data_dir, deadline=deadline, told=_told
        )
        try:
            served = running.run()
            keep(running, served, out)
            report.build(out)
        finally:
            running.close()
    _told(f"done: accuracy {served.accuracy[-1]:.4f}, {_sums(served)}")
    typer.echo(f"{out / 'model.safetensors'}\n{out / 'report.html'}")


def _main_server(
    deployment: "Deployment", address: str, folder: Path, out: Path, data_dir: Path | None, own_seed: int | None
) -> None:
    from experiments.main_server import MainServer
    from experiments.served import keep_half
    from splitlearn.transport import Credentials

    with _stopping():
        running = MainServer(
            deployment, address, Credentials.read(folder, SERVER), out, own_seed=own_seed, data_dir=data_dir, told=_told
        )
        try:
            served = running.run()
            path = keep_half("top", running.top, deployment, served, out, own_seed=own_seed)
        finally:
            running.close()
    _told(f"done: {_sums(served)}")
    typer.echo(path)


def fed_server(
    main: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="The main server.")] = "localhost:50051",
    folder: Certs = Path("certs"),
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "localhost:50052",
    data_dir: DataDir = None,
    deadline: Deadline = 600.0,
    patience: Patience = 600.0,
    own_seed: OwnSeed = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for state, bottom and record.")] = Path(
        "runs/fed-server"
    ),
) -> None:
    """Average bottoms for a main server with --apart; after a stop or a crash the same command goes on.

    What is trained, and how, the main server says.
    """
    from experiments.deployment import FED_SERVER
    from experiments.fed_server import FedServer
    from experiments.served import keep_half
    from splitlearn.transport import Credentials

    with _stopping():
        running = FedServer(
            main, address, Credentials.read(folder, FED_SERVER), out,
            own_seed=own_seed, data_dir=data_dir, deadline=deadline, patience=patience, told=_told,
        )  # fmt: skip
        try:
            served = running.run()
            path = keep_half("bottom", running.bottom, running.deployment, served, out, own_seed=own_seed)
        finally:
            running.close()
    _told(f"done: {_sums(served)}")
    typer.echo(path)


def client(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name in this client's certificate.")],
    address: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="The server.")] = "localhost:50051",
    fed: Annotated[
        str | None, typer.Option("--fed-server", metavar="HOST:PORT", help="The fed server, where it is apart.")
    ] = None,
    folder: Certs = Path("certs"),
    data_dir: DataDir = None,
    deadline: Annotated[float, typer.Option(help="Seconds to wait for the reply to one request.")] = 60.0,
    patience: Patience = 600.0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the state. Default: runs/NAME")] = None,
) -> None:
    """Take part in a server's training; after a stop or a crash the same command goes on."""
    from experiments.joining import join
    from splitlearn.transport import Credentials

    own = out if out is not None else Path("runs") / name
    with _stopping():
        done = join(
            name, address, Credentials.read(folder, name), own,
            fed_server=fed, data_dir=data_dir, deadline=deadline, patience=patience, told=_told,
        )  # fmt: skip
    _told(
        f"done: {done.rounds} rounds, mean loss of the last {done.loss:.4f}, {done.nbytes:,} bytes in this run's frames"
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _sums(served: "Served") -> str:
    up, down = (sum(served.nbytes[way].values()) for way in ("up", "down"))
    return f"{up:,} bytes up and {down:,} down in frames"


def _told(line: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {line}")


class _stopping:  # noqa: N801
    """Makes SIGTERM an interrupt, which closes what is open; a line says how to go on."""

    def __enter__(self) -> None:
        import torch

        torch.set_num_threads(1)  # so that sums are the same on every machine that is alike

        def stop(number: int, frame: Any) -> NoReturn:
            raise KeyboardInterrupt

        self._before = signal.signal(signal.SIGTERM, stop)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on") from None
