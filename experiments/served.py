"""What a server keeps of a training with clients on other machines: the model, and a record for the report."""

from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save

from experiments.environment import commit, versions
from experiments.record import Record, trial_hash
from experiments.serving import Served, Server
from experiments.store import Store, write_atomically
from splitlearn.metrics import utility
from splitlearn.train import predict

__all__ = ["keep"]

EXPERIMENT = "server"


def keep(server: Server, served: Served, folder: Path) -> Record:
    """Write model.safetensors (the joined model's entries) and the record; return the record."""
    parts = [server.bottom] if server.top is None else [server.bottom, server.top]
    model = {name: tensor for part in parts for name, tensor in part.weights().items()}
    write_atomically(folder / "model.safetensors", save(model))
    deployment, test = server.deployment, server.splits.test
    config = {"experiment": EXPERIMENT, "data": deployment.data, **deployment.training.described()}
    config["clients"] = list(deployment.clients)
    words = ["splitlearn", "server", "--clients", ",".join(deployment.clients), "--protocol", deployment.protocol]
    for option in ("data", "cut", "rounds", "batch_size", "optimizer", "lr", "seed"):
        words += [f"--{option.replace('_', '-')}", str(getattr(deployment, option))]
    record = Record(
        experiment=EXPERIMENT, trial=trial_hash(config), config=config, command=" ".join(words), status="done",
        seed=deployment.seed, data=deployment.data, protocol=deployment.protocol,
        cut="" if server.top is None else deployment.cut, protection="none", strength="",
        utility=utility(predict(parts, test.x), test.y), nbytes=served.nbytes,
        seconds={"total": served.seconds}, traces={"accuracy": served.accuracy},
        notes=[f"round {number + 1}: {', '.join(out)} left out" for number, out in enumerate(served.left_out) if out],
        versions=versions(), commit=commit(), started=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    store = Store(folder)
    store.prepare()
    store.save(record)
    return record
