"""Case study: hospitals learn to tell arrhythmias from heart beats that they may not share; judged on unseen patients.

MIT-BIH beats (Moody and Mark 2001; 23 of 48 records): is a beat a ventricular ectopic one? Whole patients are dealt, by
the seed: no patient is in two of private, auxiliary and test samples (an inter-patient split, as de Chazal, O'Dwyer and
Reilly 2004 judge by), nor with two clients. Beside that stands what other beats of the same patients would have shown.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments import case_study, setups
from experiments.case_study import READ_LABELS, Study, Trial
from experiments.experiment import Experiment, Options
from experiments.ingredients import ATTACKS, PROTECTIONS
from experiments.label_ingredients import LABEL_ATTACKS
from experiments.parts import LabelAim, Shield
from experiments.runner import Outcome, Task
from experiments.scoring import Attacked, aim_of, attack_victim
from experiments.training import Trained, Training, build_model, optimizer_for
from splitlearn.cut import cut
from splitlearn.data import Dataset, Splits, partition, split
from splitlearn.federation import Member, fedavg_round, in_turn_round, splitfed_v2_round
from splitlearn.party import Learner
from splitlearn.remote import Wire, wire
from splitlearn.threat import Encoder
from splitlearn.train import Batches, fit

__all__ = ["ARRHYTHMIA", "Config"]

VENTRICULAR = 4  # of N, L, R, A and V
CLASSES = 2
FLAT = 1e-3  # millivolts of standard deviation, below which a beat is noise
DEALT = 0.75  # of all beats: whole patients do not fill parts evenly
ONE_CLIENT = ("unsplit", "u_shaped")
BLIND = "similarity"  # how the server of the U shape, which is sent no labels, guesses at them


@dataclass(frozen=True)
class Config(case_study.Config):
    """Options of the experiment."""

    protocols: tuple[str, ...] = field(
        default=("unsplit", "fedavg", "splitfed_v2", "u_shaped"),
        metadata={"help": "of unsplit, fedavg, vanilla (clients in turn), splitfed_v2, u_shaped (one client)"},
    )
    protections: tuple[str, ...] = field(
        default=("none", "noise:0.05", "nopeek:3"),
        metadata={"help": "of those of `splitlearn list protections` that work on signals; NAME or NAME:STRENGTH"},
    )
    attacks: tuple[str, ...] = field(
        default=("decoder", READ_LABELS, BLIND),
        metadata={"help": f"attacks on activations, such as decoder or rmle; {READ_LABELS}; {BLIND}; '' for none"},
    )
    cut: str = field(default="pool1", metadata={"help": "last layer below the cut"})
    targets: int = field(default=100, metadata={"help": "private beats of the first client that are attacked"})
    private: int = field(default=3000, metadata={"help": "private beats, on which the model trains"})
    auxiliary: int = field(default=1000, metadata={"help": "beats of the attacker's own patients"})
    test: int = field(default=2000, metadata={"help": "test beats, of patients whom nobody trained on"})
    clients: int = field(default=3, metadata={"help": "hospitals, each with whole patients"})
    epochs: int = field(default=8, metadata={"help": "epochs, or rounds, of training"})


def deal(dataset: Dataset, sizes: tuple[int, int, int], seed: int) -> Splits:
    """Return parts of different patients, dealt by the seed; as large as asked, of patients in proportion to that.

    Each beat has its mean taken off and is divided by its standard deviation: leads and gains differ by patient. The
    label is 1 for a ventricular ectopic beat (V), else 0. Raises ``ValueError`` where a part's patients have too few
    beats.
    """
    try:
        whole = _by_patient(dataset, sizes, seed)
    except ValueError as error:  # which quotes sizes in proportion to these
        raise ValueError(
            f"expected --private, --auxiliary and --test that whole patients of {len(dataset)} beats fill under seed "
            f"{seed}, got {', '.join(map(str, sizes))}; ask for fewer, or try another seed"
        ) from error
    parts = zip((whole.private, whole.auxiliary, whole.test), sizes, strict=True)
    return Splits(*(part.subset(torch.arange(size)) for part, size in parts))


def known_patients(dataset: Dataset, sizes: tuple[int, int, int], seed: int) -> dict[str, Dataset]:
    """Return other beats of the private patients, at most as many as test beats: what a split by beat would test on."""
    private = _by_patient(dataset, sizes, seed).private
    rows = torch.arange(sizes[0], min(len(private), sizes[0] + sizes[2]))
    return {"known_patients": private.subset(rows)} if len(rows) else {}


def _by_patient(dataset: Dataset, sizes: tuple[int, int, int], seed: int) -> Splits:
    x = dataset.x - dataset.x.mean(-1, keepdim=True)
    x = x / x.std(-1, keepdim=True).clamp(min=FLAT)
    binary = replace(dataset, x=x, y=(dataset.y == VENTRICULAR).long(), num_classes=CLASSES)
    scale = max(1.0, DEALT * len(dataset) / sum(sizes))
    private, auxiliary, test = (int(scale * size) for size in sizes)
    return split(binary, private=private, auxiliary=auxiliary, test=test, seed=seed, by_group=True)


def train_by_patient(training: Training, splits: Splits, shield: Shield) -> Trained:
    """Train hospitals of whole patients: FedAvg, SplitFed V2, or in turn (vanilla), as ``training.protocol`` says."""
    private = splits.private
    whole = build_model(splits, seed=training.seed).to(training.device)
    split_up = training.protocol != "fedavg"
    below, above = cut(whole, training.cut) if split_up else (whole, nn.Identity())
    shared = Learner("bottom" if split_up else "fed server", copy.deepcopy(below))
    server = Learner("server", above, optimizer_for(above, training), seed=training.seed * 1000)
    held = hospitals(training, splits)
    members: list[Member] = []
    wires: list[Wire] = []
    for number, rows in enumerate(held):
        stage = copy.deepcopy(below)
        client = Learner(
            f"client{number}", stage, optimizer_for(stage, training), copy.deepcopy(shield.guard),
            seed=training.seed * 1000 + number + 1,
        )  # fmt: skip
        line = wire(server.session(client.name), shield.codec) if split_up else None
        own = Batches(
            private.x[rows], private.y[rows], batch_size=training.batch_size, seed=training.seed, drop_last=True
        )  # a short last batch is no use to NoPeek
        members.append(Member(client, None if line is None else line.party, own))
        wires += [] if line is None else [line]
    remote, meters = setups.over_wires(members)
    rounds: dict[str, Callable[[], object]] = {
        "fedavg": partial(fedavg_round, remote, shared),
        "splitfed_v2": partial(splitfed_v2_round, remote, shared),
        "vanilla": partial(in_turn_round, remote, shared),
    }

    def epoch() -> float:
        rounds[training.protocol]()
        return sum(one.loss * len(own) for one, own in zip(members, held, strict=True)) / len(private)

    losses = fit(epoch, epochs=training.epochs).losses
    nbytes = setups.counted([*meters, *(line.meter for line in wires)])
    own_x, own_y = private.x[held[0]], private.y[held[0]]
    fed = {"fed server": setups.FED} if training.protocol != "vanilla" else {}
    if not split_up:
        return Trained([shared], shared.stage, losses, nbytes, fed, own_x, own_y)
    first = members[0].learner
    first.load_weights(shared.weights())
    seen = [*setups.LABELLED, *([] if fed else ["every bottom handed on"])]
    return Trained(
        [first, wires[0].party], nn.Sequential(first.stage, above), losses, nbytes,
        {"server": seen, "client": setups.NOTHING, **fed}, own_x, own_y,
        Encoder(first.stage, first.guard, shield.codec), wires[0].record,
    )  # fmt: skip


def hospitals(training: Training, splits: Splits) -> list[torch.Tensor]:
    """Return the rows of each client; ``ValueError`` where there are fewer patients than clients."""
    groups = splits.private.groups
    assert groups is not None  # a record is a patient's
    return partition.by_group(groups, training.clients, training.seed)


def train(trial: Trial, splits: Splits) -> tuple[Trained, Callable[[], Attacked]]:
    """Train one arm, and return it with what attacks the first client."""
    training, shield = trial.training, PROTECTIONS[trial.protection].build(trial.strength)
    if training.protocol in ONE_CLIENT:
        own = setups.train_unsplit if training.protocol == "unsplit" else setups.train_u_shaped
        trained = own(training, splits, shield)
    else:
        trained = train_by_patient(training, splits, shield)
    return trained, partial(attack, trial, trained, splits, training, shield)


def attack(trial: Trial, trained: Trained, splits: Splits, training: Training, shield: Shield) -> Attacked:
    """Return what the server gets of the first client's labels and beats."""
    if trained.record is None:
        return Attacked()
    labels, y = Attacked(), trained.victim_y
    if READ_LABELS in trial.attacks:
        labels = case_study.labels_read(
            trained.record, y, training, classes=CLASSES, drop_last=training.protocol in STUDY.drop_last
        )
    if BLIND in trial.attacks and training.protocol == "u_shaped":
        labels = case_study.labels_guessed(
            [BLIND], "server", trained.record, y, training, splits.auxiliary.y, classes=CLASSES
        )
    names = [name for name in trial.attacks if name in ATTACKS]
    inputs = attack_victim(names, trained, splits, training, targets=trial.targets, releases=1, shield=shield)
    return case_study.joined(labels, inputs)


def described(trial: Trial, splits: Splits) -> dict[str, Any]:
    """Return the attacks' settings."""
    shield = PROTECTIONS[trial.protection].build(trial.strength)
    aim = aim_of(splits, 0, cut_at=trial.training.cut, shield=shield)
    known = {name: ATTACKS[name].described(aim) for name in trial.attacks if name in ATTACKS}
    if BLIND in trial.attacks:
        known[BLIND] = LABEL_ATTACKS[BLIND].described(LabelAim(CLASSES, 1, 0), "server")
    return known | ({READ_LABELS: {}} if READ_LABELS in trial.attacks else {})


def check(trial: Trial, splits: Splits) -> None:
    """Refuse more hospitals than patients, batches that are no batch, and too few beats to attack, or to do so with."""
    training = trial.training
    held = hospitals(training, splits)
    fewest, most = min(map(len, held)), len(held[0])
    if fewest < training.batch_size:
        raise ValueError(
            f"expected --batch-size of at most {fewest}, the beats of the smallest hospital under seed "
            f"{training.seed}, got {training.batch_size}; or ask for fewer --clients"
        )
    if not STUDY.protocols[training.protocol]:
        return
    if not 1 <= trial.targets <= most:
        raise ValueError(
            f"expected --targets between 1 and {most}, the beats of the first hospital under seed {training.seed}, got "
            f"{trial.targets}"
        )
    case_study.check_own([name for name in trial.attacks if name in ATTACKS], splits)


def notes(trial: Trial, splits: Splits) -> list[str]:
    """Return how many patients each part has."""
    patients = [len(part.groups.unique()) for part in (splits.private, splits.auxiliary, splits.test)]  # type: ignore[union-attr]
    return [
        "patients of private, auxiliary and test samples: " + ", ".join(map(str, patients)) + "; none is in two parts",
        "MIT-BIH: 23 of 48 records; not the file of the split-learning papers",
    ]


STUDY = Study(
    name="arrhythmia",
    data=("mitbih",),
    protocols={"unsplit": False, "fedavg": False, "vanilla": True, "splitfed_v2": True, "u_shaped": True},
    alone=ONE_CLIENT,
    protections=case_study.plain_protections("signal"),
    attacks={
        **case_study.later_attacks("signal"),
        READ_LABELS: None,
        BLIND: LABEL_ATTACKS[BLIND],
    },
    deal=deal,
    train=train,
    described=described,
    check=check,
    notes=notes,
    beside=known_patients,
    drop_last=("fedavg", "vanilla", "splitfed_v2"),
)  # fmt: skip


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task an arm and seed; every name is checked first."""
    return case_study.tasks(STUDY, config, options, run_trial)


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Run one trial."""
    return case_study.run_trial(STUDY, trial, data_dir)


ARRHYTHMIA = Experiment(
    "arrhythmia",
    "Case study: hospitals' heart beats (mitbih), judged on unseen patients: what leaks, what protects, at what cost",
    Config,
    tasks,
    STUDY.data[0],
)
