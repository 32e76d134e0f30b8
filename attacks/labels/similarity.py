"""Labels by likeness: samples of one class have like gradients, and like activations once training goes on.

Liu and Lyu 2022, "Clustering label inference attack against practical split learning" (arXiv:2203.05222): cosine
similarity of gradients or Euclidean distance of activations to samples whose labels are known, and k-means where none
are. Deviations: with several known samples a class it is their mean that counts; k-means on gradients takes them at
length 1, so that it goes by direction as the cosine does.
"""

import warnings
from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from attacks.labels.guess import LabelGuess, crossed
from attacks.labels.rows import activations, gradients, hinted, normalised
from splitlearn import Kind, View

__all__ = ["Similarity", "clustered"]


@dataclass(frozen=True)
class Similarity:
    """Honest but curious party without labels: what is alike at its cut is of one class. Returns the labels, [N].

    With hints, each sample is of the class whose known samples are nearest; without, samples are clustered into
    ``classes`` clusters, which have no names. ``features`` says what is compared: gradients by cosine, or activations
    by Euclidean distance. It reads every batch in the view, which best holds one epoch: gradients of one class are most
    alike in the first, before the top is sure of some samples. ``restarts`` and ``seed`` are k-means'.
    """

    classes: int
    features: Kind = Kind.GRADIENT
    restarts: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.features not in (Kind.GRADIENT, Kind.ACTIVATION):
            raise ValueError(f"expected Kind.GRADIENT or Kind.ACTIVATION to compare, got {self.features!r}")
        if self.classes < 2 or self.restarts < 1:
            raise ValueError(
                f"expected two classes or more and a restart at least, got {self.classes} and {self.restarts}"
            )

    def __call__(self, view: View) -> LabelGuess:
        """Return labels, and for two classes with hints scores; clusters where there are no hints."""
        batches, by_direction = crossed(view), self.features == Kind.GRADIENT
        rows = normalised(gradients(batches)) if by_direction else activations(batches)
        if not view.threat.hints:
            return LabelGuess(clustered(rows, self.classes, restarts=self.restarts, seed=self.seed), named=False)
        known, labels = hinted(view, rows)
        names = labels.unique()
        centres = torch.stack([known[labels == name].mean(0) for name in names])
        near = rows @ normalised(centres).T if by_direction else -torch.cdist(rows, centres)
        scores = near[:, 1] - near[:, 0] if names.tolist() == [0, 1] else None
        return LabelGuess(names[near.argmax(1)], scores)


def clustered(rows: Tensor, clusters: int, *, restarts: int, seed: int) -> Tensor:
    """Return the cluster of each row, [N] for [N, d], by k-means, the best of ``restarts``."""
    if len(rows) < clusters:
        raise ValueError(f"expected at least {clusters} samples for {clusters} clusters, got {len(rows)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # where rows are equal there are fewer clusters
        found = KMeans(clusters, n_init=restarts, random_state=seed).fit_predict(rows.cpu().double().numpy())
    return torch.from_numpy(found).long().to(rows.device)
