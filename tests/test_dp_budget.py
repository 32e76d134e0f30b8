"""One budget: accounts apart, nothing entered beyond the limit, nothing claimed where another stage voids it."""

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import inf, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privacy.dp import (
    Accounted,
    Adjacency,
    Budget,
    BudgetExceeded,
    Clear,
    ClippedGaussian,
    GaussianRelease,
    LaplaceRelease,
    RandomisedResponse,
    Release,
    ResponseRelease,
    Shaper,
    epsilon,
)
from privacy.dp.accountants import Accountant
from privacy.dp.analytic import epsilon_of
from splitlearn import Batches, Guards, Kind, Learner, epochs_of, fit, load_checkpoint, save_checkpoint, vanilla
from splitlearn.train import TrainingStopped

GAUSSIAN = GaussianRelease(2.0)
SAMPLE_ADJACENCIES = [adjacency for adjacency in Adjacency if adjacency.unit == "sample"]


# Accounts


def test_accounts_are_kept_apart_and_never_added() -> None:
    budget = Budget()
    apart = [
        budget.account("server", "ann", "replace one input", shaped_by=()),
        budget.account("server", "bob", "replace one input", shaped_by=()),
        budget.account("fed server", "ann", "replace one input", shaped_by=()),
        budget.account("server", "ann", "replace one label", shaped_by=()),
        budget.account("server", "ann", "replace one input", model="central", shaped_by=()),
    ]
    for count, account in enumerate(apart, start=1):
        account.spend(GAUSSIAN, count)
    assert [account.releases[GAUSSIAN] for account in apart] == [1, 2, 3, 4, 5]
    assert [account.epsilon for account in apart] == [epsilon({GAUSSIAN: count}, 1e-5) for count in range(1, 6)]
    claims = budget.claims()
    assert [(one.observer, one.client, one.adjacency, one.model) for one in claims] == [
        ("server", "ann", Adjacency.REPLACE_INPUT, "local"),
        ("server", "bob", Adjacency.REPLACE_INPUT, "local"),
        ("fed server", "ann", Adjacency.REPLACE_INPUT, "local"),
        ("server", "ann", Adjacency.REPLACE_LABEL, "local"),
        ("server", "ann", Adjacency.REPLACE_INPUT, "central"),
    ]
    assert [claim.epsilon for claim in claims] == [account.epsilon for account in apart]
    assert not any("epsilon" in name for name in dir(budget) if name != "epsilon")  # no sum over accounts to ask for
    again = budget.account("server", "ann", Adjacency.REPLACE_INPUT, shaped_by=())
    assert again is apart[0]
    assert len(budget.accounts) == 5


def test_releases_of_one_account_compose_whatever_their_kind() -> None:
    account = Budget().account("server", "ann", "replace one sample", shaped_by=())
    account.spend(GAUSSIAN, 3)
    account.spend(ResponseRelease(1.0, 10), 2)
    account.spend(GAUSSIAN)
    made: Counter[Release] = Counter({GAUSSIAN: 4, ResponseRelease(1.0, 10): 2})
    assert account.releases == made
    assert account.epsilon == epsilon(made, 1e-5)
    claim = account.claim()
    assert claim.epsilon_rdp == epsilon(made, 1e-5, by="rdp") > claim.epsilon
    assert str(claim) == (
        f"ann against server (replace one sample, local): ε = {claim.epsilon:.4g} (RDP {claim.epsilon_rdp:.4g}), "
        "δ = 1e-05, 4 × Gaussian, noise multiplier 2, 2 × randomised response, ε 1 of 10 classes"
    )


def test_a_budget_in_words() -> None:
    budget = Budget(8.0, by="rdp")
    budget.account("server", "ann", "replace one input", shaped_by=())
    budget.account("server", "bob", "add or remove one sample", model="central", shaped_by=()).spend(
        GaussianRelease(1.5, 0.01)
    )
    lines = str(budget).splitlines()
    assert lines[0] == "Budget: at most ε = 8 at δ = 1e-05, by RDP"
    assert "ann against server (replace one input, local): ε = 0 (RDP 0), δ = 1e-05, nothing released" in lines[1]
    assert lines[2].endswith("1 × Gaussian, noise multiplier 1.5, sampling 0.01")
    watching = Budget()
    watching.account("server", "ann", "replace one input", shaped_by=()).spend(Clear(), 2)
    watching.account("server", "ann", "replace one label", shaped_by=()).spend(LaplaceRelease(4.0))
    assert str(watching).startswith("Budget: no limit at")
    assert "ε = ∞ (RDP ∞), δ = 1e-05, 2 × in the clear" in str(watching)
    assert "1 × Laplace, noise multiplier 4" in str(watching)


@pytest.mark.parametrize(
    ("limit", "least", "by", "told"),
    [
        (0.0, 1e-5, "pld", "expected ε above 0 and δ between 0 and 1, got 0"),
        (-1.0, 1e-5, "pld", "expected ε above 0"),
        (float("nan"), 1e-5, "pld", "expected ε above 0"),
        (1.0, 0.0, "pld", "δ between 0 and 1"),
        (1.0, 1.0, "pld", "δ between 0 and 1"),
        (1.0, 1e-5, "gdp", "expected the accountant rdp, pld or prv, got 'gdp'"),
    ],
)
def test_budgets_that_are_none(limit: float, least: float, by: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Budget(limit, least, by=by)


def test_an_adjacency_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"among 'replace one input', .*got 'replace everything'"):
        Budget().account("server", "ann", "replace everything", shaped_by=())


# Spending


def test_what_exceeds_is_refused_before_it_is_entered() -> None:
    budget = Budget(4.0)
    account = budget.account("server", "ann", "replace one input", shaped_by=())
    account.spend(GAUSSIAN, 3)
    before = account.epsilon
    with pytest.raises(BudgetExceeded) as refused:
        account.spend(GAUSSIAN, 2)
    would = epsilon({GAUSSIAN: 5}, 1e-5)
    assert str(refused.value) == (
        f"expected at most ε=4 at δ=1e-05 for ann against server (replace one input), got {would:.4g} with the next "
        "after 3 × Gaussian, noise multiplier 2; it was not made: stop here, or start again with more noise "
        "(Account.noise_for says how much)"
    )
    assert isinstance(refused.value, TrainingStopped)
    assert isinstance(refused.value, ValueError)
    assert account.releases == {GAUSSIAN: 3}
    assert account.slack == 0
    assert account.epsilon == before
    with pytest.raises(BudgetExceeded, match=r"got ∞ with the next after 3 ×"):
        account.spend(Clear())
    with pytest.raises(BudgetExceeded, match="with the next after no releases so far"):
        budget.account("server", "bob", "replace one input", shaped_by=()).spend(GaussianRelease(0.1))
    assert account.releases == {GAUSSIAN: 3}


def test_a_refusal_enters_no_slack_either() -> None:
    account = Budget(4.0).account("server", "ann", "add or remove one sample", shaped_by=())
    with pytest.raises(BudgetExceeded, match="got ∞ with the next"):
        account.spend(GAUSSIAN, slack=1e-5)
    assert account.slack == 0
    account.spend(GAUSSIAN, 2, slack=1e-9)
    assert account.slack == 2e-9
    assert account.epsilon == epsilon({GAUSSIAN: 2}, 1e-5, slack=2e-9) > epsilon({GAUSSIAN: 2}, 1e-5)


def test_spending_nothing_and_what_makes_no_sense() -> None:
    account = Budget(1.0).account("server", "ann", "replace one input", shaped_by=())
    account.spend(Clear(), 0)
    assert account.epsilon == 0
    assert not account.releases
    for times, slack in ((-1, 0.0), (1, -0.1), (1, 1.0)):
        with pytest.raises(ValueError, match="expected 0 releases or more and a probability"):
            account.spend(GAUSSIAN, times, slack=slack)


def test_prv_counts_gaussians_and_refuses_all_else_at_once() -> None:
    for limit in (inf, 8.0):
        account = Budget(limit, by="prv").account("server", "ann", "replace one input", shaped_by=())
        account.spend(GaussianRelease(2.0, 0.1), 3)
        for other in (LaplaceRelease(50.0), ResponseRelease(0.01, 10)):
            with pytest.raises(ValueError, match=r"expected Gaussian releases alone in a budget by prv.*by='pld'"):
                account.spend(other)
        assert account.releases == {GaussianRelease(2.0, 0.1): 3}  # so that what it comes to can still be told
        assert account.claim().epsilon > 0


@pytest.mark.parametrize(
    ("release", "times", "slack", "by", "limit"),
    [
        (GAUSSIAN, 1, 0.0, "pld", 8.0),
        (GAUSSIAN, 3, 0.0, "pld", 8.0),  # steps that are no power of two
        (GAUSSIAN, 5, 0.0, "rdp", 10.0),
        (GAUSSIAN, 1, 1e-8, "pld", 5.0),
        (LaplaceRelease(4.0), 3, 0.0, "pld", 4.0),
        (ResponseRelease(0.5, 10), 1, 0.0, "pld", 4.0),
        (ResponseRelease(0.5, 10), 7, 0.0, "rdp", 6.0),
        (ResponseRelease(0.002, 10), 1999, 0.0, "pld", 0.7),  # each below the step of the distribution's grid
        (GaussianRelease(1.0, 0.02), 77, 0.0, "pld", 2.0),
        (GaussianRelease(1.0, 0.02), 50, 0.0, "prv", 1.5),
    ],
)
def test_the_fast_allowance_agrees_with_asking_each_time(
    release: Release, times: int, slack: float, by: Accountant, limit: float
) -> None:
    account = Budget(limit, by=by).account("server", "ann", "replace one sample", shaped_by=())
    for step in itertools.count(1):
        would = epsilon({release: step * times}, 1e-5, by=by, slack=step * times * slack)
        if would > limit:
            break
        account.spend(release, times, slack=slack)
        assert account.epsilon <= limit
    with pytest.raises(BudgetExceeded, match="it was not made"):
        account.spend(release, times, slack=slack)
    assert account.releases == {release: (step - 1) * times}
    assert step > 2


@pytest.mark.parametrize("times", [3, 5, 6, 7])  # no powers of two, from which halving misses some counts
def test_many_at_once_and_then_one_by_one_reach_the_same_count(times: int) -> None:
    release = GaussianRelease(10.0)  # some hundred of them, of which the last few tens are beyond RDP's bound
    for limit in (5.0, 6.0, 6.1, 6.2):
        account = Budget(limit).account("server", "ann", "replace one input", shaped_by=())
        made = 0
        for step in (times, 1):
            while epsilon({release: made + step}, 1e-5) <= limit:
                account.spend(release, step)
                made += step
            with pytest.raises(BudgetExceeded, match="expected at most"):
                account.spend(release, step)
        assert account.releases[release] == made


def test_the_allowance_of_one_release_does_not_outlive_another() -> None:
    small, great = ResponseRelease(0.3, 4), LaplaceRelease(3.0)
    account = Budget(4.0).account("server", "ann", "replace one sample", shaped_by=())
    made: Counter[Release] = Counter()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    while refused < 6:
        release = small if torch.rand((), generator=generator) < 0.7 else great
        times = int(torch.randint(1, 4, (), generator=generator))
        if epsilon(made + Counter({release: times}), 1e-5) <= 4.0:
            account.spend(release, times)
            made[release] += times
        else:
            refused += 1
            with pytest.raises(BudgetExceeded, match="expected at most ε=4"):
                account.spend(release, times)
        assert account.releases == made


def test_slack_that_comes_later_shrinks_what_was_allowed_before() -> None:
    release = GAUSSIAN
    for burdened in range(1, 12):
        account = Budget(8.0).account("server", "ann", "replace one sample", shaped_by=())
        made = slack = 0
        for step in range(40):
            more = 2e-10 if step == burdened else 0.0
            if epsilon({release: made + 1}, 1e-5, slack=slack + more) <= 8.0:
                account.spend(release, slack=more)
                made, slack = made + 1, slack + more
            else:
                with pytest.raises(BudgetExceeded, match="expected at most ε=8"):
                    account.spend(release, slack=more)
        assert account.epsilon <= 8.0
        assert account.releases[release] == made


# Planning


@pytest.mark.parametrize(
    ("make", "releases"),
    [
        (GaussianRelease, 20),
        (LaplaceRelease, 4),
        (lambda noise: ResponseRelease(1 / noise, 10), 4),
        (partial(GaussianRelease, sampling=0.05), 60),
    ],
)
@pytest.mark.parametrize("before", [None, GaussianRelease(3.0)])
def test_planned_noise_leaves_exactly_enough_room(
    make: Callable[[float], Release], releases: int, before: Release | None
) -> None:
    by: Accountant = "rdp" if isinstance(make, partial) else "pld"  # a search over distributions takes 10 s
    account = Budget(6.0, by=by).account("server", "ann", "replace one sample", shaped_by=())
    if before is not None:
        account.spend(before)
    release = make(account.noise_for(make, releases=releases))
    assert sum(account.releases.values()) == (before is not None)  # asking enters nothing
    account.spend(release, releases)
    assert 0.99 * 6 < account.epsilon <= 6  # the noise is within 0.01 % of the least, and ε follows it
    with pytest.raises(BudgetExceeded, match="expected at most ε=6"):
        account.spend(release)


def test_planning_without_a_limit_or_without_room() -> None:
    with pytest.raises(ValueError, match=r"expected a budget with a finite ε to plan for.*Budget\(epsilon=…\)"):
        Budget().account("server", "ann", "replace one input", shaped_by=()).noise_for(GaussianRelease, releases=3)
    account = Budget(1.0).account("server", "ann", "replace one input", shaped_by=())
    account.spend(GaussianRelease(account.noise_for(GaussianRelease, releases=1)))
    with pytest.raises(ValueError, match="what was spent before leaves nothing"):
        account.noise_for(GaussianRelease, releases=10**13)


# What shapes a release


def _stage(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers or (nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


def _trained() -> Learner:
    stage = _stage()
    return Learner("bottom", stage, torch.optim.SGD(stage.parameters(), 0.1))


def _still(stage: nn.Module | None = None) -> Learner:
    return Learner("bottom", stage or _stage())


def _frozen_parameters() -> Learner:
    stage = _stage()
    optimizer = torch.optim.SGD(stage.parameters(), 0.1)
    return Learner("bottom", stage.requires_grad_(False), optimizer)


class _Private(nn.Module):  # stands for a PrivateLearner: a stage, trained by DP-SGD
    name, trains_privately, optimizer = "private one", True, object()

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


@pytest.mark.parametrize("adjacency", SAMPLE_ADJACENCIES)
@pytest.mark.parametrize(
    "shaper",
    [
        _still,
        _frozen_parameters,
        lambda: _stage().requires_grad_(False),
        lambda: nn.Flatten(),
        lambda: Shaper("public top", "frozen"),
        lambda: _still(_stage(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()),
        lambda: _still(_stage(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Dropout())),
    ],
)
def test_what_is_frozen_may_shape_a_release(adjacency: Adjacency, shaper: Callable[[], Any]) -> None:
    account = Budget().account("server", "ann", adjacency, shaped_by=[shaper()])
    assert account.private == []


@pytest.mark.parametrize("adjacency", SAMPLE_ADJACENCIES)
@pytest.mark.parametrize(
    ("shaper", "name"),
    [(_trained, "bottom"), (_stage, "Sequential"), (lambda: Shaper("far top", "trained"), "far top")],
)
def test_what_trains_without_privacy_voids_an_epsilon_for_a_sample(
    adjacency: Adjacency, shaper: Callable[[], Any], name: str
) -> None:
    budget = Budget()
    told = (
        f"got {name}, trained without privacy on the same data: one changed sample moves it, and with it every other "
        f"sample's release, so that no ε to {adjacency} holds. Freeze it"
    )
    with pytest.raises(ValueError, match=told):
        budget.account("server", "ann", adjacency, shaped_by=[_still(), shaper()])
    assert not budget.accounts


@pytest.mark.parametrize("adjacency", [Adjacency.REPLACE_CLIENT, Adjacency.ADD_REMOVE_CLIENT])
def test_under_a_clients_adjacency_anything_may_train(adjacency: Adjacency) -> None:
    mixing = _stage(nn.Linear(3, 4), nn.BatchNorm1d(4))
    shapers = [_trained(), _stage(), mixing, Shaper("far top", "trained")]
    assert Budget().account("server", "ann", adjacency, shaped_by=shapers).private == []


@pytest.mark.parametrize("adjacency", SAMPLE_ADJACENCIES)
def test_dp_sgd_shapes_releases_of_its_own_account_alone(adjacency: Adjacency) -> None:
    shapers = [_Private(), Shaper("far one", "private")]
    if adjacency is not Adjacency.ADD_REMOVE_SAMPLE:
        for shaper, name in zip(shapers, ("private one", "far one"), strict=True):
            with pytest.raises(ValueError, match=f"to be frozen or public, got {name}, trained by DP-SGD, whose acc"):
                Budget().account("server", "ann", adjacency, shaped_by=[shaper])
        return
    budget = Budget()
    account = budget.account("server", "ann", adjacency, shaped_by=shapers, model="central")
    assert account.private == shapers
    assert budget.account("server", "ann", adjacency, shaped_by=shapers, model="central").private == shapers
    with pytest.raises(ValueError, match="to be frozen or in DP-SGD's own account, got bottom, trained without"):
        budget.account("server", "ann", adjacency, shaped_by=[_trained()], model="central")


@pytest.mark.parametrize("adjacency", SAMPLE_ADJACENCIES)
@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, track_running_stats=False).eval(),  # which goes by the batch in evaluation, too
        nn.Sequential(nn.Identity(), nn.BatchNorm1d(4, affine=False)),
    ],
)
def test_batch_norm_that_goes_by_the_batch_voids_it_too(adjacency: Adjacency, layer: nn.Module) -> None:
    stage = nn.Sequential(nn.Linear(3, 4), layer).requires_grad_(False)
    for shaper in (stage, _still(stage)):
        with pytest.raises(ValueError, match=r"got batch norm '1.*one sample moves every row of its batch.*group norm"):
            Budget().account("server", "ann", adjacency, shaped_by=[shaper])


def test_what_cannot_be_looked_at_must_be_told() -> None:
    for unknown in ("bottom", None, 3):
        with pytest.raises(ValueError, match=r"expected a party of this process, a module or a Shaper.*'frozen'"):
            Budget().account("server", "ann", "replace one input", shaped_by=[unknown])


# Checkpoints


def _spent(limit: float = 20.0, by: Accountant = "pld") -> Budget:
    budget = Budget(limit, 1e-6, by=by)
    account = budget.account("server", "ann", "replace one sample", shaped_by=())
    account.spend(GaussianRelease(3.0, 0.5), 7, slack=1e-13)
    account.spend(LaplaceRelease(4.0), 2)
    account.spend(ResponseRelease(1.5, 10), 3)
    budget.account("server", "bob", "add or remove one client", model="central", shaped_by=()).spend(GAUSSIAN)
    return budget


def _opened(limit: float = 20.0, by: Accountant = "pld") -> Budget:
    budget = Budget(limit, 1e-6, by=by)
    budget.account("server", "bob", "add or remove one client", model="central", shaped_by=())
    budget.account("server", "ann", "replace one sample", shaped_by=())
    return budget


@pytest.mark.parametrize("limit", [20.0, inf])
def test_a_checkpoint_carries_what_was_spent(limit: float, tmp_path: Path) -> None:
    before = _spent(limit)
    if limit == inf:
        before.account("server", "ann", "replace one sample", shaped_by=()).spend(Clear())
    save_checkpoint(tmp_path / "budget", before.state_dict())
    after = _opened(limit)
    after.load_state_dict(load_checkpoint(tmp_path / "budget"))
    for key, account in before.accounts.items():
        assert after.accounts[key].releases == account.releases
        assert after.accounts[key].slack == account.slack
        assert after.accounts[key].claim() == account.claim()
    assert set(map(str, after.claims())) == set(map(str, before.claims()))
    # And goes on from there: the limit holds for all together.
    one, other = (budget.account("server", "ann", "replace one sample", shaped_by=()) for budget in (before, after))
    for account in (one, other):
        account.spend(GAUSSIAN)
    assert one.epsilon == other.epsilon


def test_loading_drops_what_was_allowed_before() -> None:
    state = _spent(8.0).state_dict()
    budget = _opened(8.0)
    account = budget.account("server", "ann", "replace one sample", shaped_by=())
    budget.load_state_dict(state)
    made = Counter(account.releases)
    while epsilon(made + Counter({GAUSSIAN: 1}), 1e-6, slack=account.slack) <= 8.0:
        account.spend(GAUSSIAN)
        made[GAUSSIAN] += 1
    with pytest.raises(BudgetExceeded, match="expected at most ε=8"):
        account.spend(GAUSSIAN)


def test_an_older_state_unspends_nothing() -> None:
    budget = Budget(20.0)
    account = budget.account("server", "ann", "replace one input", shaped_by=())
    account.spend(GAUSSIAN, 2, slack=1e-9)
    older = budget.state_dict()
    account.spend(GAUSSIAN, 3, slack=1e-9)
    account.spend(LaplaceRelease(5.0))
    spent = account.epsilon
    budget.load_state_dict(older)
    assert account.releases == {GAUSSIAN: 5, LaplaceRelease(5.0): 1}
    assert account.epsilon == spent
    assert account.slack == 2e-9 + 3e-9


def test_a_checkpoint_of_another_process_adds_to_what_was_entered_in_this_one() -> None:
    before, after = _spent(), _opened()
    account = after.account("server", "ann", "replace one sample", shaped_by=())
    account.spend(LaplaceRelease(4.0), 3, slack=1e-13)
    state = before.state_dict()
    after.load_state_dict(state)
    spent = before.account("server", "ann", "replace one sample", shaped_by=()).releases
    assert account.releases == spent + Counter({LaplaceRelease(4.0): 3})
    assert account.slack == pytest.approx(7e-13 + 3e-13)
    once = Counter(account.releases)
    after.load_state_dict(state)  # it is now an earlier state of this one
    assert account.releases == once
    assert after.state_dict()["line"] == state["line"]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: _opened(21.0), "expected the state of a budget of ε=21, δ=1e-06 by pld, got ε=20"),
        (lambda: _opened(20.0, "rdp"), "δ=1e-06 by rdp, got ε=20, δ=1e-06 by pld; resume with the same budget"),
        (lambda: Budget(20.0, 1e-5), "δ=1e-05 by pld, got ε=20, δ=1e-06"),
        (lambda: Budget(20.0, 1e-6), r"expected the state of the accounts \[\], got .*open the same ones before you"),
    ],
)
def test_the_state_of_another_budget_is_refused(other: Callable[[], Budget], told: str) -> None:
    budget = other()
    with pytest.raises(ValueError, match=told):
        budget.load_state_dict(_spent().state_dict())
    assert not any(account.releases for account in budget.accounts.values())


def test_more_accounts_than_the_state_has_are_refused() -> None:
    budget = _opened()
    budget.account("server", "eve", "replace one input", shaped_by=())
    with pytest.raises(ValueError, match=r"expected the state of the accounts \[.*'eve'.*open the same ones"):
        budget.load_state_dict(_spent().state_dict())
    assert not any(account.releases for account in budget.accounts.values())


# Training within a budget


class _Run:
    """A frozen bottom whose noised activations and answered labels train a top: one release of each kind an epoch."""

    def __init__(self, limit: float, *, seed: int | None = 0) -> None:
        torch.manual_seed(1)
        self.budget = Budget(limit)
        bottom, top = nn.Linear(3, 4), nn.Linear(4, 2)
        x = torch.randn(20, 3)
        self.batches = Batches(x, (x[:, 0] > 0).long(), batch_size=8)
        self.account = self.budget.account("server", "ann", "replace one sample", shaped_by=[_still(bottom)])
        self.guard = Accounted(
            Guards(ClippedGaussian(1.0, 2.0), RandomisedResponse(1.0, 2)),
            self.account, over=self.batches,
        )  # fmt: skip
        self.client = Learner("client", bottom, None, self.guard, seed=seed)
        self.server = Learner("server", top, torch.optim.SGD(top.parameters(), 0.1))
        self.epoch = epochs_of(partial(vanilla, self.client, self.server), self.batches)
        self.state: dict[str, Any] = {
            "client": self.client, "server": self.server, "batches": self.batches, "budget": self.budget,
        }  # fmt: skip

    def weights(self) -> Tensor:
        return torch.cat([entry.flatten() for entry in self.server.weights().values()])


def _cost(epochs: int, labels: int | None = None) -> float:
    return epsilon({GAUSSIAN: epochs, ResponseRelease(1.0, 2): epochs if labels is None else labels}, 1e-5)


def test_training_ends_in_good_order_where_the_budget_ends(tmp_path: Path) -> None:
    run = _Run(_cost(3) + 0.01)
    done: list[int] = []
    history = fit(
        run.epoch, epochs=10, state=run.state, checkpoint=tmp_path / "run",
        progress=lambda epoch, *_: done.append(epoch),
    )  # fmt: skip
    assert done == [1, 2, 3]
    assert len(history.losses) == 3
    assert history.stopped_by.startswith("expected at most ε=")
    assert "it was not made: stop here" in history.stopped_by
    assert not history.stopped_early
    assert run.account.releases == {GAUSSIAN: 3, ResponseRelease(1.0, 2): 3}
    assert run.account.epsilon <= run.budget.epsilon
    assert run.server.steps == 3 * 3
    run.client.state_dict()  # no step is left open
    # The file is that of the third epoch: resumed from, it ends in the same place and trains no further.
    again = _Run(_cost(3) + 0.01)
    resumed = fit(again.epoch, epochs=10, state=again.state, checkpoint=tmp_path / "run")
    assert resumed.losses == history.losses
    assert resumed.stopped_by == history.stopped_by
    assert again.account.releases == run.account.releases
    assert torch.equal(again.weights(), run.weights())


def test_a_resumed_run_goes_on_with_what_was_spent(tmp_path: Path) -> None:
    whole = _Run(50.0)
    expected = fit(whole.epoch, epochs=4, state=whole.state)
    first, second = _Run(50.0), _Run(50.0)
    fit(first.epoch, epochs=2, state=first.state, checkpoint=tmp_path / "run")
    assert first.account.epsilon == _cost(2)
    history = fit(second.epoch, epochs=4, state=second.state, checkpoint=tmp_path / "run")
    assert history.losses == expected.losses
    assert torch.equal(second.weights(), whole.weights())
    assert second.account.releases == whole.account.releases == {GAUSSIAN: 4, ResponseRelease(1.0, 2): 4}
    assert second.account.epsilon == whole.account.epsilon == _cost(4)


def test_a_budget_that_ends_before_the_first_epoch_does() -> None:
    run = _Run(0.1)
    before = run.weights()
    history = fit(run.epoch, epochs=3, state=run.state)
    assert history.losses == []
    assert "no releases so far" in history.stopped_by
    assert torch.equal(run.weights(), before)


def test_the_best_state_put_back_does_not_bring_back_the_budget() -> None:
    run = _Run(50.0)
    scores = iter([0.5, 0.9, 0.1, 0.2, 0.3])
    history = fit(run.epoch, epochs=5, state=run.state, validate=lambda: next(scores), patience=3)
    assert history.best_epoch == 2
    assert run.batches.epoch == 2  # that of then
    assert run.account.releases == {GAUSSIAN: 5, ResponseRelease(1.0, 2): 5}  # all that crossed
    run.epoch()
    assert run.account.releases == {GAUSSIAN: 6, ResponseRelease(1.0, 2): 6}


@pytest.mark.parametrize("seed", [0, None])
def test_no_noise_is_sent_again_once_the_best_state_is_back(seed: int | None) -> None:
    run = _Run(50.0, seed=seed)
    scores = iter([0.9, 0.1, 0.2])
    noises: list[Tensor] = []

    class Watched(ClippedGaussian):
        def activation(self, z: Tensor) -> Tensor:
            sent = super().activation(z)
            noises.extend((sent - ClippedGaussian(self.clip, 0.0).activation(z)).detach())
            return sent

    run.guard.mechanism = Guards(Watched(1.0, 2.0), RandomisedResponse(1.0, 2))

    def validate() -> float:
        run.client.predict(run.batches.x)  # whose stream goes on, too
        return next(scores)

    fit(run.epoch, epochs=5, state=run.state, validate=validate, patience=2)
    assert run.batches.epoch == 1  # the best is back: the same batches come, in the same order
    run.epoch()
    run.client.predict(run.batches.x)
    assert len(noises) == 4 * (20 + 20)
    far = torch.pdist(torch.stack(noises))
    assert far.min() > 0.01  # rows of four entries of standard deviation 4


def test_a_run_is_not_resumed_without_its_budget(tmp_path: Path) -> None:
    first, second = _Run(50.0), _Run(50.0)
    for run in (first, second):
        del run.state["budget"]
    fit(first.epoch, epochs=2, state=first.state, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match=r"expected the 4 releases of ann.*got 0; resume with the budget too: state="):
        fit(second.epoch, epochs=4, state=second.state, checkpoint=tmp_path / "run")
    assert not second.account.releases


def test_a_budget_that_ends_in_a_validation_ends_the_training(tmp_path: Path) -> None:
    # 20 predictions of the validation are entered as a pass, too: epochs 1 and 2 cost two Gaussians each.
    run = _Run(_cost(3, labels=2) + 0.01)

    def validate() -> float:
        run.client.predict(run.batches.x)
        return 0.0

    history = fit(run.epoch, epochs=5, state=run.state, validate=validate, checkpoint=tmp_path / "run")
    assert len(history.losses) == len(history.scores) == 1  # the second epoch was trained, but never validated
    assert history.stopped_by.startswith("expected at most ε=")
    assert run.account.releases == {GAUSSIAN: 3, ResponseRelease(1.0, 2): 2}
    assert load_checkpoint(tmp_path / "run")["done"] == 1


def test_labels_alone_are_in_no_account_of_inputs() -> None:
    for adjacency, kinds in (
        ("replace one input", {Kind.ACTIVATION, Kind.GRADIENT}),
        ("replace one label", {Kind.LABEL, Kind.GRADIENT, Kind.LOSS}),
        ("replace one sample", {Kind.ACTIVATION, Kind.GRADIENT, Kind.LABEL, Kind.LOSS}),
        ("replace one client's data", {Kind.ACTIVATION, Kind.GRADIENT, Kind.LABEL, Kind.LOSS}),
        ("add or remove one sample", {Kind.WEIGHTS}),
        ("add or remove one client", {Kind.WEIGHTS}),
    ):
        account = Budget().account("server", "ann", adjacency, shaped_by=())
        assert {kind for kind in Kind if account.bears_on(kind)} == kinds


def test_the_closed_form_at_the_limit_itself() -> None:
    # ε of exactly nine releases is affordable, to the last bit; one more is not.
    account = Budget(epsilon_of(1e-5, sqrt(9 / 4))).account("server", "ann", "replace one input", shaped_by=())
    account.spend(GAUSSIAN, 9)
    with pytest.raises(BudgetExceeded, match="with the next after 9 ×"):
        account.spend(GAUSSIAN)


def test_what_shapes_a_release_must_be_said_and_is_looked_at_again() -> None:
    budget, bottom = Budget(), nn.Linear(4, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"expected shaped_by=\[…\] for an account to replace one input"):
        budget.account("server", "ann", "replace one input")
    budget.account("server", "ann", "replace one client's data")  # the client is the unit, whatever trains
    account = budget.account("server", "ann", "replace one input", shaped_by=[bottom])
    account.spend(GAUSSIAN)
    bottom.requires_grad_(True)
    with pytest.raises(ValueError, match="got Linear, trained without privacy on the same data"):
        account.spend(GAUSSIAN)
    assert account.releases == {GAUSSIAN: 1}
