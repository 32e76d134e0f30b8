"""Is split training the same as unsplit training? Trains both from one start and compares weights and accuracy."""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn

from experiments.experiment import Experiment, Options, reproduction
from experiments.ingredients import PROTOCOLS
from experiments.names import find
from experiments.parts import Shield
from experiments.runner import Outcome, Task
from experiments.setups import train_unsplit
from experiments.training import Training, default_cut, device_of, load_splits, warm_up
from splitlearn.data import DATASETS
from splitlearn.train import evaluate

__all__ = ["PARITY", "Config"]


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    protocols: tuple[str, ...] = field(
        default=("vanilla", "u_shaped", "splitfed_v1", "splitfed_v2", "splitfed_v3", "parallel", "fedavg", "vertical"),
        metadata={"help": "protocols to compare with unsplit training"},
    )
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: the model's usual one"})
    clients: int = field(default=1, metadata={"help": "clients; with one, all protocols but vertical are exact"})
    epochs: int = field(default=5, metadata={"help": "epochs, or rounds, of training"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch"})
    optimizer: str = field(default="adam", metadata={"help": "adam, or sgd with momentum 0.9"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate"})
    dtype: str = field(default="float64", metadata={"help": "float64 or float32"})


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each protocol and seed; every name is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.protocols:
        find("protocol", name, PROTOCOLS)
    if config.dtype not in ("float32", "float64"):
        raise ValueError(f"expected --dtype float32 or float64, got {config.dtype!r}")
    splits = load_splits(options.data, options.data_dir)
    base = Training(
        cut=default_cut(splits) if config.cut == "default" else config.cut, epochs=config.epochs,
        batch_size=config.batch_size, optimizer=config.optimizer, lr=config.lr, clients=config.clients,
        device=device_of(options.device), dtype=config.dtype,
    )  # fmt: skip
    found = []
    for protocol in config.protocols:
        for seed in options.seeds:
            training = replace(base, protocol=protocol, seed=seed)
            alone = replace(config, protocols=(protocol,), cut=training.cut)
            command = reproduction("parity", alone, data=options.data, device=training.device, seed=seed)
            labels = {
                "seed": seed, "data": options.data, "protocol": protocol, "cut": training.cut,
                "protection": "none", "strength": "",
            }  # fmt: skip
            described = {
                "data": options.data,
                "sizes": list(DATASETS[options.data].sizes),
                **training.described(),
            }
            call = partial(run_trial, options.data, training, options.data_dir)
            found.append(Task("parity", described, command, labels, call))
    return found


def run_trial(data: str, training: Training, data_dir: Path | None) -> Outcome:
    """Train under the protocol and unsplit, and return accuracy, bytes, seconds and how far the weights differ."""
    splits = load_splits(data, data_dir, dtype=training.dtype)
    warm_up()
    start = time.perf_counter()
    trained = PROTOCOLS[training.protocol].train(training, splits, Shield())
    split_seconds = time.perf_counter() - start
    start = time.perf_counter()
    whole = train_unsplit(training, splits, Shield())
    unsplit_seconds = time.perf_counter() - start
    utility = evaluate(trained.chain, splits.test.x, splits.test.y)
    utility["accuracy_unsplit"] = evaluate(whole.chain, splits.test.x, splits.test.y)["accuracy"]
    notes = []
    difference = _difference(trained.model, whole.model)
    if difference is None:
        notes.append("the clients' bottoms are narrower than the unsplit one: weights are not comparable")
    else:
        utility["weights_difference"] = difference
        notes.append(
            "equal to unsplit training, bit for bit" if difference == 0 else f"weights differ by {difference:g}"
        )
    return Outcome(
        utility=utility,
        nbytes=trained.nbytes,
        seconds={"train": split_seconds, "train_unsplit": unsplit_seconds},
        visible=trained.visible,
        notes=notes,
    )


def _difference(model: nn.Module, other: nn.Module) -> float | None:
    """Return the greatest difference of any weight, or None where the two have not the same weights."""
    mine, theirs = list(model.parameters()), list(other.parameters())
    if [p.shape for p in mine] != [p.shape for p in theirs]:
        return None
    return max((a - b).detach().abs().max().item() for a, b in zip(mine, theirs, strict=True))


PARITY = Experiment(
    "parity", "Is split training the same as unsplit training? Weights, accuracy, bytes and seconds", Config, tasks
)
