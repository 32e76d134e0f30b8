"""Split, federated, distilled: the ways in which devices and a cloud learn together, side by side.

A trial is one paradigm, trained twice on the same samples: dealt evenly, and dealt unlike (Dirichlet). All else is of
the even training: bytes, messages and operations of its last round, what networks would take for it, what leaks.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attacks.gradients import InvertingGradients, seen_updates
from experiments.bad_members import answers
from experiments.courses import PARADIGMS, RATES, Course
from experiments.experiment import Experiment, Options, reproduction
from experiments.fleet import Fleet, network_seconds
from experiments.names import find
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.scoring import Attacked, aim_of, attack_victim, scored, shown
from experiments.training import (
    Trained,
    Training,
    build_model,
    default_cut,
    described,
    device_of,
    load_splits,
    sizes_of,
    warm_up,
)
from splitlearn.cut import cut
from splitlearn.data import DATASETS, Splits, partition
from splitlearn.frames import Kind
from splitlearn.leakage import score_membership
from splitlearn.metrics import accuracy_advantage
from splitlearn.network import PROFILES
from splitlearn.party import Learner
from splitlearn.threat import Encoder, Threat, observe
from splitlearn.train import Predictor, predict

__all__ = ["COMPARISON", "Config"]

DECODER = ("decoder",)
UPDATES = Threat(name="honest-but-curious fed server", sees=frozenset({Kind.WEIGHTS, Kind.UPDATE, Kind.COUNT}))
LABELS = Threat(name="honest-but-curious server", sees=frozenset({Kind.LABEL}))


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    paradigms: tuple[str, ...] = field(default=tuple(PARADIGMS), metadata={"help": f"of {', '.join(PARADIGMS)}"})
    clients: int = field(default=10, metadata={"help": "devices"})
    alpha: float = field(
        default=0.1, metadata={"help": "Dirichlet concentration of the unlike devices' classes: small is unlike"}
    )
    rounds: int = field(default=30, metadata={"help": "rounds of training, an epoch of every device each"})
    batch_size: int = field(default=16, metadata={"help": "samples in a batch"})
    lr: float = field(default=0.0, metadata={"help": "learning rate of SGD with momentum; 0: the paradigm's usual one"})
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: the model's usual one"})
    targets: int = field(default=64, metadata={"help": "samples of the first device that are attacked, at most"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})
    auxiliary: int = field(default=0, metadata={"help": "public samples; 0: the data set's usual number"})


@dataclass(frozen=True)
class Trial:
    """One paradigm on even and on unlike devices."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    alpha: float
    targets: int

    def described(self) -> dict[str, Any]:
        """Return the full configuration."""
        setting = described(self.data, self.sizes, self.training)
        return {**setting, "alpha": self.alpha, "targets": self.targets, "networks": sorted(PROFILES)}


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each paradigm and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.paradigms:
        find("paradigm", name, PARADIGMS)
    if not config.paradigms:
        raise ValueError("expected at least one of --paradigms, got none; leave the option out for all")
    if config.clients < 3:
        raise ValueError(f"expected --clients of 3 or more, got {config.clients}; paradigms differ in what many do")
    if config.rounds < 1:
        raise ValueError(f"expected --rounds of 1 or more, got {config.rounds}")
    if not 0 < config.alpha < float("inf"):
        raise ValueError(f"expected --alpha above 0 and finite, got {config.alpha:g}; a large one is all but even")
    if config.targets < 1:
        raise ValueError(f"expected --targets of 1 or more, got {config.targets}")
    sizes = sizes_of(options.data, private=config.private, auxiliary=config.auxiliary)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    if not splits.private.x.is_floating_point():
        raise ValueError(f"expected inputs that are numbers, got {options.data}, which holds tokens")
    place = default_cut(splits) if config.cut == "default" else config.cut
    cut(build_model(splits, seed=0), place)
    device = device_of(options.device)
    for seed in options.seeds:  # too few samples are told now
        try:
            partition.dirichlet(splits.private.y, config.clients, config.alpha, seed, min_rows=2)
        except ValueError as error:
            raise ValueError(
                f"expected 2 samples or more for each of {config.clients} clients, got {len(splits.private)} for all "
                f"of them, dealt at --alpha {config.alpha:g}; raise --private or --alpha, or lower --clients"
            ) from error
    found = []
    for name in config.paradigms:
        for seed in options.seeds:
            training = Training(
                protocol=name, cut=place, epochs=config.rounds, batch_size=config.batch_size, optimizer="sgd",
                lr=config.lr or RATES[name], clients=config.clients, seed=seed, device=device,
            )  # fmt: skip
            trial = Trial(options.data, sizes, training, config.alpha, config.targets)
            alone = replace(config, paradigms=(name,))
            command = reproduction("paradigms", alone, data=options.data, device=device, seed=seed)
            labels = {
                "seed": seed, "data": options.data, "protocol": name, "cut": place, "protection": "none",
                "strength": "",
            }  # fmt: skip
            call = partial(run_trial, trial, options.data_dir)
            found.append(Task("paradigms", trial.described(), command, labels, call))
    return found


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train the paradigm on even and on unlike devices; count, time and attack the former."""
    warm_up()
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    begun = time.perf_counter()
    paradigm, fleet = PARADIGMS[trial.training.protocol], Fleet(trial.training, splits, None)
    course = paradigm.build(fleet)
    traces = {"accuracy": _train(fleet, course, splits, trial.training.epochs - 1)}
    fleet.traffic.clear()  # the last round is what is told of traffic, and what updates are read off
    _forget(fleet)
    _, flops = fleet.cloud.count(course.round)
    accuracy, lowest = _accuracy(course, splits)
    traces["accuracy"].append(accuracy)
    seconds = {"train": time.perf_counter() - begun}
    utility = {
        "accuracy": accuracy, "accuracy_lowest": lowest,
        "messages": float(fleet.traffic.messages) / trial.training.clients,
        "edge_flops": float(flops - fleet.cloud.flops) / trial.training.clients,
        "cloud_flops": float(fleet.cloud.flops),
        "edge_parameters": float(sum(p.numel() for stage in course.device for p in stage.parameters())),
        **{f"network_seconds_{name}": _waited(fleet, course, name, trial.training.seed) for name in PROFILES},
    }  # fmt: skip
    nbytes = fleet.traffic.nbytes
    begun = time.perf_counter()
    attacked = _attacked(fleet, course, trial)
    seconds["attack"] = time.perf_counter() - begun
    begun = time.perf_counter()
    unlike = Fleet(trial.training, splits, trial.alpha)
    other = paradigm.build(unlike)
    traces["accuracy_non_iid"] = _train(unlike, other, splits, trial.training.epochs)
    seconds["train_non_iid"] = time.perf_counter() - begun
    utility["accuracy_non_iid"], utility["accuracy_non_iid_lowest"] = _accuracy(other, splits)
    begun = time.perf_counter()
    utility |= {name: _right(train(), splits) for name, train in course.baselines.items()}
    seconds |= {"train_baselines": time.perf_counter() - begun} if course.baselines else {}
    if trial.training.epochs % 5:
        traces["accuracy_non_iid"].append(utility["accuracy_non_iid"])
    return Outcome(
        utility=utility, leakage=attacked.leakage, nbytes=nbytes, seconds=seconds, images=attacked.images,
        visible=course.visible | attacked.visible, traces=traces,
        notes=[
            f"model: {paradigm.partitioning}; leaves a device: {paradigm.leaves}",
            f"messages, operations and parameters are a device's, in a round; bytes are all {trial.training.clients} "
            "devices', in a round; network seconds are a round's, without computing",
            f"membership is asked by {paradigm.asks}, of {_asked(course)}",
            *course.notes, *attacked.notes,
        ],
    )  # fmt: skip


def _train(fleet: Fleet, course: Course, splits: Splits, rounds: int) -> list[float]:
    """Run the rounds; return the accuracy after every fifth."""
    found = []
    for number in range(1, rounds + 1):
        _forget(fleet)
        course.round()
        if number % 5 == 0:
            found.append(_accuracy(course, splits)[0])
    return found


def _forget(fleet: Fleet) -> None:
    for record in fleet.records.values():
        record.clear()


def _accuracy(course: Course, splits: Splits) -> tuple[float, float]:
    """Return the mean accuracy of the model, or of all devices' models, and the lowest of these."""
    found = [_right(chain, splits) for chain in course.chains()]
    return sum(found) / len(found), min(found)


def _right(chain: Sequence[Predictor], splits: Splits) -> float:
    """Return a model's accuracy; what is not finite answers no class."""
    x, y = splits.test.x, splits.test.y
    return (answers(predict(chain, x)).cpu() == y.cpu()).double().mean().item()


def _waited(fleet: Fleet, course: Course, network: str, seed: int) -> float:
    """Return how long a round's frames take: of all devices in turn, of the slowest at once, of one on the average."""
    events = fleet.traffic.events.values()
    each = [
        network_seconds(own, PROFILES[network], streamed=course.streamed, seed=seed * 1000 + place)
        for place, own in enumerate(events)
    ]
    if not each:
        return 0.0
    if course.schedule == "in turn":
        return sum(each)
    return sum(each) / len(each) if course.schedule == "asynchronous" else max(each)


def _attacked(fleet: Fleet, course: Course, trial: Trial) -> Attacked:
    """Run what there is to be run on what crossed, and ask the trained model who was in it."""
    x, y = fleet.shares()[0]
    done = Attacked()
    if trial.training.protocol == "central":
        done.leakage.append(_held("sent_inputs", "reconstruction", "mse", 0.0))
        done.leakage.append(_held("sent_labels", "label", "accuracy", 1.0))
        done.notes.append("the cloud holds the samples: there is nothing to attack")
    if "server" in fleet.records:
        done.leakage.append(_sent_labels(fleet, y))
        done = _decoded(fleet, course, trial, x, y, done)
    elif "fed server" in fleet.records and any(name.endswith(".weight") for name in _names(fleet)):
        _inverted(fleet, trial, x, y, done)
    done.leakage.append(_members(course, fleet))
    return done


def _held(name: str, family: Literal["reconstruction", "label"], metric: str, value: float) -> Leakage:
    return Leakage(attack=name, family=family, advantage=1.0, metrics={metric: value}, baselines={})


def _names(fleet: Fleet) -> list[str]:
    """Return the entries that crossed to the fed server, or nothing."""
    exchanges = fleet.records["fed server"].exchanges
    return [key.split("/", 1)[-1] for key in exchanges[-1].request.tensors] if exchanges else []


def _sent_labels(fleet: Fleet, y: Tensor) -> Leakage:
    """Return what the server knows of labels that are sent to it: read off what crossed."""
    view = observe(fleet.records["server"], threat=LABELS)
    sent = torch.cat([t.flatten() for t in view.tensors(Kind.LABEL)]).cpu()
    counts = torch.stack([one.cpu().bincount(minlength=int(y.max()) + 1) for one in (sent, y)])
    right = float(counts.min(0).values.sum()) / len(y)  # an epoch's labels against the device's own, class by class
    blind = float(counts[1].max()) / len(y)
    return Leakage(
        attack="sent_labels", family="label", advantage=accuracy_advantage(min(1.0, right), blind),
        metrics={"accuracy": min(1.0, right)}, baselines={"accuracy_commonest_class": blind},
    )  # fmt: skip


def _decoded(fleet: Fleet, course: Course, trial: Trial, x: Tensor, y: Tensor, done: Attacked) -> Attacked:
    """Attack what the first device sends for its samples through the trained model, as in `tradeoff`."""
    bottom, top = course.chains()[0]
    assert isinstance(bottom, Learner)
    assert isinstance(top, Learner)
    line = fleet.lines({fleet.names[0]: top})[fleet.names[0]]
    trained = Trained(
        [bottom, line], nn.Sequential(bottom.stage, top.stage), [], {}, {}, x, y, Encoder(bottom.stage, bottom.guard),
        fleet.records["server"],
    )  # fmt: skip
    found = attack_victim(
        DECODER, trained, fleet.splits, trial.training, targets=min(trial.targets, len(x)), releases=1
    )
    return replace(found, leakage=[*done.leakage, *found.leakage], notes=[*done.notes, *found.notes])


def _inverted(fleet: Fleet, trial: Trial, x: Tensor, y: Tensor, done: Attacked) -> None:
    """Attack the first device's last update as if it were one gradient: in the attacker's favour, in the best order."""
    aim = aim_of(fleet.splits, trial.training.seed)
    view = observe(fleet.records["fed server"], threat=UPDATES)
    attack = InvertingGradients(
        fleet.model(),
        lambda seen: seen_updates(seen, lr=trial.training.lr)[-1:],
        aim.shape,
        bounds=aim.bounds,
        seed=aim.seed,
        restarts=1,
    )
    result = attack(view)
    rows, columns = _matched(x, result.x_hat.to(x.device, x.dtype))
    kept = slice(0, trial.targets)
    ordered = replace(result, x_hat=result.x_hat.to(x.device, x.dtype)[columns][kept])
    leak, x_hat = scored(
        "inverting_gradients", {"inverting_gradients": ordered}, fleet.splits, x[rows][kept], y[rows][kept]
    )
    done.leakage.append(leak)
    done.images.update(shown(x[rows][kept], "inverting_gradients", x_hat))
    done.notes.append(
        f"the last update, of {len(x)} samples in several steps, was inverted as one gradient, its images in the order "
        "that suits the attacker; one sample and one step a round leak far more: see `splitlearn run "
        "reconstruction_attacks`; nothing is inferred of the labels behind it"
    )


def _matched(x: Tensor, x_hat: Tensor) -> tuple[list[int], list[int]]:
    """Return rows of both, each used once, of the least error in all."""
    cost = torch.cdist(x.flatten(1).double(), x_hat.flatten(1).double()).square()
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return rows.tolist(), columns.tolist()


def _asked(course: Course) -> str:
    return "the one model, of all devices' samples" if len(course.chains()) == 1 else "the first device's, of its own"


def _members(course: Course, fleet: Fleet) -> Leakage:
    """Ask the trained model, or the first device's own, who was in its training, by the loss."""
    chains = course.chains()
    shares = fleet.shares()
    own = shares if len(chains) == 1 else shares[:1]
    x, y = torch.cat([x for x, _ in own]), torch.cat([y for _, y in own])
    test = fleet.splits.test
    score = score_membership(-_surprise(chains[0], x, y), -_surprise(chains[0], test.x, test.y))
    return Leakage(
        attack="loss_threshold", family="membership", advantage=score.advantage, metrics=dict(score.metrics),
        baselines=dict(score.baselines),
    )  # fmt: skip


def _surprise(chain: Sequence[Any], x: Tensor, y: Tensor) -> Tensor:
    logits = predict(chain, x).double()
    return cross_entropy(logits, y.to(logits.device), reduction="none").cpu()


COMPARISON = Experiment(
    "paradigms",
    "Split, federated, distilled, peer to peer: accuracy, bytes, operations, networks and leakage side by side",
    Config,
    tasks,
)
