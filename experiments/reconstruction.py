"""Every attack at every depth, and every defense against every attack: tradeoff's engine, asked for more."""

from dataclasses import dataclass, field
from functools import partial

from experiments import tradeoff
from experiments.experiment import Experiment
from experiments.ingredients import ATTACKS, PROTECTIONS, PROTOCOLS

__all__ = ["DEFENSE_TOURNAMENT", "RECONSTRUCTION_ATTACKS", "Attacks", "Tournament"]

ON_DIGITS = tuple(name for name, one in ATTACKS.items() if one.family == "reconstruction" and "image" in one.inputs)


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


@dataclass(frozen=True)
class Tournament(tradeoff.Config):
    """Options of defense_tournament: each attacker knows the defense."""

    protections: tuple[str, ...] = field(
        default=("none", *(name for name, one in PROTECTIONS.items() if name != "none")),
        metadata={"help": f"of {', '.join(PROTECTIONS)}; NAME for all its strengths, NAME:STRENGTH for one"},
    )
    attacks: tuple[str, ...] = field(
        default=("rmle", "decoder", "fsha"), metadata={"help": f"of {', '.join(ATTACKS)}; the worst one counts"}
    )


RECONSTRUCTION_ATTACKS = Experiment(
    "reconstruction_attacks",
    "How well can inputs be rebuilt? Every attack at every depth of the cut, nothing protecting",
    Attacks,
    partial(tradeoff.tasks, name="reconstruction_attacks"),
)
DEFENSE_TOURNAMENT = Experiment(
    "defense_tournament",
    "Which defense holds against the attacker who knows it? Defenses × strengths, the worst of several attacks",
    Tournament,
    partial(tradeoff.tasks, name="defense_tournament"),
)
