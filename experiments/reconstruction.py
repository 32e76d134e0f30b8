"""Every attack at every depth, and every defense against every attack: tradeoff's engine, asked for more."""

from dataclasses import dataclass, field, replace
from functools import partial

from experiments import tradeoff
from experiments.experiment import Experiment, Options
from experiments.ingredients import ATTACKS, PROTECTIONS, PROTOCOLS
from experiments.names import find
from experiments.runner import Task
from experiments.training import sizes_of
from experiments.updates import UPDATE_ATTACKS, update_tasks

__all__ = ["DEFENSE_TOURNAMENT", "RECONSTRUCTION_ATTACKS", "Attacks", "Tournament"]

ON_DIGITS = tuple(name for name, one in ATTACKS.items() if one.family == "reconstruction" and "image" in one.inputs)
DEFENDED = tuple(name for name, one in PROTECTIONS.items() if name != "none" and "image" in one.inputs)


@dataclass(frozen=True)
class Attacks(tradeoff.Config):
    """Options of reconstruction_attacks: nothing protects, the cut goes down."""

    cuts: tuple[str, ...] = field(
        default=("depths",),
        metadata={"help": "last layer below the cut, by name; default: the model's usual one; depths: one to three"},
    )
    protections: tuple[str, ...] = field(
        default=("none",), metadata={"help": f"of {', '.join(PROTECTIONS)}; see defense_tournament"}
    )
    attacks: tuple[str, ...] = field(
        default=ON_DIGITS, metadata={"help": f"of {', '.join(ATTACKS)}; those in the server's place train a model each"}
    )
    protocols: tuple[str, ...] = field(
        default=("vanilla",), metadata={"help": f"protocols to train under, of {', '.join(PROTOCOLS)}"}
    )
    update_attacks: tuple[str, ...] = field(
        default=tuple(UPDATE_ATTACKS),
        metadata={"help": f"on updates that a fed server sees, of {', '.join(UPDATE_ATTACKS)}; '' for none"},
    )
    batch_size: int = field(default=64, metadata={"help": "samples in a batch, as in most of the attacks' papers"})
    update_targets: int = field(default=8, metadata={"help": "samples whose updates are attacked, a member each"})


@dataclass(frozen=True)
class Tournament(tradeoff.Config):
    """Options of defense_tournament: each attacker knows the defense."""

    protections: tuple[str, ...] = field(
        default=("none", *DEFENDED),
        metadata={"help": f"of {', '.join(PROTECTIONS)}; NAME for all its strengths, NAME:STRENGTH for one"},
    )
    attacks: tuple[str, ...] = field(
        default=("rmle", "decoder", "fsha"), metadata={"help": f"of {', '.join(ATTACKS)}; the worst one counts"}
    )


def attack_tasks(config: Attacks, options: Options) -> list[Task]:
    """Return a task for each cut, protocol and seed, and for each federation whose updates are attacked."""
    for name in config.update_attacks:
        find("attack", name, UPDATE_ATTACKS)
    if not (config.attacks or config.update_attacks):
        raise ValueError("expected at least one attack, got none: nothing to do; name one with --attacks")
    name = "reconstruction_attacks"
    found = tradeoff.tasks(replace(config, update_attacks=()), options, name=name) if config.attacks else []
    sizes = sizes_of(options.data, private=config.private, auxiliary=config.auxiliary)
    if config.update_attacks and not 1 <= config.update_targets <= sizes[0]:
        raise ValueError(f"expected --update-targets between 1 and {sizes[0]}, got {config.update_targets}")
    return [*found, *update_tasks(name, config, options, sizes=sizes)]


RECONSTRUCTION_ATTACKS = Experiment(
    "reconstruction_attacks",
    "How well can inputs be rebuilt? Every attack at every depth of the cut, nothing protecting",
    Attacks,
    attack_tasks,
)
DEFENSE_TOURNAMENT = Experiment(
    "defense_tournament",
    "Which defense holds against the attacker who knows it? Defenses × strengths, the worst of several attacks",
    Tournament,
    partial(tradeoff.tasks, name="defense_tournament"),
)
