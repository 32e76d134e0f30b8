"""How much leaks, what protects, and what that costs: every protection at every strength against every attack."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.experiment import Experiment, Options, reproduction
from experiments.ingredients import ATTACKS, PROTECTIONS, PROTOCOLS
from experiments.names import find, spec_of
from experiments.parts import Aim, Shield
from experiments.protected import described_protection, named_protections
from experiments.runner import Outcome, Task
from experiments.scoring import Attacked, aim_of, attack_victim
from experiments.training import (
    Trained,
    Training,
    described,
    device_of,
    load_splits,
    places,
    sizes_of,
    warm_up,
)
from splitlearn.data import DATASETS, Dataset, Splits
from splitlearn.train import evaluate

__all__ = ["TRADEOFF", "Config", "check_auxiliary"]

LEAST_AUXILIARY = 16  # samples, of which an attack's networks train on some and are judged on others


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    protocols: tuple[str, ...] = field(
        default=("vanilla",), metadata={"help": f"protocols to train under, of {', '.join(PROTOCOLS)}"}
    )
    cuts: tuple[str, ...] = field(
        default=("default",),
        metadata={"help": "last layer below the cut, by name; default: the model's usual one; depths: one to three"},
    )
    protections: tuple[str, ...] = field(
        default=("none", "noise", "nopeek", "compression"),
        metadata={
            "help": f"of {', '.join(PROTECTIONS)}; NAME for all its strengths, NAME:STRENGTH for one, such as noise:0.1"
        },
    )
    attacks: tuple[str, ...] = field(
        default=("rmle", "decoder"),
        metadata={"help": f"attacks on the activations, of {', '.join(ATTACKS)}; '' for none"},
    )
    targets: int = field(default=100, metadata={"help": "private samples that are attacked"})
    releases: int = field(
        default=1, metadata={"help": "how often each target crosses, under fresh noise; the attacker averages"}
    )
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})
    auxiliary: int = field(default=0, metadata={"help": "auxiliary samples; 0: the data set's usual number"})
    clients: int = field(default=1, metadata={"help": "clients among which the private data is divided"})
    epochs: int = field(default=15, metadata={"help": "epochs, or rounds, of training"})
    batch_size: int = field(default=32, metadata={"help": "samples in a batch"})
    optimizer: str = field(default="adam", metadata={"help": "adam, or sgd with momentum 0.9"})
    lr: float = field(default=1e-3, metadata={"help": "learning rate"})


@dataclass(frozen=True)
class Trial:
    """One training and the attacks on it."""

    data: str
    training: Training
    protection: str
    strength: str
    attacks: tuple[str, ...]
    targets: int
    releases: int
    sizes: tuple[int, int, int]  # private, auxiliary, test

    def shield(self) -> Shield:
        """Return the client's protection."""
        return PROTECTIONS[self.protection].build(self.strength)

    def described(self, aim: Aim) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on, those of the attacks included."""
        setting = described(self.data, self.sizes, self.training)
        return {
            **setting,
            "sizes": {**setting["sizes"], "targets": self.targets},
            "releases": self.releases,
            "protection": described_protection(self.protection, self.strength),
            "attacks": {name: ATTACKS[name].described(aim) for name in self.attacks},
        }


Also = Callable[[Trial, Trained, Splits], dict[str, float]]  # what else is measured, a part of the utility


def nothing(trial: Trial, trained: Trained, splits: Splits) -> dict[str, float]:
    """Return nothing beside the utility."""
    return {}


def tasks(config: Config, options: Options, *, name: str = "tradeoff", also: Also = nothing) -> list[Task]:
    """Return one task for each protocol, cut, protection, strength and seed; every name is checked first.

    ``name`` is the experiment's, where another asks the same of other protections and attacks; ``also`` measures what
    that wants to know beside.
    """
    find("data set", options.data, DATASETS)
    for attack in config.attacks:
        find("attack", attack, ATTACKS)
    for protocol in config.protocols:
        find("protocol", protocol, PROTOCOLS)
    for option in ("protocols", "cuts", "protections"):
        if not getattr(config, option):
            raise ValueError(f"expected at least one of --{option}, got none; leave the option out for the default")
    protections = named_protections(config.protections)
    if config.releases < 1:
        raise ValueError(f"expected --releases of 1 or more, got {config.releases}")
    device = device_of(options.device)
    sizes = sizes_of(options.data, private=config.private, auxiliary=config.auxiliary)
    # Absent or damaged data ends here, before any work.
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    _check_inputs(config, protections, splits.private)
    check_auxiliary(config.attacks, sizes[1])
    most = len(splits.private) // config.clients if config.clients > 0 else 0
    _check_seats(config)
    if config.attacks and not 1 <= config.targets <= most:
        raise ValueError(f"expected --targets between 1 and {most}, the samples of one client, got {config.targets}")
    base = Training(
        epochs=config.epochs, batch_size=config.batch_size, optimizer=config.optimizer, lr=config.lr,
        clients=config.clients, device=device,
    )  # fmt: skip
    found = []
    for protocol in config.protocols:
        for place in places(config.cuts, splits):
            for seed in options.seeds:
                training = replace(base, protocol=protocol, cut=place, seed=seed)
                for protection, strength in _applicable(protocol, protections):
                    trial = Trial(
                        options.data, training, protection, strength, config.attacks, config.targets, config.releases,
                        sizes,
                    )  # fmt: skip
                    spec = spec_of(protection, strength)
                    alone = replace(config, protocols=(protocol,), cuts=(place,), protections=(spec,))
                    command = reproduction(name, alone, data=options.data, device=device, seed=seed)
                    aim = aim_of(splits, seed, cut_at=place, shield=trial.shield())
                    found.append(_task(name, trial, command, aim, partial(run_trial, trial, options.data_dir, also)))
    return found


def run_trial(trial: Trial, data_dir: Path | None, also: Also = nothing) -> Outcome:
    """Train, evaluate and attack, and return what came of it."""
    warm_up()
    seconds = {}
    start = time.perf_counter()
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    seconds["data"] = time.perf_counter() - start
    start = time.perf_counter()
    trained = PROTOCOLS[trial.training.protocol].train(trial.training, splits, trial.shield())
    seconds["train"] = time.perf_counter() - start
    start = time.perf_counter()
    utility = evaluate(trained.chain, splits.test.x, splits.test.y) | also(trial, trained, splits)
    seconds["evaluate"] = time.perf_counter() - start
    attacks = Attacked()
    notes = [f"loss of the last epoch: {trained.losses[-1]:.4f}"]
    if unit := PROTECTIONS[trial.protection].unit:
        notes.append(f"strength: {unit}")
    if trained.record is None:
        notes.append("no activation crosses under this protocol, so these attacks have nothing to read")
    else:
        attacks = attack_victim(
            trial.attacks, trained, splits, trial.training, targets=trial.targets, releases=trial.releases,
            shield=trial.shield(),
        )  # fmt: skip
    return Outcome(
        utility=utility, leakage=attacks.leakage, nbytes=trained.nbytes, seconds=seconds | attacks.seconds,
        visible=trained.visible | attacks.visible, notes=[*notes, *attacks.notes], images=attacks.images,
        epsilon=None if trained.claim is None else trained.claim.epsilon,
        delta=None if trained.claim is None else trained.claim.delta,
        accounts=[] if trained.claim is None else [str(trained.claim)],
    )  # fmt: skip


def _applicable(protocol: str, protections: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the protections that can do something: of activations where some cross, of updates where some do."""
    on_updates = [one for one in protections if PROTECTIONS[one[0]].build(one[1]).updates is not None]
    if on_updates and not PROTOCOLS[protocol].updates_cross:
        fits = ", ".join(name for name, one in PROTOCOLS.items() if one.updates_cross)
        raise ValueError(
            f"expected protocols whose members send updates, {fits}, for {spec_of(*on_updates[0])}, got {protocol}"
        )
    if PROTOCOLS[protocol].activations_cross:
        return protections
    if on_updates:
        return [one for one in protections if one in on_updates or one == ("none", "")]
    if ("none", "") not in protections:
        raise ValueError(
            f"no activation crosses under {protocol}, so these protections would do nothing; add none to --protections"
        )
    return [("none", "")]


def _check_inputs(config: Config, protections: list[tuple[str, str]], private: Dataset) -> None:
    """Refuse attacks and protections that can do nothing with inputs of this kind; say what to ask for instead."""
    misfits = [f"attack {name}" for name in config.attacks if private.kind not in ATTACKS[name].inputs]
    chosen = dict.fromkeys(name for name, _ in protections)
    misfits += [f"protection {name}" for name in chosen if private.kind not in PROTECTIONS[name].inputs]
    if misfits:
        attacks = [name for name in config.attacks if private.kind in ATTACKS[name].inputs]
        fits = [spec for spec in config.protections if private.kind in PROTECTIONS[spec.partition(":")[0]].inputs]
        instead = f"--attacks {','.join(attacks) or repr('')} --protections {','.join(fits) or 'none'}"
        raise ValueError(
            f"expected attacks and protections that work on {private.kind}, which {private.name} holds, got "
            f"{', '.join(misfits)}; use {instead}"
        )


def _check_seats(config: Config) -> None:
    """Refuse attacks that take part in the training where nobody can take the server's place."""
    inside = [name for name in config.attacks if ATTACKS[name].steps]
    closed = [name for name in config.protocols if not PROTOCOLS[name].infiltrable]
    if inside and (closed or config.clients != 1):
        fits = ", ".join(name for name, one in PROTOCOLS.items() if one.infiltrable)
        raise ValueError(
            f"expected protocols of one client whose server {', '.join(inside)} can replace, of {fits}, got "
            f"{', '.join(closed) or f'{config.clients} clients'}; leave these attacks out, or use --clients 1"
        )
    blind = [name for name in config.protocols if not PROTOCOLS[name].labels_cross]
    labelled = [name for name in config.attacks if ATTACKS[name].needs_labels]
    if blind and labelled:
        raise ValueError(
            f"expected protocols whose client sends the labels that {', '.join(labelled)} needs, as in vanilla, got "
            f"{', '.join(blind)}; leave these attacks out"
        )


def check_auxiliary(attacks: Iterable[str], auxiliary: int) -> None:
    """Refuse attacks that train on samples of their own where there are too few of these."""
    needy = [name for name in attacks if ATTACKS[name].threat.auxiliary]
    if needy and auxiliary < LEAST_AUXILIARY:
        raise ValueError(
            f"expected --auxiliary of {LEAST_AUXILIARY} or more for {', '.join(needy)}, got {auxiliary}; 0 takes the "
            "data set's usual number"
        )


def _task(name: str, trial: Trial, command: str, aim: Aim, call: Callable[[], Outcome]) -> Task:
    training = trial.training
    labels = {
        "seed": training.seed, "data": trial.data, "protocol": training.protocol, "cut": training.cut,
        "protection": trial.protection, "strength": trial.strength,
    }  # fmt: skip
    return Task(name, trial.described(aim), command, labels, call)


TRADEOFF = Experiment(
    "tradeoff",
    "How much leaks, what protects, and what that costs: protections × strengths × attacks, one picture",
    Config,
    tasks,
)
