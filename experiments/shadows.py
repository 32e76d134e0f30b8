"""The target of a membership trial, its candidates, and the shadow models that whoever asks trains.

The data set's private and auxiliary samples are one pool of candidates, of which the client trains on a random half.
Some labels of the pool are flipped, in members and others alike.
"""

from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks import ActivationPoint, GradientPoint, LogitPoint, Point, halves
from experiments.ingredients import PROTECTIONS
from experiments.parts import Shield
from experiments.protected import described_protection
from experiments.training import Training, build_model, described, load_splits, optimizer_for
from experiments.workers import Job, run_jobs
from splitlearn.cut import cut
from splitlearn.data import Dataset, Splits
from splitlearn.frames import Kind
from splitlearn.party import Learner, Party
from splitlearn.protocols import vanilla
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.threat import Encoder, Threat
from splitlearn.train import Batches, epochs_of, fit
from splitlearn.wire import Framed, serve

__all__ = ["PLACES", "Pool", "Trial", "halves_of", "pool_of", "shadows_of"]


@dataclass(frozen=True)
class Place:
    """A point of the split, whoever reads there, and by which requests."""

    point: Point
    threat: Threat
    verb: str


PLACES: dict[str, Place] = {
    one.point.name: one
    for one in (
        Place(
            LogitPoint(),
            Threat("whoever asks for predictions", frozenset({Kind.PREDICTION}), queries=True),
            "predict",
        ),
        Place(
            ActivationPoint(),
            Threat("honest-but-curious server", frozenset({Kind.ACTIVATION}), queries=True),
            "predict",
        ),
        Place(
            GradientPoint(),
            Threat("honest-but-curious client", frozenset({Kind.GRADIENT}), queries=True),
            "learn",
        ),
    )
}


@dataclass(frozen=True)
class Trial:
    """One target, its shadows and the attacks on it."""

    data: str
    sizes: tuple[int, int, int]
    training: Training
    protection: str
    strength: str
    points: tuple[str, ...]
    shadows: int
    flipped: float

    def shield(self) -> Shield:
        """Return the client's protection."""
        return PROTECTIONS[self.protection].build(self.strength)

    def described(self) -> dict[str, Any]:
        """Return the full configuration: every setting that the result depends on."""
        return {
            **described(self.data, self.sizes, self.training),
            "protection": described_protection(self.protection, self.strength),
            "points": list(self.points),
            "shadows": self.shadows,
            "flipped": self.flipped,
        }


@dataclass(frozen=True)
class Pool:
    """All candidates, labels as flipped, which of them are members, and the samples that score the model."""

    candidates: Dataset
    members: Tensor
    test: Dataset

    def splits(self, chosen: Tensor) -> Splits:
        """Return the chosen candidates [N] as private samples, and the rest as auxiliary ones."""
        rows = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
        return Splits(self.candidates.subset(rows[0]), self.candidates.subset(rows[1]), self.test)


@lru_cache(maxsize=1)
def pool_of(trial: Trial, data_dir: Path | None) -> Pool:
    """Return the candidates of a trial: half of them members, a share of their labels changed to another, by seed."""
    splits = load_splits(trial.data, data_dir, sizes=trial.sizes)
    private, auxiliary = splits.private, splits.auxiliary
    x, y, ids = (torch.cat([getattr(private, one), getattr(auxiliary, one)]) for one in ("x", "y", "ids"))
    draws = torch.Generator().manual_seed(trial.training.seed)
    flipped = torch.randperm(len(y), generator=draws)[: round(trial.flipped * len(y))]
    other = torch.randint(1, private.num_classes, (len(flipped),), generator=draws)
    y[flipped] = (y[flipped] + other) % private.num_classes
    members = torch.zeros(len(y), dtype=torch.bool)
    members[torch.randperm(len(y), generator=draws)[: len(y) // 2]] = True
    return Pool(replace(private, x=x, y=y, ids=ids, groups=None), members, splits.test)


def _shadow(trial: Trial, data_dir: Path | None, number: int) -> dict[str, np.ndarray]:
    """Train one shadow as the target is trained, on its half of the candidates; return its statistics of all, by point.

    Its parties are in this process; frames are used where a codec changes what crosses.
    """
    pool, shield = pool_of(trial, data_dir), trial.shield()
    training = replace(trial.training, seed=1_000 * (trial.training.seed + 1) + number)
    splits = pool.splits(halves_of(trial)[number])
    below, top = cut(build_model(splits, seed=training.seed).to(training.device), training.cut)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        x = splits.private.x[:1].to(training.device)
        bottom, above = shield.shaped(below, x), shield.raised(top, below, x)
    client = Learner("client", bottom, optimizer_for(bottom, training), shield.guard, seed=training.seed)
    server: Party = Learner("server", above, optimizer_for(above, training), seed=training.seed)
    if shield.codec is not None:
        server = Remote("server", Framed(serve(Service({"server": server}), shield.codec), shield.codec), "server")
    batches = Batches(splits.private.x, splits.private.y, batch_size=training.batch_size, seed=training.seed)
    fit(epochs_of(partial(vanilla, client, server), batches), epochs=training.epochs)
    x, y = pool.candidates.x.to(training.device), pool.candidates.y.to(training.device)
    path, head = Encoder(bottom, client.guard, trial.shield().codec), above.eval()
    return {name: PLACES[name].point.of(path, head, x, y).numpy() for name in trial.points}


def halves_of(trial: Trial) -> Tensor:
    """Return which candidates each shadow of the trial is trained on, [shadows, candidates]."""
    samples = trial.sizes[0] + trial.sizes[1]
    return halves(trial.shadows, samples, seed=trial.training.seed + 1_000_000)  # not the draws that made the members


def shadows_of(trial: Trial, data_dir: Path | None, jobs: int) -> list[dict[str, np.ndarray]]:
    """Return the statistics of each shadow, which train on one thread each, in processes of their own or in this one.

    Ending this process, by an interrupt too, ends those.
    """
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [_shadow(trial, data_dir, number) for number in range(trial.shadows)]
        finally:
            torch.set_num_threads(threads)
    work = [Job(str(number), _shadow, (trial, data_dir, number)) for number in range(trial.shadows)]
    found: dict[str, dict[str, np.ndarray]] = {}
    with closing(run_jobs(work, processes=jobs)) as replies:
        for reply in replies:
            if reply.error:
                raise RuntimeError(f"shadow {reply.name}: {reply.error.splitlines()[-1]}")
            found[reply.name] = reply.value
    return [found[str(number)] for number in range(trial.shadows)]
