"""What a case study is: one realistic setting, unsplit and split, each protection an arm; what leaks, and at what cost.

A study says who holds what, how rows are dealt, and how an arm is trained and attacked; all else is here.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.experiment import Options, reproduction
from experiments.ingredients import ATTACKS, PROTECTIONS
from experiments.label_ingredients import LABEL_ATTACKS
from experiments.names import at_strengths, find, spec_of
from experiments.parts import Attack, LabelAim, LabelProtection, Protection, Shield
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.scoring import Attacked
from experiments.training import Trained, Training, build_model, device_of, places, warm_up
from splitlearn.cut import cut
from splitlearn.data import Dataset, Splits, load, split, standardise
from splitlearn.data.dataset import Modality
from splitlearn.frames import Kind
from splitlearn.leakage import score_labels
from splitlearn.threat import Grants, Threat, observe
from splitlearn.train import Batches, evaluate
from splitlearn.wire import Recorded

__all__ = ["READ_LABELS", "Config", "Study", "Trial", "check_guessed", "check_own", "dealt", "joined", "labels_guessed",
           "labels_read", "run_trial", "tasks"]  # fmt: skip

LEAST = 4  # samples in a batch, of which there is a distance correlation
OWN = 16  # samples of the attacker's own, without which nothing can be learned
READ_LABELS = "read_labels"
TRAINING = ("learn", "forward", "backward")  # verbs of a training step


@dataclass(frozen=True)
class Config:
    """Options of every case study; each has its own defaults."""

    protocols: tuple[str, ...] = field(default=("unsplit",), metadata={"help": "ways to train; each is an arm"})
    protections: tuple[str, ...] = field(
        default=("none",),
        metadata={"help": "NAME for all strengths, NAME:STRENGTH for one; what nothing crosses under has none"},
    )
    attacks: tuple[str, ...] = field(default=(), metadata={"help": "attacks on each arm, where they fit; '' for none"})
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: the model's usual one"})
    targets: int = field(default=100, metadata={"help": "private samples whose inputs are attacked"})
    private: int = field(default=2000, metadata={"help": "private samples, on which the model trains"})
    auxiliary: int = field(default=1000, metadata={"help": "samples of the attacker's own"})
    test: int = field(default=1000, metadata={"help": "test samples"})
    clients: int = field(default=1, metadata={"help": "clients, or institutions, among which private data is divided"})
    epochs: int = field(default=5, metadata={"help": "epochs, or rounds, of training"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate of Adam"})


@dataclass(frozen=True)
class Trial:
    """One arm under one seed: a training, and the attacks on it."""

    data: str
    sizes: tuple[int, int, int]  # private, auxiliary, test
    training: Training
    protection: str
    strength: str
    attacks: tuple[str, ...]
    targets: int


@dataclass(frozen=True)
class Study:
    """A setting. ``data`` are the sets that it is about, the usual one first; all mappings are by name.

    ``protocols`` says of each whether anything crosses that a protection can change; --clients is of those that are not
    ``alone``, and in those of ``drop_last`` a short last batch is left out. ``deal(dataset, sizes, seed)`` parts the
    rows. ``train(trial, splits)`` returns what was trained, and a function that attacks it. ``described(trial,
    splits)`` are the attacks' settings, ``check(trial, splits)`` raises for what cannot be, ``notes(trial, splits)``
    are what must be known to read the figures, ``epsilon(trial, splits)`` is what the arm's protection proves (δ = 0),
    None where nothing. ``beside(dataset, sizes, seed)`` are further test samples, by what the metrics on them are
    called after.
    """

    name: str
    data: tuple[str, ...]
    protocols: Mapping[str, bool]
    alone: tuple[str, ...]
    protections: Mapping[str, Protection | LabelProtection]
    attacks: Mapping[str, Any]
    deal: Callable[[Dataset, tuple[int, int, int], int], Splits]
    train: Callable[[Trial, Splits], tuple[Trained, Callable[[], Attacked]]]
    described: Callable[[Trial, Splits], dict[str, Any]]
    check: Callable[[Trial, Splits], None]
    notes: Callable[[Trial, Splits], list[str]]
    epsilon: Callable[[Trial, Splits], float | None] = lambda *_: None
    beside: Callable[[Dataset, tuple[int, int, int], int], dict[str, Dataset]] = lambda *_: {}
    drop_last: tuple[str, ...] = ()


def tasks(study: Study, config: Config, options: Options, call: Callable[[Trial, Path | None], Outcome]) -> list[Task]:
    """Return one task an arm and seed; every name and number is checked first, and that the data is there.

    ``call`` runs a trial: the study's own top-level function, which a worker process can take.
    """
    data = options.data
    if data not in study.data:
        raise LookupError(
            f"expected --data of {', '.join(study.data)}, which {study.name} is about, got {data!r}; leave it out for "
            f"{study.data[0]}"
        )
    for kind in ("protocols", "protections"):
        if not getattr(config, kind):
            raise ValueError(f"expected at least one of --{kind}, got none; leave the option out for the default")
    for protocol in config.protocols:
        find("protocol", protocol, study.protocols)
    for attack in config.attacks:
        find("attack", attack, study.attacks)
    protections = at_strengths("protection", config.protections, study.protections, _build)
    sizes = config.private, config.auxiliary, config.test
    if min(sizes) < 1:
        raise ValueError(f"expected --private, --auxiliary and --test of 1 or more, got {', '.join(map(str, sizes))}")
    if config.batch_size < 1:
        raise ValueError(f"expected --batch-size of 1 or more, got {config.batch_size}")
    if any(name == "nopeek" for name, _ in protections):
        _check_batches(study, config)
    device = device_of(options.device)
    dataset = load(data, data_dir=options.data_dir)
    found = []
    for seed in options.seeds:
        splits = study.deal(dataset, sizes, seed)
        (place,) = places((config.cut,), splits)
        for protocol in config.protocols:
            training = Training(
                protocol=protocol, cut=place, epochs=config.epochs, batch_size=config.batch_size, lr=config.lr,
                clients=1 if protocol in study.alone else config.clients, seed=seed, device=device,
            )  # fmt: skip
            for protection, strength in protections if study.protocols[protocol] else [("none", "")]:
                trial = Trial(data, sizes, training, protection, strength, config.attacks, config.targets)
                study.check(trial, splits)
                alone = replace(config, protocols=(protocol,), protections=(spec_of(protection, strength),), cut=place)
                command = reproduction(study.name, alone, data=data, device=device, seed=seed)
                labels = {
                    "seed": seed, "data": data, "protocol": protocol, "cut": place, "protection": protection,
                    "strength": strength,
                }  # fmt: skip
                whole = _described(study, trial, splits)
                found.append(Task(study.name, whole, command, labels, partial(call, trial, options.data_dir)))
    return found


def run_trial(study: Study, trial: Trial, data_dir: Path | None) -> Outcome:
    """Train one arm, evaluate and attack it, and return what came of it."""
    warm_up()
    seconds: dict[str, float] = {}
    begun = time.perf_counter()
    dataset = load(trial.data, data_dir=data_dir)
    splits = study.deal(dataset, trial.sizes, trial.training.seed)
    seconds["data"] = time.perf_counter() - begun
    begun = time.perf_counter()
    trained, attack = study.train(trial, splits)
    seconds["train"] = time.perf_counter() - begun
    begun = time.perf_counter()
    utility = evaluate(trained.chain, splits.test.x, splits.test.y)
    for name, part in study.beside(dataset, trial.sizes, trial.training.seed).items():
        utility |= {f"{metric}_{name}": value for metric, value in evaluate(trained.chain, part.x, part.y).items()}
    seconds["evaluate"] = time.perf_counter() - begun
    attacked = attack()
    notes = [f"loss of the last epoch: {trained.losses[-1]:.4f}", *_commonest(splits), *study.notes(trial, splits)]
    if unit := study.protections[trial.protection].unit:
        notes.append(f"strength: {unit}")
    if not attacked.leakage and trial.attacks:
        notes.append("nothing crosses here that these attacks could read")
    epsilon = study.epsilon(trial, splits)
    return Outcome(
        epsilon=epsilon, delta=None if epsilon is None else 0.0, utility=utility, leakage=attacked.leakage,
        nbytes=trained.nbytes, seconds=seconds | attacked.seconds,
        visible=trained.visible | attacked.visible, notes=[*notes, *attacked.notes], images=attacked.images,
    )  # fmt: skip


def dealt(dataset: Dataset, sizes: tuple[int, int, int], seed: int) -> Splits:
    """Return the parts of a data set without groups: the same rows under every seed; tables are standardised."""
    private, auxiliary, test = sizes
    splits = split(dataset, private=private, auxiliary=auxiliary, test=test)
    return standardise(splits) if dataset.kind == "table" else splits


def plain_protections(kind: Modality) -> dict[str, Protection]:
    """Return the protections of activations for inputs of this kind that bring no layers of their own."""
    fits = {name: one for name, one in PROTECTIONS.items() if kind in one.inputs}
    return {name: one for name, one in fits.items() if one.build(one.strengths[0]).layers is None}


def later_attacks(kind: Modality) -> dict[str, Attack]:
    """Return the attacks on activations of such inputs that come after the training, and need no top of logits."""
    fits = {name: one for name, one in ATTACKS.items() if kind in one.inputs}
    return {name: one for name, one in fits.items() if not (one.steps or one.needs_top)}


def joined(*parts: Attacked) -> Attacked:
    """Return what several attacks got as one."""
    whole = Attacked()
    for part in parts:
        whole.leakage.extend(part.leakage)
        whole.notes.extend(part.notes)
        whole.seconds.update(part.seconds)
        whole.visible.update(part.visible)
        whole.images.update(part.images)
    return whole


def labels_read(record: Recorded, y: Tensor, training: Training, *, classes: int, drop_last: bool = False) -> Attacked:
    """Return what the server reads of the victim's labels ``y`` where they are sent: in its last epoch, off the wire.

    Nothing where no label crossed. The order of the samples is that of the victim's ``Batches``, which may
    ``drop_last``.
    """
    begun = time.perf_counter()
    orders = _orders(len(y), training, drop_last=drop_last)
    view = observe(record, threat=Threat())
    sent = view.tensors(Kind.LABEL, verb="learn")[-len(orders[-1]) :]
    if not sent:
        return Attacked()
    truth = y.cpu()[torch.cat(orders[-1])]
    score = score_labels(torch.cat(sent).cpu(), truth, num_classes=classes)
    leak = Leakage(
        attack=READ_LABELS, family="label", advantage=score.advantage, metrics=score.metrics,
        baselines=score.baselines, details={"best": READ_LABELS, "evidence": {READ_LABELS: {}}},
    )  # fmt: skip
    return Attacked([leak], {f"attack_{READ_LABELS}": time.perf_counter() - begun},
                    {f"attacker ({READ_LABELS})": Threat().in_words()})  # fmt: skip


def labels_guessed(
    names: Sequence[str], seat: str, record: Recorded, y: Tensor, training: Training, auxiliary_y: Tensor,
    *, classes: int, hints: int = 1,
) -> Attacked:  # fmt: skip
    """Return what attacks on labels make of the gradients that one party without labels saw.

    They read the last epoch; one that remembers, all. ``y`` are the labels of the samples in ``record``, by number,
    ``hints`` of each class known; ``seat`` is client or server, as in ``label_leakage``.
    """
    orders = _orders(len(y), training)
    whole = list(record.exchanges)
    if record.dropped:
        raise LookupError(f"expected the whole transcript, {record.dropped} exchanges were dropped; train on less")
    epochs = _by_epoch([one for one in whole if one.request.verb in TRAINING], len(orders))
    shares = torch.bincount(auxiliary_y, minlength=classes).double().clamp(min=1)
    public = tuple((shares / shares.sum()).tolist())
    y = y.cpu()
    found = Attacked()
    try:
        for name in names:
            begun = time.perf_counter()
            attack = LABEL_ATTACKS[name]
            threat = attack.threat(seat, hints)
            built = attack.build(LabelAim(classes, hints, training.seed, shares=public if attack.shares else ()))
            memory = None
            for number, (exchanges, rows) in enumerate(zip(epochs, orders, strict=True)):
                last = number == len(orders) - 1
                if not (last or attack.remembers):
                    continue
                record.clear(keep=exchanges)
                truth = y[torch.cat(rows)]
                view = observe(record, threat=threat, grants=Grants(y=truth.to(training.device)),
                               device=training.device)  # fmt: skip
                if not last:
                    memory = built.remembered(view, memory)
            guess = built(view, memory) if attack.remembers else built(view)
            score = score_labels(
                None if guess.labels is None else guess.labels.cpu(), truth, num_classes=classes, scores=guess.scores,
                sizes=[len(one) for one in orders[-1]], named=guess.named,
                known=view.hints[0] if view.threat.hints else None,
            )  # fmt: skip
            found.leakage.append(
                Leakage(
                    attack=name, family="label", advantage=score.advantage, metrics=score.metrics,
                    baselines=dict(score.baselines),
                    details={"epoch": len(orders), "best": name, "evidence": {name: dict(guess.evidence)}},
                )
            )  # fmt: skip
            told = threat.in_words()
            if attack.remembers:
                told = [line for line in told if not line.startswith("one release")]
                told.append("what crossed in all epochs before, and of which sample")
            found.visible[f"attacker ({name})"] = told
            found.seconds[f"attack_{name}"] = time.perf_counter() - begun
    finally:
        record.clear(keep=whole)
    return found


def check_own(names: Sequence[str], splits: Splits) -> None:
    """Refuse too few samples of the attacker's own for one of these attacks, which all learn from them."""
    if names and len(splits.auxiliary) < OWN:
        raise ValueError(
            f"expected --auxiliary of {OWN} or more for {names[0]}, got {len(splits.auxiliary)}; ask for more"
        )


def check_guessed(names: Sequence[str], y: Tensor, training: Training) -> None:
    """Refuse labels [N] on which one of these attacks could not be scored: no batch has both, the known ones apart."""
    rows = _orders(len(y), training)[-1]
    sent = y.cpu()[torch.cat(rows)]
    for name in names:
        counted, hints = torch.ones(len(sent), dtype=torch.bool), LABEL_ATTACKS[name].hinted
        for label in sent.unique():
            counted[(sent == label).nonzero()[:hints, 0]] = False
        sizes = [len(one) for one in rows]
        batches = zip(sent.split(sizes), counted.split(sizes), strict=True)
        if not any(len(labels[some].unique()) > 1 for labels, some in batches):
            raise ValueError(
                f"expected a batch with both labels for {name}, beside {hints} of each that it knows, got "
                f"{torch.bincount(sent, minlength=2).tolist()} private samples of 0 and 1 in batches of "
                f"{training.batch_size}; raise --private or --batch-size"
            )


def _check_batches(study: Study, config: Config) -> None:
    """Refuse batches of which there is no distance correlation, in the protocols that a protection can change."""
    for protocol in config.protocols:
        short = 0 if protocol in study.drop_last else config.private % config.batch_size
        least = short or config.batch_size
        if study.protocols[protocol] and least < LEAST:
            raise ValueError(
                f"expected batches of {LEAST} samples or more for nopeek under {protocol}, the last one too, got "
                f"{least}; change --batch-size or --private"
            )


def _orders(count: int, training: Training, *, drop_last: bool = False) -> list[list[Tensor]]:
    """Return the rows of each batch of each epoch, as ``Batches`` of this seed yields them."""
    ids = torch.arange(count)
    batches = Batches(ids, ids, batch_size=training.batch_size, seed=training.seed, drop_last=drop_last)
    return [[rows for rows, _ in batches] for _ in range(training.epochs)]


def _by_epoch(exchanges: Sequence[Any], epochs: int) -> list[list[Any]]:
    each, left = divmod(len(exchanges), epochs)
    assert each, "a training without exchanges"
    assert not left, "every epoch has as many steps"
    return [list(exchanges[each * number : each * (number + 1)]) for number in range(epochs)]


def _build(protection: Protection | LabelProtection, strength: str) -> None:
    if isinstance(protection, Protection):
        protection.build(strength)
    else:
        protection.build(strength, 2, 0)


def _described(study: Study, trial: Trial, splits: Splits) -> dict[str, Any]:
    """Return the full configuration: every setting that the result depends on."""
    private, auxiliary, test = trial.sizes
    entry = study.protections[trial.protection]
    built = entry.build(trial.strength) if isinstance(entry, Protection) else entry.build(trial.strength, 2, 0)
    told = {"name": trial.protection, "strength": trial.strength, "guard": repr(built.guard)}
    if isinstance(built, Shield):
        told |= {"codec": built.codec.name} if built.codec else {}
    else:
        told |= {"settings": built.settings}
    cut(build_model(splits, seed=0), trial.training.cut)
    return {
        "data": trial.data,
        "sizes": {"private": private, "auxiliary": auxiliary, "test": test, "targets": trial.targets},
        **trial.training.described(),
        "protection": told,
        "attacks": study.described(trial, splits),
    }


def _commonest(splits: Splits) -> list[str]:
    """Return how right a guess of the commonest class is on the test samples, in words."""
    counts = torch.bincount(splits.test.y)
    return [f"always the commonest class is right for {counts.max().item() / len(splits.test):.3f} of the test samples"]
