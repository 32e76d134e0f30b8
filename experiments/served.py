"""What servers keep of a training with clients on other machines: the model, or a half, and a record for the report."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save

from experiments.deployment import Deployment
from experiments.environment import commit, versions
from experiments.record import Record, trial_hash
from experiments.serving import Served, Server
from experiments.store import Store, write_atomically
from splitlearn.metrics import utility
from splitlearn.party import Learner
from splitlearn.train import predict

__all__ = ["keep", "keep_half"]

OPTIONS = ("data", "cut", "rounds", "batch_size", "optimizer", "lr", "seed")


def keep(server: Server, served: Served, folder: Path) -> Record:
    """Write model.safetensors (the joined model's entries) and the record; return the record."""
    parts = [server.bottom] if server.top is None else [server.bottom, server.top]
    _write(folder / "model.safetensors", parts)
    test = server.splits.test
    scores = utility(predict(parts, test.x), test.y)
    record = _record("server", server.deployment, served, _words(server.deployment), utility=scores)
    return _saved(record, folder)


def keep_half(
    half: str, learner: Learner, deployment: Deployment, served: Served, folder: Path, *, own_seed: int | None = None
) -> Path:
    """Write a half of the model, "bottom" or "top", and the record of the server that holds it; return the half's path.

    Neither server has the whole model: nobody can say how accurate it is until its owners put it together.
    """
    path = folder / f"{half}.safetensors"
    _write(path, [learner])
    fed = half == "bottom"
    words = ["splitlearn", "fed-server"] if fed else _words(deployment)
    words += [] if own_seed is None else ["--own-seed", str(own_seed)]
    _saved(_record("fed_server" if fed else "main_server", deployment, served, words, utility={}), folder)
    return path


def _write(path: Path, parts: Sequence[Learner]) -> None:
    write_atomically(path, save({name: tensor for part in parts for name, tensor in part.weights().items()}))


def _words(deployment: Deployment) -> list[str]:
    """Return the command that offers this training."""
    words = ["splitlearn", "server", "--clients", ",".join(deployment.clients), "--protocol", deployment.protocol]
    words += ["--apart"] if deployment.apart else []
    for option in OPTIONS:
        words += [f"--{option.replace('_', '-')}", str(getattr(deployment, option))]
    return words


def _record(
    experiment: str, deployment: Deployment, served: Served, words: Sequence[str], *, utility: dict[str, float]
) -> Record:
    config = {"experiment": experiment, "data": deployment.data, **deployment.training.described()}
    config["clients"] = list(deployment.clients)
    return Record(
        experiment=experiment, trial=trial_hash(config), config=config, command=" ".join(words), status="done",
        seed=deployment.seed, data=deployment.data, protocol=deployment.protocol,
        cut="" if deployment.protocol == "fedavg" else deployment.cut, protection="none", strength="",
        utility=utility, nbytes=served.nbytes,
        seconds={"total": served.seconds}, traces={"accuracy": served.accuracy} if served.accuracy else {},
        notes=[f"round {number + 1}: {', '.join(out)} left out" for number, out in enumerate(served.left_out) if out],
        versions=versions(), commit=commit(), started=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _saved(record: Record, folder: Path) -> Record:
    store = Store(folder)
    store.prepare()
    store.save(record)
    return record
