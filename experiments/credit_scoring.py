"""Case study: two institutions hold different columns of the same persons, a third the labels: who defaults?

Vertical split learning on a table (credit, bank, adult). Each institution sends the activation of its columns, the
label owner joins them and trains the top. The owner is after columns, the institutions after labels.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments import case_study, setups
from experiments.case_study import Study, Trial
from experiments.experiment import Experiment, Options
from experiments.ingredients import ATTACKS
from experiments.label_ingredients import LABEL_ATTACKS, LABEL_PROTECTIONS
from experiments.parts import LabelAim, LabelShield, Protection, Shield
from experiments.runner import Outcome, Task
from experiments.scoring import Attacked, aim_of, attack_victim
from experiments.training import Trained, optimizer_for
from splitlearn.codecs import through
from splitlearn.data import Splits, partition
from splitlearn.frames import Codec
from splitlearn.party import Learner
from splitlearn.protocols import concatenated, vertical
from splitlearn.remote import Remote, wire
from splitlearn.service import Service
from splitlearn.threat import Encoder
from splitlearn.train import Batches, Predictor, epochs_of, fit
from splitlearn.wire import Framed, Metered, Recorded, serve

__all__ = ["CREDIT_SCORING", "Config"]

OF_LABELS = ("marvell", "max_norm", "isotropic", "label_dp")  # what the owner can do to gradients or labels
GUESSERS = ("norm", "cosine", "similarity", "averaged")  # attacks of an institution on the gradients that it is sent


@dataclass(frozen=True)
class Config(case_study.Config):
    """Options of the experiment."""

    protocols: tuple[str, ...] = field(
        default=("unsplit", "vertical"), metadata={"help": "of unsplit (one holds all), vertical"}
    )
    protections: tuple[str, ...] = field(
        default=("none", "noise:0.02", "nopeek:3", "marvell:4", "label_dp:1"),
        metadata={
            "help": "of activations, as `splitlearn list protections` has them for tables, or of labels: "
            f"{', '.join(OF_LABELS)}; NAME or NAME:STRENGTH"
        },
    )
    attacks: tuple[str, ...] = field(
        default=("decoder", "norm", "cosine", "averaged"),
        metadata={"help": f"on columns, such as decoder or rmle; on labels: {', '.join(GUESSERS)}; '' for none"},
    )
    cut: str = field(default="relu1", metadata={"help": "last layer below the cut, whose width the clients share"})
    targets: int = field(default=200, metadata={"help": "private persons whose columns are attacked"})
    private: int = field(default=3000, metadata={"help": "private persons, on whom the model trains"})
    auxiliary: int = field(default=1500, metadata={"help": "persons of the attacker's own, all columns known"})
    test: int = field(default=3000, metadata={"help": "test persons"})
    clients: int = field(default=2, metadata={"help": "institutions that hold columns, neighbours together"})
    epochs: int = field(default=8, metadata={"help": "epochs of training"})
    batch_size: int = field(default=64, metadata={"help": "persons in a batch"})


def shields(trial: Trial, classes: int) -> tuple[Shield, LabelShield]:
    """Return what the institutions do to activations, and what the owner does to labels; one of them nothing."""
    entry = STUDY.protections[trial.protection]
    if isinstance(entry, Protection):
        return entry.build(trial.strength), LabelShield()
    return Shield(), entry.build(trial.strength, classes, trial.training.seed)


def train(trial: Trial, splits: Splits) -> tuple[Trained, Callable[[], Attacked]]:
    """Train one arm, and return it with what attacks columns and labels."""
    training, private = trial.training, splits.private
    if training.protocol == "unsplit":
        return setups.train_unsplit(training, splits, Shield()), Attacked
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed + 5)  # of labels that are answered once
        shield, labels = shields(trial, private.num_classes)
        trained_on = labels.labels(private.y)
    holders, side, top = setups.vertical_parts(training, splits, shield)
    owner = Learner(
        "owner", top, optimizer_for(top, training), copy.deepcopy(labels.guard), loss=labels.loss,
        seed=training.seed * 1000,
    )  # fmt: skip
    records = [Recorded(Service({one.name: one})) for one in holders]  # what each institution sees
    meters = [Metered(serve(record, shield.codec), requests="down") for record in records]
    remote = [
        Remote(one.name, Framed(meter, shield.codec), one.name) for one, meter in zip(holders, meters, strict=True)
    ]
    ids = torch.arange(len(private))
    batches = Batches(ids, trained_on, batch_size=training.batch_size, seed=training.seed)
    step = partial(vertical, owner, remote, join=concatenated)
    losses = fit(epochs_of(step, batches), epochs=training.epochs).losses
    nbytes = setups.counted(meters)
    paths = [Encoder(one.learner.stage, one.learner.guard, shield.codec) for one in holders]
    seen = wire(owner)
    chain: list[Predictor] = [_Institutions([one.learner for one in holders], side.columns, shield.codec), seen.party]
    visible = {
        "owner": ["each institution's activation of every person, in training and prediction", "the labels, its own"],
        "each institution": ["gradients at its cut", "which persons are in a batch"],
    }
    trained = Trained(
        chain, nn.Sequential(side, top), losses, nbytes, visible, private.x, private.y,
        Encoder(setups.SideBySide(paths, side.columns, side.joined)), seen.record,
    )  # fmt: skip
    return trained, partial(attack, trial, trained, records[0], splits, shield)


def attack(trial: Trial, trained: Trained, first: Recorded, splits: Splits, shield: Shield) -> Attacked:
    """Return what the first institution gets of the labels, and the owner of all columns."""
    private = splits.private
    names = [name for name in trial.attacks if name in GUESSERS]
    labels = case_study.labels_guessed(
        names, "client", first, private.y, trial.training, splits.auxiliary.y, classes=private.num_classes
    )
    names = [name for name in trial.attacks if name in ATTACKS]
    columns = attack_victim(names, trained, splits, trial.training, targets=trial.targets, releases=1, shield=shield)
    labels.notes.extend(shields(trial, private.num_classes)[1].notes)
    return case_study.joined(labels, columns)


def epsilon(trial: Trial, splits: Splits) -> float | None:
    """Return the ε to the change of one label, where labels are answered once; δ is 0."""
    return shields(trial, splits.private.num_classes)[1].epsilon


def described(trial: Trial, splits: Splits) -> dict[str, Any]:
    """Return the attacks' settings."""
    aim = aim_of(splits, 0)
    guess = LabelAim(splits.private.num_classes, 1, 0)
    return {
        name: ATTACKS[name].described(aim) if name in ATTACKS else LABEL_ATTACKS[name].described(guess, "client")
        for name in trial.attacks
    }


def check(trial: Trial, splits: Splits) -> None:
    """Refuse one client, since nothing would be divided, and too few persons to attack, or to do so with."""
    training = trial.training
    if training.protocol == "unsplit":
        return
    if training.clients < 2:
        raise ValueError(f"expected --clients of 2 or more, who hold columns each, got {training.clients}")
    if not 1 <= trial.targets <= len(splits.private):
        raise ValueError(f"expected --targets between 1 and {len(splits.private)}, got {trial.targets}")
    setups.vertical_parts(training, splits, Shield())  # what the clients cannot share ends here
    case_study.check_own([name for name in trial.attacks if name in ATTACKS], splits)
    case_study.check_guessed([name for name in trial.attacks if name in GUESSERS], splits.private.y, training)


def notes(trial: Trial, splits: Splits) -> list[str]:
    """Return how many columns each institution holds, and up to which; nothing where one holds all."""
    if trial.training.protocol == "unsplit":
        return []
    names = splits.private.names or ()
    held = [f"{len(own)} up to {names[int(own[-1])]}" for own in partition.attributes(names, trial.training.clients)]
    return [f"{len(held)} institutions hold the {len(names)} columns, whole attributes each: {', '.join(held)}"]


class _Institutions:
    """All institutions asked as one for a prediction, each on its columns of ``x``."""

    def __init__(self, learners: Sequence[Learner], columns: Sequence[Tensor], codec: Codec | None):
        self.name, self._learners, self._columns, self._codec = "institutions", learners, columns, codec

    def predict(self, x: Tensor) -> Tensor:
        """Return the joined activation that they send for ``x``."""
        sent = [one.predict(x[:, own]) for one, own in zip(self._learners, self._columns, strict=True)]
        return torch.cat([z if self._codec is None else through(self._codec, z) for z in sent], 1)


STUDY = Study(
    name="credit_scoring",
    data=("credit", "bank", "adult"),
    protocols={"unsplit": False, "vertical": True},
    alone=("unsplit",),
    protections={
        **case_study.plain_protections("table"),
        **{name: LABEL_PROTECTIONS[name] for name in OF_LABELS},
    },
    attacks={
        **case_study.later_attacks("table"),
        **{name: LABEL_ATTACKS[name] for name in GUESSERS},
    },
    deal=case_study.dealt,
    train=train,
    described=described,
    check=check,
    notes=notes,
    epsilon=epsilon,
)


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task an arm and seed; every name is checked first."""
    return case_study.tasks(STUDY, config, options, run_trial)


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Run one trial."""
    return case_study.run_trial(STUDY, trial, data_dir)


CREDIT_SCORING = Experiment(
    "credit_scoring",
    "Case study: two hold columns, a third labels (credit, bank, adult): what leaks, what protects, at what cost",
    Config,
    tasks,
    STUDY.data[0],
)
