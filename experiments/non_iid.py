"""Who wins where members are unlike? Federated, personalised and split methods × skews of labels, amounts, devices.

All methods start from the same model, train for as many rounds and local epochs by SGD without momentum, and are judged
on the same samples; those that end in a model of each member's own train it --tune-epochs more at home. The rate, of
FedAvg, and --mu (0.01, of 0.01, 0.1 and 1) were chosen on the auxiliary samples of seed 10, which takes no part in a
result: ``splitlearn run non_iid --judged-on auxiliary --seeds 10 --lr RATE``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.experiment import Experiment, Options, reproduction
from experiments.names import find
from experiments.runner import Outcome, Task
from experiments.skewed import KINDS, Share, Skew, judged_by, shares_of, skew_of
from experiments.training import (
    Training,
    build_model,
    described,
    device_of,
    load_splits,
    places,
    sizes_of,
    warm_up,
)
from experiments.unlike import METHODS, Federation, Plan, accuracy, timed
from splitlearn.cut import layer_names
from splitlearn.data import DATASETS

__all__ = ["NON_IID", "Config", "Trial", "run_trial", "tasks"]

SPLIT = ("splitfed_v1", "splitfed_v1_prox")


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    methods: tuple[str, ...] = field(
        default=(
            "local", "fedavg", "fedprox", "scaffold", "fedper", "fedavg_tuned", "splitfed_v1", "splitfed_v1_prox",
        ),
        metadata={"help": f"of {', '.join(METHODS)}"},
    )  # fmt: skip
    skews: tuple[str, ...] = field(
        default=("iid", "label:100", "label:1", "label:0.1", "quantity:0.5", "feature:0.5"),
        metadata={"help": f"KIND:LEVEL, of {', '.join(KINDS)}; each is a trial"},
    )
    clients: int = field(default=20, metadata={"help": "members of the federation"})
    absent: float = field(default=0.0, metadata={"help": "share of rounds that each member is away from"})
    rounds: int = field(default=20, metadata={"help": "rounds of training"})
    local_epochs: int = field(default=2, metadata={"help": "epochs that a member trains at home in a round"})
    batch_size: int = field(default=16, metadata={"help": "samples in a batch"})
    lr: float = field(default=0.0, metadata={"help": "learning rate of plain SGD; 0: the method's usual one"})
    mu: float = field(default=0.01, metadata={"help": "of FedProx: how strongly members are held near a round's start"})
    tune_epochs: int = field(
        default=5, metadata={"help": "epochs at home after all rounds: local, fedper, fedavg_tuned"}
    )
    cut: str = field(default="default", metadata={"help": "last layer below the cut of SplitFed"})
    cuts: tuple[str, ...] = field(
        default=("depths",), metadata={"help": "of unlike_cuts, members in turn: names, default, first, depths"}
    )
    shared: str = field(
        default="default", metadata={"help": "last layer that FedPer shares; default: all but the model's last"}
    )
    private: int = field(default=0, metadata={"help": "samples of all members; 0: the data set's usual number"})
    judged_on: Literal["test", "auxiliary"] = field(
        default="test", metadata={"help": "samples that accuracy is taken on; rates are chosen on the auxiliary ones"}
    )


@dataclass(frozen=True)
class Trial:
    """One method under one skew."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    method: str
    skew: Skew
    local_epochs: int
    absent: float
    judged_on: str
    own: dict[str, Any]  # options that this method alone depends on

    def described(self) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        return {
            **described(self.data, self.sizes, self.training),
            "momentum": 0.0, "method": self.method, "skew": str(self.skew), "local_epochs": self.local_epochs,
            "absent": self.absent, "judged_on": self.judged_on,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in self.own.items()},
        }  # fmt: skip


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each method, skew and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.methods:
        find("method", name, METHODS)
    skews = [skew_of(spec) for spec in config.skews]
    _check(config)
    device = device_of(options.device)
    sizes = sizes_of(options.data, private=config.private)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    if splits.private.kind == "tokens" and any(skew.kind == "feature" for skew in skews):
        raise ValueError(f"expected inputs that take noise for a feature skew, got {options.data}, which holds tokens")
    judged = judged_by(config.judged_on, splits)
    for skew in skews:
        for seed in options.seeds:
            shares_of(skew, splits.private, judged, config.clients, seed)  # too few samples are told now
    (place,) = places((config.cut,), splits)
    layers = layer_names(build_model(splits, seed=0))
    shared = layers[-1] if config.shared == "default" else config.shared
    if shared not in layers:
        raise ValueError(f"expected --shared among {', '.join(layers)}, got {shared!r}")
    settings: dict[str, Any] = {
        "mu": config.mu, "tune_epochs": config.tune_epochs, "shared": shared,
        "cuts": tuple(places(config.cuts, splits)),
    }  # fmt: skip
    found = []
    for method in config.methods:
        entry = METHODS[method]
        for skew in skews:
            for seed in options.seeds:
                training = Training(
                    protocol=method, cut=place, epochs=config.rounds, batch_size=config.batch_size, optimizer="sgd",
                    lr=config.lr or entry.lr, clients=config.clients, seed=seed, device=device,
                )  # fmt: skip
                own = {name: settings[name] for name in entry.uses}
                trial = Trial(
                    options.data, sizes, training, method, skew, config.local_epochs, config.absent, config.judged_on,
                    own,
                )  # fmt: skip
                alone = replace(config, methods=(method,), skews=(str(skew),))
                command = reproduction("non_iid", alone, data=options.data, device=device, seed=seed)
                at = place if method in SPLIT else "+".join(settings["cuts"] if "cuts" in own else ())
                labels = {
                    "seed": seed, "data": options.data, "protocol": method, "cut": at, "protection": "none",
                    "strength": str(skew),
                }  # fmt: skip
                call = partial(run_trial, trial, options.data_dir)
                found.append(Task("non_iid", trial.described(), command, labels, call))
    return found


def _check(config: Config) -> None:
    """Refuse numbers that no training can be made of."""
    if config.rounds < 1:
        raise ValueError(f"expected --rounds of 1 or more, got {config.rounds}")
    for option in ("methods", "skews", "cuts"):
        if not getattr(config, option):
            raise ValueError(f"expected at least one of --{option}, got none; leave the option out for the default")
    if config.clients < 2:
        raise ValueError(f"expected --clients of 2 or more, got {config.clients}")
    for option in ("local_epochs", "tune_epochs"):
        if getattr(config, option) < 1:
            raise ValueError(f"expected --{option.replace('_', '-')} of 1 or more, got {getattr(config, option)}")
    if not 0 <= config.absent < 1:
        raise ValueError(f"expected --absent from 0 to below 1, got {config.absent}")
    if not 0 <= config.mu < float("inf"):
        raise ValueError(f"expected --mu of 0 or more, got {config.mu}")
    if not 0 <= config.lr < float("inf"):
        raise ValueError(f"expected --lr of 0 (the method's usual one) or more, got {config.lr}")


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train by one method, and return how accurate the global model and the members' own are."""
    warm_up()
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    judged, training = judged_by(trial.judged_on, splits), trial.training
    shares = shares_of(trial.skew, splits.private, judged, training.clients, training.seed)
    device = training.device
    model = build_model(splits, seed=training.seed).to(device)
    plan = Plan(training, model, local_epochs=trial.local_epochs, absent=trial.absent, **trial.own)
    x, y = judged.x.to(device), judged.y.to(device)
    done = METHODS[trial.method].train(plan, shares, lambda chain: accuracy(chain, x, y))
    with timed(done.seconds, "evaluate"):
        personal = [
            accuracy(chain, share.judged_x.to(device), share.judged_y.to(device))
            for chain, share in zip(done.own, shares, strict=True)
        ]
        worth = {"accuracy": accuracy(done.everywhere, x, y)} if done.everywhere is not None else {}
    worth["accuracy_personal"] = sum(personal) / len(personal)
    traces = {"accuracy of each member": personal}
    if done.everywhere is not None:
        traces["accuracy after each round"] = done.accuracy
    return Outcome(
        utility=worth, nbytes=done.nbytes, seconds=done.seconds, visible=done.visible, traces=traces,
        notes=_notes(trial, shares, done),
    )  # fmt: skip


def _notes(trial: Trial, shares: Sequence[Share], done: Federation) -> list[str]:
    amounts = [len(share.y) for share in shares]
    classes = [len(torch.unique(share.y)) for share in shares]
    notes = [
        f"skew {trial.skew}: {KINDS[trial.skew.kind]}; here {min(amounts)} to {max(amounts)} samples and "
        f"{min(classes)} to {max(classes)} classes a member",
        f"accuracy_personal: mean over members, each on {trial.judged_on} samples of its own class mix and device",
    ]
    notes += done.stopped
    if done.everywhere is None:
        notes.append("no global model: members' own alone are judged")
    if trial.method == "fedavg_tuned":
        notes.append("accuracy is that of the global model, before it is tuned")
    if trial.method == "local" and trial.absent:
        notes.append("nobody is away from training alone")
    elif trial.absent:
        notes.append(f"members were away {done.missed} times; rounds in which nobody was there: {done.idle}")
    return notes


NON_IID = Experiment(
    "non_iid",
    "Who wins where members are unlike? Federated, personalised and split methods × skews of labels, amounts, devices",
    Config,
    tasks,
)
