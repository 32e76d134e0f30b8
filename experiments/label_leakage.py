"""What do gradients and activations tell of labels? Every label attack against every protection, epoch by epoch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks import LabelGuess
from experiments.experiment import Experiment, Options, reproduction
from experiments.label_ingredients import LABEL_ATTACKS, LABEL_PROTECTIONS
from experiments.names import at_strengths, find, spec_of
from experiments.parts import LabelAim, LabelShield, Shield
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.scoring import fresh_bottom
from experiments.setups import UNLABELLED, counted
from experiments.training import (
    Training,
    build_model,
    default_cut,
    described,
    device_of,
    load_splits,
    optimizer_for,
    sizes_of,
    warm_up,
)
from splitlearn.cut import cut
from splitlearn.data import DATASETS, Splits
from splitlearn.features import Features
from splitlearn.leakage import score_labels
from splitlearn.metrics import LeakageScore, accuracy_advantage, utility
from splitlearn.party import Learner
from splitlearn.protocols import concatenated, u_shaped, vertical
from splitlearn.remote import Remote, wire
from splitlearn.service import Service
from splitlearn.threat import Encoder, Grants, observe
from splitlearn.train import Batches, Predictor, epochs_of, fit, predict
from splitlearn.wire import Framed, Metered, Recorded, serve

__all__ = ["EPOCHS", "LABEL_LEAKAGE", "SEATS", "TASKS", "Config"]

LEAST = 4  # samples in a batch, of which there is a distance correlation
BLIND = ("accuracy", "leak_auc")  # of who lacks what training left
EPOCHS = "epochs"  # the trace of the epochs that were attacked; one trace an attack holds its advantage at each
TASKS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "classes": None,
    "parity": lambda y: y % 2,
    "rare": lambda y: (y == 0).long(),
}


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    seats: tuple[str, ...] = field(
        default=("client", "server"),
        metadata={
            "help": "who is after the labels: client (two-party vertical, it holds the inputs) or server (U-shaped)"
        },
    )
    tasks: tuple[str, ...] = field(
        default=("rare", "classes"),
        metadata={"help": "classes: labels as they are; parity: odd or even; rare: class 0 against the others"},
    )
    protections: tuple[str, ...] = field(
        default=tuple(LABEL_PROTECTIONS),
        metadata={"help": f"of {', '.join(LABEL_PROTECTIONS)}; NAME for all its strengths, NAME:STRENGTH for one"},
    )
    attacks: tuple[str, ...] = field(default=tuple(LABEL_ATTACKS), metadata={"help": f"of {', '.join(LABEL_ATTACKS)}"})
    attacked: tuple[int, ...] = field(
        default=(1, 5, 15), metadata={"help": "epochs whose traffic is attacked; those beyond the last are left out"}
    )
    hints: int = field(default=1, metadata={"help": "private samples of each class whose labels the attacker knows"})
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: the model's usual one"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})
    epochs: int = field(default=15, metadata={"help": "epochs of training"})
    batch_size: int = field(default=128, metadata={"help": "samples in a batch"})
    lr: float = field(default=3e-4, metadata={"help": "learning rate of Adam"})


@dataclass(frozen=True)
class Trial:
    """One training, attacked in several of its epochs."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    seat: str
    task: str
    protection: str
    strength: str
    attacks: tuple[str, ...]
    attacked: tuple[int, ...]
    hints: int

    def described(self, classes: int) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        shield = LABEL_PROTECTIONS[self.protection].build(self.strength, classes, 0)  # the seed stands apart
        aim = LabelAim(classes, self.hints, seed=0)
        return {
            **described(self.data, self.sizes, self.training),
            "seat": self.seat, "task": self.task, "attacked": list(self.attacked), "hints": self.hints,
            "protection": {"name": self.protection, "strength": self.strength, "guard": repr(shield.guard)}
            | {"settings": shield.settings},
            "attacks": {name: LABEL_ATTACKS[name].described(aim, self.seat) for name in self.attacks},
        }  # fmt: skip


@dataclass(frozen=True)
class Seat:
    """A training as the adversary's wire sees it. ``step(ids, y)`` is on private samples by number."""

    step: Callable[[Tensor, Tensor], Tensor]
    record: Recorded
    meter: Metered
    bottom: nn.Module  # below the cut, of whoever holds the inputs
    chain: Sequence[Predictor]
    visible: list[str]


def as_client(training: Training, splits: Splits, shield: LabelShield) -> Seat:
    """Two parties in vertical training (Li et al. 2022): the client holds inputs, the owner labels and top."""
    bottom, top = cut(build_model(splits, seed=training.seed).to(training.device), training.cut)
    client = Learner("client", bottom, optimizer_for(bottom, training), seed=training.seed * 1000 + 1)
    owner = _owner("owner", top, training, shield)
    record = Recorded(Service({"client": Features(client, splits.private.x.to(training.device))}))
    meter = Metered(serve(record), requests="down")
    step = partial(vertical, owner, [Remote("client", Framed(meter), "client")], join=concatenated)
    visible = ["the inputs, its own", "gradients at its cut", "which samples are in a batch"]
    return Seat(step, record, meter, bottom, [client, owner], visible)


def as_server(training: Training, splits: Splits, shield: LabelShield) -> Seat:
    """The U shape: the server holds the middle, bottom and head with the labels are the client's."""
    model = build_model(splits, seed=training.seed).to(training.device)
    below, middle, last = cut(model, training.cut, len(model) - 1)
    bottom = Learner("client", below, optimizer_for(below, training), seed=training.seed * 1000 + 1)
    server = Learner("server", middle, optimizer_for(middle, training), seed=training.seed * 1000)
    head = _owner("head", last, training, shield)
    line, x = wire(server), splits.private.x

    def step(ids: Tensor, y: Tensor) -> Tensor:
        return u_shaped(bottom, line.party, head, x[ids], y)

    return Seat(step, line.record, line.meter, below, [bottom, line.party, head], UNLABELLED)


SEATS: dict[str, Callable[[Training, Splits, LabelShield], Seat]] = {"client": as_client, "server": as_server}
PROTOCOL_OF = {"client": "vertical", "server": "u_shaped"}


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each seat, task, protection, strength and seed; every name is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.attacks:
        find("attack", name, LABEL_ATTACKS)
    for name in config.seats:
        find("seat", name, SEATS)
    if config.hints < 1:
        raise ValueError(f"expected --hints of 1 or more, got {config.hints}; attacks that need none do not use them")
    attacked = tuple(sorted(epoch for epoch in set(config.attacked) if epoch <= config.epochs))
    if not attacked or attacked[0] < 1:
        raise ValueError(f"expected --attacked epochs from 1 to {config.epochs}, got {config.attacked}")
    device = device_of(options.device)
    sizes = sizes_of(options.data, private=config.private)
    loaded = load_splits(options.data, options.data_dir, sizes=sizes)
    if loaded.private.kind == "tokens":
        raise ValueError(f"expected inputs that are numbers, got {options.data}, which holds tokens")
    protections = at_strengths(
        "protection", config.protections, LABEL_PROTECTIONS, lambda one, strength: one.build(strength, 2, 0)
    )
    place = default_cut(loaded) if config.cut == "default" else config.cut
    base = Training(
        cut=place, epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, device=device
    )  # fmt: skip
    found = []
    for task in config.tasks:
        splits = relabelled(loaded, task)
        cut(build_model(splits, seed=0), place)
        classes = splits.private.num_classes
        fits = [name for name in config.attacks if classes == 2 or not LABEL_ATTACKS[name].binary]
        _check_counts(config, splits, fits, protections)
        for seat in config.seats:
            for protection, strength in protections:
                if LABEL_PROTECTIONS[protection].binary and classes != 2:
                    continue
                for seed in options.seeds:
                    training = replace(base, protocol=PROTOCOL_OF[seat], seed=seed)
                    names = tuple(name for name in fits if seat in LABEL_ATTACKS[name].seats)
                    trial = Trial(
                        options.data, sizes, training, seat, task, protection, strength, names, attacked, config.hints
                    )
                    spec = spec_of(protection, strength)
                    alone = replace(config, seats=(seat,), tasks=(task,), protections=(spec,), cut=place)
                    command = reproduction("label_leakage", alone, data=options.data, device=device, seed=seed)
                    labels = {
                        "seed": seed, "data": options.data if task == "classes" else f"{options.data} ({task})",
                        "protocol": training.protocol, "cut": place, "protection": protection, "strength": strength,
                    }  # fmt: skip
                    call = partial(run_trial, trial, options.data_dir)
                    found.append(Task("label_leakage", trial.described(classes), command, labels, call))
    if not found:
        raise ValueError(
            f"expected protections for the tasks {', '.join(config.tasks)}, got {', '.join(config.protections)}, "
            "which are for two classes; add --tasks rare"
        )
    return found


def relabelled(splits: Splits, task: str) -> Splits:
    """Return the parts with the labels of a task: as they are, odd or even, or class 0 against the others."""
    change = find("task", task, TASKS)
    if change is None:
        return splits
    if splits.private.num_classes == 2:
        raise ValueError(f"expected more than two classes for the task {task}, got two; use --tasks classes")
    parts = (splits.private, splits.auxiliary, splits.test)
    return Splits(*(replace(part, y=change(part.y), num_classes=2) for part in parts))


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train, attack the traffic of the epochs that are asked for, and return what came of it."""
    warm_up()
    training = trial.training
    splits = relabelled(load_splits(trial.data, data_dir, sizes=trial.sizes), trial.task)
    private, classes = splits.private, splits.private.num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed + 5)
        shield = LABEL_PROTECTIONS[trial.protection].build(trial.strength, classes, training.seed)
        trained_on = shield.labels(private.y)
        seat = SEATS[trial.seat](training, splits, shield)
    ids, order = torch.arange(len(private)), list[Tensor]()
    memory: dict[str, Any] = {}
    blind_scores: dict[Any, LeakageScore] = {}
    by_attack: dict[str, list[Leakage]] = {name: [] for name in trial.attacks}
    seconds = {"train": 0.0, **{f"attack_{name}": 0.0 for name in trial.attacks}}

    def step(rows: Tensor, _: Tensor) -> Tensor:
        order.append(rows)
        return seat.step(rows, trained_on[rows])

    one = epochs_of(step, Batches(ids, ids, batch_size=training.batch_size, seed=training.seed))
    done = 0

    def epoch() -> float:
        nonlocal done
        begun = time.perf_counter()
        loss = one()
        seconds["train"] += time.perf_counter() - begun
        done += 1
        if done in trial.attacked:
            for name in trial.attacks:
                begun = time.perf_counter()
                by_attack[name].append(_attacked(name, trial, seat, splits, order, done, blind_scores, memory))
                seconds[f"attack_{name}"] += time.perf_counter() - begun
        for name in trial.attacks:
            if LABEL_ATTACKS[name].remembers and done < max(trial.attacked):
                memory[name] = _remembered(name, trial, seat, memory.get(name), private.num_classes)
        seat.record.clear()
        order.clear()
        return loss

    losses = fit(epoch, epochs=training.epochs).losses
    nbytes = counted([seat.meter])
    logits = shield.decode(predict(seat.chain, splits.test.x))
    protection = LABEL_PROTECTIONS[trial.protection]
    knows = {name: _known(name, trial) for name in trial.attacks}
    notes = [f"loss of the last epoch: {losses[-1]:.4f}", *shield.notes]
    return Outcome(
        utility=utility(logits, splits.test.y.to(logits.device)), seconds=seconds, nbytes=nbytes,
        leakage=[max(leaks, key=lambda leak: leak.advantage) for leaks in by_attack.values()],
        visible={trial.seat: list(seat.visible)}
        | {f"attacker ({name})": told for name, told in knows.items()},
        traces={EPOCHS: [float(at) for at in trial.attacked]}
        | {name: [leak.advantage for leak in leaks] for name, leaks in by_attack.items()},
        epsilon=shield.epsilon, delta=None if shield.epsilon is None else 0.0,
        notes=[*notes, f"strength: {protection.unit}"] if protection.unit else notes,
    )  # fmt: skip


def _owner(name: str, stage: nn.Module, training: Training, shield: LabelShield) -> Learner:
    own = shield.top(stage).to(training.device)
    return Learner(
        name, own, optimizer_for(own, training), shield.guard, loss=shield.loss, seed=training.seed * 1000 + 7
    )


def _attacked(
    name: str, trial: Trial, seat: Seat, splits: Splits, order: Sequence[Tensor], epoch: int,
    blind_scores: dict[Any, LeakageScore], memory: dict[str, Any],
) -> Leakage:  # fmt: skip
    """Return what one attack gets of the labels of one epoch's batches; hinted samples are not counted.

    It reads that epoch's traffic, and what it keeps of those before where it remembers.
    Where an attack gets labels without what training left (from a fresh bottom, in place of the trained one), the
    advantage is over what that gets with the same hints; it is run once an epoch, and kept in ``blind_scores``.
    """
    attack, private, rows = LABEL_ATTACKS[name], splits.private, torch.cat(list(order))
    threat, y, device = attack.threat(trial.seat, trial.hints), private.y[rows], trial.training.device
    grants = Grants(encoder=Encoder(seat.bottom), own_x=private.x[rows].to(device), y=y.to(device))
    view = observe(seat.record, threat=threat, grants=grants, device=device)
    fresh = fresh_bottom(trial.training.cut, splits, Shield())
    shares = torch.bincount(splits.auxiliary.y, minlength=private.num_classes).double().clamp(min=1)
    public = tuple((shares / shares.sum()).tolist()) if attack.shares else ()
    aim = LabelAim(private.num_classes, trial.hints, trial.training.seed * 100 + epoch, fresh, public)
    known = view.hints[0] if view.threat.hints else None

    def scored(guess: LabelGuess) -> LeakageScore:
        return score_labels(
            None if guess.labels is None else guess.labels.cpu(), y, num_classes=private.num_classes,
            scores=guess.scores, sizes=[len(one) for one in order], named=guess.named, known=known,
        )  # fmt: skip

    built = attack.build(aim)
    guess = built(view, memory.get(name)) if attack.remembers else built(view)
    score = scored(guess)
    advantage, baselines = score.advantage, dict(score.baselines)
    if attack.blind is not None:
        if (attack.blind, epoch) not in blind_scores:
            blind_scores[attack.blind, epoch] = scored(attack.blind(aim)(view))
        blind = blind_scores[attack.blind, epoch]
        advantage = accuracy_advantage(advantage, blind.advantage)
        baselines |= {f"{metric}_fresh_bottom": value for metric, value in blind.metrics.items() if metric in BLIND}
    return Leakage(
        attack=name,
        family="label",
        advantage=advantage,
        metrics=score.metrics,
        baselines=baselines,
        details={"epoch": epoch, "best": name, "evidence": {name: dict(guess.evidence)}, "named": guess.named},
    )


def _remembered(name: str, trial: Trial, seat: Seat, before: Any, classes: int) -> Any:
    """Return what an attack that remembers keeps of this epoch and those before."""
    attack = LABEL_ATTACKS[name]
    view = observe(seat.record, threat=attack.threat(trial.seat, trial.hints), device=trial.training.device)
    return attack.build(LabelAim(classes, trial.hints, seed=0)).remembered(view, before)


def _known(name: str, trial: Trial) -> list[str]:
    """Return what an attack sees and knows, a line each."""
    attack = LABEL_ATTACKS[name]
    shares = ["how frequent each class is"] if attack.shares else []
    told = attack.threat(trial.seat, trial.hints).in_words()
    if attack.remembers and trial.seat == "client":  # the server of the U shape is sent no numbers
        told = [line for line in told if not line.startswith("one release")]
        told.append("what crossed in all epochs before, and of which sample")
    return [*told, *shares]


def _check_counts(
    config: Config, splits: Splits, attacks: Sequence[str], protections: Sequence[tuple[str, str]]
) -> None:
    """Refuse more hints than there are samples, and batches that no score or penalty is defined on."""
    fewest = int(torch.bincount(splits.private.y, minlength=splits.private.num_classes).min())
    for name in attacks:
        if (hinted := LABEL_ATTACKS[name].hinted * config.hints) >= fewest > 0:
            raise ValueError(
                f"expected fewer hints a class than the {fewest} samples of the rarest, got {hinted} for {name}; lower "
                "--hints, or leave it out"
            )
    least = LEAST if any(name == "label_dcor" for name, _ in protections) else 2
    last = len(splits.private) % config.batch_size or config.batch_size
    if min(last, config.batch_size) < least:
        raise ValueError(
            f"expected batches of {least} samples or more, the last one too, got {min(last, config.batch_size)}; "
            "change --batch-size or --private"
        )


LABEL_LEAKAGE = Experiment(
    "label_leakage",
    "What do gradients and activations tell of labels? Label attacks × protections, epoch by epoch",
    Config,
    tasks,
)
