"""Members' updates as a rule sees them: rows, mixed ones too, their inner products, and what a rule makes of them."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from splitlearn.deltas import inner_products, squared_distances

__all__ = [
    "ByDistance", "Points", "Rule", "Verdict", "checked_norms", "cosines", "enough", "least_rows",
    "squared_norms", "usable",
]  # fmt: skip

LARGEST = 1e300  # squared norm: sums of some of them are finite too, so that no distance becomes nan


def squared_norms(rows: Tensor) -> Tensor:
    """Return ‖x_i‖² of rows [n, d], [n] in float64; infinite or nan where a row has such an entry, or overflows."""
    array = rows.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(np.einsum("ij,ij->i", array, array, dtype=np.float64))


def usable(rows: Tensor) -> Tensor:
    """Return which rows [n, d] are finite, and of a norm of at most 1e150, so that distances are finite; [n]."""
    return squared_norms(rows.detach().cpu()) <= LARGEST


def checked_norms(rows: Tensor) -> Tensor:
    """Return ‖x_i‖² as ``squared_norms`` does; ``ValueError`` where a row is not ``usable``."""
    norms = squared_norms(rows)
    if not bool((norms <= LARGEST).all()):
        bad = (~(norms <= LARGEST)).nonzero().flatten().tolist()
        raise ValueError(
            f"expected finite updates, of norms up to 1e150, got others in rows {bad}; put Robust around the rule"
        )
    return norms


def cosines(products: Tensor) -> Tensor:
    """Return the cosines between rows of these inner products, [n, n]; 0 beside a row of zeros, 1 on the diagonal."""
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)
    return (products * scale[:, None] * scale[None, :]).clamp(-1, 1).fill_diagonal_(1)


class Points:
    """Rows [n, d], finite, float32 or float64; mixed ones are W·X of the rows X that came, and are made when asked for.

    ``ValueError`` for anything else. Nothing here writes into the rows that came.
    """

    def __init__(self, rows: Tensor):
        if rows.ndim != 2 or not rows.numel() or rows.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"expected updates [members, numbers] in float32 or float64, got {rows.dtype} {tuple(rows.shape)}; "
                "make them with splitlearn.deltas.deltas"
            )
        self._own = rows.detach().cpu()
        self._before: tuple[Points, Tensor] | None = None  # the points that these are mixed of, and by which matrix
        self._mixing: Tensor | None = None  # from the rows that came

    def __len__(self) -> int:
        return len(self._own if self._mixing is None else self._mixing)

    @property
    def unchecked(self) -> Tensor:
        """The rows [n, d] for who looks at every number anyway; mixed ones are checked all the same."""
        return self._own if self._mixing is None else self.rows

    @cached_property
    def _norms(self) -> Tensor:
        return checked_norms(self._own)

    @cached_property
    def rows(self) -> Tensor:
        """The rows [n, d], on the CPU; ``ValueError`` where they are not finite."""
        assert len(self._norms)
        return self._own if self._mixing is None else self._mixing.to(self._own.dtype) @ self._own

    @cached_property
    def products(self) -> Tensor:
        """Inner products of the rows less a common centre, [n, n] in float64: for distances, and nothing else.

        The centre is the row of median norm and not the mean: one row far enough away carries the mean with it, and
        the distances among all the others are then lost in rounding. Fewer than half cannot move the median.
        """
        if self._before is not None:
            points, mixing = self._before
            return mixing @ points.products @ mixing.T
        centre = self._own[int(self._norms.argsort()[(len(self._norms) - 1) // 2])]
        return inner_products(self._own, centre)

    @cached_property
    def squared_distances(self) -> Tensor:
        """Squared distances between the rows, [n, n] in float64."""
        return squared_distances(self.products)

    def mixed(self, mixing: Tensor) -> "Points":
        """Return the rows that ``mixing`` [m, n], whose rows sum to 1, makes of these."""
        new = copy.copy(self)  # its rows' norms with it, where they are known
        for made in ("rows", "products", "squared_distances"):
            new.__dict__.pop(made, None)
        new._before = self, mixing
        new._mixing = mixing if self._mixing is None else mixing @ self._mixing
        return new

    def combined(self, shares: Tensor) -> Tensor:
        """Return Σ w_i·x_i for ``shares`` w [n], a row [d]."""
        assert len(self._norms)
        whole = shares if self._mixing is None else shares @ self._mixing
        return whole.to(self._own.dtype) @ self._own


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a rule makes of rows: a row ``delta`` [d], and each row's share in it, [n], where the rule has such shares.

    A share of 0 is a row that counts for nothing. None where every coordinate goes its own way.
    """

    delta: Tensor
    shares: Tensor | None = None


class Rule(ABC):
    """Makes one row [d] of members' rows [n, d]; all rows alike, whatever their sample counts."""

    @property
    def least(self) -> int:
        """The fewest rows that it takes."""
        return 1

    @property
    def remembers(self) -> bool:
        """Whether it remembers each member from call to call, by position."""
        return False

    @abstractmethod
    def verdict(self, points: Points) -> Verdict:
        """Return the row and the shares that ``points`` have in it."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return one row [d] of ``rows`` [n, d], of their type; ``ValueError`` where they are too few."""
        return self.verdict(Points(rows)).delta.to(rows)


class ByDistance(Rule):
    """A rule whose row is Σ w_i·x_i, with shares w that follow from the rows' distances alone."""

    @abstractmethod
    def shares(self, points: Points) -> Tensor:
        """Return the share of each row, [n] in float64, sum 1."""

    def verdict(self, points: Points) -> Verdict:
        """Return the rows added up by their shares."""
        shares = self.shares(points)
        return Verdict(points.combined(shares), shares)


def least_rows(f: int, *, per: int, more: int, rule: str) -> int:
    """Return per·f + more, the fewest rows that ``rule`` takes with ``f`` bad ones among them."""
    if isinstance(f, bool) or not isinstance(f, int) or f < 0:
        raise ValueError(f"{rule}: expected f, the number of bad rows to withstand, of 0 or more, got {f!r}")
    return per * f + more


def enough(rule: Rule, n: int, f: int, limit: str) -> None:
    """Refuse fewer than ``rule.least`` rows; ``limit`` says why in terms of n and f."""
    if n < rule.least:
        raise ValueError(
            f"{type(rule).__name__}: expected {limit} rows, at least {rule.least} with f = {f}, got {n}; "
            "lower f, or ask more members"
        )
