"""Colluding: members' updates replaced by an attack's, on their way to an aggregator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attacks.poisoning.updates import UpdateAttack
from splitlearn.deltas import applied, deltas
from splitlearn.federation import Aggregator, mean
from splitlearn.members import Weights

__all__ = ["Colluding"]


@dataclass(frozen=True)
class Colluding:
    """An aggregator before which the members at the positions ``bad`` send what ``attack`` makes of all updates.

    The adversary is omniscient: the colluders read every honest update of the round before they send theirs, as the
    literature's worst case has it; no member of a real federation could. The updates of members that diverged (nan,
    inf) they pass over. Positions are among the members that finished the round, in their order: run it where none
    drops out. They lie about weights alone: the counts of samples, integer entries and entries that stay local are as
    in an honest round, and so is what they did to a server's stage on the way. Wrap the bottoms' aggregator only;
    clients have no hand in that of the server's copies (``aggregate_tops`` in ``splitfed_v1_round``).

    Without colluders, what ``aggregate`` is called with is what came, bit for bit.
    """

    attack: UpdateAttack
    bad: tuple[int, ...]
    aggregate: Aggregator = mean

    def __post_init__(self) -> None:
        if len(set(self.bad)) < len(self.bad) or any(place < 0 for place in self.bad):
            raise ValueError(f"expected positions of 0 or more, each once, got bad={self.bad}; count members from 0")

    def __call__(
        self, weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> Weights:
        """Return the aggregate of the honest members' weights and the colluders' lies."""
        if not self.bad:
            return self.aggregate(weights, counts, start)
        if max(self.bad) >= len(weights) or len(self.bad) == len(weights):
            raise ValueError(
                f"expected colluders among {len(weights)} members, and one honest, got bad={self.bad}; "
                "has somebody dropped out?"
            )
        rows = deltas(weights, start)
        known = [place for place in range(len(rows)) if place not in self.bad and rows[place].isfinite().all()]
        lies = self.attack(rows[known], rows[list(self.bad)])
        if lies.shape != (len(self.bad), rows.shape[1]):
            raise ValueError(
                f"expected {len(self.bad)} rows of {rows.shape[1]} numbers from {self.attack!r}, got "
                f"{tuple(lies.shape)}; a row a colluder"
            )
        sent: list[Mapping[str, Tensor]] = list(weights)
        for place, lie in zip(self.bad, lies, strict=True):
            sent[place] = applied(lie, weights[place], start)
        return self.aggregate(sent, counts, start)
