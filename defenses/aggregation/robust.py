"""A rule on updates as a federation's aggregator, behind a screen for what is not finite."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.aggregation.fltrust import Rooted
from defenses.aggregation.points import Points, Rule, Verdict, usable
from splitlearn.deltas import applied, deltas
from splitlearn.members import Weights

__all__ = ["Robust", "Screened"]


@dataclass(frozen=True, eq=False)
class Screened:
    """What became of each member in one call, by position.

    ``idle``: had no samples; ``screened``: sent what is not finite; ``shares`` [members]: its part in the result, 0 for
    those two, or None where the rule has no shares (a coordinate at a time, or no ``Rule``).
    """

    idle: tuple[int, ...]
    screened: tuple[int, ...]
    shares: Tensor | None


class Robust:
    """An aggregator: deltas from the start, those that are not finite screened out, ``rule`` on the others, applied.

    Protects the average, and what is averaged alone, from members that send whatever they like: as far as the rule
    withstands them. Not what a member does to a server's shared top on the way, and not what hides within the honest
    updates' spread. A rule is any callable [n, d] -> [d] in float64, or ``Rooted``. Robust rules take all members
    alike: sample counts do not weigh, as anybody could claim more of them; a member with none is left out. Integer
    entries are the lower median of the members' that are left.

    ``last`` says who was screened and whose part was how large in the last call, ``screened`` counts in all calls. A
    member whose update has a norm above 1e150 counts as not finite. ``ValueError`` where too few are left.
    """

    def __init__(self, rule: Rule | Rooted | Callable[[Tensor], Tensor]):
        self.rule = rule
        self.last: Screened | None = None
        self.screened = 0
        self._known: list[int] | None = None  # the positions that a rule which remembers members knows

    def __call__(
        self, weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> Weights:
        """Return the entries of a round's result, given each member's weights, samples, and what all started from."""
        if not weights or len(weights) != len(counts) or min(counts) < 0 or sum(counts) == 0:
            raise ValueError(
                f"expected weights of members with some samples, got {len(weights)} weights, counts {list(counts)}"
            )
        busy = [place for place, count in enumerate(counts) if count]
        rows = deltas([weights[place] for place in busy], start)
        fine = usable(rows)
        left = [place for place, good in zip(busy, fine.tolist(), strict=True) if good]
        screened = tuple(place for place in busy if place not in left)
        self.screened += len(screened)
        self.last = Screened(tuple(place for place, count in enumerate(counts) if not count), screened, None)
        rule = self.rule.at(start, weights[busy[0]]) if isinstance(self.rule, Rooted) else self.rule
        least = rule.least if isinstance(rule, Rule) else 1
        if len(left) < least:
            raise ValueError(
                f"expected at least {least} members with finite updates for {rule}, got {len(left)} of {len(busy)} "
                f"({len(screened)} screened as not finite); lower f, or ask more members"
            )
        if isinstance(rule, Rule) and rule.remembers:
            if self._known not in (None, left):
                raise ValueError(
                    f"{rule} remembers members by position: expected those at {self._known} in every call, got {left} "
                    f"({len(screened)} screened as not finite); start it anew, or take a rule without a memory"
                )
            self._known = left
        kept = rows if len(left) == len(busy) else rows[fine.to(rows.device)]
        found = rule.verdict(Points(kept)) if isinstance(rule, Rule) else Verdict(rule(kept))
        if found.shares is not None:
            shares = torch.zeros(len(weights), dtype=torch.float64)
            shares[left] = found.shares.double()
            self.last = Screened(self.last.idle, screened, shares)
        return applied(found.delta.to(rows.device), _integers([weights[place] for place in left]), start)


def _integers(weights: Sequence[Mapping[str, Tensor]]) -> Weights:
    """Return the first one's entries, those of integers replaced by the lower median of all."""
    result = dict(weights[0])
    for name, first in weights[0].items():
        if not first.is_floating_point():
            every = torch.stack([own[name].to(first.device) for own in weights])
            result[name] = every.sort(dim=0).values[(len(weights) - 1) // 2]
    return result
