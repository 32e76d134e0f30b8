"""One cut, every kind of protection, every kind of leak: utility, leakage, seconds, bytes, ε and who sees what."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attacks import LossThreshold
from experiments.encrypted import Setup, encrypted_cut
from experiments.experiment import Experiment, Options, reproduction
from experiments.grid_rows import QUERIES, ROWS, Row, Seen
from experiments.ingredients import ATTACKS
from experiments.names import at_strengths, find, spec_of
from experiments.parts import Aim, number
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.scoring import aim_of, attack_victim
from experiments.training import (
    BY_SGD,
    Training,
    build_model,
    check_numbers,
    described,
    load_splits,
    sizes_of,
    warm_up,
)
from splitlearn.data import DATASETS, Splits
from splitlearn.frames import Kind
from splitlearn.leakage import score_membership
from splitlearn.party import Learner
from splitlearn.remote import wire
from splitlearn.threat import Threat, observe
from splitlearn.train import Predictor, evaluate, predict

__all__ = ["PROTECTION_GRID", "Config"]

ASKED = 128  # predictions at once


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    rows: tuple[str, ...] = field(
        default=tuple(ROWS), metadata={"help": f"of {', '.join(ROWS)}; NAME for all its strengths, NAME:STRENGTH"}
    )
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: below the last weights"})
    targets: int = field(default=100, metadata={"help": "private samples whose inputs are attacked"})
    epochs: int = field(default=10, metadata={"help": "epochs of training"})
    batch_size: int = field(default=64, metadata={"help": "samples in a batch"})
    lr: float = field(default=2e-3, metadata={"help": "learning rate of Adam"})
    sgd_lr: float = field(default=0.05, metadata={"help": "learning rate of SGD with momentum, on shares"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})


@dataclass(frozen=True)
class Trial:
    """One row at one strength."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    row: str
    strength: str
    targets: int

    def described(self, aim: Aim) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        row = ROWS[self.row]
        return {
            **described(self.data, self.sizes, self.training),
            "row": {"name": self.row, **row.described}, "strength": self.strength, "targets": self.targets,
            "attacks": {name: ATTACKS[name].described(aim) for name in row.attacks},
        }  # fmt: skip


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each row, strength and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    chosen = at_strengths("row", config.rows, ROWS, _check_strength)
    if not chosen:
        raise ValueError(f"expected at least one row among {', '.join(ROWS)}, got none")
    sizes = sizes_of(options.data, private=config.private)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    check_numbers(splits, options.data)
    if not 1 <= config.targets <= len(splits.private):
        raise ValueError(f"expected --targets between 1 and {len(splits.private)}, got {config.targets}")
    place = encrypted_cut(build_model(splits, seed=0)) if config.cut == "default" else config.cut
    # On the CPU: ciphertexts and shares are, and seconds are to be compared.
    base = Training(cut=place, epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, device="cpu")
    _, _, head = Setup(splits, base).parts()  # an impossible cut is told of now
    if list(head.parameters()):
        raise ValueError(
            f"expected a cut below the last layer with weights, of whose gradient labels are read, got {place}; "
            f"use --cut {encrypted_cut(build_model(splits, seed=0))}"
        )
    found = []
    for name, strength in chosen:
        own = replace(base, optimizer="sgd", lr=config.sgd_lr) if name in BY_SGD else base
        for seed in options.seeds:
            training = replace(own, protocol=name, seed=seed)
            trial = Trial(options.data, sizes, training, name, strength, config.targets)
            alone = replace(config, rows=(spec_of(name, strength),), cut=place)
            command = reproduction("protection_grid", alone, data=options.data, device="cpu", seed=seed)
            labels = {
                # No protocol: what is compared is ways to protect, each under the protocol that it needs.
                "seed": seed, "data": options.data, "protocol": "", "cut": place, "protection": name,
                "strength": strength,
            }  # fmt: skip
            call = partial(run_trial, trial, options.data_dir)
            found.append(Task("protection_grid", trial.described(aim_of(splits, seed)), command, labels, call))
    return found


def _check_strength(row: Row, strength: str) -> None:
    if strength and number(strength, "a strength") <= 0:
        raise ValueError(f"expected a strength above 0, got {strength}: {row.summary}")


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train the row, attack inputs, labels and membership as its server and its users can, and return it all."""
    warm_up()
    splits, training = load_splits(trial.data, data_dir, sizes=trial.sizes), trial.training
    with ROWS[trial.row].run(training, splits, trial.strength) as reached:
        begun = time.perf_counter()
        utility = evaluate(reached.chain, splits.test.x, splits.test.y)
        seconds = {"epoch": reached.epoch, "test": time.perf_counter() - begun}
        queries = min(QUERIES, len(splits.auxiliary)) if ROWS[trial.row].sealed else len(splits.auxiliary)
        own = splits.auxiliary.subset(torch.arange(queries))
        attacks = attack_victim(
            ROWS[trial.row].attacks, reached.seen, replace(splits, auxiliary=own), training, targets=trial.targets,
            releases=reached.releases,
        )  # fmt: skip
        leakage = [*attacks.leakage, reached.labels, _membership(reached.chain, splits)]
    claim = reached.claims[0] if reached.claims else None
    return Outcome(
        utility=utility, leakage=leakage, nbytes=reached.seen.nbytes, seconds=seconds | attacks.seconds,
        visible=reached.seen.visible | attacks.visible, images=attacks.images,
        epsilon=None if claim is None else claim.epsilon, delta=None if claim is None else claim.delta,
        accounts=[str(one) for one in reached.claims],
        notes=[f"loss of the last epoch: {reached.seen.losses[-1]:.4f}", *reached.notes, *attacks.notes],
    )  # fmt: skip


def _membership(chain: Sequence[Predictor], splits: Splits) -> Leakage:
    """Return what users of the model learn of who was trained on: the private samples, against those of the test."""
    private, test = splits.private, splits.test
    line = wire(Learner("model", Seen(lambda x: predict(chain, x, batch_size=ASKED))))
    predict([line.party], torch.cat([private.x, test.x]), batch_size=ASKED)
    view = observe(line.record, threat=Threat("users of the model", frozenset({Kind.PREDICTION}), queries=True))
    scores = LossThreshold(torch.cat([private.y, test.y]))(view)
    score = score_membership(scores[: len(private)], scores[len(private) :])
    return Leakage(
        attack="loss_threshold", family="membership", advantage=score.advantage, metrics=score.metrics,
        baselines=score.baselines,
    )  # fmt: skip


PROTECTION_GRID = Experiment(
    "protection_grid",
    "Every kind of protection at one cut, against attacks on inputs, labels and membership: the whole picture",
    Config,
    tasks,
)
