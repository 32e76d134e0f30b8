"""Does the client notice? Each detector against an honest server and against each attack in its place."""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from attacks import Infiltration, Insider
from defenses.detectors.detector import Detector
from experiments.experiment import Experiment, Options, reproduction
from experiments.ingredients import ATTACKS, DETECTORS
from experiments.names import find
from experiments.parts import Aim, Watched
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.scoring import aim_of, grants_of, scored, shown
from experiments.setups import counted
from experiments.tradeoff import check_auxiliary
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
from splitlearn.party import Learner
from splitlearn.protocols import vanilla
from splitlearn.remote import wire
from splitlearn.threat import Encoder, Grants, granted, observe
from splitlearn.train import Batches, epochs_of, evaluate, fit, predict

__all__ = ["DETECTED_AT", "DETECTION", "HONEST", "READY", "SUSPICION", "Config"]

HONEST = "honest"
SUSPICION, DETECTED_AT = "suspicion", "detected_at"  # traces: scores turned so that more is worse; batch, if ever
READY = "ready"  # 1 where the scores were as many as a verdict needs
INSIDE = tuple(name for name, one in ATTACKS.items() if one.steps)


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    detectors: tuple[str, ...] = field(
        default=tuple(DETECTORS), metadata={"help": f"what watches the server, of {', '.join(DETECTORS)}"}
    )
    servers: tuple[str, ...] = field(
        default=(HONEST, *(name for name in INSIDE if ATTACKS[name].active)),
        metadata={"help": f"who is in the server's place, of {', '.join((HONEST, *INSIDE))}"},
    )
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: the model's usual one"})
    epochs: int = field(default=10, metadata={"help": "epochs of training"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate of Adam"})
    targets: int = field(default=100, metadata={"help": "private samples that are rebuilt at the end"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})
    auxiliary: int = field(default=0, metadata={"help": "auxiliary samples; 0: the data set's usual number"})


@dataclass(frozen=True)
class Trial:
    """One training, watched by one detector."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    detector: str
    server: str
    targets: int

    def described(self, aim: Aim) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on, detector and attack included."""
        return {
            **described(self.data, self.sizes, self.training),
            "detector": {"name": self.detector, **DETECTORS[self.detector].described()},
            "server": {"name": self.server} | ({} if self.server == HONEST else ATTACKS[self.server].described(aim)),
            "targets": self.targets,
        }


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each detector, server and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.detectors:
        find("detector", name, DETECTORS)
    for name in config.servers:
        find("server", name, {HONEST: None, **{one: ATTACKS[one] for one in INSIDE}})
    for option in ("detectors", "servers"):
        if not getattr(config, option):
            raise ValueError(f"expected at least one of --{option}, got none: nothing to do; name one")
    sizes = sizes_of(options.data, private=config.private, auxiliary=config.auxiliary)
    for name in config.detectors:
        if sizes[0] < DETECTORS[name].least:
            raise ValueError(f"expected --private of {DETECTORS[name].least} or more for {name}, got {sizes[0]}")
    check_auxiliary([name for name in config.servers if name != HONEST], sizes[1])
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    if splits.private.kind == "tokens":
        raise ValueError(f"expected inputs that are numbers, got {options.data}, which holds tokens")
    if not 1 <= config.targets <= len(splits.private):
        raise ValueError(f"expected --targets between 1 and {len(splits.private)}, got {config.targets}")
    device = device_of(options.device)
    place = default_cut(splits) if config.cut == "default" else config.cut
    cut(build_model(splits, seed=0), place)
    base = Training(cut=place, epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, device=device)
    found = []
    for detector in config.detectors:
        for server in config.servers:
            for seed in options.seeds:
                trial = Trial(options.data, sizes, replace(base, seed=seed), detector, server, config.targets)
                alone = replace(config, detectors=(detector,), servers=(server,), cut=place)
                command = reproduction("detection", alone, data=options.data, device=device, seed=seed)
                labels = {
                    "seed": seed, "data": options.data, "protocol": "vanilla", "cut": place,
                    "protection": detector, "strength": server,
                }  # fmt: skip
                call = partial(run_trial, trial, options.data_dir)
                aim = aim_of(splits, seed, cut_at=place)
                found.append(Task("detection", trial.described(aim), command, labels, call))
    return found


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train with the detector watching; return its scores, when it spoke, and what the server rebuilds at the end."""
    warm_up()
    splits, training = load_splits(trial.data, data_dir, sizes=trial.sizes), trial.training
    bottom, top = cut(build_model(splits, seed=training.seed).to(training.device), training.cut)
    server = Learner("server", top, optimizer_for(top, training), seed=training.seed * 1000)
    client = Learner("client", bottom, optimizer_for(bottom, training), seed=training.seed * 1000 + 1)
    x, y = splits.private.x, splits.private.y
    guess = cut(build_model(splits, seed=training.seed + 1).to(training.device), training.cut)[1]
    detector = DETECTORS[trial.detector].build(Watched(client, guess, splits.private, training))
    insider = None if trial.server == HONEST else _insider(trial, server, splits)
    line = wire(server if insider is None else insider)
    batches = Batches(x, y, batch_size=training.batch_size, seed=training.seed)
    begun = time.perf_counter()
    losses = fit(epochs_of(partial(vanilla, detector, line.party), batches), epochs=training.epochs).losses
    seconds = {"train": time.perf_counter() - begun}
    utility = evaluate([client, line.party], splits.test.x, splits.test.y)
    leakage: list[Leakage] = []
    images: dict[str, Tensor] = {}
    if insider is not None:
        attack, targets = ATTACKS[trial.server], x[: trial.targets]
        line.record.clear()
        predict([client, line.party], targets)
        view = observe(line.record, threat=attack.threat, grants=Grants(Encoder(bottom)), device=training.device)
        leak, x_hat = scored(
            trial.server, {trial.server: insider(view)}, splits, targets, y[: trial.targets],
            labels_known=attack.threat.auxiliary_labels,
        )  # fmt: skip
        leakage.append(leak)
        images = shown(targets, trial.server, x_hat)
    caught = detector.detected_at
    return Outcome(
        utility=utility, leakage=leakage, seconds=seconds, images=images,
        nbytes=counted([line.meter]),
        visible={"client": ["gradients at the cut", "the loss that the server tells it"]},
        traces={
            "scores": detector.scores,
            SUSPICION: [score if detector.above else -score for score in detector.scores],
            DETECTED_AT: [] if caught is None else [float(caught)],
            READY: [float(detector.ready)],
        },
        notes=[
            f"{trial.detector} {_said(detector)} in {detector.batches} batches; the loss told to the client ended at "
            f"{losses[-1]:.4f}",
            "strength: who is in the server's place",
        ],
    )  # fmt: skip


def _said(detector: Detector) -> str:
    """Return when the detector spoke, or why it did not."""
    if detector.detected_at is not None:
        return f"spoke at batch {detector.detected_at}"
    if detector.ready:
        return "never spoke"
    return f"could not speak: {len(detector.scores)} scores are too few for {detector.policy},"


def _insider(trial: Trial, server: Learner, splits: Splits) -> Insider:
    """Return the first of the attack's family in this server's place."""
    attack, training = ATTACKS[trial.server], trial.training
    members = attack.build(aim_of(splits, training.seed, cut_at=training.cut))
    infiltration: Infiltration = next(iter(members.values()))
    return infiltration.insider(server, granted(attack.threat, grants_of(splits, training)))


DETECTION = Experiment(
    "detection",
    "Does the client notice that the server hijacks the training? Detectors against honest servers and attacks",
    Config,
    tasks,
)
