"""FLAME: the majority by direction, clipped to the median norm, with noise.

Nguyen, Rieger, Chen, Yalame, Möllering, Fereidooni, Marchal, Miettinen, Mirhoseini, Zeitouni, Koushanfar, Sadeghi &
Schneider 2022, "FLAME: taming backdoors in federated learning" (USENIX Security, arXiv:2101.02281).
"""

from dataclasses import dataclass, field
from math import isfinite

import torch
from sklearn.cluster import HDBSCAN

from defenses.aggregation.points import Points, Rule, Verdict, cosines, inner_products, squared_norms

__all__ = ["FLAME"]


@dataclass(frozen=True, eq=False)
class FLAME(Rule):
    """The mean of the rows in the one cluster, by cosine distance, of more than half of them, each clipped to norm S.

    S is the median norm of all rows. Clusters are HDBSCAN's, of at least ⌊n/2⌋ + 1 rows; a row of zeros is at distance
    1 from every other. N(0, (``noise``·S)²) is added to each number; the paper derives a level from (ε, δ) of
    backdoors, and no ε is claimed here. Withstands fewer than n/2 bad rows that go another way than the honest; those
    that hide in the honest cone are clipped and no more. Where honest rows point apart, as with unlike data, it keeps
    little more than half of them, and a tight group of bad ones may be in it. Noise comes from ``seed`` alone; a second
    call draws anew. n ≥ 3. O(n²·d).
    """

    noise: float = 0.0
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False, default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if not (isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"FLAME: expected a finite noise of 0 or more, got {self.noise}; 0.001 is a start")
        self.generator.manual_seed(self.seed)

    @property
    def least(self) -> int:
        """3: a majority, and somebody else."""
        return 3

    def verdict(self, points: Points) -> Verdict:
        """Return the row; shares are what each row is multiplied by, its clipping included."""
        n = len(points)
        if n < self.least:
            raise ValueError(f"FLAME: expected n ≥ 3 rows, got {n}; ask more members")
        apart = (1 - cosines(inner_products(points.rows))).fill_diagonal_(0)
        clusters = HDBSCAN(
            metric="precomputed", min_cluster_size=n // 2 + 1, min_samples=1, allow_single_cluster=True, copy=True
        ).fit_predict(apart.numpy())
        admitted = torch.from_numpy(clusters) >= 0  # two clusters of more than half are one
        norms = squared_norms(points.rows).sqrt()
        bound = norms.quantile(0.5)
        clip = torch.where(norms > bound, bound / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1.0)
        shares = admitted * clip / admitted.sum()
        delta = points.combined(shares)
        if self.noise:
            delta = delta + self.noise * bound * torch.randn(delta.shape, generator=self.generator, dtype=delta.dtype)
        return Verdict(delta, shares)
