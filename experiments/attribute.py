"""What else do activations tell? An attribute that is no label, inferred from what crosses, at each cut and protection.

Where the data set has patients or persons (and the label is not the person), the attribute is whose a sample is. In a
table it is a column, taken out of the inputs; a number is split at its median. Else the labels are parted: the task is
whether a label is odd, the attribute whether it is in the upper half.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks import AttributeInference, Inference
from experiments.experiment import Experiment, Options, reproduction
from experiments.ingredients import PROTECTIONS, PROTOCOLS
from experiments.names import find, spec_of
from experiments.parts import Shield
from experiments.protected import described_protection, protections_for
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.training import (
    Training,
    described,
    device_of,
    load_splits,
    places,
    sizes_of,
    warm_up,
)
from splitlearn.data import DATASETS, Dataset, Splits
from splitlearn.metrics import accuracy, accuracy_advantage
from splitlearn.threat import Grants, Threat, observe
from splitlearn.train import evaluate, predict

__all__ = ["ATTRIBUTE", "Config", "attribute_splits", "guess_by_label"]

HALF, GROUP = "half", "group"
THREAT = Threat(queries=True, auxiliary=True, auxiliary_labels=True)
KNOWS = "of its own samples, the attribute in place of the label"


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    attribute: str = field(
        default="auto",
        metadata={
            "help": "group: patient or person; half: upper half of labels; a table's column; auto: what there is"
        },
    )
    cuts: tuple[str, ...] = field(
        default=("default",),
        metadata={"help": "last layer below the cut, by name; default: the model's usual one; depths: one to three"},
    )
    protections: tuple[str, ...] = field(
        default=("none", "gaussian_noise", "nopeek"),
        metadata={"help": f"of {', '.join(PROTECTIONS)}; NAME for all strengths, NAME:STRENGTH for one"},
    )
    targets: int = field(default=400, metadata={"help": "private samples whose attribute is guessed, at most"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})
    auxiliary: int = field(default=0, metadata={"help": "samples of the attacker; 0: the data set's usual number"})
    epochs: int = field(default=15, metadata={"help": "epochs of training"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate of Adam"})


@dataclass(frozen=True)
class Trial:
    """One training, and the attack on what crosses."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    protection: str
    strength: str
    attribute: str
    targets: int

    def shield(self) -> Shield:
        """Return the client's protection."""
        return PROTECTIONS[self.protection].build(self.strength)

    def described(self, classes: int) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        setting = described(self.data, self.sizes, self.training)
        return {
            **setting,
            "sizes": {**setting["sizes"], "targets": self.targets},
            "protection": described_protection(self.protection, self.strength),
            "attribute": self.attribute,
            "attack": repr(AttributeInference(classes)),
        }


@dataclass(frozen=True)
class Known:
    """An attribute: the splits of the task without it, its values 0 to ``classes`` − 1 beside each part's samples."""

    splits: Splits
    private: Tensor
    auxiliary: Tensor
    classes: int


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each cut, protection, strength and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    sizes = sizes_of(options.data, private=config.private, auxiliary=config.auxiliary)
    raw = load_splits(options.data, options.data_dir, sizes=sizes)
    name = usual_attribute(raw.private) if config.attribute == "auto" else config.attribute
    known = attribute_splits(raw, name)
    if config.targets < 1:
        raise ValueError(f"expected --targets of 1 or more, got {config.targets}")
    protections = protections_for(config.protections, known.splits.private)
    device = device_of(options.device)
    base = Training(epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, device=device)
    found = []
    for place in places(config.cuts, known.splits):
        for protection, strength in protections:
            for seed in options.seeds:
                training = replace(base, cut=place, seed=seed)
                trial = Trial(options.data, sizes, training, protection, strength, name, config.targets)
                spec = spec_of(protection, strength)
                alone = replace(config, attribute=name, cuts=(place,), protections=(spec,))
                command = reproduction("attribute", alone, data=options.data, device=device, seed=seed)
                labels = {
                    "seed": seed, "data": options.data, "protocol": "vanilla", "cut": place, "protection": protection,
                    "strength": strength,
                }  # fmt: skip
                call = partial(run_trial, trial, options.data_dir)
                found.append(Task("attribute", trial.described(known.classes), command, labels, call))
    return found


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train for the task, let the client send private samples, and infer the attribute of these."""
    warm_up()
    known = attribute_splits(load_splits(trial.data, data_dir, sizes=trial.sizes), trial.attribute)
    splits, training = known.splits, trial.training
    begun = time.perf_counter()
    trained = PROTOCOLS["vanilla"].train(training, splits, trial.shield())
    seconds = {"train": time.perf_counter() - begun}
    utility = evaluate(trained.chain, splits.test.x, splits.test.y)
    trained.record.clear()
    predict(trained.chain, splits.private.x[: trial.targets])
    grants = Grants(trained.encoder, splits.auxiliary.x.to(training.device), known.auxiliary.to(training.device))
    view = observe(trained.record, threat=THREAT, grants=grants, device=training.device)
    begun = time.perf_counter()
    inferred = AttributeInference(known.classes, seed=training.seed)(view)
    seconds["attack_attribute"] = time.perf_counter() - begun
    leak = _scored(inferred, known, trial)
    return Outcome(
        utility=utility, leakage=[leak], nbytes=trained.nbytes, seconds=seconds,
        visible=trained.visible | {"attacker (attribute)": [*THREAT.in_words(), KNOWS]},
        notes=[
            f"attribute: {trial.attribute}, {known.classes} values; loss of the last epoch: {trained.losses[-1]:.4f}",
            *([f"strength: {unit}"] if (unit := PROTECTIONS[trial.protection].unit) else []),
        ],
    )  # fmt: skip


def usual_attribute(private: Dataset) -> str:
    """Return the attribute to ask for where none is named."""
    if private.kind == "table":
        columns = list(dict.fromkeys(name.partition("=")[0] for name in private.names or ()))
        usual = [name for name in columns if name.lower() == "sex"] or columns
        return usual[0] if usual else HALF
    told_apart = private.groups is not None and not _decides(private.y, private.groups)
    return GROUP if told_apart else HALF


def attribute_splits(splits: Splits, name: str) -> Known:
    """Return the task and its attribute; ``LookupError`` where there is none of this name."""
    known = (_group if name == GROUP else _half if name == HALF else partial(_column, name=name))(splits)
    if known.classes < 2 or _decides(known.splits.private.y, known.private):
        raise ValueError(
            f"expected an attribute that the label does not tell, got {name} of {splits.private.name}; take another "
            "--attribute"
        )
    return known


def guess_by_label(y: Tensor, own_y: Tensor, attribute: Tensor, classes: int) -> Tensor:
    """Return the commonest attribute of own samples [M] of the same label, [N]: the best guess by the label alone."""
    labels = int(max(y.max(), own_y.max())) + 1
    counts = torch.zeros(labels, classes, dtype=torch.int64)
    counts.index_put_((own_y, attribute), torch.ones_like(attribute), accumulate=True)
    counts[counts.sum(1) == 0] = counts.sum(0)  # a label that it has never seen
    return counts.argmax(1)[y]


def _scored(inferred: Inference, known: Known, trial: Trial) -> Leakage:
    truth, y = known.private[: trial.targets], known.splits.private.y[: trial.targets]
    got = accuracy(inferred.scores.cpu(), truth)
    commonest = known.auxiliary.bincount(minlength=known.classes).argmax()
    by_label = guess_by_label(y, known.splits.auxiliary.y, known.auxiliary, known.classes)
    baselines = {
        "accuracy_majority": (truth == commonest).double().mean().item(),
        "accuracy_by_label": (truth == by_label).double().mean().item(),
    }
    return Leakage(
        attack="attribute", family="property", advantage=accuracy_advantage(got, max(baselines.values())),
        metrics={"accuracy": got}, baselines=baselines,
        details={
            "attribute": trial.attribute, "values": known.classes, "best": "attribute",
            "evidence": {"attribute": dict(inferred.evidence)},
        },
    )  # fmt: skip


def _group(splits: Splits) -> Known:
    """Return whose each sample is; those of whom the attacker has no sample have a value that it never guesses."""
    groups = splits.private.groups, splits.auxiliary.groups
    if groups[0] is None or groups[1] is None:
        raise LookupError(
            f"expected a data set of patients or persons, got {splits.private.name}; use --attribute half"
        )
    values = torch.cat([groups[0], groups[1]]).unique()
    mine, own = (torch.searchsorted(values, group) for group in (groups[0], groups[1]))
    return Known(splits, mine, own, len(values))


def _half(splits: Splits) -> Known:
    """Return the task of odd labels, and whether a label is in the upper half."""
    classes = splits.private.num_classes
    if classes < 4:
        raise ValueError(
            f"expected 4 classes or more to part into task and attribute, got {classes}; use --attribute with a column"
        )
    upper = [(part.y >= classes // 2).long() for part in (splits.private, splits.auxiliary)]
    return Known(_each(splits, lambda part: replace(part, y=part.y % 2, num_classes=2)), upper[0], upper[1], 2)


def _column(splits: Splits, *, name: str) -> Known:
    """Return the table without a column, and the values of that: of a category, or above the attacker's median."""
    names = splits.private.names or ()
    if splits.private.kind != "table":
        raise LookupError(
            f"expected {GROUP} or {HALF} as attribute of {splits.private.kind}, got {name}; columns are for tables"
        )
    places = [place for place, one in enumerate(names) if one == name or one.startswith(f"{name}=")]
    find("column", name, dict.fromkeys(one.partition("=")[0] for one in names))
    kept = [place for place in range(len(names)) if place not in places]
    parts = splits.private.x[:, places], splits.auxiliary.x[:, places]
    if len(places) == 1:
        middle = parts[1].median()
        mine, own = ((part[:, 0] > middle).long() for part in parts)
    else:
        mine, own = (part.argmax(1) for part in parts)
    rest = tuple(names[place] for place in kept)
    return Known(
        _each(splits, lambda part: replace(part, x=part.x[:, kept], names=rest)), mine, own, max(2, len(places))
    )


def _each(splits: Splits, change: Callable[[Dataset], Dataset]) -> Splits:
    return Splits(change(splits.private), change(splits.auxiliary), change(splits.test))


def _decides(y: Tensor, attribute: Tensor) -> bool:
    """Return whether all samples of one label have one attribute."""
    return all(len(attribute[y == label].unique()) == 1 for label in y.unique().tolist())


ATTRIBUTE = Experiment(
    "attribute",
    "What else do activations tell? An attribute that is no label, by cut and protection, beside what the label tells",
    Config,
    tasks,
)
