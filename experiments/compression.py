"""What does compression save, what does it cost, and does it protect: rate, accuracy and leakage, one curve each."""

from dataclasses import dataclass, field
from math import prod

import torch

from experiments import tradeoff
from experiments.compressed import COMPRESSIONS
from experiments.experiment import Experiment, Options
from experiments.ingredients import ATTACKS, PROTOCOLS
from experiments.runner import Task
from experiments.tradeoff import Trial
from experiments.training import Trained, build_model
from splitlearn.cut import cut
from splitlearn.data import Splits
from splitlearn.frames import Kind, Message, encode

__all__ = ["COMPRESSION", "Config"]

PACKED = 64  # samples in the frame that is measured
CODED = tuple(
    f"compression:{one}"
    for one in (
        "float16", "int8", "int6", "int4", "int3", "int2", "ans8", "ans4", "ans3", "ans2", "learned4", "learned3",
        "learned2", "0.1", "0.02", "random0.1", "narrow0.25", "narrow0.25+ans4", "aware4+int8",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Config(tradeoff.Config):
    """Options of the experiment."""

    protocols: tuple[str, ...] = field(
        default=("vanilla",), metadata={"help": f"protocols to train under, of {', '.join(PROTOCOLS)}"}
    )
    protections: tuple[str, ...] = field(
        default=("none", *CODED), metadata={"help": f"none, and compression:NAME, where NAME is {COMPRESSIONS}"}
    )
    attacks: tuple[str, ...] = field(
        default=("decoder",), metadata={"help": f"attacks on the activations, of {', '.join(ATTACKS)}; '' for none"}
    )


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each protocol, cut, compression and seed; every name is checked first."""
    return tradeoff.tasks(config, options, name="compression", also=rate)


@torch.no_grad()
def rate(trial: Trial, trained: Trained, splits: Splits) -> dict[str, float]:
    """Return how small a real frame of test activations is, beside one of the plain stage's activation in float32."""
    if trial.shield().updates is not None:
        return _rate_of_updates(trial, trained)
    if trained.encoder is None:
        return {"times_smaller": 1.0, "bits_per_entry": 32.0}
    x = splits.test.x[:PACKED].to(trial.training.device)
    z = trained.encoder(x).cpu()
    plain = cut(build_model(splits, seed=0), trial.training.cut)[0](splits.test.x[:1])
    shape = (len(x), *plain.shape[1:])
    bare = len(encode(Message("predict", {Kind.ACTIVATION: torch.zeros(shape, dtype=plain.dtype)})))
    sent = len(encode(Message("predict", {Kind.ACTIVATION: z}), trial.shield().codec))
    return {"times_smaller": bare / sent, "bits_per_entry": 8 * sent / prod(shape)}


def _rate_of_updates(trial: Trial, trained: Trained) -> dict[str, float]:
    """Return the same for updates: the bytes of all that crossed, beside those of float32."""
    averaged = trained.model if trial.training.protocol == "fedavg" else next(trained.model.children())
    entries = sum(one.numel() for one in averaged.state_dict().values() if one.is_floating_point())
    sent = sum(kinds.get(Kind.UPDATE, 0) for kinds in trained.nbytes.values())
    bits = 8 * sent / (entries * trial.training.epochs * trial.training.clients)
    return {"times_smaller": 32 / bits, "bits_per_entry": bits}


COMPRESSION = Experiment(
    "compression",
    "What does compression at the cut save, cost and protect? Rate, accuracy and leakage of each",
    Config,
    tasks,
)
