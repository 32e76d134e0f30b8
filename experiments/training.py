"""Train one model under one protocol, protected by one shield, over real frames: what every experiment starts with."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from privacy.dp import Claim
from splitlearn.cut import cut, layer_names
from splitlearn.data import DATASETS, Splits, load, split, standardise
from splitlearn.models import digits_cnn, model_for
from splitlearn.threat import Encoder
from splitlearn.train import Predictor
from splitlearn.wire import Recorded

__all__ = [
    "BY_SGD",
    "ONE_CLIENT",
    "Trained",
    "Training",
    "build_model",
    "check_numbers",
    "default_cut",
    "depths",
    "described",
    "device_of",
    "load_splits",
    "optimizer_for",
    "places",
    "sizes_of",
    "warm_up",
]


ONE_CLIENT = (
    "u_shaped", "he_u_dp", "he_encw", "he_inference", "split_ways", "mpc_2pc", "mpc_u_shaped", "mpc_inference",
)  # fmt: skip
BY_SGD = ("mpc_2pc", "mpc_u_shaped", "mpc_vertical")  # whose weights two servers train in shares
MOMENTUM = 0.9  # of SGD
BLOCK_ENDS = ("block", "pool", "relu")  # how the last layer of a block is called, the first of these that there is
USUAL_CUTS = ("relu2", "block2", "pool2", "relu1")  # after the second block, where there is one


@dataclass(frozen=True)
class Training:
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
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "sgd"):
            raise LookupError(f"no optimizer is named {self.optimizer!r}: expected adam or sgd")
        for name in ("epochs", "batch_size", "clients"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"expected --{option} of 1 or more, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"expected --lr greater than 0, got {self.lr}")
        if self.protocol in ONE_CLIENT and self.clients != 1:
            raise ValueError(f"protocol {self.protocol} has one client here, got {self.clients}; use --clients 1")
        if self.protocol == "splitfed_v2_secure" and self.clients < 2:
            raise ValueError(
                f"expected at least two clients under {self.protocol}, whose sum tells of none, got {self.clients}; "
                "use --clients 3"
            )
        if self.protocol in BY_SGD and self.optimizer != "sgd":
            raise ValueError(
                f"protocol {self.protocol} trains shares by SGD with momentum {MOMENTUM}, got {self.optimizer}; use "
                "--optimizer sgd"
            )

    def described(self) -> dict[str, Any]:
        """Return it as a trial's configuration has it: the seed apart, so that trials that differ by it are seen to."""
        settings = asdict(self)
        return {"seed": settings.pop("seed"), "training": settings}


def described(data: str, sizes: tuple[int, int, int], training: Training) -> dict[str, Any]:
    """Return the part of a trial's configuration that says on what it trains, and how."""
    private, auxiliary, test = sizes
    return {
        "data": data,
        "sizes": {"private": private, "auxiliary": auxiliary, "test": test},
        **training.described(),
    }


@dataclass(frozen=True)
class Trained:
    """A trained model and what its evaluation needs.

    ``chain`` are the parties, bottom first, as an input passes them; ``model`` is the plain joined model;
    ``victim_x`` and ``victim_y`` the victim's own inputs and labels, ``encoder`` its path, ``record`` what the
    server saw (None where no activation crosses).
    """

    chain: Sequence[Predictor]
    model: nn.Module
    losses: list[float]
    nbytes: dict[str, dict[str, int]]
    visible: dict[str, list[str]]
    victim_x: Tensor
    victim_y: Tensor
    encoder: Encoder | None = None
    record: Recorded | None = None
    claim: Claim | None = None  # of a protocol that has an ε of its own


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


def sizes_of(name: str, *, private: int = 0, auxiliary: int = 0) -> tuple[int, int, int]:
    """Return how many private, auxiliary and test samples to take; 0 stands for the data set's usual number."""
    usual = DATASETS[name].sizes
    if min(private, auxiliary) < 0:
        raise ValueError(f"expected --private and --auxiliary of 0 or more, got {private} and {auxiliary}")
    return private or usual[0], auxiliary or usual[1], usual[2]


def load_splits(
    name: str, data_dir: Path | None, *, sizes: tuple[int, int, int] | None = None, dtype: str = "float32"
) -> Splits:
    """Return private, auxiliary and test parts, disjoint by index, of the data set's usual sizes or of ``sizes``."""
    dataset = load(name, data_dir=data_dir)
    private, auxiliary, test = sizes if sizes is not None else DATASETS[name].sizes
    splits = split(dataset, private=private, auxiliary=auxiliary, test=test)
    splits = standardise(splits) if dataset.kind == "table" else splits
    if dtype == "float32" or not dataset.x.is_floating_point():
        return splits
    wide = [replace(part, x=part.x.double()) for part in (splits.private, splits.auxiliary, splits.test)]
    return Splits(*wide)


def check_numbers(splits: Splits, data: str) -> None:
    """Raise ``ValueError`` where inputs are tokens, which fit no layer that servers compute without seeing them."""
    if not splits.private.x.is_floating_point():
        raise ValueError(f"expected inputs that are numbers, got {data}, which holds tokens")


def build_model(splits: Splits, *, seed: int) -> nn.Sequential:
    """Return a fresh model that fits the data."""
    private = splits.private
    shape = tuple(private.x.shape[1:])
    vocabulary = len(private.names or ()) if private.kind == "tokens" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_for(shape, private.num_classes, private.kind, vocabulary)
    return model.to(private.x.dtype) if private.x.is_floating_point() else model


def default_cut(splits: Splits) -> str:
    """Return the last layer below the usual cut of the model that fits the data; a head has room above it."""
    names = layer_names(build_model(splits, seed=0))
    usual = [name for name in USUAL_CUTS if name in names[:-1]]
    return usual[0] if usual else names[len(names) // 3]


def depths(splits: Splits) -> list[str]:
    """Return the last layers of the first three blocks of the model that fits the data, where there are as many."""
    names = layer_names(build_model(splits, seed=0))[:-1]
    found = ([name for name in names if name in [f"{end}{n}" for n in range(1, 4)]] for end in BLOCK_ENDS)
    return next((ends for ends in found if ends), names[:1])


def places(asked: Sequence[str], splits: Splits) -> list[str]:
    """Return the last layers below the cuts asked for: names, ``default``, ``first``, ``depths``; all can be cut at."""
    model = build_model(splits, seed=0)
    usual = {"default": [default_cut(splits)], "first": depths(splits)[:1], "depths": depths(splits)}
    found = list(dict.fromkeys(place for one in asked for place in usual.get(one, [one])))
    for place in found:
        cut(model, place)
    return found


def optimizer_for(stage: nn.Module, training: Training) -> torch.optim.Optimizer | None:
    """Return the training's optimizer over the stage, or None where it has nothing to train."""
    parameters = list(stage.parameters())
    if not parameters:
        return None
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=training.lr)
    return torch.optim.SGD(parameters, lr=training.lr, momentum=MOMENTUM)


@cache
def warm_up() -> None:
    """Do one training step and forget it: the first one in a process pays for what torch sets up on demand."""
    model = digits_cnn()
    optimizer = torch.optim.Adam(model.parameters())
    cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.zeros(8, dtype=torch.int64)).backward()
    optimizer.step()
