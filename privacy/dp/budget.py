"""Budget: one account of all releases of a run, kept per observer, client and adjacency, and never added across.

An account answers: what does this observer learn about one neighbour's change in this client's data, from everything
that it was sent, in all epochs together? Releases of one account compose, whatever their kind (activations, gradients,
labels, weights); two accounts never do, since they answer different questions.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import inf, isfinite
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from privacy.dp import releases as made
from privacy.dp.accountants import Accountant, calibrate, epsilon
from privacy.dp.releases import Release
from splitlearn.frames import Kind
from splitlearn.train import TrainingStopped

__all__ = ["Account", "Adjacency", "Budget", "BudgetExceeded", "Claim", "Shaper"]

Model = Literal["local", "central"]


class Adjacency(StrEnum):
    """What one neighbour differs in. ε bounds how well the two can be told apart."""

    REPLACE_INPUT = "replace one input"  # its label is public, or crosses nowhere
    REPLACE_LABEL = "replace one label"  # its input is public
    REPLACE_SAMPLE = "replace one sample"  # input and label
    ADD_REMOVE_SAMPLE = "add or remove one sample"
    REPLACE_CLIENT = "replace one client's data"
    ADD_REMOVE_CLIENT = "add or remove one client"

    @property
    def unit(self) -> Literal["sample", "client"]:
        """Whose change is hidden: one sample's, or that of all samples of a client."""
        return "client" if self in (Adjacency.REPLACE_CLIENT, Adjacency.ADD_REMOVE_CLIENT) else "sample"


BEARS_ON = {
    Adjacency.REPLACE_INPUT: {Kind.ACTIVATION, Kind.GRADIENT},
    Adjacency.REPLACE_LABEL: {Kind.LABEL, Kind.GRADIENT},
    Adjacency.REPLACE_SAMPLE: {Kind.ACTIVATION, Kind.GRADIENT, Kind.LABEL},
    Adjacency.REPLACE_CLIENT: {Kind.ACTIVATION, Kind.GRADIENT, Kind.LABEL},
    Adjacency.ADD_REMOVE_SAMPLE: {Kind.WEIGHTS},
    Adjacency.ADD_REMOVE_CLIENT: {Kind.WEIGHTS},
}


class BudgetExceeded(TrainingStopped, ValueError):  # noqa: N818 - the end of a run in good order
    """The next release would exceed the budget; it was not made. ``fit`` ends in good order on it."""


@dataclass(frozen=True)
class Shaper:
    """A trained parameter set that shapes what is released, where it cannot be looked at (across a wire, say).

    ``frozen``: never trained, or on public data alone. ``private``: trained by DP-SGD in the same account.
    ``trained``: trained on the data without privacy.
    """

    name: str
    status: Literal["frozen", "private", "trained"]


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
        self.private: list[Any] = []  # parties that train by DP-SGD in this account
        self._allowance: tuple[Counter[Release], float, Release, int] | None = None

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
        """
        if times < 0 or not 0 <= slack < 1:
            raise ValueError(f"expected 0 releases or more and a probability, got {times} and {slack}")
        if not times:
            return
        if self.budget.by == "prv" and not isinstance(release, made.GaussianRelease | made.Clear):
            raise ValueError(
                f"expected Gaussian releases alone in a budget by prv, got {_told(release)}; use Budget(by='pld')"
            )
        if not self._affords(release, times, slack):
            would = self._epsilon_with(release, times, slack, self.budget.by)
            raise BudgetExceeded(
                f"expected at most ε={self.budget.epsilon:g} at δ={self.budget.delta:g} for {self.name}, got "
                f"{_number(would)} with the next of {_listed(self.releases) or 'no releases so far'}; it was not made: "
                "stop here, or start again with more noise (Account.noise_for says how much)"
            )
        self.releases[release] += times
        self.slack += times * slack

    def noise_for(self, make: Callable[[float], Release], *, releases: int) -> float:
        """Return the least noise with which ``releases`` of ``make(noise)`` fit into what is left of the budget.

        Asked before training: ``account.noise_for(GaussianRelease, releases=epochs)``; see ``calibrate``.
        """
        if not isfinite(self.budget.epsilon):
            raise ValueError("expected a budget with a finite ε to plan for, got an infinite one; Budget(epsilon=…)")
        return calibrate(
            make, epsilon=self.budget.epsilon, delta=self.budget.delta, releases=releases, beside=self.releases,
            by=self.budget.by, slack=self.slack,
        )  # fmt: skip

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

    def account(
        self,
        observer: str,
        client: str,
        adjacency: Adjacency | str,
        *,
        shaped_by: Iterable[Any] = (),
        model: Model = "local",
    ) -> Account:
        """Open the account of what ``observer`` learns of one neighbour's change in ``client``'s data, or return it.

        ``shaped_by`` names all parties, or modules, whose trained parameters shape what is released: the bottom for
        activations; bottom and top for gradients and for DP-SGD. Under a sample's adjacency each must be frozen (no
        optimizer, or no parameter that asks for a gradient), a ``Shaper`` that says so, or trained by DP-SGD in this
        account. Any other was moved by the changed sample, and with it moves every other sample's release, which
        voids the claim: ``ValueError`` says so. Then the unit is the client, and all its frames compose.

        ``model``: ``local`` where each sample is noised before anybody else sees it, ``central`` where somebody
        trusted adds up first (a client its own samples in DP-SGD, a fed server its clients).
        """
        adjacency = Adjacency(adjacency)
        key = (observer, client, adjacency.value, model)
        shapers = list(shaped_by)
        if adjacency.unit == "sample":
            for shaper in shapers:
                _check_shaper(shaper, adjacency)
        if key not in self.accounts:
            self.accounts[key] = Account(self, observer, client, adjacency, model)
        account = self.accounts[key]
        account.private += [one for one in shapers if _status(one)[1] == "private" and one not in account.private]
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
        return {"epsilon": self.epsilon, "delta": self.delta, "by": self.by, "accounts": accounts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; limit and accounts must be the same, or nothing is taken.

        What these accounts have entered themselves is never unspent: of each release the greater count stays. So
        ``fit`` may put back its best state, whose budget is that of then.
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
            spent = {getattr(made, name)(**fields): times for name, fields, times in found[key]["releases"]}
            account.releases |= Counter(spent)
            account.slack, account._allowance = max(account.slack, found[key]["slack"]), None


def _status(shaper: Any) -> tuple[str, str]:
    """Return the name of what shapes a release, and whether it is frozen, private or trained."""
    if isinstance(shaper, Shaper):
        return shaper.name, shaper.status
    stage = shaper if isinstance(shaper, nn.Module) else getattr(shaper, "stage", None)
    if not isinstance(stage, nn.Module):
        raise ValueError(
            f"expected a party of this process, a module or a Shaper, got {shaper!r}; of a party across a wire say "
            "what is known: Shaper(name, 'frozen'), 'private' or 'trained'"
        )
    name = getattr(shaper, "name", type(stage).__name__)
    if getattr(shaper, "trains_privately", False):
        return name, "private"
    still = all(not parameter.requires_grad for parameter in stage.parameters())
    held = not isinstance(shaper, nn.Module) and shaper.optimizer is None
    return name, "frozen" if still or held else "trained"


def _check_shaper(shaper: Any, adjacency: Adjacency) -> None:
    """Raise ``ValueError`` where an ε per sample would not hold for what this party shapes."""
    name, status = _status(shaper)
    private = "in DP-SGD's own account" if adjacency is Adjacency.ADD_REMOVE_SAMPLE else "public"
    if status == "trained" or (status == "private" and adjacency is not Adjacency.ADD_REMOVE_SAMPLE):
        how = "without privacy" if status == "trained" else "by DP-SGD, whose account is another one,"
        raise ValueError(
            f"expected every trained parameter that shapes a release to be frozen or {private}, got {name}, trained "
            f"{how} on the same data: one changed sample moves it, and with it every other sample's release, so that "
            f"no ε to {adjacency} holds. Freeze it (no optimizer, or requires_grad_(False)), train it by DP-SGD "
            "(PrivateLearner), or open the account to 'replace one client's data', where all frames compose"
        )
    stage = shaper if isinstance(shaper, nn.Module) else getattr(shaper, "stage", None)
    if isinstance(stage, nn.Module):
        mixing = [title for title, layer in stage.named_modules() if _mixes(layer)]
        if mixing:
            raise ValueError(
                f"expected no layer that mixes samples in what shapes a release, got batch norm {mixing[0]!r} of "
                f"{name}: one sample moves every row of its batch, so that no ε to {adjacency} holds; use group norm, "
                "or put that layer, with running statistics, into evaluation mode"
            )


def _mixes(layer: nn.Module) -> bool:
    """Whether it is batch norm that goes by the batch: in training, or where it keeps no statistics of its own."""
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)


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
