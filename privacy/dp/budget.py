"""Budget: one account of all releases of a run, kept per observer, client and adjacency, and never added across.

An account answers: what does this observer learn about one neighbour's change in this client's data, from everything
that it was sent, in all epochs together? Releases of one account compose, whatever their kind (activations, gradients,
labels, weights); two accounts never do, since they answer different questions.
"""

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite
from threading import RLock
from typing import Any, Literal

from privacy.dp import releases as made
from privacy.dp.accountants import Accountant, calibrate, epsilon
from privacy.dp.adjacency import BEARS_ON, Adjacency
from privacy.dp.releases import Release
from privacy.dp.shapers import check_shaper, status_of
from splitlearn.frames import Kind
from splitlearn.train import TrainingStopped

__all__ = ["Account", "Budget", "BudgetExceeded", "Claim", "Model"]

Model = Literal["local", "central"]


class BudgetExceeded(TrainingStopped, ValueError):  # noqa: N818 - the end of a run in good order
    """The next release would exceed the budget; it was not made. ``fit`` ends in good order on it."""


@dataclass(frozen=True)
class Claim:
    """What an account comes to: for whom, against whom, ε by each accountant, and what it was spent on."""

    observer: str
    client: str
    adjacency: Adjacency
    model: Model
    delta: float
    epsilon: float  # by the budget's accountant
    epsilon_rdp: float
    releases: str

    def __str__(self) -> str:
        """Return the claim in a line."""
        return (
            f"{self.client} against {self.observer} ({self.adjacency}, {self.model}): ε = {_number(self.epsilon)} "
            f"(RDP {_number(self.epsilon_rdp)}), δ = {self.delta:g}, {self.releases}"
        )


class Account:
    """What one observer may learn of one client under one adjacency; made by ``Budget.account``.

    ``spend`` is called before a release is made, by the guards and samplers that make it.
    """

    def __init__(self, budget: "Budget", observer: str, client: str, adjacency: Adjacency, model: Model):
        self.observer, self.client, self.adjacency, self.model = observer, client, adjacency, model
        self.budget = budget
        self.releases: Counter[Release] = Counter()
        self.slack = 0.0  # probability that the run is not the one accounted for: Poisson batches over their capacity
        self.shapers: list[Any] = []  # parties and modules whose parameters shape what is released
        self._lock = RLock()  # replicas of a guard share an account, and may be asked from several threads
        self._allowance: tuple[Counter[Release], float, Release, int] | None = None

    @property
    def private(self) -> list[Any]:
        """The parties that train by DP-SGD in this account."""
        return [shaper for shaper in self.shapers if status_of(shaper)[1] == "private"]

    @property
    def name(self) -> str:
        """Whose data, against whom, under which adjacency."""
        return f"{self.client} against {self.observer} ({self.adjacency})"

    @property
    def epsilon(self) -> float:
        """The ε spent so far, by the budget's accountant; infinite once something crossed in the clear."""
        return epsilon(self.releases, self.budget.delta, by=self.budget.by, slack=self.slack)

    def spend(self, release: Release, times: int = 1, *, slack: float = 0.0) -> None:
        """Enter ``times`` releases, each of what one neighbour may change; ``BudgetExceeded`` where that is too much.

        Nothing is entered then. ``slack`` is the probability, of each of them, that it is not what is accounted for.
        ``ValueError`` where what shapes the releases has come to train without privacy since the account was opened.
        """
        if times < 0 or not 0 <= slack < 1:
            raise ValueError(f"expected 0 releases or more and a probability, got {times} and {slack}")
        if not times:
            return
        if self.budget.by == "prv" and not isinstance(release, made.GaussianRelease | made.Clear):
            raise ValueError(
                f"expected Gaussian releases alone in a budget by prv, got {_told(release)}; use Budget(by='pld')"
            )
        self.check_shapers()
        with self._lock:
            if not self._affords(release, times, slack):
                would = self._epsilon_with(release, times, slack, self.budget.by)
                raise BudgetExceeded(
                    f"expected at most ε={self.budget.epsilon:g} at δ={self.budget.delta:g} for {self.name}, got "
                    f"{_number(would)} with the next after {_listed(self.releases) or 'no releases so far'}; it was "
                    "not made: stop here, or start again with more noise (Account.noise_for says how much)"
                )
            self.releases[release] += times
            self.slack += times * slack

    def noise_for(self, make: Callable[[float], Release], *, releases: int, slack: float = 0.0) -> float:
        """Return the least noise with which ``releases`` of ``make(noise)`` fit into what is left of the budget.

        Asked before training: ``account.noise_for(GaussianRelease, releases=epochs)``; see ``calibrate``. ``slack`` is
        that of each release (``PoissonBatches.overflow``).
        """
        if not isfinite(self.budget.epsilon):
            raise ValueError("expected a budget with a finite ε to plan for, got an infinite one; Budget(epsilon=…)")
        return calibrate(
            make, epsilon=self.budget.epsilon, delta=self.budget.delta, releases=releases, beside=self.releases,
            by=self.budget.by, slack=self.slack + releases * slack,
        )  # fmt: skip

    def check_shapers(self) -> None:
        """Raise ``ValueError`` where an ε of this account's unit does not hold for what shapes its releases."""
        if self.adjacency.unit == "sample":
            for shaper in self.shapers:
                check_shaper(shaper, self.adjacency)

    def bears_on(self, kind: Kind) -> bool:
        """Whether a release of this kind tells something of what this account's neighbours differ in."""
        return kind in BEARS_ON[self.adjacency]

    def claim(self) -> Claim:
        """Return what this account comes to."""
        rdp = epsilon(self.releases, self.budget.delta, by="rdp", slack=self.slack)
        return Claim(
            self.observer, self.client, self.adjacency, self.model, self.budget.delta, self.epsilon, rdp,
            _listed(self.releases) or "nothing released",
        )  # fmt: skip

    def _epsilon_with(self, release: Release, more: int, slack: float, by: Accountant) -> float:
        total = self.releases + Counter({release: more})
        return epsilon(total, self.budget.delta, by=by, slack=self.slack + more * slack)

    def _affords(self, release: Release, times: int, slack: float) -> bool:
        """Whether the budget allows these releases on top; how many it allows is worked out once a kind of release."""
        limit, by = self.budget.epsilon, self.budget.by
        if limit == inf or isinstance(release, made.Clear):
            return limit == inf

        def fits(more: int, accountant: Accountant) -> bool:
            return self._epsilon_with(release, more, slack, accountant) <= limit

        others = Counter({other: count for other, count in self.releases.items() if other != release})
        known, there = self._allowance, self.releases[release]
        # What was entered since is this release alone, under the same slack: the bound that was found still holds.
        if known is not None and known[:3] == (others, slack, release):
            return there + times <= known[3]
        self._allowance = None  # whatever is entered now, that bound did not foresee it
        if by == "pld" and fits(times, "rdp"):  # the fast bound: what it allows needs no distribution
            return True
        if not fits(times, by):
            return False
        most, over = times, 2 * times
        while fits(over, by):
            most, over = over, 2 * over
        while over - most > 1:
            middle = (most + over) // 2
            most, over = (middle, over) if fits(middle, by) else (most, middle)
        self._allowance = (others, slack, release, there + most)
        return True


class Budget:
    """The greatest ε of any account at this δ, and the accounts of a run.

    ``by`` is the accountant that counts (``accountants`` says what each is). With ``epsilon`` infinite it only
    watches. A checkpoint carries it: ``fit(…, state={"budget": budget, …})``; the accounts are opened before.

    What every account assumes: the noise is secret and drawn anew; the observer has none of the other observers'
    messages (who colludes is one observer: give the account both names).
    """

    def __init__(self, epsilon: float = inf, delta: float = 1e-5, *, by: Accountant = "pld"):
        if not epsilon > 0 or not 0 < delta < 1:
            raise ValueError(f"expected ε above 0 and δ between 0 and 1, got {epsilon} and {delta}")
        if by not in ("rdp", "pld", "prv"):
            raise ValueError(f"expected the accountant rdp, pld or prv, got {by!r}")
        self.epsilon, self.delta, self.by = float(epsilon), float(delta), by
        self.accounts: dict[tuple[str, str, str, str], Account] = {}
        self._line = secrets.token_hex(8)  # tells an earlier state of this very budget from another run's

    def account(
        self,
        observer: str,
        client: str,
        adjacency: Adjacency | str,
        *,
        shaped_by: Iterable[Any] | None = None,
        model: Model = "local",
    ) -> Account:
        """Open the account of what ``observer`` learns of one neighbour's change in ``client``'s data, or return it.

        ``shaped_by`` names all parties, or modules, whose trained parameters shape what is released: the bottom for
        activations; bottom and top for gradients and for DP-SGD. Under a sample's adjacency each must be frozen (no
        optimizer, or no parameter that asks for a gradient), a ``Shaper`` that says so, or trained by DP-SGD in this
        account. Any other was moved by the changed sample, and with it moves every other sample's release, which
        voids the claim: ``ValueError`` says so. Then the unit is the client, and all its frames compose. ``()`` says
        that none does, as for labels that are randomised once. It is asked for under a sample's adjacency, and looked
        at again at every release.

        ``model``: ``local`` where each sample is noised before anybody else sees it, ``central`` where somebody
        trusted adds up first (a client its own samples in DP-SGD, a fed server its clients).
        """
        adjacency = Adjacency(adjacency)
        key = (observer, client, adjacency.value, model)
        if shaped_by is None and adjacency.unit == "sample":
            raise ValueError(
                f"expected shaped_by=[…] for an account to {adjacency}: the parties or modules whose trained "
                "parameters shape what is released, () where none does; an ε for one sample rests on it"
            )
        shapers = list(shaped_by or ())
        if adjacency.unit == "sample":
            for shaper in shapers:
                check_shaper(shaper, adjacency)
        if key not in self.accounts:
            self.accounts[key] = Account(self, observer, client, adjacency, model)
        account = self.accounts[key]
        account.shapers += [one for one in shapers if all(one is not other for other in account.shapers)]
        return account

    def claims(self) -> list[Claim]:
        """Return what each account comes to, in the order in which they were opened."""
        return [account.claim() for account in self.accounts.values()]

    def __str__(self) -> str:
        """Return the accounts, a line each."""
        limit = "no limit" if self.epsilon == inf else f"at most ε = {self.epsilon:g}"
        lines = [f"Budget: {limit} at δ = {self.delta:g}, by {self.by.upper()}"]
        return "\n  ".join([*lines, *map(str, self.claims())])

    def state_dict(self) -> dict[str, Any]:
        """Return limit and accounts, for a checkpoint."""
        accounts = [
            {
                "key": list(key),
                "slack": account.slack,
                "releases": [[type(one).__name__, asdict(one), times] for one, times in account.releases.items()],
            }
            for key, account in self.accounts.items()
        ]
        limit = {"epsilon": self.epsilon, "delta": self.delta, "by": self.by}
        return {**limit, "line": self._line, "accounts": accounts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; limit and accounts must be the same, or nothing is taken.

        What these accounts have entered themselves is never unspent. Of an earlier state of this very budget the
        greater count stays, so that ``fit`` may put back its best state. A checkpoint of another process is added to
        what was entered in this one.
        """
        found = {tuple(one["key"]): one for one in state["accounts"]}
        if (state["epsilon"], state["delta"], state["by"]) != (self.epsilon, self.delta, self.by):
            raise ValueError(
                f"expected the state of a budget of ε={self.epsilon:g}, δ={self.delta:g} by {self.by}, got "
                f"ε={state['epsilon']:g}, δ={state['delta']:g} by {state['by']}; resume with the same budget"
            )
        if set(found) != set(self.accounts):
            raise ValueError(
                f"expected the state of the accounts {sorted(self.accounts)}, got {sorted(found)}; open the same ones "
                "before you resume"
            )
        for key, account in self.accounts.items():
            spent: Counter[Release] = Counter()
            for name, fields, times in found[key]["releases"]:
                spent[getattr(made, name)(**fields)] = times
            slack = found[key]["slack"]
            if state["line"] == self._line:
                account.releases, account.slack = account.releases | spent, max(account.slack, slack)
            else:
                account.releases, account.slack = account.releases + spent, account.slack + slack
            account._allowance = None
        self._line = state["line"]


def _listed(releases: Mapping[Release, int]) -> str:
    return ", ".join(f"{times} × {_told(release)}" for release, times in releases.items() if times)


def _told(release: Release) -> str:
    match release:
        case made.GaussianRelease(noise, sampling):
            return f"Gaussian, noise multiplier {noise:.4g}" + (f", sampling {sampling:.4g}" if sampling < 1 else "")
        case made.LaplaceRelease(noise):
            return f"Laplace, noise multiplier {noise:.4g}"
        case made.ResponseRelease(answer, classes):
            return f"randomised response, ε {answer:.4g} of {classes} classes"
    return "in the clear"


def _number(value: float) -> str:
    return "∞" if value == inf else f"{value:.4g}"
