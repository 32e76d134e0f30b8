"""Options of the experiments on poisoning: one set, and which attacks, defenses and cuts each question begins with."""

from dataclasses import dataclass, field

from experiments.poison_ingredients import POISON_ATTACKS, POISON_DEFENSES, POISONED

__all__ = ["Backdoor", "Config", "Privacy", "Surface"]

DAMAGE = ("label_flip", "sign_flip", "alie", "min_max", "adaptive", "smashed_noise", "misa")
DOORS = ("badnets", "replacement", "dba", "embedding")
BOTH = ("none", "clip", "trimmed_mean", "multi_krum", "nnm", "trimmed_mean_clip")
PROTOCOLS = {"help": f"of {', '.join(POISONED)}"}
DEFENSES = {"help": f"of {', '.join(POISON_DEFENSES)}; left out where a protocol has no use for it"}
ATTACKS = {"help": f"of {', '.join(POISON_ATTACKS)}; left out where a protocol has no such surface"}
CUTS = {"help": "last layer below the cut, by name, or default, first, depths; fedavg has none"}


@dataclass(frozen=True)
class Config:
    """Options of poisoning."""

    protocols: tuple[str, ...] = field(default=("splitfed_v1", "splitfed_v2", "fedavg"), metadata=PROTOCOLS)
    defenses: tuple[str, ...] = field(default=BOTH, metadata=DEFENSES)
    attacks: tuple[str, ...] = field(
        default=DAMAGE,
        metadata=ATTACKS,
    )
    clients: int = field(default=20, metadata={"help": "members of the federation"})
    bad: tuple[int, ...] = field(default=(4,), metadata={"help": "how many of them are bad; each is a trial"})
    alphas: tuple[float, ...] = field(
        default=(1.0,), metadata={"help": "Dirichlet concentration of the members' classes: small is unlike"}
    )
    cuts: tuple[str, ...] = field(
        default=("default",),
        metadata=CUTS,
    )
    private: int = field(default=0, metadata={"help": "private samples of all members; 0: all but the auxiliary"})
    auxiliary: int = field(
        default=100, metadata={"help": "labelled samples of a bad server, of FLTrust and of Neural Cleanse"}
    )
    rounds: int = field(default=0, metadata={"help": "rounds of training; 0: the protocol's usual number, 30 or 40"})
    batch_size: int = field(default=16, metadata={"help": "samples in a batch"})
    lr: float = field(
        default=0.0,
        metadata={
            "help": "learning rate of SGD with momentum; 0: 0.05; for a shared top (splitfed_v2) 0.03 where its steps "
            "are clipped, else 0.02"
        },
    )


@dataclass(frozen=True)
class Backdoor(Config):
    """Options of backdoor: attacks that plant one, and defenses that may answer."""

    protocols: tuple[str, ...] = field(default=("splitfed_v1", "splitfed_v2"), metadata=PROTOCOLS)
    defenses: tuple[str, ...] = field(
        default=(
            "none", "clip", "trimmed_mean", "multi_krum", "geometric_median", "trimmed_mean_clip", "safesplit",
            "graph", "witnesses",
        ),
        metadata=DEFENSES,
    )  # fmt: skip
    attacks: tuple[str, ...] = field(default=DOORS, metadata=ATTACKS)
    cuts: tuple[str, ...] = field(
        default=("first",),
        metadata=CUTS,
    )


@dataclass(frozen=True)
class Surface(Config):
    """Options of surface: one attack a surface, at each depth of the cut."""

    protocols: tuple[str, ...] = field(default=("splitfed_v1", "splitfed_v2", "fedavg"), metadata=PROTOCOLS)
    defenses: tuple[str, ...] = field(default=("none", "trimmed_mean", "trimmed_mean_clip"), metadata=DEFENSES)
    attacks: tuple[str, ...] = field(
        default=("label_flip", "smashed_noise", "server_backdoor", "sign_flip"),
        metadata=ATTACKS,
    )
    cuts: tuple[str, ...] = field(
        default=("depths",),
        metadata=CUTS,
    )


@dataclass(frozen=True)
class Privacy(Config):
    """Options of privacy_meets_poisoning: clipping and noise that are there for privacy, against poison."""

    protocols: tuple[str, ...] = field(default=("splitfed_v2", "fedavg"), metadata=PROTOCOLS)
    defenses: tuple[str, ...] = field(
        default=("none", "clipped_mean", "private_mean", "trimmed_mean_clip", "noised_activations"),
        metadata=DEFENSES,
    )
    attacks: tuple[str, ...] = field(default=("sign_flip", "smashed_noise", "badnets"), metadata=ATTACKS)
