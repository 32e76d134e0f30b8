"""How much can a device answer itself? Early exits at each cut × rules: accuracy, work, bytes, and what still crosses.

The model is trained split (vanilla), then the device trains an exit head on its bottom, and the rule's threshold is
calibrated on the auxiliary samples, which neither was trained on. All is measured on the test set, over real frames.
Attacks are on the activations of the test samples that cross; which ones cross is itself seen, and scored as a guess
of the label. Utility metrics: ``accuracy`` is the cascade's, operations and bytes are those of one sample.
"""

import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments.experiment import Experiment, Options, reproduction
from experiments.ingredients import ATTACKS, PROTOCOLS
from experiments.names import find
from experiments.parts import Shield
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.scoring import Attacked, aim_of, attack_victim
from experiments.tradeoff import check_auxiliary
from experiments.training import Trained, Training, described, device_of, load_splits, places, sizes_of, warm_up
from splitlearn.data import DATASETS, Dataset, Splits
from splitlearn.exits import Confidence, Entropy, Threshold, calibrated, exit_head, train_exit
from splitlearn.inference import Answers, infer
from splitlearn.metrics import accuracy, accuracy_advantage
from splitlearn.party import Learner
from splitlearn.remote import wire
from splitlearn.train import Predictor, predict

__all__ = ["EARLY_EXITS", "RULES", "SWEEP", "Config", "Trial", "crossing_leakage", "run_trial", "tasks"]

RULES: dict[str, type[Threshold]] = {"confidence": Confidence, "entropy": Entropy}
SWEEP = "accuracy by share left"  # the trace: at 0, 1, … 100 % of the test samples, the surest first


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    cuts: tuple[str, ...] = field(
        default=("first", "default"),
        metadata={"help": "where the exit is: last layer below the cut, by name; default, first, depths"},
    )
    rules: tuple[str, ...] = field(
        default=("none", "confidence", "entropy"),
        metadata={"help": f"of none (plain split: all cross), {', '.join(RULES)}"},
    )
    max_loss: float = field(default=0.01, metadata={"help": "accuracy that may be lost against split; 0.01: a point"})
    delta: float = field(
        default=0.05,
        metadata={"help": "probability that more is lost, by the draw of held-out samples; 0: take them at their word"},
    )
    side: int = field(default=7, metadata={"help": "places a side to which the exit head pools"})
    exit_epochs: int = field(default=10, metadata={"help": "epochs of the exit head's training"})
    epochs: int = field(default=15, metadata={"help": "epochs of the split training"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch of either training"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate of either training, by Adam"})
    at_once: int = field(default=16, metadata={"help": "samples in a request at inference"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})
    auxiliary: int = field(default=0, metadata={"help": "auxiliary samples; 0: the data set's usual number"})
    attacks: tuple[str, ...] = field(
        default=("decoder",), metadata={"help": "attacks on the activations that cross, of tradeoff's; '' for none"}
    )
    targets: int = field(default=100, metadata={"help": "test samples that are attacked, the first that cross"})


@dataclass(frozen=True)
class Trial:
    """One training, one exit and one rule."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    rule: str
    at_once: int
    attacks: tuple[str, ...]
    targets: int
    own: dict[str, Any]  # options that exits alone depend on; none of plain split

    def described(self, splits: Splits) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        aim = aim_of(splits, self.training.seed, cut_at=self.training.cut)
        return {
            **described(self.data, self.sizes, self.training),
            "rule": self.rule, "exit": self.own, "at_once": self.at_once, "targets": self.targets,
            "attacks": {name: ATTACKS[name].described(aim) for name in self.attacks},
        }  # fmt: skip


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each cut, rule and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.rules:
        find("rule", name, {"none": None, **RULES})
    for name in config.attacks:
        find("attack", name, ATTACKS)
    _check(config)
    device = device_of(options.device)
    sizes = sizes_of(options.data, private=config.private, auxiliary=config.auxiliary)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    _check_fits(config, splits)
    check_auxiliary(config.attacks, sizes[1])
    settings = {"max_loss": config.max_loss, "delta": config.delta, "side": config.side, "epochs": config.exit_epochs}
    found = []
    for place in places(config.cuts, splits):
        for rule in config.rules:
            for seed in options.seeds:
                training = Training(
                    cut=place, epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, seed=seed,
                    device=device,
                )  # fmt: skip
                own = {} if rule == "none" else settings
                trial = Trial(options.data, sizes, training, rule, config.at_once, config.attacks, config.targets, own)
                alone = replace(config, cuts=(place,), rules=(rule,))
                command = reproduction("early_exits", alone, data=options.data, device=device, seed=seed)
                labels = {
                    "seed": seed, "data": options.data, "protocol": "vanilla", "cut": place, "protection": rule,
                    "strength": "" if rule == "none" else f"{config.max_loss:g}",
                }  # fmt: skip
                call = partial(run_trial, trial, options.data_dir)
                found.append(Task("early_exits", trial.described(splits), command, labels, call))
    return found


def _check(config: Config) -> None:
    for option in ("cuts", "rules"):
        if not getattr(config, option):
            raise ValueError(f"expected at least one of --{option}, got none; leave the option out for the default")
    for option in ("side", "exit_epochs", "at_once", "targets"):
        if getattr(config, option) < 1:
            raise ValueError(f"expected --{option.replace('_', '-')} of 1 or more, got {getattr(config, option)}")
    if not 0 <= config.max_loss <= 1:
        raise ValueError(f"expected --max-loss in [0, 1], got {config.max_loss}; 0.01 is a point of accuracy")
    if not 0 <= config.delta < 1:
        raise ValueError(f"expected --delta from 0 to below 1, got {config.delta}; 0.05 is usual, 0 is no bound")


def _check_fits(config: Config, splits: Splits) -> None:
    if splits.private.kind == "tokens":
        raise ValueError(
            f"expected images, signals or a table, whose activations an exit head can pool, got {splits.private.name}, "
            "which holds tokens; use another --data"
        )
    misfits = [name for name in config.attacks if splits.private.kind not in ATTACKS[name].inputs]
    misfits += [name for name in config.attacks if ATTACKS[name].steps]
    if misfits:
        raise ValueError(
            f"expected attacks on what {splits.private.kind} inputs send at inference, got {', '.join(misfits)}; leave "
            "these out, or look at them by tradeoff"
        )


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train, add an exit, calibrate it, and return what the cascade is worth on the test set and what leaks."""
    warm_up()
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    seconds, start = {}, time.perf_counter()
    trained = PROTOCOLS["vanilla"].train(trial.training, splits, Shield())
    seconds["train"], start = time.perf_counter() - start, time.perf_counter()
    if trial.rule == "none":
        found = _split(trial, trained, splits.test)
    else:
        found = _cascade(trial, trained, splits)
    seconds["exit"] = time.perf_counter() - start
    attacks = _attacked(trial, trained, splits, found.crossed)
    return Outcome(
        utility=found.utility, leakage=[*found.leakage, *attacks.leakage], nbytes=trained.nbytes,
        seconds=seconds | attacks.seconds, visible=_visible(trial.rule) | attacks.visible, traces=found.traces,
        notes=[*found.notes, *attacks.notes], images=attacks.images,
    )  # fmt: skip


@dataclass(frozen=True)
class _Found:
    """What was measured of one inference on the test set."""

    utility: dict[str, float]
    crossed: Tensor  # which test samples did, [N]
    leakage: list[Leakage] = field(default_factory=list)
    traces: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _split(trial: Trial, trained: Trained, test: Dataset) -> _Found:
    """Return what plain split inference is worth, beside sending the input itself."""
    client, top, x, y = _parties(trial, trained, test)
    answers, nbytes = _measured(x, client, top, at_once=trial.at_once, mode="split")
    _, nbytes_cloud = _measured(x, None, Learner("server", trained.model), at_once=trial.at_once, mode="cloud")
    edge, cloud = _operations(client, x[:1]), _operations(top, client.predict(x[:1]))
    worth = {
        "accuracy": accuracy(answers.logits, y), "share_left": 0.0, **_work(edge, 0, cloud, answers.sent),
        "sample_bytes": nbytes / len(x), "sample_bytes_of_input": nbytes_cloud / len(x),
    }  # fmt: skip
    return _Found(worth, answers.sent)


def _cascade(trial: Trial, trained: Trained, splits: Splits) -> _Found:
    """Return what a cascade is worth, beside the edge alone and plain split, and what its crossings tell."""
    client, top, x, y = _parties(trial, trained, splits.test)
    held, held_y = splits.auxiliary.x.to(x.device), splits.auxiliary.y.to(x.device)
    own, kind = trial.own, RULES[trial.rule]
    head = exit_head(
        tuple(client.predict(x[:1]).shape[1:]), splits.test.num_classes, side=own["side"], seed=trial.training.seed
    )
    exit_ = train_exit(
        head, client, trained.victim_x.to(x.device), trained.victim_y, epochs=own["epochs"],
        batch_size=trial.training.batch_size, lr=trial.training.lr, seed=trial.training.seed,
    )  # fmt: skip
    held_exit, held_final = predict([client, exit_], held), predict(trained.chain, held)
    rule = calibrated(kind, held_exit, held_final, held_y, max_loss=own["max_loss"], delta=own["delta"] or None)
    each = partial(_measured, x, client, top, exit_=exit_, rule=rule, at_once=trial.at_once)
    (split, nbytes_split), (edge, _), (answers, nbytes) = each(mode="split"), each(mode="edge"), each(mode="cascade")
    z = client.predict(x[:1])
    accuracies = [accuracy(one.logits, y) for one in (answers, split, edge)]
    worth = {
        "accuracy": accuracies[0], "accuracy_split": accuracies[1], "accuracy_edge": accuracies[2],
        "accuracy_lost": accuracies[1] - accuracies[0], "share_left": answers.share("edge"),
        **_work(_operations(client, x[:1]), _operations(exit_, z), _operations(top, z), answers.sent),
        "sample_bytes": nbytes / len(x), "sample_bytes_of_split": nbytes_split / len(x),
    }  # fmt: skip
    leak = crossing_leakage(~rule(held_exit).cpu(), held_y.cpu(), answers.sent, y.cpu(), splits.test.num_classes)
    told = (
        f"a sample leaves at {trial.rule} {rule.threshold:.4g}"
        if math.isfinite(rule.threshold)
        else _all_or_none(answers)
    )
    notes = [
        "strength: accuracy that may be lost" + (f", but with probability {own['delta']:g}" if own["delta"] else ""),
        f"{told}, calibrated on {len(held)} held-out samples, of which {rule(held_exit).double().mean().item():.1%} "
        "leave; these crossed once for it",
        "operations are multiplications and additions of convolutions and linear layers; pooling is not counted",
    ]
    return _Found(worth, answers.sent, [leak], {SWEEP: _sweep(kind, edge.logits, split.logits, y)}, notes)


def _all_or_none(answers: Answers) -> str:
    return (
        "every sample leaves"
        if answers.share("edge")
        else "no sample leaves: too few held-out samples to tell, or too bad"
    )


def _parties(trial: Trial, trained: Trained, test: Dataset) -> tuple[Learner, Learner, Tensor, Tensor]:
    """Return the client, the server's own party, and the test set on their device."""
    client = trained.chain[0]
    assert isinstance(client, Learner)  # in vanilla
    device = trial.training.device
    return client, Learner("server", trained.model[1]), test.x.to(device), test.y.to(device)  # type: ignore[index]


def _measured(
    x: Tensor, client: Learner | None, server: Learner, *, at_once: int, mode: Any, exit_: Any = None, rule: Any = None
) -> tuple[Answers, int]:
    """Return the answers to x over a wire of their own, and the bytes of its frames."""
    line = wire(server, max_nbytes=0)
    answers = infer(x, client, line.party, exit=exit_, rule=rule, mode=mode, batch_size=at_once)
    return answers, line.meter.total_nbytes


def _operations(party: Predictor, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        party.predict(x)
    return counter.get_total_flops()


def _work(bottom: int, head: int, top: int, crossed: Tensor) -> dict[str, float]:
    """Return a sample's operations, on average: at the edge, in the cloud, and as shares of the whole model's."""
    edge, cloud, whole = bottom + head, top * crossed.double().mean().item(), bottom + top
    return {
        "edge_flops": float(edge), "cloud_flops": cloud, "edge_flops_share": edge / whole,
        "flops_share": (edge + cloud) / whole,
    }  # fmt: skip


def _sweep(kind: type[Threshold], early: Tensor, late: Tensor, y: Tensor) -> list[float]:
    """Return the cascade's accuracy where 0, 1, … 100 % of the samples leave, the surest first."""
    order = kind.sureness(early).argsort(descending=True)
    gains = ((early.argmax(1) == y).long() - (late.argmax(1) == y).long())[order].cumsum(0).tolist()
    right, num = int((late.argmax(1) == y).sum()), len(y)
    left = [round(num * percent / 100) for percent in range(101)]
    return [(right + (gains[count - 1] if count else 0)) / num for count in left]


def crossing_leakage(held: Tensor, held_y: Tensor, crossed: Tensor, y: Tensor, num_classes: int) -> Leakage:
    """Return what the mere sight of which samples cross tells of their labels.

    Whoever sees it guesses, of those that cross and of those that do not, the class that is most frequent among the
    held-out samples (``held`` says which of these cross); the baseline guesses the most frequent one of all. Beside it
    the mutual information of crossing and label on the test set, in nats, and what independent ones would seem to have:
    (C - 1) / 2N.
    """
    shape = (2, num_classes)
    counts = torch.bincount(held.long() * num_classes + held_y, minlength=2 * num_classes).view(shape)
    guess = (counts + counts.sum(0) / (len(held) + 1)).argmax(1)  # without any sample of a kind: of all
    blind = counts.sum(0).argmax()
    right, baseline = ((found == y).double().mean().item() for found in (guess[crossed.long()], blind))
    joint = torch.bincount(crossed.long() * num_classes + y, minlength=2 * num_classes).view(shape).double() / len(y)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    seen = joint > 0
    information = (joint[seen] * (joint[seen] / apart[seen]).log()).sum().item()
    return Leakage(
        attack="crossing", family="label", advantage=accuracy_advantage(right, baseline),
        metrics={"accuracy": right, "mutual_information": max(0.0, information)},
        baselines={"accuracy_majority": baseline, "mutual_information_independent": (num_classes - 1) / (2 * len(y))},
    )  # fmt: skip


def _attacked(trial: Trial, trained: Trained, splits: Splits, crossed: Tensor) -> Attacked:
    """Return what the attacks make of the activations of the first test samples that cross."""
    rows = crossed.nonzero().flatten()[: trial.targets]
    if not trial.attacks:
        return Attacked()
    if not len(rows):
        return Attacked(notes=["nothing crosses, so the attacks have nothing to read"])
    device = trial.training.device
    victim = replace(trained, victim_x=splits.test.x[rows].to(device), victim_y=splits.test.y[rows].to(device))
    done = attack_victim(trial.attacks, victim, splits, trial.training, targets=len(rows), releases=1)
    return replace(done, notes=[*done.notes, _targets(len(rows), crossed)])


def _targets(num: int, crossed: Tensor) -> str:
    return f"attacked: {num} of the {int(crossed.sum())} test samples that cross, of {len(crossed)} in all"


def _visible(rule: str) -> dict[str, list[str]]:
    crosses = "every sample" if rule == "none" else "each sample that does not leave at the edge, and which these are"
    return {
        "server": [
            "in training: the activation of every sample, the labels, the loss",
            f"at inference: the activation of {crosses}",
        ],
        "client": ["gradients at the cut", "the loss", "the answers"],
        "who sees the wire": ["which samples cross, and when"],
    }


EARLY_EXITS = Experiment(
    "early_exits",
    "How much can a device answer itself? Early exits × rules: accuracy, share that leaves, operations, bytes, leakage",
    Config,
    tasks,
)
