"""Scores of guesses at labels, attributes and membership, each beside what who saw nothing reaches."""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import beta
from torch import Tensor

from splitlearn.metrics import LeakageScore, accuracy_advantage, auc, membership_advantage

__all__ = ["clopper_pearson", "leak_auc", "matched", "score_labels", "score_membership", "tpr_at_fpr"]

SHUFFLES = 10  # of clusters, for what chance gets
RARE_FPR_NON_MEMBERS = 10_000  # below which a true positive rate at 0.1 % false ones says nothing


def score_labels(
    guessed: Tensor | None, y: Tensor, *, num_classes: int, scores: Tensor | None = None, sizes: Sequence[int] = (),
    named: bool = True, known: Tensor | None = None,
) -> LeakageScore:  # fmt: skip
    """Return accuracy of the guesses [N] at ``y`` [N], and leak AUC of ``scores`` [N] within batches of ``sizes``.

    Where classes have no names for the attacker (``named=False``: clusters), the best assignment of names counts
    (Hungarian matching), also of as many clusters drawn at random, which is then a baseline (``accuracy_shuffled``).
    Else it is the share of the commonest label, and .5 for an AUC. The advantage is that of the mean leak AUC,
    2·AUC − 1, where there are scores, and else that of the accuracy. ``scores`` are for two classes, higher for label
    1. Samples at the places ``known`` [m], whose labels the attack was told, are not counted. Raises ``ValueError``
    where neither guesses nor scores are given, or no batch has both labels.
    """
    if guessed is None and scores is None:
        raise ValueError("expected guesses or scores, got neither; an attack returns at least one of them")
    if known is not None:
        counted = torch.ones(len(y), dtype=torch.bool)
        counted[known.cpu()] = False
        sizes = [int(part.sum()) for part in counted.split(list(sizes) or [len(y)])]
        guessed, scores = (one if one is None else one.cpu()[counted] for one in (guessed, scores))
        y = y.cpu()[counted]
    metrics, baselines, advantage = {}, {}, 0.0
    if guessed is not None:
        if guessed.shape != y.shape or not len(y):
            raise ValueError(
                f"expected one guess a sample, got {tuple(guessed.shape)} for labels {tuple(y.shape)}; "
                "guesses stand in the order in which samples crossed"
            )
        names = guessed if named else matched(guessed, y, num_classes)
        metrics["accuracy"] = (names.cpu() == y.cpu()).double().mean().item()
        baselines["accuracy_majority"] = torch.bincount(y).max().item() / len(y)
        if not named:
            baselines["accuracy_shuffled"] = _shuffled(guessed.cpu(), y.cpu(), num_classes)
        advantage = accuracy_advantage(metrics["accuracy"], max(baselines.values()))
    if scores is not None:
        found = leak_auc(scores, y, sizes)
        metrics |= found
        baselines["leak_auc_chance"] = 0.5
        advantage = membership_advantage(found["leak_auc"])
    return LeakageScore(metrics, baselines, advantage)


def leak_auc(scores: Tensor, y: Tensor, sizes: Sequence[int] = ()) -> dict[str, float]:
    """Return mean and 95th percentile of the AUC within each batch, and how many batches of one class were left out.

    (Li et al. 2022, "Label leakage and protection in two-party split learning", arXiv:2102.08504.) ``scores`` and
    ``y`` (0 or 1) are [N], batch after batch, of ``sizes`` samples; one batch where none are given. Raises
    ``ValueError`` where no batch holds both labels.
    """
    sizes = list(sizes) or [len(y)]
    if scores.shape != y.shape or sum(sizes) != len(y):
        raise ValueError(
            f"expected one score a label, in batches that add up, got {tuple(scores.shape)}, {tuple(y.shape)} and "
            f"{sum(sizes)} samples in batches"
        )
    if len(y) and int(y.max()) > 1:
        raise ValueError(f"expected two classes, 0 and 1, for a leak AUC, got labels up to {int(y.max())}")
    parts = zip(scores.cpu().split(sizes), y.cpu().split(sizes), strict=True)
    found = [auc(part.double(), labels) for part, labels in parts if len(labels.unique()) > 1]
    if not found:
        raise ValueError("expected a batch with both labels, got batches of one class alone; take larger batches")
    areas = torch.tensor(found, dtype=torch.float64)
    return {
        "leak_auc": areas.mean().item(),
        "leak_auc_p95": areas.quantile(0.95).item(),
        "batches_left_out": float(len(sizes) - len(found)),
    }


def matched(clusters: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Return the clusters [N] renamed so that as many as can be are right (Kuhn 1955, the Hungarian method)."""
    counts = torch.zeros(max(num_classes, int(clusters.max()) + 1), num_classes, dtype=torch.int64)
    counts.index_put_((clusters.cpu(), y.cpu()), torch.ones(len(y), dtype=torch.int64), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    names = torch.full((len(counts),), -1)  # a cluster beyond the number of classes has no name
    names[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return names[clusters.cpu()]


def _shuffled(clusters: Tensor, y: Tensor, num_classes: int) -> float:
    """Return the mean accuracy of these clusters in a random order, by the best names."""
    draws = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(y), generator=draws) for _ in range(SHUFFLES)]
    found = [(matched(clusters[order], y, num_classes) == y).double().mean().item() for order in orders]
    return sum(found) / len(found)


def score_membership(members: Tensor, others: Tensor, *, confidence: float = 0.95) -> LeakageScore:
    """Return AUC and true positive rates at small false positive rates of scores, higher for members.

    (Carlini et al. 2022, "Membership inference attacks from first principles", arXiv:2112.03570.) ``members`` [M] and
    ``others`` [N]. Rates stand with Clopper–Pearson bounds (``…_low``, ``…_high``) at ``confidence``, which take the
    threshold as given; it is set by the others, so that with few of them the truth is less sure. Below 100 others the
    rate at 1 % is that at no false positive. That at 0.1 % is given only with 10,000 others or more.
    """
    scores = torch.cat([members, others]).double().cpu()
    truth = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).long()
    metrics = {"auc": auc(scores, truth)}
    for name, fpr in (("tpr_at_1pct", 0.01), ("tpr_at_01pct", 0.001)):
        if fpr < 0.01 and len(others) < RARE_FPR_NON_MEMBERS:
            continue
        hits = tpr_at_fpr(members, others, fpr)
        low, high = clopper_pearson(hits, len(members), confidence)
        metrics |= {name: hits / len(members), f"{name}_low": low, f"{name}_high": high}
    baselines = {"auc_chance": 0.5, "tpr_at_1pct_chance": 0.01}
    return LeakageScore(metrics, baselines, membership_advantage(metrics["auc"]))


def tpr_at_fpr(members: Tensor, others: Tensor, fpr: float) -> int:
    """Return how many members score above a threshold that at most a share ``fpr`` of the others score above."""
    allowed = int(fpr * len(others) + 1e-9)
    ranked = others.double().cpu().sort(descending=True).values
    return int((members.double().cpu() > ranked[allowed]).sum()) if allowed < len(ranked) else len(members)


def clopper_pearson(hits: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact confidence interval of a share (Clopper and Pearson 1934)."""
    if not 0 <= hits <= of or of < 1:
        raise ValueError(f"expected hits from 0 to {of} of at least 1, got {hits}")
    alpha = (1 - confidence) / 2
    low = float(beta.ppf(alpha, hits, of - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - alpha, hits + 1, of - hits)) if hits < of else 1.0
    return low, high
