"""Labels from gradients of all epochs so far: what is the same of a sample each time adds up, and noise does not.

Sums over repeated releases are the standard way to undo noise that is drawn anew; the directions after summing are the
spectral signatures of Tran, Li and Mądry 2018 (arXiv:1811.00636), of gradients here in place of activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attacks.labels.guess import Crossed, LabelGuess, crossed
from attacks.labels.rows import hinted, normalised
from attacks.labels.similarity import clustered
from splitlearn import View

__all__ = ["AveragedGradients"]


@dataclass(frozen=True)
class Sums:
    """Gradients added up by sample: ``rows`` [S, d] of the samples numbered ``numbers`` [S], which crossed so often."""

    numbers: Tensor
    rows: Tensor
    crossings: int


@dataclass(frozen=True)
class AveragedGradients:
    """Honest but curious party without labels that remembers: it adds up each sample's gradients over the epochs.

    It knows some labels (hints), and which sample is which: a vertical client is asked by sample number. Where no
    numbers cross, as in the U shape, each crossing is a sample of its own, and only one epoch can be read.

    Sums, in units of their batch's root mean square, are read along their first ``classes`` − 1 singular directions:
    isotropic noise is spread over all of them, and a few classes' gradients lie in few. For two classes the one
    direction gives scores, its sign by hints; for more, clusters of the normalised projections (k-means, the best of
    ``restarts`` by ``seed``) get the names of the hints that they are nearest to, one each. Returns a guess for each
    crossing: [N], those of one sample all the same.
    """

    classes: int
    restarts: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 2 or self.restarts < 1:
            raise ValueError(
                f"expected two classes or more and a restart at least, got {self.classes} and {self.restarts}"
            )

    def remembered(self, view: View, before: Sums | None = None) -> Sums | None:
        """Return what is kept of the view and of what was kept ``before``; None where no sample numbers cross."""
        batches = crossed(view)
        if any(one.ids is None for one in batches):
            return None
        found, _ = summed(batches)
        return found if before is None else added(before, found)

    def __call__(self, view: View, before: Sums | None = None) -> LabelGuess:
        """Return scores for two classes, labels for more, of the view's crossings; ``before`` is of earlier epochs.

        ``evidence`` says how often a sample crossed, on average.
        """
        found, numbers = summed(crossed(view))
        sums = found if before is None else added(before, found)
        sample = torch.searchsorted(sums.numbers, numbers)
        centred = sums.rows - sums.rows.mean(0)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        along = centred @ directions[: self.classes - 1].T
        known, labels = hinted(view, sample)
        evidence = {"releases": sums.crossings / len(sums.rows)}
        if self.classes == 2:
            scores = along[:, 0]
            upwards = scores[known[labels == 1]].mean() > scores[known[labels == 0]].mean()
            return LabelGuess(scores=(scores if upwards else -scores)[sample], evidence=evidence)
        rows = normalised(along)
        clusters = clustered(rows, self.classes, restarts=self.restarts, seed=self.seed)
        return LabelGuess(_named(rows, clusters, known, labels)[clusters][sample], evidence=evidence)


def summed(batches: Sequence[Crossed]) -> tuple[Sums, Tensor]:
    """Return each sample's summed gradient, in units of its batch's root mean square, and whose each crossing is, [N].

    Where no sample numbers crossed, each crossing is a sample of its own.
    """
    parts = [one.g.flatten(1) for one in batches]
    parts = [part / part.square().sum(1).mean().sqrt().clamp(min=torch.finfo(part.dtype).tiny) for part in parts]
    rows, ids = torch.cat(parts), [one.ids for one in batches if one.ids is not None]
    numbers = (
        torch.cat(ids).to(rows.device) if len(ids) == len(batches) else torch.arange(len(rows), device=rows.device)
    )
    return _by_number(numbers, rows, len(rows)), numbers


def added(one: Sums, other: Sums) -> Sums:
    """Return the sums of both."""
    numbers, rows = torch.cat([one.numbers, other.numbers]), torch.cat([one.rows, other.rows])
    return _by_number(numbers, rows, one.crossings + other.crossings)


def _by_number(numbers: Tensor, rows: Tensor, crossings: int) -> Sums:
    each, sample = numbers.unique(return_inverse=True)
    return Sums(each, rows.new_zeros(len(each), rows.shape[1]).index_add_(0, sample, rows), crossings)


def _named(rows: Tensor, clusters: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Return the label of each cluster: of the hints [m] whose mean row has the greatest cosine, one to one."""
    names = labels.unique()
    hints = normalised(torch.stack([rows[known[labels == name]].mean(0) for name in names]))
    count = int(clusters.max()) + 1
    centres = normalised(torch.stack([rows[clusters == cluster].mean(0) for cluster in range(count)]))
    near = centres @ hints.T
    found = names[near.argmax(1)]  # where clusters are more than names
    which, name = linear_sum_assignment(near.cpu().numpy(), maximize=True)
    found[torch.from_numpy(which)] = names[torch.from_numpy(name)]
    return found
