"""Who was trained on? Membership inference at each point of the split, against models that memorise some labels.

The data set's private and auxiliary samples are one pool of candidates, of which the client trains on a random half.
Whoever asks has all of them, not which are in. Some labels of the pool are flipped, in members and others alike: what
is hard is remembered, and a threshold for all samples does not see that.
"""

import copy
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from attacks import LiRA, LogitPoint, LossThreshold, halves
from experiments.experiment import Experiment, Options, reproduction
from experiments.ingredients import PROTECTIONS
from experiments.names import find, spec_of
from experiments.parts import Shield
from experiments.protected import protections_for
from experiments.record import Leakage
from experiments.runner import Outcome, Task
from experiments.setups import train_vanilla
from experiments.shadows import PLACES, Pool, Trial, halves_of, pool_of, shadows_of
from experiments.training import (
    Trained,
    Training,
    build_model,
    default_cut,
    device_of,
    load_splits,
    sizes_of,
    warm_up,
)
from experiments.workers import available_cpus
from splitlearn.cut import cut
from splitlearn.data import DATASETS
from splitlearn.leakage import score_membership
from splitlearn.party import Learner
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.threat import observe
from splitlearn.train import evaluate, predict
from splitlearn.wire import Framed, Recorded, serve

__all__ = ["MEMBERSHIP", "Config"]

PART = 256  # candidates in a request
BY_LOSS = LogitPoint.name  # where a loss is to be read
CANDIDATES = "the candidates and their labels, not which of them are private"
SHADOWS = "the architecture, the protection and how the model is trained: it trains shadows on halves of the candidates"


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    points: tuple[str, ...] = field(
        default=tuple(PLACES), metadata={"help": f"where the attacker reads, of {', '.join(PLACES)}"}
    )
    shadows: int = field(default=32, metadata={"help": "shadow models, each trained on half of the candidates; even"})
    flipped: float = field(default=0.2, metadata={"help": "share of all candidates' labels that are changed"})
    protections: tuple[str, ...] = field(
        default=("none",),
        metadata={
            "help": f"on activations, of {', '.join(PROTECTIONS)}; NAME for all strengths, NAME:STRENGTH for one"
        },
    )
    cut: str = field(default="default", metadata={"help": "last layer below the cut; default: the model's usual one"})
    private: int = field(default=0, metadata={"help": "private samples; 0: the data set's usual number"})
    auxiliary: int = field(default=0, metadata={"help": "auxiliary samples; 0: the data set's usual number"})
    epochs: int = field(default=20, metadata={"help": "epochs of training, of the target and of each shadow"})
    batch_size: int = field(default=64, metadata={"help": "samples in a batch"})
    lr: float = field(default=2e-3, metadata={"help": "learning rate of Adam"})
    shadow_jobs: int = field(
        default=0, metadata={"help": "processes that train shadows; 0: the cores that trials at once leave to each"}
    )


def tasks(config: Config, options: Options) -> list[Task]:
    """Return one task for each protection, strength and seed; every name and number is checked first."""
    find("data set", options.data, DATASETS)
    for name in config.points:
        find("point", name, PLACES)
    if not 0 <= config.flipped < 1:
        raise ValueError(f"expected --flipped from 0 to below 1, got {config.flipped}; 0.2 flips a fifth of the labels")
    if config.shadow_jobs < 0:
        raise ValueError(f"expected --shadow-jobs of 0 or more, got {config.shadow_jobs}")
    halves(config.shadows, 1)
    sizes = sizes_of(options.data, private=config.private, auxiliary=config.auxiliary)
    splits = load_splits(options.data, options.data_dir, sizes=sizes)
    protections = protections_for(config.protections, splits.private)
    device = device_of(options.device)
    place = default_cut(splits) if config.cut == "default" else config.cut
    cut(build_model(splits, seed=0), place)
    base = Training(cut=place, epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, device=device)
    at_once = min(options.jobs or available_cpus(), len(protections) * len(options.seeds))
    jobs = config.shadow_jobs or max(1, available_cpus() // at_once)
    found = []
    for protection, strength in protections:
        for seed in options.seeds:
            training = replace(base, seed=seed)
            trial = Trial(
                options.data, sizes, training, protection, strength, config.points, config.shadows, config.flipped
            )
            spec = spec_of(protection, strength)
            alone = replace(config, protections=(spec,), cut=place, shadow_jobs=0)
            command = reproduction("membership", alone, data=options.data, device=device, seed=seed)
            labels = {
                "seed": seed, "data": options.data, "protocol": "vanilla", "cut": place, "protection": protection,
                "strength": strength,
            }  # fmt: skip
            call = partial(run_trial, trial, options.data_dir, jobs)
            found.append(Task("membership", trial.described(), command, labels, call))
    return found


def run_trial(trial: Trial, data_dir: Path | None, jobs: int) -> Outcome:
    """Train the target and its shadows, send every candidate, and ask of each whether it was trained on."""
    warm_up()
    pool, training, shield = pool_of(trial, data_dir), trial.training, trial.shield()
    begun = time.perf_counter()
    trained = train_vanilla(training, pool.splits(pool.members), shield)
    seconds = {"train": time.perf_counter() - begun}
    utility = evaluate(trained.chain, pool.test.x, pool.test.y)
    learned = evaluate(trained.chain, trained.victim_x, trained.victim_y)["accuracy"]
    wires = {"predict": _asked(trained, pool), "learn": _taught(trained, pool, shield)}
    begun = time.perf_counter()
    inside = halves_of(trial)
    shadows = shadows_of(trial, data_dir, jobs)
    seconds["shadows"] = time.perf_counter() - begun
    leakage, visible = [], {}
    for name in trial.points:
        place, y = PLACES[name], pool.candidates.y
        view = observe(wires[place.verb], threat=place.threat)
        lira = LiRA(place.point, y, torch.stack([torch.from_numpy(one[name]) for one in shadows]), inside)
        scores = {"lira": lira(view)} | ({"loss_threshold": LossThreshold(y)(view)} if name == BY_LOSS else {})
        for attack, found in scores.items():
            leakage.append(_scored(f"{attack}@{name}", found, pool, trial))
            knows = [*place.threat.in_words(), CANDIDATES, *([SHADOWS] if attack == "lira" else [])]
            visible[f"{place.threat.name} ({attack}@{name})"] = knows
    return Outcome(
        utility=utility, leakage=leakage, nbytes=trained.nbytes, seconds=seconds, visible=trained.visible | visible,
        notes=[
            f"{int(pool.members.sum())} members and {int((~pool.members).sum())} others are asked about, with "
            f"{trial.flipped:.0%} of the labels of both flipped; {trial.shadows} shadows",
            f"{learned:.3f} of the members' labels are learned; loss of the last epoch: {trained.losses[-1]:.4f}",
            *([f"strength: {unit}"] if (unit := PROTECTIONS[trial.protection].unit) else []),
        ],
    )  # fmt: skip


def _asked(trained: Trained, pool: Pool) -> Recorded:
    """Return the server's record of a prediction of every candidate."""
    assert trained.record is not None
    trained.record.clear()
    predict(trained.chain, pool.candidates.x, batch_size=PART)
    return trained.record


def _taught(trained: Trained, pool: Pool, shield: Shield) -> Recorded:
    """Return the client's record of every candidate being sent to be learned from, by a server that stays as it is.

    That is what one who joins the last step reads; a server that moved would tell of the candidates before.
    """
    assert trained.encoder is not None
    assert isinstance(trained.model, nn.Sequential)
    frozen = Learner("server", copy.deepcopy(trained.model[1]).eval())
    codec = copy.deepcopy(shield.codec)
    record = Recorded(Framed(serve(Service({"server": frozen}), codec), codec))
    server = Remote("server", record, "server")
    for x, y in zip(pool.candidates.x.split(PART), pool.candidates.y.split(PART), strict=True):
        server.learn(trained.chain[0].predict(x).requires_grad_(), y)
    return record


def _scored(name: str, scores: Tensor, pool: Pool, trial: Trial) -> Leakage:
    score = score_membership(scores[pool.members], scores[~pool.members])
    return Leakage(
        attack=name, family="membership", advantage=score.advantage, metrics=score.metrics, baselines=score.baselines,
        details={"members": int(pool.members.sum()), "shadows": trial.shadows, "flipped": trial.flipped},
    )  # fmt: skip


MEMBERSHIP = Experiment(
    "membership",
    "Who was trained on? Likelihood ratios over shadow models at each point of the split, and a threshold on the loss",
    Config,
    tasks,
)
