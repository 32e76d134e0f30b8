"""Train one model under one protocol, protected by one shield, over real frames: what every experiment starts with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from splitlearn.data import DATASETS, Splits, load, split, standardise
from splitlearn.models import model_for
from splitlearn.threat import Encoder
from splitlearn.train import Predictor
from splitlearn.wire import Recorded

__all__ = ["Setting", "Trained", "build_model", "device_of", "load_splits", "optimizer_for"]


@dataclass(frozen=True)
class Setting:
    """How a model is trained; together with data and protection it decides the result to the bit."""

    protocol: str = "vanilla"
    cut: str = "relu2"
    epochs: int = 15
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float = 1e-3
    clients: int = 1
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Trained:
    """A trained model and what its evaluation needs.

    ``chain`` are the parties, bottom first, as an input passes them; ``model`` is the plain joined model;
    ``encoder`` the victim's path, ``victim_x`` the victim's own inputs, ``record`` what the server saw (None
    where no activation crosses).
    """

    chain: Sequence[Predictor]
    model: nn.Module
    losses: list[float]
    nbytes: dict[str, dict[str, int]]
    visible: dict[str, list[str]]
    victim_x: Tensor
    encoder: Encoder | None = None
    record: Recorded | None = None


def device_of(name: str) -> str:
    """Return the device that ``--device`` names; auto is the accelerator where torch sees one, else the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected a device that torch can use, got {name!r} ({reason}); try --device auto") from error
    return name


def load_splits(name: str, data_dir: Path | None) -> Splits:
    """Return private, auxiliary and test parts, disjoint by index, at the data set's default sizes."""
    dataset = load(name, data_dir=data_dir)
    private, auxiliary, test = DATASETS[name].sizes
    splits = split(dataset, private=private, auxiliary=auxiliary, test=test)
    return standardise(splits) if dataset.kind in ("table", "signal") else splits


def build_model(splits: Splits, *, seed: int) -> nn.Sequential:
    """Return a fresh model that fits the data."""
    private = splits.private
    shape = tuple(private.x.shape[1:])
    vocabulary = int(private.x.max()) + 1 if private.kind == "tokens" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_for(shape, private.num_classes, private.kind, vocabulary)


def optimizer_for(stage: nn.Module, setting: Setting) -> torch.optim.Optimizer | None:
    """Return the setting's optimizer over the stage, or None where it has nothing to train."""
    parameters = list(stage.parameters())
    if not parameters:
        return None
    if setting.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=setting.lr)
    if setting.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=setting.lr, momentum=0.9)
    raise LookupError(f"no optimizer is named {setting.optimizer!r}: expected adam or sgd")
