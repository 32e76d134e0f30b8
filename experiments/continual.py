"""What is forgotten where classes come one task after the other? Methods × split and federated training; one head.

Class-incremental: a task is a few classes, and whoever predicts is not told of which task a sample is. Methods begin
from the same model and see each task for as many epochs, but for ``joint``, which sees all earlier tasks again: an
upper bound. Methods compare within a protocol: FedAvg makes several passes a round, and its memories are small. What
was never learned is not forgotten either: read forgetting beside accuracy_learned, that on each task right after it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.experiment import Experiment, Options, reproduction
from experiments.names import at_strengths, find, spec_of
from experiments.runner import Outcome, Task
from experiments.setups import counted, over_wires
from experiments.skewed import judged_by
from experiments.training import (
    Training,
    build_model,
    described,
    device_of,
    load_splits,
    optimizer_for,
    places,
    sizes_of,
    warm_up,
)
from experiments.unlike import Epochs, accuracy, advance, timed
from splitlearn.cut import cut
from splitlearn.data import DATASETS, Dataset, Splits, partition
from splitlearn.federation import apart_round, fedavg_round
from splitlearn.members import Member
from splitlearn.paradigms import Elastic, Replay, Replayed, fisher, forgetting
from splitlearn.party import Learner
from splitlearn.protocols import vanilla
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.train import Batches, Predictor
from splitlearn.wire import Framed, Metered, serve

__all__ = ["CONTINUAL", "TASK_METHODS", "TRAINED", "Config", "TaskMethod", "Trial", "run_trial", "tasks"]

TRAINED = ("vanilla", "fedavg")
Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TaskMethod:
    """What is done about forgetting, at several strengths."""

    summary: str
    strengths: tuple[str, ...] = ("",)


TASK_METHODS: dict[str, TaskMethod] = {
    "naive": TaskMethod("each task is trained on as it comes"),
    "replay": TaskMethod("so many samples of earlier tasks, kept on the devices, are shown again", ("50", "200")),
    "ewc": TaskMethod("weights are held by so much where earlier tasks need them (EWC)", ("1000", "10000")),
    "joint": TaskMethod("all tasks so far are trained on: the upper bound"),
}


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    protocols: tuple[str, ...] = field(default=TRAINED, metadata={"help": f"of {', '.join(TRAINED)}"})
    methods: tuple[str, ...] = field(
        default=tuple(TASK_METHODS),
        metadata={
            "help": f"of {', '.join(TASK_METHODS)}; NAME for all its strengths, NAME:STRENGTH for one: replay:50"
        },
    )
    classes_per_task: int = field(default=2, metadata={"help": "classes that come at a time, in their order"})
    clients: int = field(default=5, metadata={"help": "members of fedavg, each with an equal share of every task"})
    epochs: int = field(default=10, metadata={"help": "epochs, or rounds, on each task"})
    local_epochs: int = field(default=3, metadata={"help": "of fedavg: epochs that a member trains at home in a round"})
    batch_size: int = field(default=16, metadata={"help": "samples in a batch, those that are replayed apart"})
    optimizer: str = field(default="adam", metadata={"help": "adam, or sgd with momentum 0.9"})
    lr: float = field(default=5e-4, metadata={"help": "learning rate"})
    fisher: int = field(
        default=100, metadata={"help": "of ewc: samples of a task that a device takes Fisher information from, at most"}
    )
    cut: str = field(default="default", metadata={"help": "last layer below the cut of vanilla"})
    private: int = field(default=0, metadata={"help": "samples of all clients; 0: the data set's usual number"})
    judged_on: Literal["test", "auxiliary"] = field(
        default="test", metadata={"help": "samples that accuracy is taken on; strengths are chosen on the auxiliary"}
    )


@dataclass(frozen=True)
class Trial:
    """One method at one strength under one protocol."""

    data: str
    sizes: tuple[int, int, int]
    training: Training  # an epoch is one on each task
    method: str
    strength: str
    classes_per_task: int
    local_epochs: int
    fisher: int
    judged_on: str

    def described(self) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        found = {
            **described(self.data, self.sizes, self.training),
            "method": self.method, "strength": self.strength, "classes_per_task": self.classes_per_task,
            "judged_on": self.judged_on,
        }  # fmt: skip
        found |= {"local_epochs": self.local_epochs} if self.training.protocol == "fedavg" else {}
        return found | ({"fisher": self.fisher} if self.method == "ewc" else {})


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each protocol, method, strength and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.protocols:
        find("protocol", name, dict.fromkeys(TRAINED))
    for option in ("protocols", "methods"):
        if not getattr(config, option):
            raise ValueError(f"expected at least one of --{option}, got none; leave the option out for the default")
    methods = at_strengths("method", config.methods, TASK_METHODS, _check_strength)
    for option in ("local_epochs", "fisher"):
        if getattr(config, option) < 1:
            raise ValueError(f"expected --{option.replace('_', '-')} of 1 or more, got {getattr(config, option)}")
    device = device_of(options.device)
    sizes = sizes_of(options.data, private=config.private)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    (place,) = places((config.cut,), splits)
    found = []
    for protocol in config.protocols:
        clients = 1 if protocol == "vanilla" else config.clients
        for method, strength in methods:
            if method == "replay" and int(strength) < clients:
                raise ValueError(f"expected replay of a sample or more for each of {clients} clients, got {strength}")
            for seed in options.seeds:
                training = Training(
                    protocol=protocol, cut=place, epochs=config.epochs, batch_size=config.batch_size,
                    optimizer=config.optimizer, lr=config.lr, clients=clients, seed=seed, device=device,
                )  # fmt: skip
                trial = Trial(
                    options.data, sizes, training, method, strength, config.classes_per_task, config.local_epochs,
                    config.fisher, config.judged_on,
                )  # fmt: skip
                _shares(trial, splits)  # too few samples or tasks are told now
                _judged(trial, splits)
                alone = replace(config, protocols=(protocol,), methods=(spec_of(method, strength),))
                command = reproduction("continual", alone, data=options.data, device=device, seed=seed)
                labels = {
                    "seed": seed, "data": options.data, "protocol": protocol,
                    "cut": place if protocol == "vanilla" else "",
                    "protection": "none" if method == "naive" else method, "strength": strength,
                }  # fmt: skip
                call = partial(run_trial, trial, options.data_dir)
                found.append(Task("continual", trial.described(), command, labels, call))
    return found


def _check_strength(method: TaskMethod, strength: str) -> None:
    """Refuse a strength that is no number of samples, or no λ."""
    if method is TASK_METHODS["replay"] and not (strength.isdecimal() and int(strength) >= 1):
        raise ValueError(f"expected replay of a number of samples, got {strength!r}; for example replay:50")
    if method is TASK_METHODS["ewc"]:
        try:
            fits = 0 <= float(strength) < float("inf")
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"expected ewc at a strength of 0 or more, got {strength!r}; for example ewc:1000")


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train on one task after the other, and return what is known of each at the end, and what was before."""
    warm_up()
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    device = trial.training.device
    tests = [(x.to(device), y.to(device)) for x, y in _judged(trial, splits)]
    train = _train_vanilla if trial.training.protocol == "vanilla" else _train_fedavg
    found = train(trial, splits, lambda chain: [accuracy(chain, *one) for one in tests])
    outcome = forgetting(found.table)
    rows = "; ".join(" ".join(f"{value:.3f}" for value in row) for row in found.table)
    notes = [
        f"{len(tests)} tasks of {trial.classes_per_task} classes, one head; accuracy is the mean over tasks at the end",
        f"after each task, on the tasks in their order: {rows}",
    ]
    notes += [found.stopped] if found.stopped else []
    if trial.method == "ewc":
        notes.append(f"of the bytes {found.fisher_nbytes} are for Fisher information, a step a sample")
    return Outcome(
        utility={
            "accuracy": outcome.accuracy, "accuracy_learned": outcome.learned, "forgetting": outcome.forgetting,
            "backward_transfer": outcome.backward_transfer,
        },
        nbytes=counted(found.meters), seconds=found.seconds, visible=found.visible,
        traces={f"accuracy on task {n + 1}": [row[n] for row in found.table] for n in range(len(tests))}, notes=notes,
    )  # fmt: skip


@dataclass
class Taught:
    """What training ended in: ``table[i][j]`` is the accuracy on task j after task i, and what crossed."""

    meters: list[Metered]
    visible: dict[str, list[str]]
    table: list[list[float]] = field(default_factory=list)
    fisher_nbytes: int = 0
    stopped: str = ""  # why it ended early: it diverged
    seconds: dict[str, float] = field(default_factory=dict)  # of training, and of evaluation in between


Look = Callable[[Sequence[Predictor]], list[float]]  # the accuracy on each task
Lesson = Iterable[Callable[[], object]]  # a task's steps: its rounds, and what is kept of it after them


def _teach(
    found: Taught, lessons: Sequence[Lesson], chain: Sequence[Learner], shares: Sequence[list[Samples]], look: Look
) -> Taught:
    """Go through all lessons, and look at all tasks after each; once a step diverges nothing more is learned."""
    for number, lesson in enumerate(lessons):
        samples = torch.cat([own[number][0] for own in shares])
        for place, step in enumerate(() if found.stopped else lesson):
            if said := advance(step, [chain], [samples], found.seconds):
                found.stopped = f"stopped in task {number + 1}, the model is that after {place} rounds of it: {said}"
                break
        with timed(found.seconds, "evaluate"):
            found.table.append(look(chain))
    return found


def _train_vanilla(trial: Trial, splits: Splits, look: Look) -> Taught:
    """One client and a server, each with its half; of ewc each holds its own, from gradients that it sees anyway."""
    below, above = cut(build_model(splits, seed=trial.training.seed).to(trial.training.device), trial.training.cut)
    client, server = _learner("client0", below, trial, 1), _learner("server", above, trial, 0)
    meter = Metered(serve(Service({"server": server})))
    far = Remote("server", Framed(meter), "server")
    member = Member(client, far, [])
    held = _held(trial, [client, server])
    shares = _shares(trial, splits)
    (own,) = shares
    memory = _memory(trial, 0)
    seen = ["the activation of every sample in training", "the labels", "the loss"]
    found = Taught([meter], {"server": seen, "client": ["gradients at the cut", "the loss"]})

    def lesson(number: int) -> Iterator[Callable[[], object]]:
        member.batches = batches = _batches(trial, own, memory, 0, number)
        yield from [partial(apart_round, [member])] * trial.training.epochs
        yield partial(keep, batches, number)

    def keep(batches: Batches | Replayed, number: int) -> None:
        if isinstance(batches, Replayed):
            batches.remember()
        if held and number < len(own) - 1:
            before = meter.total_nbytes
            x, y = (part[: trial.fisher] for part in own[number])
            information = fisher([client, server], partial(vanilla, client, far), x, y)
            for elastic, one in zip(held, information, strict=True):
                elastic.consolidate(one)
            found.fisher_nbytes += meter.total_nbytes - before

    return _teach(found, [lesson(number) for number in range(len(own))], [client, server], shares, look)


def _train_fedavg(trial: Trial, splits: Splits, look: Look) -> Taught:
    """Members with equal shares of every task; of ewc and replay each holds its own, and none of it crosses."""
    model = build_model(splits, seed=trial.training.seed).to(trial.training.device)
    everywhere = Learner("fed server", model)
    shares = _shares(trial, splits)
    members = [Member(_learner(f"client{n}", copy.deepcopy(model), trial, n + 1), None, []) for n in range(len(shares))]
    held = [_held(trial, [member.learner]) for member in members]
    memories = [_memory(trial, n) for n in range(len(shares))]
    remote, meters = over_wires(members)
    seen = {"fed server": ["every client's weights after every round", "how many samples each client has"]}
    found = Taught(meters, {**seen, "client": ["its own samples and the model that it is given"]})

    def lesson(number: int) -> Iterator[Callable[[], object]]:
        batches = [_batches(trial, shares[n], memories[n], n, number) for n in range(len(shares))]
        for member, own in zip(members, batches, strict=True):
            member.batches = Epochs(own, trial.local_epochs)
        yield from [partial(fedavg_round, remote, everywhere)] * trial.training.epochs
        yield partial(keep, batches, number)

    def keep(batches: Sequence[Batches | Replayed], number: int) -> None:
        for own in batches:
            if isinstance(own, Replayed):
                own.remember()
        if trial.method == "ewc" and number < len(shares[0]) - 1:
            for member, (elastic,), parts in zip(members, held, shares, strict=True):
                member.begin(everywhere.weights())
                x, y = (part[: trial.fisher] for part in parts[number])
                elastic.consolidate(fisher([member.learner], member.learner.learn, x, y)[0])

    return _teach(found, [lesson(number) for number in range(len(shares[0]))], [everywhere], shares, look)


def _learner(name: str, stage: nn.Module, trial: Trial, number: int) -> Learner:
    return Learner(name, stage, optimizer_for(stage, trial.training), seed=trial.training.seed * 1000 + number)


def _held(trial: Trial, learners: Sequence[Learner]) -> list[Elastic]:
    """Return what holds each learner where earlier tasks need it; nothing but for ewc."""
    return [Elastic(one, float(trial.strength)) for one in learners] if trial.method == "ewc" else []


def _memory(trial: Trial, number: int) -> Replay | None:
    """Return a client's memory, all of them together as large as the strength; None but for replay."""
    if trial.method != "replay":
        return None
    clients = trial.training.clients
    room = int(trial.strength) // clients + (number < int(trial.strength) % clients)
    return Replay(room, trial.training.seed * 1000 + number)


def _batches(
    trial: Trial, parts: Sequence[Samples], memory: Replay | None, client: int, number: int
) -> Batches | Replayed:
    """Return a client's batches of one task, of ``joint`` of all tasks so far."""
    seen = parts[: number + 1] if trial.method == "joint" else parts[number : number + 1]
    x, y = torch.cat([one for one, _ in seen]), torch.cat([one for _, one in seen])
    seed = (trial.training.seed * trial.training.clients + client) * len(parts) + number
    batches = Batches(x, y, batch_size=trial.training.batch_size, seed=seed)
    return batches if memory is None else Replayed(batches, memory)


def _shares(trial: Trial, splits: Splits) -> list[list[Samples]]:
    """Return each client's samples, by task; ``ValueError`` where there are too few for all, or but one task."""
    clients, seed = trial.training.clients, trial.training.seed
    found: list[list[Samples]] = [[] for _ in range(clients)]
    for x, y in _by_task(splits.private, trial, "raise --private or --classes-per-task"):
        if len(x) < clients:
            raise ValueError(
                f"expected a sample or more of every task for each of {clients} clients, got {len(x)} of one for all "
                "of them; raise --private, or lower --clients"
            )
        for own, rows in zip(found, partition.iid(len(x), clients, seed), strict=True):
            own.append((x[rows], y[rows]))
    return found


def _judged(trial: Trial, splits: Splits) -> list[Samples]:
    """Return the samples that models are judged on, by task."""
    other = "auxiliary" if trial.judged_on == "test" else "test"
    return _by_task(judged_by(trial.judged_on, splits), trial, f"raise --classes-per-task, or use --judged-on {other}")


def _by_task(samples: Dataset, trial: Trial, remedy: str) -> list[Samples]:
    """Return the samples of each task, classes in their order; ``remedy`` is told where a task has none."""
    classes, width = samples.num_classes, trial.classes_per_task
    if not 1 <= width <= classes // 2 or classes % width:
        raise ValueError(
            f"expected --classes-per-task that divides {classes} classes into 2 tasks or more, got {width}"
        )
    found = []
    for first in range(0, classes, width):
        rows = torch.nonzero((samples.y >= first) & (samples.y < first + width)).flatten()
        if not len(rows):
            raise ValueError(f"expected samples of classes {first} to {first + width - 1}, got none; {remedy}")
        found.append((samples.x[rows], samples.y[rows]))
    return found


CONTINUAL = Experiment(
    "continual",
    "What is forgotten where classes come one task after the other? Replay, EWC × split and federated training",
    Config,
    tasks,
)
