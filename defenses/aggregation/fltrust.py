"""FLTrust: members count as far as they agree with an update of the server's own.

Cao, Fang, Liu & Gong 2021, "FLTrust: Byzantine-robust federated learning via trust bootstrapping" (NDSS,
arXiv:2012.13995).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from defenses.aggregation.points import Points, Rule, Verdict, squared_norms
from splitlearn.deltas import deltas

__all__ = ["FLTrust", "Rooted"]


@dataclass(frozen=True, eq=False)
class FLTrust(Rule):
    """Σ ReLU(cos(g_i, g_0))·(‖g_0‖ / ‖g_i‖)·g_i / Σ ReLU(cos(g_i, g_0)) for the server's row g_0, ``reference`` [d].

    Withstands any number of bad rows, as far as the server's few samples are like the members': a row across from g_0
    counts for nothing, and none counts for more than ‖g_0‖. What agrees with g_0 and does something else besides gets
    through. Zeros where nobody agrees. Rescaled rows may make a batch norm's running variance negative: leave these
    out. In a federation the server's row is another in each round: ``Rooted``. O(n·d).
    """

    reference: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if self.reference.ndim != 1 or not bool(self.reference.isfinite().all()):
            raise ValueError(
                f"FLTrust: expected a finite row [d] of the server's own, got {tuple(self.reference.shape)}; "
                "train on the server's samples from the weights that members started from"
            )

    def verdict(self, points: Points) -> Verdict:
        """Return the row; shares are what each row is multiplied by, its rescaling included."""
        own = self.reference.detach().cpu().double()
        if len(own) != points.rows.shape[1]:
            raise ValueError(
                f"FLTrust: expected members' rows as long as the server's, of {len(own)} numbers, got "
                f"{points.rows.shape[1]}; take the server's over the entries that members send"
            )
        length = own.norm()
        lengths = squared_norms(points.rows).sqrt()
        unit = torch.where(lengths > 0, 1 / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 0.0)
        trust = (points.rows.double() @ own * unit / length).clamp(min=0) if length > 0 else lengths * 0
        shares = trust * length * unit / trust.sum() if trust.sum() > 0 else trust * 0
        return Verdict(points.combined(shares), shares)


@dataclass(frozen=True)
class Rooted:
    """FLTrust for ``Robust``: ``own`` trains on the server's samples from a round's start, and returns what came of it.

    That is the server's weights, or its row [d] already: weights less start over the entries that members send, in the
    start's order.
    """

    own: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor] | Tensor]

    def at(self, start: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> FLTrust:
        """Return the rule of the round that starts from ``start``, over the ``entries`` that members send."""
        found = self.own({name: tensor.clone() for name, tensor in start.items()})
        if isinstance(found, Tensor):
            return FLTrust(found)
        if missing := [name for name, own in entries.items() if own.is_floating_point() and name not in found]:
            raise ValueError(
                f"FLTrust: expected the server's weights over the entries that members send, got none for "
                f"{', '.join(missing)}; train the same stage"
            )
        return FLTrust(deltas([{name: found[name] for name in entries if name in found}], start)[0])
