"""Controllers: which arm (a cut and a codec) each request takes, as network, load and battery change.

Of ``costs`` [T, A] (what each arm would cost at each time) a policy sees the entry that it chose, once it chose it; of
``contexts`` [T, d] (what was last measured) a row, before it chooses. ``switch`` is what a change of arms costs, as
one number or [A, A] from row to column, zero on the diagonal. The first arm is free.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Disjoint", "Fixed", "LinUCB", "Played", "Policy", "QLearning", "Threshold", "best_fixed", "oracle", "play",
    "regret",
]  # fmt: skip

Matrix = NDArray[np.float64]
Features = Callable[[Matrix], Matrix]  # of a context [d], for each arm: [A, D]
Game = tuple[Matrix, Matrix]  # costs [T, A] and contexts [T, d] of a training trace


@dataclass(frozen=True, eq=False)
class Played:
    """What was played: the arm of each request [T], what each cost [T] without switching, and what all of it cost."""

    arms: NDArray[np.int64]
    costs: Matrix
    switches: int
    total: float  # switching included


class Policy(Protocol):
    """What decides."""

    def choose(self, context: Matrix, current: int | None, switch: Matrix) -> int:
        """Return the arm of the next request, from what was last measured [d] and the arm of the last one, if any."""

    def learn(self, context: Matrix, arm: int, cost: float) -> None:
        """Take note of what the request cost under the arm that was chosen."""


def play(policy: Policy, costs: Matrix, contexts: Matrix, switch: Matrix | float = 0.0) -> Played:
    """Have the policy choose an arm for each request in turn, and return what came of it."""
    switch = _checked(costs, switch)
    if contexts.ndim != 2 or len(contexts) != len(costs):
        raise ValueError(f"expected a context a request, [{len(costs)}, d], got shape {contexts.shape}")
    arms: list[int] = []
    current: int | None = None
    for context, cost in zip(contexts, costs, strict=True):
        arm = policy.choose(context, current, switch)
        if not 0 <= arm < costs.shape[1]:
            raise ValueError(f"expected an arm from 0 to {costs.shape[1] - 1}, got {arm} from {policy!r}")
        policy.learn(context, arm, float(cost[arm]))
        arms.append(arm)
        current = arm
    return _played(arms, costs, switch)


def oracle(costs: Matrix, switch: Matrix | float = 0.0) -> Played:
    """Return the cheapest sequence of arms there is, found by dynamic programming that knows the whole trace.

    O(T · A²); what no policy can beat, and none that does not see the future can hope to equal.
    """
    switch = _checked(costs, switch)
    best = costs[0].copy()
    came = np.zeros(costs.shape, dtype=np.int64)
    for time in range(1, len(costs)):
        ways = best[:, None] + switch
        came[time] = ways.argmin(0)
        best = ways.min(0) + costs[time]
    arms = [int(best.argmin())]
    for time in range(len(costs) - 1, 0, -1):
        arms.append(int(came[time, arms[-1]]))
    return _played(arms[::-1], costs, switch)


def best_fixed(costs: Matrix) -> Played:
    """Return the one arm that is cheapest over the whole trace, which it knows, kept throughout."""
    switch = _checked(costs, 0.0)
    return _played([int(costs.sum(0).argmin())] * len(costs), costs, switch)


def regret(played: Played, costs: Matrix, switch: Matrix | float = 0.0) -> float:
    """Return what was paid beyond the oracle, ≥ 0 but for rounding."""
    return played.total - oracle(costs, switch).total


@dataclass(frozen=True)
class Fixed:
    """Always the same arm."""

    arm: int

    @classmethod
    def trained(cls, games: Sequence[Game]) -> "Fixed":
        """Return the arm that is cheapest over the training traces."""
        return cls(int(sum(costs.sum(0) for costs, _ in games).argmin()))

    def choose(self, context: Matrix, current: int | None, switch: Matrix) -> int:
        """Return the arm."""
        return self.arm

    def learn(self, context: Matrix, arm: int, cost: float) -> None:
        """Learn nothing."""


@dataclass(frozen=True, eq=False)
class Threshold:
    """A rule: contexts' columns ``low`` and ``high`` cut at thresholds, an arm for each cell of that table.

    ``arms[i, j]`` is taken where as many as i of ``first`` lie below the first column's value, and j of ``second``
    below the second's. What an engineer would write down, with two thresholds on bandwidth and one on load.
    """

    columns: tuple[int, int]
    first: tuple[float, ...]
    second: tuple[float, ...]
    arms: NDArray[np.int64]

    @classmethod
    def trained(
        cls, games: Sequence[Game], switch: Matrix | float, *, columns: tuple[int, int], quantiles: int = 8
    ) -> "Threshold":
        """Return the rule that costs least over the training traces, of thresholds at quantiles of their contexts.

        For given thresholds a cell has the arm that is cheapest in it on average; switching counts when rules are
        compared, beside those of one arm for all.
        """
        seen = np.concatenate([contexts[:, columns] for _, contexts in games])
        levels = np.quantile(seen, np.linspace(0, 1, quantiles + 1)[1:-1], axis=0)
        rules = [cls(columns, (), (), np.array([[Fixed.trained(games).arm]]))]
        firsts = [*((level,) for level in levels[:, 0]), *combinations(levels[:, 0], 2)]
        for first in firsts:
            for second in ((), *((level,) for level in levels[:, 1])):
                rules.append(cls._filled(games, columns, first, second))
        totals = [sum(rule._total(*game, switch) for game in games) for rule in rules]
        return rules[int(np.argmin(totals))]

    @classmethod
    def _filled(
        cls, games: Sequence[Game], columns: tuple[int, int], first: tuple[float, ...], second: tuple[float, ...]
    ) -> "Threshold":
        sums = np.zeros((len(first) + 1, len(second) + 1, games[0][0].shape[1]))
        for costs, contexts in games:
            cells = np.searchsorted(first, contexts[:, columns[0]]), np.searchsorted(second, contexts[:, columns[1]])
            np.add.at(sums, cells, costs)
        return cls(columns, tuple(map(float, first)), tuple(map(float, second)), sums.argmin(2))

    def _total(self, costs: Matrix, contexts: Matrix, switch: Matrix | float) -> float:
        """Return what the rule pays in a game: as ``play`` does, all requests at once."""
        one, other = self.columns
        cells = np.searchsorted(self.first, contexts[:, one]), np.searchsorted(self.second, contexts[:, other])
        return _played(self.arms[cells], costs, _checked(costs, switch)).total

    def choose(self, context: Matrix, current: int | None, switch: Matrix) -> int:
        """Return the arm of the cell that the context falls in."""
        one, other = self.columns
        return int(self.arms[np.searchsorted(self.first, context[one]), np.searchsorted(self.second, context[other])])

    def learn(self, context: Matrix, arm: int, cost: float) -> None:
        """Learn nothing: the rule stands."""


@dataclass(frozen=True, eq=False)
class Disjoint:
    """Features with weights of its own for each arm: the context over its ``scale`` [d], clipped to ``most`` times it.

    Returns [A, A · d], the context in the arm's own place (the disjoint model of Li et al. 2010).
    """

    num_arms: int
    scale: Matrix
    most: float = 10.0

    def __post_init__(self) -> None:
        if self.num_arms < 1 or not (self.most > 0 and bool((self.scale > 0).all())):
            raise ValueError(f"expected arms ≥ 1, scale and most > 0, got {self.num_arms}, {self.scale}, {self.most}")

    def __call__(self, context: Matrix) -> Matrix:
        """Return the features of each arm."""
        features = np.zeros((self.num_arms, self.num_arms, len(self.scale)))
        features[range(self.num_arms), range(self.num_arms)] = np.clip(context / self.scale, -self.most, self.most)
        return features.reshape(self.num_arms, -1)


class LinUCB:
    """A contextual bandit that takes costs as linear in features, and doubts what it has seen little of.

    Li, Chu, Langford and Schapire 2010 (arXiv:1003.0146): ridge regression, and the arm with the best confidence bound,
    here the least ``estimate − alpha · width``. ``features(context)`` gives [A, D]: ``Disjoint`` is the paper's
    algorithm 1; features of the arms themselves (bytes over bandwidth, operations times load) share what is learnt
    among them, as Zhang, Chen and Xu 2021 (arXiv:2102.02638) choose where to cut. Deviations: the width is in units of
    what the estimates were lately off by (root mean square), so that ``alpha`` has none; and to the bound is added
    ``switch / patience``: what a change costs once is saved at each request until the next, of which ``patience`` is
    the expected number. We know no source for that.

    It learns from the chosen arm's cost alone; ``trained`` has it play on training traces.
    """

    def __init__(
        self, features: Features, *, alpha: float = 1.0, ridge: float = 0.01, patience: float = 1.0, recent: int = 200
    ):
        if not (alpha >= 0 and ridge > 0 and patience > 0 and recent >= 1):
            raise ValueError(
                f"expected alpha ≥ 0, ridge and patience > 0, recent ≥ 1, got {alpha}, {ridge}, {patience}, {recent}"
            )
        self.alpha, self.patience = alpha, patience
        self._features, self._ridge, self._recent = features, ridge, recent
        self._inverse: Matrix | None = None  # of A in the paper
        self._sums = np.zeros(0)  # b in the paper
        self._weights = np.zeros(0)
        self._square, self._count = 1.0, 0  # of what the estimates were off by

    @classmethod
    def trained(
        cls,
        games: Sequence[Game],
        switch: Matrix | float,
        features: Features,
        *,
        alphas: Sequence[float] = (0.3, 1, 3),
        patiences: Sequence[float] = (1, 3, 10, 30),
    ) -> "LinUCB":
        """Return the bandit after the training traces, of the settings that paid least on their second half.

        Each setting has a bandit of its own, which sees the costs of its own choices alone.
        """
        best, least = None, np.inf
        for alpha in alphas:
            for patience in patiences:
                policy = cls(features, alpha=alpha, patience=patience)
                totals = [play(policy, *game, switch).total for game in games]
                if (total := sum(totals[len(games) // 2 :])) < least:
                    best, least = policy, total
        if best is None:
            raise ValueError("expected at least one training trace of finite costs, alpha and patience, got none")
        return best

    def choose(self, context: Matrix, current: int | None, switch: Matrix) -> int:
        """Return the arm whose optimistic cost, and a part of what it takes to change to it, is least."""
        x = self._features(context)
        if self._inverse is None:
            self._inverse = np.eye(x.shape[1]) / self._ridge
            self._sums = self._weights = np.zeros(x.shape[1])
        width = np.sqrt(np.maximum((x @ self._inverse * x).sum(1), 0))
        bound = x @ self._weights - self.alpha * np.sqrt(self._square) * width
        if current is not None:
            bound = bound + switch[current] / self.patience
        return int(bound.argmin())

    def learn(self, context: Matrix, arm: int, cost: float) -> None:
        """Take the cost into the regression."""
        x = self._features(context)[arm]
        assert self._inverse is not None  # it chose the arm
        self._count += 1
        error = cost - float(self._weights @ x)
        self._square += (error**2 - self._square) / min(self._count, self._recent)
        shift = self._inverse @ x
        self._inverse = self._inverse - np.outer(shift, shift) / (1 + x @ shift)  # Sherman and Morrison
        self._sums = self._sums + cost * x
        self._weights = self._inverse @ self._sums


class QLearning:
    """A tabular policy: Watkins' Q-learning (1989; Watkins and Dayan 1992), of discounted costs by cell and arm.

    A state is a cell of the contexts (``edges`` cut each of ``columns``) and the current arm. Contexts do not depend on
    what was chosen, and on a training trace each arm's cost can be reckoned, so that every step updates all arms and
    all current arms of its cell at once, where the original updates the one that it took; the rate of a cell's update
    is one over its number of visits to the power ``decay``. It does not learn while it plays.
    """

    def __init__(self, columns: Sequence[int], edges: Sequence[Matrix], values: Matrix):
        self._columns, self._edges = list(columns), list(edges)
        self._values = values  # [cells, current arm, arm]: what the arm costs from here on, switching included

    @classmethod
    def trained(
        cls,
        games: Sequence[Game],
        switch: Matrix | float,
        *,
        columns: Sequence[int],
        bins: Sequence[int],
        discount: float = 0.9,
        passes: int = 4,
        decay: float = 0.7,
    ) -> "QLearning":
        """Return the policy after so many passes over the training traces; ``bins`` cells a column, by quantiles."""
        if not (0 <= discount < 1 and passes >= 1 and len(bins) == len(columns) and min(bins) >= 1):
            raise ValueError(
                f"expected a discount in [0, 1), passes ≥ 1 and bins ≥ 1 a column, got {discount}, {passes}, {bins}"
            )
        seen = np.concatenate([contexts for _, contexts in games])
        edges = [
            np.unique(np.quantile(seen[:, column], np.linspace(0, 1, number + 1)[1:-1]))
            for column, number in zip(columns, bins, strict=True)
        ]
        num_arms = games[0][0].shape[1]
        cells = int(np.prod([len(edge) + 1 for edge in edges]))
        policy = cls(columns, edges, np.zeros((cells, num_arms, num_arms)))
        visits = np.zeros(cells)
        for _ in range(passes):
            for costs, contexts in games:
                paid = _checked(costs, switch)
                path = [policy._cell(context) for context in contexts]
                for cell, onward, cost in zip(path, path[1:], costs, strict=False):
                    visits[cell] += 1
                    target = paid + cost + discount * policy._values[onward].min(1)
                    policy._values[cell] += (target - policy._values[cell]) / visits[cell] ** decay
        mean = policy._values[visits > 0].mean(0)
        policy._values[visits == 0] = mean  # cells that training never saw: as the others on average
        return policy

    def choose(self, context: Matrix, current: int | None, switch: Matrix) -> int:
        """Return the arm that costs least from here on."""
        values = self._values[self._cell(context)]
        return int((values.min(0) if current is None else values[current]).argmin())

    def learn(self, context: Matrix, arm: int, cost: float) -> None:
        """Learn nothing: it learned on the training traces."""

    def _cell(self, context: Matrix) -> int:
        cell = 0
        for column, edge in zip(self._columns, self._edges, strict=True):
            cell = cell * (len(edge) + 1) + int(np.searchsorted(edge, context[column]))
        return cell


def _checked(costs: Matrix, switch: Matrix | float) -> Matrix:
    """Return ``switch`` as [A, A], after a look at both."""
    if costs.ndim != 2 or 0 in costs.shape:
        raise ValueError(f"expected costs [times, arms], at least one of each, got shape {costs.shape}")
    size = costs.shape[1]
    full = np.full((size, size), switch, dtype=np.float64) if np.ndim(switch) == 0 else np.asarray(switch, np.float64)
    if full.shape != (size, size) or not bool((full >= 0).all()):
        raise ValueError(f"expected switching costs ≥ 0, one or [{size}, {size}], got shape {full.shape}")
    if np.ndim(switch) == 0:
        np.fill_diagonal(full, 0.0)
    elif full.diagonal().any():
        raise ValueError("expected no cost of staying at an arm, got other than 0 on the diagonal of switch")
    return full


def _played(arms: Sequence[int] | NDArray[np.int64], costs: Matrix, switch: Matrix) -> Played:
    chosen = np.array(arms, dtype=np.int64)
    paid = costs[np.arange(len(costs)), chosen]
    moves = switch[chosen[:-1], chosen[1:]]
    return Played(chosen, paid, int((chosen[1:] != chosen[:-1]).sum()), float(paid.sum() + moves.sum()))
