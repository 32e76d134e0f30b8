"""Accounted: a guard that enters what its mechanism releases into accounts, before it is sent."""

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from privacy.dp.adjacency import BEARS_ON
from privacy.dp.budget import Account
from privacy.dp.releases import Clear, Release
from splitlearn import Batches, Guard, Guards, Kind

__all__ = ["Accounted"]

GUARDED = (Kind.ACTIVATION, Kind.GRADIENT, Kind.LABEL)  # what a guard is asked about
BESIDE = (*GUARDED, Kind.LOSS)  # and what crosses beside it, in the clear


class Accounted(Guard):
    """Sends what ``mechanism`` sends, and enters every release into each of ``accounts`` first.

    ``mechanism`` is a guard with a proof (``ClippedGaussian``, ``ClippedLaplace``, ``OnGradient``,
    ``RandomisedResponse``), or ``Guards`` of several. Where a release would exceed a budget, nothing is sent and
    ``BudgetExceeded`` is raised.

    Under a sample's adjacency an account counts the releases of the sample that is released most often. ``over`` says
    how samples pass: ``Batches``, a ``DataLoader`` that draws without replacement, or the number of rows in a pass, all
    of different samples. Rows are then counted, and every begun pass is a release. A pass that is broken off must be
    closed by ``new_pass()``; ``Batches`` tell by themselves where one begins. Without ``over`` every frame is a release
    of one and the same sample, which may be in it once. Under a client's adjacency every row of every frame is a
    release.

    ``crosses`` names the kinds that cross from this party, where the accounts bear on more than the mechanism covers:
    those without a mechanism are entered as crossing in the clear. What another party sends to the same observer, such
    as the gradients of a head in the U shape, is entered by that party's own guard, into the same account.

    Each frame of a party's predictions (``Learner.predict``, and with it ``evaluate``) is a release of its own. With
    ``predictions="of others"`` they are not, under a sample's adjacency: the caller says that no sample predicted is
    among those that pass. ``predicted`` counts their rows, each a release of its own sample.
    """

    def __init__(
        self,
        mechanism: Guard,
        *accounts: Account,
        over: "Batches | DataLoader[Any] | int | None" = None,
        crosses: Collection[Kind] | None = None,
        predictions: Literal["entered", "of others"] = "entered",
    ):
        if predictions not in ("entered", "of others"):
            raise ValueError(f"expected predictions='entered' or 'of others', got {predictions!r}")
        self.mechanism, self.accounts, self.predictions = mechanism, accounts, predictions
        self.rows = Counter[str]()
        self.passes = Counter[str]()
        self.predicted = 0
        self._resumed: list[int] = []
        self._over = None if over is None else rows_in_a_pass(over)
        self._batches = over if isinstance(over, Batches) else None
        self._epoch = over.epoch if isinstance(over, Batches) else 0
        self._releases = _releases(mechanism)
        if not self._releases:
            raise ValueError(f"expected a mechanism with a proof, got {mechanism!r}; ClippedGaussian is one")
        if past := [kind for kind in crosses or () if kind not in BESIDE]:
            raise ValueError(
                f"expected crosses=… among {', '.join(BESIDE)}, got {past[0]}: it crosses past every guard, so "
                "that no account of this one can hold it"
            )
        if not accounts:
            raise ValueError("expected at least one account to enter releases into; budget.account(…) opens one")
        for account in accounts:
            self._check(account, crosses)
        self._clear = frozenset(Kind(kind) for kind in crosses or ()) - set(self._releases)

    def __repr__(self) -> str:
        return f"Accounted({self.mechanism!r}, {', '.join(repr(str(account.adjacency)) for account in self.accounts)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Accounted":
        """Return a guard of its own that enters what it sends into the same accounts."""
        other = copy.copy(self)
        other.mechanism = copy.deepcopy(self.mechanism, memo)
        other.rows, other.passes = Counter(self.rows), Counter(self.passes)
        other.new_pass()  # it may send any sample again
        return other

    def activation(self, z: Tensor) -> Tensor:
        """Return what the mechanism sends for ``z``; entered first."""
        self._enter(Kind.ACTIVATION, len(z))
        return self.mechanism.activation(z)

    def prediction(self, z: Tensor) -> Tensor:
        """Return what the mechanism sends for ``z``; entered first, unless it is of others."""
        self._enter(Kind.ACTIVATION, len(z), predicted=self.predictions)
        return self.mechanism.prediction(z)

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what the mechanism sends for ``g``; entered first."""
        self._enter(Kind.GRADIENT, len(g))
        return self.mechanism.gradient(g, y)

    def label(self, y: Tensor) -> Tensor:
        """Return what the mechanism sends for ``y``; entered first."""
        self._enter(Kind.LABEL, len(y))
        return self.mechanism.label(y)

    def penalty(self, x: Tensor, z: Tensor) -> Tensor | None:
        """Return the mechanism's own penalty."""
        return self.mechanism.penalty(x, z)

    @property
    def secret(self) -> bool:
        """As the mechanism's."""
        return self.mechanism.secret

    @property
    def penalises(self) -> bool:
        """Whether the mechanism does."""
        return self.mechanism.penalises

    def new_pass(self) -> None:
        """Say that a new pass over the samples begins, though the last one may not have been finished."""
        for kind in self.rows:
            self.rows[kind] = self.passes[kind] * (self._over or 0)

    def simulated(self) -> Guard:
        """Return the mechanism alone: who simulates what it sends releases nothing."""
        return self.mechanism.simulated()

    def state_dict(self) -> dict[str, Any]:
        """Return how far each pass is; the accounts are in the budget's own state."""
        return {
            "mechanism": self.mechanism.state_dict(), "rows": dict(self.rows), "passes": dict(self.passes),
            "predicted": self.predicted,
            "entered": [sum(account.releases.values()) for account in self.accounts],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.mechanism.load_state_dict(state["mechanism"])
        self.rows, self.passes = Counter(state["rows"]), Counter(state["passes"])
        self.predicted = max(self.predicted, state["predicted"])  # a best state put back unsends nothing
        self._resumed = list(state["entered"])

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Have the mechanism take over its earlier state; what was sent stays sent, and a new pass begins."""
        self.mechanism.put_back(state["mechanism"])
        self.new_pass()

    def _check_resumed(self) -> None:
        """Raise ``ValueError`` where a resumed account has lost what this guard had entered."""
        for account, entered in zip(self.accounts, self._resumed, strict=False):
            if sum(account.releases.values()) < entered:
                raise ValueError(
                    f"expected the {entered} releases of {account.name} that were entered before, got "
                    f"{sum(account.releases.values())}; resume with the budget too: state={{'budget': budget, …}}"
                )
        self._resumed = []

    def _enter(self, kind: Kind, rows: int, *, predicted: str | None = None) -> None:
        """Enter a frame of ``rows`` rows of one kind into every account that it bears on."""
        release = self._releases.get(kind, Clear() if kind in self._clear else None)
        if release is None or not rows:
            return
        self._check_resumed()
        if Kind.LOSS in self._clear:
            for account in self.accounts:
                if account.bears_on(Kind.LOSS):
                    account.spend(Clear())
            self._clear -= {Kind.LOSS}
        if self._batches is not None and self._batches.epoch != self._epoch:
            self.new_pass()
            self._epoch = self._batches.epoch
        if predicted is None:
            passes = self._passes_with(kind, rows)
            times = passes - self.passes[kind]
        else:  # a prediction is no part of a pass: a release of its own, or of others
            times = 1 if predicted == "entered" else 0
        for account in self.accounts:
            if account.bears_on(kind):
                count = rows if account.adjacency.unit == "client" else times
                # Where one of several accounts is exhausted, those before it have entered what is not sent: too much
                # is entered then, never too little.
                account.spend(release, min(count, 1) if isinstance(release, Clear) else count)
        if predicted is None:
            self.rows[kind] += rows
            self.passes[kind] = passes
        elif predicted == "of others":
            self.predicted += rows

    def _passes_with(self, kind: Kind, rows: int) -> int:
        """Return how many passes will have begun once ``rows`` more rows have crossed."""
        if self._over is None:
            return self.passes[kind] + 1
        if rows > self._over:
            raise ValueError(
                f"expected frames of at most {self._over} rows, those of a pass, got {rows}: a sample would cross "
                "twice in one frame; over=… is how many samples pass"
            )
        return -(-(self.rows[kind] + rows) // self._over)

    def _check(self, account: Account, crosses: Collection[Kind] | None) -> None:
        covered = [kind for kind in self._releases if account.bears_on(kind)]
        if not covered:
            raise ValueError(
                f"expected an account on which {self.mechanism!r} bears, got one to {account.adjacency}; "
                f"{_fitting(self._releases)}"
            )
        if account.model != "local":
            raise ValueError(
                f"expected a local account, got a {account.model} one: this noise is each sample's own, and no sum "
                "over samples hides it; budget.account(…, model='local')"
            )
        open_kinds = [kind for kind in (Kind.ACTIVATION, Kind.LABEL) if account.bears_on(kind)]
        if crosses is None and (lacking := [kind for kind in open_kinds if kind not in self._releases]):
            raise ValueError(
                f"expected crosses={{Kind.…}} for the account to {account.adjacency}, on which {lacking[0]}s bear too: "
                f"{self.mechanism!r} does not cover them; name all kinds that cross from this party, or add a mechanism"
            )


def rows_in_a_pass(over: "Batches | DataLoader[Any] | int") -> int:
    """Return how many rows, each of another sample, one pass sends; ``ValueError`` where samples may come twice."""
    if isinstance(over, Batches):
        return len(over) * over.batch_size if over.drop_last else len(over.x)
    if isinstance(over, DataLoader):
        sampler = over.sampler
        if not isinstance(sampler, SequentialSampler | RandomSampler) or getattr(sampler, "replacement", False):
            how = " with replacement" if getattr(sampler, "replacement", False) else ""
            raise ValueError(
                f"expected a loader that draws each sample once a pass, got {type(sampler).__name__}{how}: a sample "
                "may come twice, and its ε would be counted once; shuffle without replacement"
            )
        whole = getattr(sampler, "data_source", ())
        if type(over.batch_sampler) is not BatchSampler or over.batch_sampler.sampler is not sampler:
            raise ValueError(
                "expected a loader that makes batches of its own sampler, got batches made otherwise, in which a "
                "sample may come twice; use DataLoader(dataset, batch_size=…, shuffle=True)"
            )
        samples = len(sampler)
        if samples > len(whole):
            raise ValueError(
                f"expected a loader that draws each sample once a pass, got {samples} draws of {len(whole)} samples; "
                "leave num_samples=… out"
            )
        if over.drop_last:
            assert over.batch_size is not None
            samples -= samples % over.batch_size
        return samples
    if not isinstance(over, int) or over < 1:
        raise ValueError(f"expected Batches, a DataLoader, or at least one row in a pass, got {over!r}")
    return over


def _releases(guard: Guard) -> dict[Kind, Release]:
    """Return what a guard releases by kind; of several in a row the first one counts, the rest is post-processing.

    Not so a later one that changes gradients: it is told the true labels.
    """
    found: dict[Kind, Release] = {}
    for one in guard.guards if isinstance(guard, Guards) else (guard,):
        own = getattr(one, "releases", {})
        if Kind.GRADIENT in found and Kind.GRADIENT not in own and type(one).gradient is not Guard.gradient:
            raise ValueError(
                f"expected nothing that sees the labels once the gradient is noised, got {one!r}; put it before the "
                "mechanism"
            )
        for kind, release in own.items():
            found.setdefault(kind, release)
    return found


def _fitting(releases: Mapping[Kind, Release]) -> str:
    kinds = " and ".join(f"{kind}s" for kind in releases)
    fitting = [repr(str(adjacency)) for adjacency, bearing in BEARS_ON.items() if bearing & set(releases)]
    return f"{kinds} bear on: {', '.join(fitting)}"
