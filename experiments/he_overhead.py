"""What encryption on the cut costs in accuracy, seconds and bytes an epoch, each protocol and preset; and its leaks."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import inf, isinf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks import DirectLabels
from experiments.encrypted import WAYS, Ready, Setup, check_linear_last, encrypted_cut
from experiments.experiment import Experiment, Options, reproduction
from experiments.names import find
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.setups import counted
from experiments.timing import timed_epochs
from experiments.training import (
    Training,
    build_model,
    check_numbers,
    described,
    device_of,
    load_splits,
    sizes_of,
    warm_up,
)
from privacy.he import PRESETS, Parameters
from splitlearn.data import DATASETS, Splits
from splitlearn.metrics import accuracy_advantage
from splitlearn.threat import Threat, View, observe
from splitlearn.train import evaluate

__all__ = ["HE_OVERHEAD", "Config", "labels_read"]

ATTACKED = 4  # batches that the label attack reads
TRANSCRIPT = 1 << 32  # bytes that are kept of them


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    ways: tuple[str, ...] = field(default=tuple(WAYS), metadata={"help": f"ways to train, of {', '.join(WAYS)}"})
    presets: tuple[str, ...] = field(
        default=("fast", "precise"), metadata={"help": f"parameter sets, of {', '.join(PRESETS)}"}
    )
    epsilons: tuple[float, ...] = field(
        default=(0.5, 2.0, 8.0),
        metadata={"help": "ε of the noised ways (at the first preset), beside noise switched off"},
    )
    delta: float = field(default=1e-5, metadata={"help": "δ of every claim"})
    clip: float = field(default=1.0, metadata={"help": "norm that all of a sample's gradients are cut to, together"})
    dp_lr: float = field(default=0.5, metadata={"help": "learning rate of plain SGD where noise is added"})
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: below the last weights"})
    epochs: int = field(default=10, metadata={"help": "epochs of training"})
    batch_size: int = field(default=64, metadata={"help": "samples in a batch; expected samples where drawn by chance"})
    optimizer: str = field(default="adam", metadata={"help": "adam, or sgd with momentum 0.9"})
    lr: float = field(default=2e-3, metadata={"help": "learning rate"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})


@dataclass(frozen=True)
class Trial:
    """One way, at one preset and ε where it has them."""

    data: str
    sizes: tuple[int, int, int]  # private, auxiliary, test
    way: str
    preset: str  # "" where nothing is encrypted
    epsilon: float  # infinite without noise
    training: Training
    config: Config

    @property
    def parameters(self) -> Parameters | None:
        """The parameter set, or None where nothing is encrypted."""
        return PRESETS[self.preset]() if self.preset else None

    @property
    def strength(self) -> str:
        """Preset and ε, as far as there are any."""
        noise = f"ε {self.epsilon:g}" if not isinf(self.epsilon) else "noise off" if WAYS[self.way].noised else ""
        return ", ".join(part for part in (self.preset, noise) if part)

    def described(self) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        parameters = self.parameters
        return {
            **described(self.data, self.sizes, self.training),
            "way": self.way,
            "parameters": None if parameters is None else asdict(parameters),
            "epsilon": "none" if isinf(self.epsilon) else self.epsilon,
            **(
                {name: getattr(self.config, name) for name in ("delta", "clip", "dp_lr")}
                if not isinf(self.epsilon)
                else {}
            ),
        }


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each way, preset, ε and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.ways:
        find("way", name, WAYS)
    for name in config.presets:
        find("preset", name, PRESETS)
    if not config.ways:
        raise ValueError(f"expected at least one way among {', '.join(WAYS)}, got none")
    if not 0 < config.delta < 1:
        raise ValueError(f"expected --delta above 0 and below 1, got {config.delta}")
    if not config.presets:
        raise ValueError(f"expected at least one preset among {', '.join(PRESETS)}, got none")
    if not all(0 < one < inf for one in config.epsilons):
        raise ValueError(f"expected --epsilons above 0, got {','.join(map(str, config.epsilons))}")
    for name in ("clip", "dp_lr"):
        if not 0 < getattr(config, name) < inf:
            option = name.replace("_", "-")
            raise ValueError(f"expected --{option} above 0, got {getattr(config, name)}")
    sizes = sizes_of(options.data, private=config.private)
    device = device_of(options.device)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    check_numbers(splits, options.data)
    place = encrypted_cut(build_model(splits, seed=0)) if config.cut == "default" else config.cut
    base = Training(
        cut=place, epochs=config.epochs, batch_size=config.batch_size, optimizer=config.optimizer, lr=config.lr,
        device=device,
    )  # fmt: skip
    Setup(splits, base).parts()  # an impossible cut is told of now
    if "split_ways" in config.ways:
        check_linear_last(Setup(splits, base))
    found = []
    for way, preset, epsilon in _rows(config):
        for seed in options.seeds:
            trial = Trial(options.data, sizes, way, preset, epsilon, replace(base, protocol=way, seed=seed), config)
            alone = replace(
                config, ways=(way,), cut=place, presets=(preset,) if preset else config.presets,
                epsilons=() if isinf(epsilon) else (epsilon,),
            )  # fmt: skip
            command = reproduction("he_overhead", alone, data=options.data, device=device, seed=seed)
            labels = {
                # No protocol: what is compared is ways to train, each a protocol of its own.
                "seed": seed, "data": options.data, "protocol": "", "cut": place,
                "protection": way, "strength": trial.strength,
            }  # fmt: skip
            found.append(
                Task("he_overhead", trial.described(), command, labels, partial(run_trial, trial, options.data_dir))
            )
    return found


def _rows(config: Config) -> list[tuple[str, str, float]]:
    """Return way, preset and ε of each configuration."""
    found = []
    for name in config.ways:
        way = WAYS[name]
        presets = config.presets if way.encrypted else ("",)
        found += [(name, preset, inf) for preset in presets if way.encrypted or not way.noised]
        found += [(name, presets[0], epsilon) for epsilon in config.epsilons] if way.noised else []
    return found


def run_trial(trial: Trial, data_dir: Path | None) -> Outcome:
    """Train that way, and return accuracy, bytes and seconds an epoch, and what the server reads of labels."""
    warm_up()
    warnings.filterwarnings("ignore", message=".*LEAKY")  # as asked for here, and in the record
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    way, epochs = WAYS[trial.way], trial.training.epochs
    setup = Setup(
        splits, trial.training, trial.parameters or PRESETS["fast"](), trial.epsilon, trial.config.delta,
        trial.config.clip, trial.config.dp_lr,
    )  # fmt: skip
    ready = way.ready(setup)
    seconds: dict[str, float] = {}
    losses, lasted = timed_epochs(ready.step, ready.batches, epochs if way.trains else 1)
    notes = [*ready.notes, f"loss of the last epoch: {losses[-1]:.4f}"]
    if way.trains:
        seconds["train"] = sum(lasted)
        seconds["epoch"] = statistics.median(lasted)  # what accountants work out once is in the first alone
        nbytes = counted([ready.line.meter])
    seconds |= _crypto(ready, epochs)
    ready.line.meter.clear()
    begun = time.perf_counter()
    utility = evaluate(ready.chain, splits.test.x, splits.test.y)
    seconds["test"] = time.perf_counter() - begun
    if not way.trains:
        nbytes = counted([ready.line.meter])
        notes.append(f"bytes and seconds are those of {len(splits.test)} predictions")
        seconds |= _crypto(ready, 1)
    if ready.layer is not None:
        notes += [setup.parameters.in_words(), f"{ready.layer.clipped} activations clipped to ±{ready.layer.bound:g}"]
    claim = None if ready.account is None else ready.account.claim()
    return Outcome(
        utility=utility, leakage=_leakage(trial, splits) if _attackable(trial) else [],
        nbytes=nbytes, seconds=seconds, visible={who: list(what) for who, what in ready.visible.items()}, notes=notes,
        epsilon=None if claim is None else claim.epsilon, delta=None if claim is None else claim.delta,
        accounts=[] if claim is None else [str(claim)],
    )  # fmt: skip


def _attackable(trial: Trial) -> bool:
    """Whether an attack on gradients in the clear says something: not where all is in one place, nor of true steps."""
    way = WAYS[trial.way]
    return way.trains and trial.way != "plain_dp" and not (way.noised and isinf(trial.epsilon))


def _crypto(ready: Ready, epochs: int) -> dict[str, float]:
    """Return the seconds an epoch of encryption, of the holder (frames included) and of decryption."""
    return {} if ready.layer is None else {name: spent / epochs for name, spent in ready.layer.seconds.items()}


def _leakage(trial: Trial, splits: Splits) -> list[Leakage]:
    """Return what the server makes of the first batches of a training of its own, which is then given up."""
    setup = Setup(
        splits, trial.training, trial.parameters or PRESETS["fast"](), trial.epsilon,
        trial.config.delta, trial.config.clip, trial.config.dp_lr, TRANSCRIPT,
    )  # fmt: skip
    ready = WAYS[trial.way].ready(setup)
    if not ready.read_by_logits:
        return []  # weights above the server's layer: the gradient that crosses is not that of the logits
    return [labels_read(ready.step, ready.batches, lambda: observe(ready.line.record, threat=Threat()), splits)]


def labels_read(
    step: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    view: Callable[[], View],
    splits: Splits,
) -> Leakage:
    """Return what a server reads of the labels in gradients of the outputs, in the first batches of a training.

    The training is then given up. A label is -1 where a row is padding.
    """
    labels = []
    for _, (x, y) in zip(range(ATTACKED), batches, strict=False):
        labels.append(y)
        step(x, y)
    truth = torch.cat(labels)
    kept = truth >= 0
    share = splits.auxiliary.y.bincount(minlength=splits.private.num_classes).argmax()
    guess = float((truth[kept] == share).double().mean())
    try:
        told = DirectLabels()(view()).labels
        assert told is not None
        score = float((told[kept] == truth[kept]).double().mean())
        details = {}
    except LookupError:
        score, details = guess, {"why": "no gradient crosses in the clear: nothing to read"}
    return Leakage(
        attack="clear_gradient", family="label", advantage=accuracy_advantage(score, guess),
        metrics={"accuracy": score}, baselines={"accuracy_majority": guess}, details=details,
    )  # fmt: skip


HE_OVERHEAD = Experiment(
    "he_overhead",
    "What does encryption on the cut cost? Accuracy, seconds and bytes an epoch, each protocol and preset",
    Config,
    tasks,
)
