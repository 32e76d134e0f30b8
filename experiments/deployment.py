"""What parties on several machines agree on: the training that a server announces, and how each side makes its part."""

import copy
import json
import secrets
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from experiments.training import Training, build_model, default_cut, load_splits, optimizer_for, sizes_of
from splitlearn.cut import cut
from splitlearn.data import DATASETS, Dataset, Splits, partition
from splitlearn.party import Learner
from splitlearn.train import Batches

__all__ = [
    "FED_SERVER",
    "SERVED",
    "Deployment",
    "announced",
    "client_learner",
    "own_batches",
    "own_stages",
    "parts_of",
    "server_learners",
    "share_of",
]

SERVED = ("splitfed_v1", "splitfed_v2", "in_turn", "fedavg")
HELLO = "hello"
FED_SERVER = "fed-server"  # the name in the certificate of a fed server that is apart


@dataclass(frozen=True)
class Deployment:
    """A training that a server offers; all parties hold the same one, and with it the same model and seeds.

    ``clients`` are the names in the clients' certificates, in the order of the round.
    """

    clients: tuple[str, ...]
    protocol: str = field(default="splitfed_v1", metadata={"help": f"of {', '.join(SERVED)}"})
    data: str = field(default="digits", metadata={"help": "the data set whose shape the model fits"})
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: the model's usual one"})
    rounds: int = field(default=10, metadata={"help": "rounds of training"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch"})
    optimizer: str = field(default="sgd", metadata={"help": "sgd or adam"})
    lr: float = field(default=0.05, metadata={"help": "learning rate"})
    seed: int = field(default=0, metadata={"help": "of the model, the batches and the shares"})
    apart: bool = field(default=False, metadata={"help": "main and fed server are two operators'"})

    def __post_init__(self) -> None:
        if self.protocol not in SERVED:
            raise LookupError(f"expected a protocol among {', '.join(SERVED)}, got {self.protocol!r}")
        if self.data not in DATASETS:
            raise LookupError(f"expected a data set among {', '.join(DATASETS)}, got {self.data!r}")
        if strange := [name for name in self.clients if "@" in name or "/" in name]:
            raise ValueError(f"expected clients' names without @ and /, got {strange[0]!r}")
        if not self.clients or len(set(self.clients)) < len(self.clients):
            raise ValueError(f"expected clients, each of a name of its own, got {', '.join(self.clients) or 'none'}")
        if self.rounds < 1:
            raise ValueError(f"expected --rounds of 1 or more, got {self.rounds}")
        if self.apart and self.protocol == "fedavg":
            raise ValueError(
                "expected a protocol with a main server for --apart, got fedavg, which has a fed server alone; leave "
                "--apart"
            )
        if self.apart and FED_SERVER in self.clients:
            raise ValueError(f"expected clients' names other than {FED_SERVER}, which is the fed server's")

    @property
    def training(self) -> Training:
        """Its settings as experiments know them."""
        return Training(
            protocol=self.protocol, cut=self.cut, epochs=self.rounds, batch_size=self.batch_size,
            optimizer=self.optimizer, lr=self.lr, clients=len(self.clients), seed=self.seed,
        )  # fmt: skip

    def told(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(asdict(self))


def announced(text: str) -> tuple[Deployment, str]:
    """Return what a server announced, and its run's name; ``ValueError`` where this release cannot take part in it."""
    try:
        told: dict[str, Any] = json.loads(text)
        found, run = told["training"], told["run"]
        known = {one.name for one in fields(Deployment)}
        if not isinstance(found, dict) or set(found) != known or not isinstance(run, str):
            raise ValueError("other settings than this release knows")
        found["clients"] = tuple(map(str, found["clients"]))
        usual = Deployment(("a",))  # each of whose settings has a default of its type
        wrong = [name for name, value in found.items() if not isinstance(value, (type(getattr(usual, name)), int))]
        if wrong:
            raise ValueError(f"{wrong[0]} of another type")
        return Deployment(**found), run
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"expected a training that this release knows, got one that it does not ({error})") from error


def parts_of(deployment: Deployment, data_dir: Path | None) -> Splits:
    """Return the data set's parts: clients share the private one, the server looks at the test one alone."""
    return load_splits(deployment.data, data_dir, sizes=sizes_of(deployment.data))


def stages(deployment: Deployment, splits: Splits) -> tuple[Any, Any]:
    """Return bottom and top as everybody starts with; in FedAvg the whole model and None."""
    model = build_model(splits, seed=deployment.seed)
    if deployment.protocol == "fedavg":
        return model, None
    below, above = cut(model, default_cut(splits) if deployment.cut == "default" else deployment.cut)
    return below, above


def own_stages(deployment: Deployment, splits: Splits, seed: int | None = None) -> tuple[Any, Any]:
    """Return bottom and top to start with, by a seed of one's own, or such that nobody can guess them.

    Each weight is then one of two that are drawn, by a secret coin: torch's generator starts in one of 2^32 ways, which
    are few enough to try them all.
    """
    if seed is not None:
        return stages(replace(deployment, seed=seed), splits)
    one, other = (stages(replace(deployment, seed=secrets.randbits(32)), splits) for _ in range(2))
    for stage, second in zip(one, other, strict=True):
        drawn = second.state_dict()
        for name, tensor in stage.state_dict().items():
            coins = torch.frombuffer(bytearray(secrets.token_bytes(max(tensor.numel(), 1))), dtype=torch.uint8) % 2
            tensor.copy_(torch.where(coins[: tensor.numel()].view(tensor.shape).bool(), tensor, drawn[name]))
    return one


def server_learners(
    deployment: Deployment, splits: Splits, start: tuple[Any, Any] | None = None
) -> tuple[Learner, Learner | None, dict[str, Learner]]:
    """Return the global bottom, the global top (None in FedAvg) and what trains against each client.

    They start as ``start``, or as everybody does by the deployment's seed.
    """
    below, above = stages(deployment, splits) if start is None else start
    bottom = Learner("bottom", copy.deepcopy(below))
    if above is None:
        return bottom, None, {}
    top = Learner("server", above, optimizer_for(above, deployment.training), seed=deployment.seed * 1000)
    apart = deployment.protocol == "splitfed_v1"
    return bottom, top, {name: top.replica(name) if apart else top.session(name) for name in deployment.clients}


def client_learner(deployment: Deployment, name: str, splits: Splits) -> Learner:
    """Return the client's own learner."""
    own = stages(deployment, splits)[0]
    place = deployment.clients.index(name)
    return Learner(name, own, optimizer_for(own, deployment.training), seed=deployment.seed * 1000 + place + 1)


def own_batches(deployment: Deployment, name: str, own: Dataset) -> Batches:
    """Return the client's batches of its own samples."""
    seed = deployment.seed * 1000 + deployment.clients.index(name)
    return Batches(own.x, own.y, batch_size=deployment.batch_size, seed=seed)


def share_of(deployment: Deployment, name: str, private: Dataset) -> Dataset:
    """Return an equal share of a data set that all have, drawn by the deployment's seed: for trials on one machine."""
    shares = partition.iid(len(private), len(deployment.clients), deployment.seed)
    return private.subset(shares[deployment.clients.index(name)])
