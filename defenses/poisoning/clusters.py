"""Activation clustering: a class of which a part is poisoned falls into two clusters, and the poison is the smaller.

Chen et al. 2018 (arXiv:1811.03728).
"""

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from torch import Tensor

from defenses.poisoning.suspects import Suspects, check_samples

__all__ = ["ActivationClustering"]


@dataclass(frozen=True)
class ActivationClustering:
    """Flags the smaller of two clusters of a class where the two stand apart.

    ``suspects = ActivationClustering()(z, y)`` of activations [N, …] with labels [N]: smashed data, or better the
    penultimate layer's, of a top that has learned from them. Each class by itself: centred, down to ``components`` by
    principal components, two means. The smaller cluster is flagged where its share of the class is at most ``size``
    and the silhouette of the two at least ``silhouette``. A sample's score in [-1, 1] is how much nearer it is to the
    smaller cluster's centre: (d_large - d_small) / (d_large + d_small); 0 in a class whose two do not stand apart, or
    of fewer than ``least`` samples.

    It protects from label-changing poison (backdoors, label flips) that the activations tell from its label's class.
    From malicious clients or whoever else brought the samples; a few of them per class, or the poison is the larger
    cluster. It does not protect where a class has two honest modes (they look the same), where the poisoner makes its
    activations alike on purpose, or during training before the poison was learned.

    From the paper's description. Deviations: principal components in place of independent ones (``whiten`` scales them
    to unit variance, after which two means are those of the paper's ICA, which only turns whitened components); size
    and silhouette both at once, where the paper compares them, with the ends of its ranges as defaults; no exclusionary
    retraining.
    """

    components: int = 10
    size: float = 0.35
    silhouette: float = 0.15
    whiten: bool = False
    least: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.components < 1 or self.least < 4:
            raise ValueError(f"expected components ≥ 1 and least ≥ 4, got {self.components} and {self.least}")
        if not (0 < self.size <= 0.5 and -1 <= self.silhouette <= 1):
            raise ValueError(
                f"expected a size in (0, 0.5] and a silhouette in [-1, 1], got {self.size} and {self.silhouette}"
            )

    def __call__(self, z: Tensor, y: Tensor) -> Suspects:
        """Return every sample's score and whether it is flagged."""
        rows = check_samples(z, y)
        scores, flagged = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.bool)
        for label in y.unique().tolist():
            at = (y.cpu() == label).nonzero()[:, 0]
            if len(at) < self.least or bool((rows[at] == rows[at[0]]).all()):
                continue
            score, small, apart = self._class(rows[at])
            if apart < self.silhouette:
                continue
            scores[at] = score
            if float(small.double().mean()) <= self.size:
                flagged[at[small]] = True
        return Suspects(scores, flagged)

    def _class(self, rows: Tensor) -> tuple[Tensor, Tensor, float]:
        components = min(self.components, len(rows) - 1, rows.shape[1])
        reduced = PCA(components, whiten=self.whiten, svd_solver="full").fit_transform(rows.numpy())
        means = KMeans(2, n_init=10, random_state=self.seed).fit(reduced)
        cluster = torch.from_numpy(means.labels_).long()
        less = int(cluster.double().mean() < 0.5)  # the number of the smaller one
        distances = torch.from_numpy(means.transform(reduced)).double()
        small, large = distances[:, less], distances[:, 1 - less]
        return (large - small) / (large + small), cluster == less, float(silhouette_score(reduced, means.labels_))
