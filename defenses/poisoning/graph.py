"""A graph on smashed data: a sample is suspicious where walks from it soon meet other labels.

In the spirit of HealSplit's topological score (Xie & Lyu 2025, arXiv:2511.11240), of which we had its description.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.poisoning.suspects import Suspects, check_samples

__all__ = ["NeighbourGraph"]


@dataclass(frozen=True)
class NeighbourGraph:
    """Flags samples that have little of their own class around them.

    ``suspects = NeighbourGraph()(z, y)`` of activations [N, …] with labels [N], of many clients at once. Samples are
    linked where each is among the ``neighbours`` nearest of the other (by cosine, of rows less their mean). A walk
    begins at the sample; before each step it ends with probability 1 - ``damping``, else it takes a link by chance. It
    is lost at a link to another label, or where there is none. The sample's score is minus the logarithm of the
    chance that its walk ends without being lost: 0 within a pure class, -log(1 - damping) where all links are foreign.
    Flagged is who scores above the first valley over the main mode of a Gaussian density of the scores, of standard
    deviation ``bandwidth``, and above log 2; without a valley nobody is.

    It protects from labels that do not fit what the activations show (label flips, patches on inputs of other classes),
    from malicious clients, while the honest are the majority of every neighbourhood. It does not protect from poison
    that clusters by itself, such as a trigger that dominates the activation: its samples then vouch for each other.

    Ours: labels in the graph, the walk that is lost, cosine, the valley as the threshold. HealSplit's are the mutual
    neighbours, a walk like PageRank's and a kernel density of scores; its recovery and distillation are left out.
    """

    neighbours: int = 20
    damping: float = 0.85
    bandwidth: float = 0.1

    def __post_init__(self) -> None:
        if self.neighbours < 1 or not 0 < self.damping < 1 or not self.bandwidth > 0:
            raise ValueError(
                "expected neighbours ≥ 1, a damping in (0, 1) and a bandwidth above 0, got "
                f"{self.neighbours}, {self.damping} and {self.bandwidth}"
            )

    def __call__(self, z: Tensor, y: Tensor) -> Suspects:
        """Return every sample's score and whether it is flagged."""
        rows = check_samples(z, y)
        if len(rows) <= self.neighbours:
            raise ValueError(
                f"expected more samples than the {self.neighbours} neighbours, got {len(rows)}; gather more batches"
            )
        links = mutual_neighbours(rows, self.neighbours)
        labels = y.cpu()
        alike = (links & (labels[:, None] == labels[None, :])).double() / links.sum(1, keepdim=True).clamp(min=1)
        ends = torch.full((len(rows),), 1 - self.damping, dtype=torch.float64)
        chance = torch.linalg.solve(torch.eye(len(rows), dtype=torch.float64) - self.damping * alike, ends)
        scores = -torch.log(chance.clamp(max=1))
        return Suspects(scores, scores > max(math.log(2), _valley(scores, self.bandwidth)))


def mutual_neighbours(rows: Tensor, neighbours: int) -> Tensor:
    """Return which samples [N, N] are each among the nearest of the other, by cosine of rows [N, d] less their mean."""
    centred = rows - rows.mean(0)
    units = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    cosines = (units @ units.T).fill_diagonal_(-2)
    near = cosines >= cosines.topk(neighbours, dim=1).values[:, -1:] - 1e-12  # all who are as near as the last
    return near & near.T


def _valley(scores: Tensor, bandwidth: float) -> float:
    """Return the first local minimum of the scores' density above its main mode, or infinity where there is none."""
    at = torch.arange(float(scores.min()), float(scores.max()) + bandwidth / 10, bandwidth / 10, dtype=torch.float64)
    density = torch.exp(-((at[:, None] - scores[None, :]) / bandwidth).square() / 2).sum(1)
    main = int(density.argmax())
    for place in range(main + 1, len(at) - 1):
        if density[place - 1] > density[place] <= density[place + 1]:
            return float(at[place])
    return math.inf
