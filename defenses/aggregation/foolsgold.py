"""FoolsGold: members whose updates have long been alike count less, since sybils share a goal.

Fung, Yoon & Beschastnikh 2020, "The limitations of federated learning in Sybil settings" (RAID; as "Mitigating Sybils
in federated learning poisoning", arXiv:1808.04866).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from defenses.aggregation.points import Points, Rule, Verdict, cosines, inner_products

__all__ = ["FoolsGold", "foolsgold_weights"]


def foolsgold_weights(cosine: Tensor, confidence: float = 1.0) -> Tensor:
    """Return the learning rate of each member, [n] in [0, 1], given the cosines of their histories, [n, n].

    v_i = max_j cos_ij; cos_ij shrinks by v_i / v_j where v_j > v_i, which pardons the honest; α_i = 1 − max_j cos_ij,
    over the largest α, then κ·(ln(α / (1 − α)) + ½), in [0, 1] all along.
    """
    others = cosine.clone().fill_diagonal_(-torch.inf)
    nearest = others.max(dim=1).values
    pardoned = nearest[None, :] > nearest[:, None]
    shrunk = torch.where(pardoned & (nearest[None, :] != 0), others * (nearest[:, None] / nearest[None, :]), others)
    alpha = (1 - shrunk.fill_diagonal_(-torch.inf).max(dim=1).values).clamp(0, 1)
    if not alpha.max() > 0:
        return alpha
    return (confidence * ((alpha / alpha.max()).logit() + 0.5)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class FoolsGold(Rule):
    """Σ α_i·x_i / Σ α_i, with α by the cosines between members' updates added up over all calls.

    Zeros where all α are 0. Withstands sybils, however many, that push the same way while honest members differ; not
    one bad member alone, and it leaves out honest ones whose data is alike. Members are told apart by position: each
    call needs the same ones in the same order, and another number is an error. ``forget`` starts anew. One instance for
    one training. O(n²·d).

    Deviations: the sum is over Σ α (the paper adds up updates, of single gradients); the history is of all numbers,
    not only of those that the output depends on most.
    """

    confidence: float = 1.0
    history: list[Tensor] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if not 0 < self.confidence < float("inf"):
            raise ValueError(f"FoolsGold: expected a finite confidence above 0, got {self.confidence}; 1 is a start")

    @property
    def least(self) -> int:
        """2: likeness takes two."""
        return 2

    @property
    def remembers(self) -> bool:
        """Yes: each member's updates, added up."""
        return True

    def forget(self) -> None:
        """Start the histories anew."""
        self.history.clear()

    def verdict(self, points: Points) -> Verdict:
        """Return the row, and each member's part in it; adds the rows to the histories."""
        rows = points.rows.double()
        if len(rows) < self.least:
            raise ValueError(f"FoolsGold: expected n ≥ 2 rows, got {len(rows)}; ask more members")
        if self.history and self.history[0].shape != rows.shape:
            raise ValueError(
                f"FoolsGold: expected updates {tuple(self.history[0].shape)} of the members that its history is of, by "
                f"position, got {tuple(rows.shape)}; let the same members take part in every round, or forget()"
            )
        history = self.history[0] + rows if self.history else rows.clone()
        self.history[:] = [history]
        alpha = foolsgold_weights(cosines(inner_products(history)), self.confidence)
        shares = alpha / alpha.sum() if alpha.sum() > 0 else alpha
        return Verdict(points.combined(shares), shares)
