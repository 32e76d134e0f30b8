"""The commands of parties on machines of their own: certificates, the server, a client."""

import signal
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

__all__ = ["certs", "client", "server"]

Certs = Annotated[Path, typer.Option("--certs", metavar="DIR", help="Folder with certificates; see splitlearn certs.")]
DataDir = Annotated[
    Path | None, typer.Option(envvar="SPLITLEARN_DATA", metavar="DIR", help="Folder with the data sets' files.")
]
SERVER = "server"  # the name in the server's certificate


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder; it keeps the authority that is there.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[CLIENT]…", help="A certificate for each.")] = None,
    hosts: Annotated[
        str, typer.Option(metavar="HOST,…", help="Names or addresses by which clients reach the server.")
    ] = "",
) -> None:
    """Make certificates for mutual TLS: an authority, the server's (--hosts) and the clients'."""
    from splitlearn.transport import issue, make_authority

    make_authority(folder)
    reached = [host.strip() for host in hosts.split(",") if host.strip()]
    if not reached and not names:
        raise ValueError(
            "expected clients or --hosts to certify, got none; for example: certs DIR a b --hosts localhost"
        )
    if reached:
        issue(folder, SERVER, hosts=reached)
    for name in names or []:
        if name == SERVER:
            raise ValueError(
                f"expected a client's name, got {SERVER}, which is the server's; give --hosts for that one"
            )
        issue(folder, name)
    for name in [*([SERVER] if reached else []), *(names or [])]:
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
    deadline: Annotated[
        float, typer.Option(help="Seconds a client may take for a round; then it is left out of it.")
    ] = 600.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for state, model, record and report.")] = Path(
        "runs/server"
    ),
) -> None:
    """Offer a training to clients on other machines; after a stop or a crash the same command goes on."""
    from experiments import report
    from experiments.deployment import Deployment
    from experiments.served import keep
    from experiments.serving import Server
    from splitlearn.transport import Credentials

    names = tuple(name.strip() for name in clients.split(",") if name.strip())
    deployment = Deployment(names, protocol, data, cut, rounds, batch_size, optimizer, lr, seed)
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
    up, down = (sum(served.nbytes[way].values()) for way in ("up", "down"))
    _told(f"done: accuracy {served.accuracy[-1]:.4f}, {up:,} bytes up and {down:,} down in frames")
    typer.echo(f"{out / 'model.safetensors'}\n{out / 'report.html'}")


def client(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name in this client's certificate.")],
    address: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="The server.")] = "localhost:50051",
    folder: Certs = Path("certs"),
    data_dir: DataDir = None,
    deadline: Annotated[float, typer.Option(help="Seconds to wait for the reply to one request.")] = 60.0,
    patience: Annotated[float, typer.Option(help="Seconds to wait for a server that is away.")] = 600.0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the state. Default: runs/NAME")] = None,
) -> None:
    """Take part in a server's training; after a stop or a crash the same command goes on."""
    from experiments.joining import join
    from splitlearn.transport import Credentials

    own = out if out is not None else Path("runs") / name
    with _stopping():
        done = join(
            name, address, Credentials.read(folder, name), own,
            data_dir=data_dir, deadline=deadline, patience=patience, told=_told,
        )  # fmt: skip
    _told(
        f"done: {done.rounds} rounds, mean loss of the last {done.loss:.4f}, {done.nbytes:,} bytes in this run's frames"
    )


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
