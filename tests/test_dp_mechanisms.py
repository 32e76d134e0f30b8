"""Mechanisms and the guard that accounts for them: what is sent, and that all of it is entered before it is."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from math import exp, sqrt
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from privacy.dp import (
    Account,
    Accounted,
    Adjacency,
    Budget,
    BudgetExceeded,
    Clear,
    ClippedGaussian,
    ClippedLaplace,
    ForwardCrossEntropy,
    GaussianRelease,
    LaplaceRelease,
    OnGradient,
    RandomisedResponse,
    Release,
    ResponseRelease,
    UnbiasedCrossEntropy,
)
from splitlearn import (
    Batches,
    Encoder,
    Features,
    Guard,
    Guards,
    Kind,
    Learner,
    evaluate,
    load_checkpoint,
    save_checkpoint,
    vanilla,
)
from splitlearn.remote import wire

GAUSSIAN = GaussianRelease(2.0)
ANSWER = ResponseRelease(1.0, 3)
MECHANISM = ClippedGaussian(1.0, 2.0)
BOTH = Guards(MECHANISM, RandomisedResponse(1.0, 3))


# ClippedLaplace


def test_rows_are_clipped_in_l1_one_by_one() -> None:
    z = torch.tensor([[3.0, -1.0], [0.3, -0.4], [0.0, 0.0]])
    sent = ClippedLaplace(clip=1.0, noise_multiplier=0.0).activation(z)
    assert torch.allclose(sent, torch.tensor([[0.75, -0.25], [0.3, -0.4], [0.0, 0.0]]))
    assert torch.equal(sent[1:], z[1:])  # inside the ball nothing changes, not even by rounding
    alone = ClippedLaplace(2.0, 0.0).activation(torch.tensor([1.0, -5.0]))  # an activation of one number
    assert alone.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("scale", [0.001, 1.0, 1e4])
def test_no_two_samples_differ_by_more_than_the_l1_sensitivity(scale: float) -> None:
    guard = ClippedLaplace(clip=2.0, noise_multiplier=0.0)
    z = scale * torch.randn(100, 3, 4, 4, dtype=torch.float64)
    sent = guard.activation(torch.cat([z, -z])).flatten(1)
    furthest = torch.cdist(sent, sent, p=1).max()
    assert furthest <= guard.sensitivity * (1 + 1e-12)  # rounding of float64 alone
    if scale >= 1:
        assert furthest == pytest.approx(guard.sensitivity)  # antipodes reach it: 2 · clip is tight


def test_laplace_noise_has_the_stated_law_and_is_drawn_anew() -> None:
    guard = ClippedLaplace(clip=3.0, noise_multiplier=0.5)
    assert guard.scale == 0.5 * 2 * 3.0
    z = torch.zeros(1000, 200)
    first, second = guard.activation(z), guard.activation(z)
    draws, scale = first.numel(), guard.scale
    # Four standard errors each: of the mean √2·b/√n, of E|noise| = b: b/√n, of the variance 2·b²: √20·b²/√n.
    assert first.mean().abs() < 4 * sqrt(2) * scale / sqrt(draws)
    assert first.abs().mean().item() == pytest.approx(scale, rel=4 / sqrt(draws))
    assert first.var().item() == pytest.approx(2 * scale**2, rel=2 * sqrt(20) / sqrt(draws))
    for quantile in (0.5, 2.0, 5.0):  # P(|noise| > q·b) = e^−q, of which a Gaussian has nothing at 5
        chance = exp(-quantile)
        found = (first.abs() > quantile * scale).double().mean().item()
        assert found == pytest.approx(chance, abs=4 * sqrt(chance / draws))
    assert (first - second).var().item() == pytest.approx(4 * scale**2, rel=0.05)  # 4 standard errors are 0.03


@pytest.mark.parametrize("guard", [ClippedLaplace(1.0, 0.0), OnGradient(ClippedLaplace(1.0, 0.0))])
def test_the_gradient_runs_through_the_clipping(guard: Guard) -> None:
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    send = guard.activation if isinstance(guard, ClippedLaplace) else guard.gradient
    assert torch.autograd.gradcheck(send, (3 * z,))
    zero = torch.zeros(2, 3, requires_grad=True)
    send(zero).sum().backward()
    assert torch.equal(zero.grad, torch.ones(2, 3))


@pytest.mark.parametrize(("norm", "make"), [(1, ClippedLaplace), (2, ClippedGaussian)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 512, 8192])
def test_half_precision_stays_within_the_bound(
    norm: int, make: Callable[[float, float], Guard], dtype: torch.dtype, size: int
) -> None:
    for factor in (0.37, 1.0, 3.0):
        z = torch.full((1, size), 6e4 * min(factor, 1.0), dtype=dtype)
        z[:, ::2] *= 0.51
        sent = make(factor, 0.0).activation(z)
        assert sent.dtype == dtype
        # Each entry is rounded once: to 2^−9 of itself in bfloat16, in float16 to half of a subnormal step, 3e-8.
        assert sent.double().norm(p=norm) <= factor * (1 + 2**-9) + size ** (1 / norm) * 3e-8
        assert sent.double().norm(p=norm) > 0.98 * factor - size ** (1 / norm) * 3e-8


@pytest.mark.parametrize(
    ("guard", "kind", "release"),
    [
        (ClippedGaussian(3.0, 2.0), Kind.ACTIVATION, GAUSSIAN),
        (ClippedGaussian(3.0, 0.0), Kind.ACTIVATION, Clear()),
        (ClippedLaplace(3.0, 0.7), Kind.ACTIVATION, LaplaceRelease(0.7)),
        (ClippedLaplace(3.0, 0.0), Kind.ACTIVATION, Clear()),
        (OnGradient(ClippedLaplace(3.0, 0.7)), Kind.GRADIENT, LaplaceRelease(0.7)),
        (OnGradient(ClippedGaussian(3.0, 2.0)), Kind.GRADIENT, GAUSSIAN),
        (RandomisedResponse(1.0, 3), Kind.LABEL, ANSWER),
    ],
)
def test_what_a_mechanism_says_it_releases(guard: Any, kind: Kind, release: Release) -> None:
    assert guard.releases == {kind: release}
    assert copy.deepcopy(guard) == guard


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_laplace_without_a_bound(value: float) -> None:
    for clip in (value, 0.0):
        with pytest.raises(ValueError, match=r"expected a finite clip above 0.*largest L1 norm"):
            ClippedLaplace(clip, 1.0)
    with pytest.raises(ValueError, match=r"expected a finite noise_multiplier of 0 or more.*scale ÷ sensitivity"):
        ClippedLaplace(1.0, value)
    if value != -1:
        with pytest.raises(ValueError, match="1 entries that are nan or inf"):
            ClippedLaplace(1.0, 1.0).activation(torch.tensor([[1.0, value]]))


# OnGradient


def test_a_gradient_is_sent_as_an_activation_would_be() -> None:
    g, y = torch.randn(5, 7), torch.arange(5)
    for mechanism in (ClippedGaussian(0.5, 1.0), ClippedLaplace(0.5, 1.0)):
        torch.manual_seed(3)
        expected = mechanism.activation(g)
        torch.manual_seed(3)
        guard = OnGradient(mechanism)
        assert torch.equal(guard.gradient(g, y), expected)
        assert torch.equal(guard.activation(g), g)
        assert torch.equal(guard.label(y), y)


def test_what_is_no_mechanism_for_a_gradient() -> None:
    for other in (Guard(), RandomisedResponse(1.0, 3), OnGradient(MECHANISM)):
        with pytest.raises(ValueError, match=r"expected a mechanism for activations.*such as ClippedGaussian"):
            OnGradient(other)


# RandomisedResponse


@pytest.mark.parametrize(("epsilon", "classes"), [(0.1, 2), (1.0, 3), (2.0, 10)])
def test_answers_are_true_as_often_as_stated_and_else_uniform(epsilon: float, classes: int) -> None:
    response = RandomisedResponse(epsilon, classes)
    truth = exp(epsilon) / (exp(epsilon) + classes - 1)
    assert response.release.truth == pytest.approx(truth, rel=1e-12)
    draws = 40_000
    for label in (0, classes - 1):
        answers = response.label(torch.full((draws,), label))
        rates = torch.bincount(answers, minlength=classes) / draws
        for answer, rate in enumerate(rates.tolist()):
            chance = truth if answer == label else (1 - truth) / (classes - 1)
            assert rate == pytest.approx(chance, abs=4 * sqrt(chance * (1 - chance) / draws))  # 4 standard errors
    assert not torch.equal(response.label(answers), response.label(answers))  # drawn anew


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_answers_of_any_whole_type(dtype: torch.dtype) -> None:
    y = torch.arange(200).to(dtype).reshape(100, 2)
    answers = RandomisedResponse(0.5, 200).label(y)
    assert answers.shape == y.shape
    assert answers.min() >= 0
    assert answers.max() < 200
    assert RandomisedResponse(0.5, 200).label(y[:0]).shape == (0, 2)


@pytest.mark.parametrize("y", [torch.tensor([0, 3]), torch.tensor([-100, 0]), torch.tensor([0.0, 1.0])])
def test_labels_that_are_none_are_not_answered(y: Tensor) -> None:
    with pytest.raises(ValueError, match="expected whole labels from 0 to 2 to randomise, got torch"):
        RandomisedResponse(1.0, 3).label(y)


def test_responses_that_are_none() -> None:
    with pytest.raises(ValueError, match="expected a finite ε above 0, got 0"):
        RandomisedResponse(0.0, 3)
    with pytest.raises(ValueError, match="expected at least 2 classes"):
        RandomisedResponse(1.0, 1)


# Losses on answers


@pytest.mark.parametrize(("epsilon", "classes"), [(0.3, 2), (1.5, 4)])
def test_the_unbiased_loss_is_cross_entropy_on_the_mean(epsilon: float, classes: int) -> None:
    response = RandomisedResponse(epsilon, classes)
    loss, release = UnbiasedCrossEntropy(response), response.release
    output = torch.randn(3, classes, dtype=torch.float64, requires_grad=True)
    y = torch.randint(classes, (3,))
    mean = torch.zeros((), dtype=torch.float64)
    for answers in product(range(classes), repeat=3):  # every answer to all three labels
        chance = 1.0
        for label, answer in zip(y.tolist(), answers, strict=True):
            chance *= release.truth if answer == label else release.other
        mean = mean + chance * loss(output, torch.tensor(answers))
    plain = cross_entropy(output, y)
    assert mean.item() == pytest.approx(plain.item(), rel=1e-12)  # float64, divided by truth − other = 0.1 at the least
    ours, theirs = (torch.autograd.grad(one, output)[0] for one in (mean, plain))
    assert torch.allclose(ours, theirs, atol=1e-12)  # as the gradients, which are what trains


@pytest.mark.parametrize(("epsilon", "classes"), [(0.3, 2), (1.5, 4), (50.0, 4)])
def test_the_forward_loss_is_least_at_the_true_chances(epsilon: float, classes: int) -> None:
    response = RandomisedResponse(epsilon, classes)
    loss, release = ForwardCrossEntropy(response), response.release
    chances = torch.softmax(torch.randn(classes, dtype=torch.float64), 0)  # of the labels
    answers = release.other + (release.truth - release.other) * chances  # and of the answers
    assert answers.sum().item() == pytest.approx(1, rel=1e-12)

    def expected(output: Tensor) -> Tensor:
        return sum(answers[answer] * loss(output[None], torch.tensor([answer])) for answer in range(classes))

    best = chances.log().requires_grad_()
    value = expected(best)
    (gradient,) = torch.autograd.grad(value, best)
    assert gradient.abs().max() < 1e-12  # float64
    assert value.item() == pytest.approx(-(answers * answers.log()).sum().item(), rel=1e-12)  # their entropy
    for _ in range(20):
        assert expected(best.detach() + 0.3 * torch.randn(classes, dtype=torch.float64)) > value


def test_losses_without_noise_are_cross_entropy() -> None:
    output, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    for kind in (UnbiasedCrossEntropy, ForwardCrossEntropy):
        loss = kind(RandomisedResponse(60.0, 3))  # other is 9e-27
        assert loss(output, y).item() == pytest.approx(cross_entropy(output, y).item(), rel=1e-12)


# Accounted: how samples pass


def _account(adjacency: str = "replace one input", limit: float = float("inf"), **settings: Any) -> Account:
    return Budget(limit).account("server", "ann", adjacency, **{"shaped_by": (), **settings})


def _data(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4), torch.arange(rows) % 3


def _batches(rows: int, *, drop_last: bool) -> Batches:
    return Batches(*_data(rows), batch_size=8, drop_last=drop_last)


def _loader(rows: int, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*_data(rows)), batch_size=8, **settings)


@pytest.mark.parametrize(
    "make",
    [
        partial(_batches, 20, drop_last=False),
        partial(_batches, 20, drop_last=True),
        partial(_batches, 16, drop_last=True),
        partial(_batches, 5, drop_last=False),
        partial(_loader, 20),
        partial(_loader, 20, shuffle=True),
        partial(_loader, 20, shuffle=True, drop_last=True),
        lambda: _loader(20, sampler=RandomSampler(range(20), num_samples=11)),
    ],
)
def test_a_pass_is_one_release_of_each_sample(make: Callable[[], Any]) -> None:
    over, account = make(), _account("replace one sample")
    guard = Accounted(BOTH, account, over=over)
    for epoch in range(1, 4):
        for number, (x, y) in enumerate(over):
            guard.activation(x)
            guard.label(y)
            # From the first frame of a pass on: the sample may be in it.
            assert account.releases == {GAUSSIAN: epoch, ANSWER: epoch}, number
    assert guard.passes == {Kind.ACTIVATION: 3, Kind.LABEL: 3}


@pytest.mark.parametrize(
    ("rows", "frames", "passes"),
    [
        (10, [4, 4, 2], [1, 1, 1]),
        (10, [4, 4, 4, 4, 4, 4], [1, 1, 2, 2, 2, 3]),  # a frame across two passes begins the second
        (10, [10, 10, 10], [1, 2, 3]),
        (10, [0, 3, 0], [0, 1, 1]),  # an empty frame sends nothing
        (1, [1, 1, 1], [1, 2, 3]),
        (None, [4, 100, 4], [1, 2, 3]),  # every frame may hold the same sample
        (None, [0, 4], [0, 1]),
    ],
)
def test_passes_are_counted_by_rows(rows: int | None, frames: list[int], passes: list[int]) -> None:
    account = _account()
    guard = Accounted(MECHANISM, account, over=rows)
    for size, expected in zip(frames, passes, strict=True):
        guard.activation(torch.randn(size, 4))
        assert account.releases[GAUSSIAN] == expected


def test_a_pass_that_is_broken_off_is_closed() -> None:
    account = _account()
    guard = Accounted(MECHANISM, account, over=10)
    for broken in range(1, 4):
        guard.activation(torch.randn(4, 2))
        assert account.releases[GAUSSIAN] == broken
        guard.new_pass()
        guard.new_pass()  # twice is once
    for _ in range(2):
        guard.activation(torch.randn(5, 2))
        assert account.releases[GAUSSIAN] == 4
    each = Accounted(MECHANISM, _account())
    each.activation(torch.randn(4, 2))
    each.new_pass()
    assert each.accounts[0].releases[GAUSSIAN] == 1


def test_a_frame_of_more_rows_than_a_pass_is_refused_and_not_entered() -> None:
    account = _account()
    guard = Accounted(MECHANISM, account, over=10)
    with pytest.raises(ValueError, match="expected frames of at most 10 rows, those of a pass, got 11"):
        guard.activation(torch.randn(11, 2))
    assert not account.releases


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: _loader(9, sampler=RandomSampler(range(9), replacement=True)), "got RandomSampler with replacement"),
        (lambda: _loader(9, sampler=WeightedRandomSampler([1.0] * 9, 9)), "got WeightedRandomSampler"),
        (lambda: _loader(9, sampler=RandomSampler(range(9), num_samples=20)), "got 20 draws of 9 samples"),
        (
            lambda: DataLoader(range(9), batch_sampler=BatchSampler(RandomSampler(range(9), True), 4, False)),
            "got batches made otherwise",
        ),
        (
            lambda: DataLoader(range(9), batch_sampler=[[0, 1], [0, 1]]),
            "got batches made otherwise",
        ),
        (lambda: DataLoader(range(9), batch_size=None), "got batches made otherwise"),
        (lambda: 0, "expected Batches, a DataLoader, or at least one row in a pass, got 0"),
        (lambda: -3, "at least one row in a pass, got -3"),
        (lambda: 2.5, "at least one row in a pass, got 2.5"),
        (lambda: [1, 2], "at least one row in a pass, got"),
    ],
)
def test_loaders_in_which_a_sample_may_come_twice_are_refused(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Accounted(MECHANISM, _account(), over=make())


def test_a_loaders_own_sampler_in_its_own_order_is_taken() -> None:
    own = DataLoader(range(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 4, False))
    with pytest.raises(
        ValueError, match=r"got batches made otherwise.*use DataLoader\(dataset, batch_size=…, shuffle=True\)"
    ):
        Accounted(MECHANISM, _account(), over=own)  # its own sampler cannot be told from another one
    assert Accounted(MECHANISM, _account(), over=_loader(9, sampler=SequentialSampler(range(9))))._over == 9


# Accounted: which accounts


def test_under_a_clients_adjacency_every_row_is_a_release() -> None:
    client, sample = _account("replace one client's data"), _account("replace one sample")
    guard = Accounted(BOTH, client, sample, over=10)
    for size in (4, 4, 2, 4):
        guard.activation(torch.randn(size, 2))
        guard.label(torch.zeros(size, dtype=torch.int64))
    assert client.releases == {GAUSSIAN: 14, ANSWER: 14}
    assert sample.releases == {GAUSSIAN: 2, ANSWER: 2}


def test_each_account_is_entered_what_bears_on_it() -> None:
    accounts = {name: _account(name) for name in ("replace one input", "replace one label", "replace one sample")}
    guard = Accounted(Guards(BOTH.guards[0], BOTH.guards[1], OnGradient(MECHANISM)), *accounts.values())
    guard.activation(torch.randn(3, 2))
    guard.label(torch.zeros(3, dtype=torch.int64))
    guard.label(torch.zeros(3, dtype=torch.int64))
    guard.gradient(torch.randn(3, 2))
    assert accounts["replace one input"].releases == {GAUSSIAN: 2}  # activation and gradient
    assert accounts["replace one label"].releases == {ANSWER: 2, GAUSSIAN: 1}
    assert accounts["replace one sample"].releases == {GAUSSIAN: 2, ANSWER: 2}


@pytest.mark.parametrize("around", [lambda guard: guard, lambda guard: Guards(Guard(), guard)])
def test_predictions_are_entered_unless_they_are_of_others(around: Callable[[Guard], Guard]) -> None:
    x, y = torch.randn(10, 3), torch.arange(10) % 3
    guard = Accounted(MECHANISM, _account(), over=10)
    learner = Learner("client", nn.Identity(), guard=around(guard))
    learner.forward(x)
    evaluate([learner], x, y)
    assert guard.accounts[0].releases == {GAUSSIAN: 2}
    assert guard.predicted == 0
    others = Accounted(MECHANISM, _account(), over=10, predictions="of others")
    learner = Learner("client", nn.Identity(), guard=around(others))
    evaluate([learner], x, y, batch_size=4)
    learner.predict(torch.randn(15, 3))  # of which a pass has no such number
    assert others.predicted == 25
    assert not others.accounts[0].releases
    assert not others.rows
    learner.forward(x)
    assert others.accounts[0].releases == {GAUSSIAN: 1}
    for wrong in (True, False, "others"):
        with pytest.raises(ValueError, match="expected predictions='entered' or 'of others', got"):
            Accounted(MECHANISM, _account(), predictions=cast(Any, wrong))


@pytest.mark.parametrize("predictions", ["entered", "of others"])
def test_a_frame_sent_under_no_grad_is_no_prediction(predictions: Literal["entered", "of others"]) -> None:
    guard = Accounted(MECHANISM, _account(), over=10, predictions=predictions)
    for _ in range(2):  # a frozen bottom may well be trained on like this
        with torch.no_grad():
            guard.activation(torch.randn(10, 3))
    assert guard.accounts[0].releases == {GAUSSIAN: 2}
    assert guard.predicted == 0


def test_what_crosses_without_a_mechanism_crosses_in_the_clear() -> None:
    account = _account("replace one sample")
    guard = Accounted(MECHANISM, account, over=10, crosses={Kind.ACTIVATION, Kind.LABEL})
    guard.activation(torch.randn(4, 2))
    guard.gradient(torch.randn(4, 2))  # named by nobody: it does not cross
    assert account.releases == {GAUSSIAN: 1}
    assert torch.equal(guard.label(torch.arange(4)), torch.arange(4))
    assert account.releases == {GAUSSIAN: 1, Clear(): 1}
    assert account.epsilon == float("inf")
    alone = Accounted(MECHANISM, _account("replace one sample"), crosses=["activation"])  # labels do not cross
    alone.label(torch.arange(4))
    assert alone.accounts[0].epsilon == 0
    gradients = Accounted(MECHANISM, _account(), crosses={Kind.GRADIENT})
    gradients.gradient(torch.randn(4, 2))
    assert gradients.accounts[0].releases == {Clear(): 1}
    client = Accounted(MECHANISM, _account("replace one client's data"), crosses={Kind.ACTIVATION, Kind.LABEL})
    client.label(torch.arange(4))
    assert client.accounts[0].releases == {Clear(): 1}  # once says it all


def test_a_loss_that_crosses_is_entered_once_where_it_bears() -> None:
    accounts = [_account("replace one label"), _account("replace one sample"), _account()]
    guard = Accounted(BOTH, *accounts, over=4, crosses={Kind.ACTIVATION, Kind.LABEL, Kind.LOSS})
    for _ in range(3):
        guard.activation(torch.randn(4, 2))
        guard.label(torch.arange(4) % 3)
    assert accounts[0].releases == {ANSWER: 3, Clear(): 1}
    assert accounts[1].releases == {GAUSSIAN: 3, ANSWER: 3, Clear(): 1}
    assert accounts[2].releases == {GAUSSIAN: 3}  # a loss tells nothing of an input whose label is public
    limited = Accounted(BOTH, _account("replace one sample", limit=30.0), crosses=["activation", "label", "loss"])
    for _ in range(2):  # it stays refused
        with pytest.raises(BudgetExceeded, match="got ∞ with the next after no releases"):
            limited.activation(torch.randn(4, 2))


def test_without_noise_what_crosses_is_clear() -> None:
    account = _account()
    Accounted(ClippedGaussian(1.0, 0.0), account).activation(torch.randn(4, 2))
    assert account.releases == {Clear(): 1}
    with pytest.raises(BudgetExceeded, match="got ∞"):
        Accounted(ClippedGaussian(1.0, 0.0), _account(limit=8.0)).activation(torch.randn(4, 2))


class _ByLabel(Guard):
    """A heuristic that changes a gradient by what the true labels are."""

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        return g if y is None else g + y[:, None]


@pytest.mark.parametrize(
    ("mechanism", "adjacency", "settings", "told"),
    [
        (Guard(), "replace one input", {}, "expected a mechanism with a proof, got Guard"),
        (Guards(Guard(), Guard()), "replace one input", {}, "expected a mechanism with a proof, got Guards"),
        (MECHANISM, "replace one label", {}, "expected an account on which ClippedGaussian.* bears, got one to repl"),
        (MECHANISM, "add or remove one sample", {}, "activations bear on: 'replace one input', 'replace one sample'"),
        (RandomisedResponse(1.0, 3), "replace one input", {}, "labels bear on: 'replace one label', 'replace one s"),
        (OnGradient(MECHANISM), "add or remove one client", {}, "gradients bear on: 'replace one input'"),
        (MECHANISM, "replace one sample", {}, r"expected crosses=\{Kind.…\} for the account.*on which labels bear"),
        (MECHANISM, "replace one client's data", {}, r"expected crosses=\{Kind.…\}.*ClippedGaussian.* does not cover"),
        (RandomisedResponse(1.0, 3), "replace one sample", {}, "on which activations bear too"),
        (OnGradient(MECHANISM), "replace one label", {}, "on which labels bear too"),
        (MECHANISM, "replace one input", {"crosses": {Kind.WEIGHTS}}, "got weights: it crosses past every guard"),
        (
            MECHANISM,
            "replace one input",
            {"crosses": {"query"}},
            "crosses=… among activation, gradient, label, loss, got",
        ),
        (Guards(OnGradient(MECHANISM), _ByLabel()), "replace one input", {}, "nothing that sees the labels once"),
    ],
)
def test_what_cannot_be_accounted_for(mechanism: Guard, adjacency: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Accounted(mechanism, _account(adjacency), **settings)


def test_accounts_that_are_none_or_central() -> None:
    with pytest.raises(ValueError, match=r"expected at least one account.*budget.account\(…\) opens one"):
        Accounted(MECHANISM)
    with pytest.raises(ValueError, match="expected a local account, got a central one: this noise is each sample's"):
        Accounted(MECHANISM, _account(model="central"))


def test_of_several_guards_the_first_noise_counts() -> None:
    noisier = ClippedGaussian(1.0, 5.0)
    for row in ([MECHANISM, noisier], [Guard(), MECHANISM, noisier], [_ByLabel(), MECHANISM]):
        account = _account()
        Accounted(Guards(*row), account).activation(torch.randn(2, 2))
        assert account.releases == {GAUSSIAN: 1}
    account = _account("replace one label")
    guard = Accounted(Guards(_ByLabel(), OnGradient(MECHANISM)), account, crosses={Kind.GRADIENT})
    guard.gradient(torch.randn(2, 2), torch.arange(2))
    assert account.releases == {GAUSSIAN: 1}


def test_nothing_is_sent_beyond_the_budget() -> None:
    sent: list[Tensor] = []

    class Watched(ClippedGaussian):
        def activation(self, z: Tensor) -> Tensor:
            sent.append(z)
            return super().activation(z)

    account = _account(limit=4.0)
    guard = Accounted(Watched(1.0, 2.0), account, over=4)
    learner = Learner("client", nn.Identity(), guard=guard)
    for _ in range(3):
        learner.forward(torch.randn(4, 2))
        learner.backward(torch.zeros(4, 2))
    with pytest.raises(BudgetExceeded, match="ann against server"):
        learner.forward(torch.randn(4, 2))
    assert len(sent) == account.releases[GAUSSIAN] == guard.passes[Kind.ACTIVATION] == 3
    assert account.epsilon <= 4.0
    learner.state_dict()  # no step is left open
    # Of two accounts the first is entered what the second refuses: rather too much than too little.
    wide, narrow = _account(), _account("replace one sample", limit=1.0)
    both = Accounted(MECHANISM, wide, narrow, crosses={Kind.ACTIVATION})
    with pytest.raises(BudgetExceeded, match="replace one sample"):
        both.activation(torch.randn(4, 2))
    assert wide.releases == {GAUSSIAN: 1}
    assert not narrow.releases


# Accounted: copies, state, wire


def test_a_copy_enters_into_the_same_account() -> None:
    account = _account()
    learner = Learner("server", nn.Linear(3, 3), guard=Accounted(MECHANISM, account, over=6))
    learner.forward(torch.randn(3, 3))
    replica = learner.replica("another")
    assert isinstance(replica.guard, Accounted)
    assert replica.guard.accounts == (account,)
    assert replica.guard.accounts[0] is account
    replica.forward(torch.randn(3, 3))  # which may be the same samples: a pass of its own
    assert account.releases == {GAUSSIAN: 2}
    replica.forward(torch.randn(3, 3))
    assert account.releases == {GAUSSIAN: 2}
    replica.forward(torch.randn(3, 3))
    assert account.releases == {GAUSSIAN: 3}
    learner.abandon()
    learner.forward(torch.randn(6, 3))  # whose own pass goes on where it was
    assert account.releases == {GAUSSIAN: 4}
    assert learner.guard.rows[Kind.ACTIVATION] == 9
    nested = copy.deepcopy(Guards(learner.guard, Guard()))
    nested.activation(torch.randn(6, 3))
    assert account.releases == {GAUSSIAN: 5}


@pytest.mark.parametrize("around", [lambda guard: guard, lambda guard: Guards(Guard(), guard)])
def test_who_simulates_it_spends_nothing(around: Callable[[Guard], Guard]) -> None:
    account = _account(limit=4.0)
    guard = Accounted(MECHANISM, account)
    encoder = Encoder(nn.Linear(3, 3), around(guard))
    x = torch.randn(5, 3, requires_grad=True)
    for _ in range(20):  # more often than the budget allows
        encoder(x).sum().backward()
    assert x.grad is not None
    assert not torch.equal(encoder(x), encoder(x))  # and the noise is there
    assert not account.releases
    assert guard.predicted == guard.rows.total() == 0
    assert guard.simulated() == MECHANISM


def test_a_checkpoint_carries_how_far_each_pass_is(tmp_path: Any) -> None:
    first, second = (
        Accounted(BOTH, _account("replace one sample"), over=10, predictions="of others") for _ in range(2)
    )
    first.activation(torch.randn(7, 2))
    first.label(torch.zeros(4, dtype=torch.int64))
    first.prediction(torch.randn(6, 2))
    save_checkpoint(tmp_path / "guard", first.state_dict())
    second.load_state_dict(load_checkpoint(tmp_path / "guard"))
    second.accounts[0].budget.load_state_dict(first.accounts[0].budget.state_dict())  # before the next frame
    assert second.rows == first.rows == {Kind.ACTIVATION: 7, Kind.LABEL: 4}
    assert second.passes == first.passes
    assert second.predicted == 6
    second.activation(torch.randn(3, 2))
    assert second.accounts[0].releases == {GAUSSIAN: 1, ANSWER: 1}  # what was begun is in the budget's own state
    second.activation(torch.randn(1, 2))
    assert second.accounts[0].releases == {GAUSSIAN: 2, ANSWER: 1}
    older = Accounted(BOTH, _account("replace one sample"), over=10).state_dict()
    second.load_state_dict(older)
    assert second.predicted == 6  # they were sent, whatever state is put back


def test_a_resumed_guard_whose_account_lost_its_releases_sends_nothing() -> None:
    first, second = (Accounted(MECHANISM, _account(), over=10) for _ in range(2))
    for _ in range(2):
        first.activation(torch.randn(10, 2))
    second.load_state_dict(first.state_dict())
    told = r"expected the 2 releases of ann against server \(replace one input\).*got 0; resume with the budget too"
    for send in (second.activation, second.prediction, second.activation):
        with pytest.raises(ValueError, match=told):
            send(torch.randn(10, 2))
    assert not second.accounts[0].releases
    second.accounts[0].budget.load_state_dict(first.accounts[0].budget.state_dict())
    second.activation(torch.randn(10, 2))
    assert second.accounts[0].releases == {GAUSSIAN: 3}


def test_what_an_accounted_guard_shows() -> None:
    guard = Accounted(MECHANISM, _account(), _account("replace one client's data"), crosses={Kind.ACTIVATION})
    assert repr(guard) == (
        "Accounted(ClippedGaussian(clip=1.0, noise_multiplier=2.0), 'replace one input', \"replace one client's data\")"
    )
    assert not guard.penalises
    assert guard.penalty(torch.randn(2, 2), torch.randn(2, 2)) is None

    class Penalising(Guard):
        def penalty(self, x: Tensor, z: Tensor) -> Tensor:
            return z.square().sum()

    penalising = Accounted(Guards(Penalising(), MECHANISM), _account())
    assert penalising.penalises
    assert torch.equal(penalising.penalty(torch.ones(2, 2), torch.ones(2, 2)), torch.tensor(4.0))


def test_over_a_real_wire_all_that_crosses_is_noised_and_entered() -> None:
    account = _account("replace one sample", limit=30.0)
    x, y = _data(20)
    batches = Batches(x, y, batch_size=8)
    client = Learner("client", nn.Linear(4, 5), guard=Accounted(BOTH, account, over=batches), seed=5)
    plain = Learner("client", copy.deepcopy(client.stage), guard=BOTH, seed=5)
    top = nn.Linear(5, 3)
    server = Learner("server", top, torch.optim.SGD(top.parameters(), 0.1))
    across = wire(server)
    for x, y in batches:
        vanilla(client, across.party, x, y)
    assert account.releases == {GAUSSIAN: 1, ANSWER: 1}
    across.party.predict(client.predict(x))
    assert account.releases == {GAUSSIAN: 2, ANSWER: 1}
    requests = [one.request.tensors for one in across.record.exchanges if one.request.verb == "learn"]
    assert len(requests) == 3
    batches.epoch = 0
    for tensors, (x, y) in zip(requests, batches, strict=True):
        # What crossed is what the mechanism alone sends, draw by draw: accounting changes no noise.
        z, answers = plain.forward(x), plain.label(y)
        plain.abandon()
        assert torch.equal(tensors["activation"], z)
        assert torch.equal(tensors["label"], answers)
        assert not torch.equal(tensors["activation"], client.stage(x))


def test_gradients_that_are_returned_are_entered_by_who_returns_them() -> None:
    account = Budget().account(
        "client", "owner", Adjacency.REPLACE_LABEL, shaped_by=[nn.Linear(4, 3).requires_grad_(False)]
    )
    top = nn.Linear(4, 3)
    guard = Accounted(OnGradient(MECHANISM), account, over=20, crosses={Kind.GRADIENT})
    owner = wire(Learner("owner", top.requires_grad_(False), guard=guard))
    bottom = nn.Linear(4, 4)
    client = Learner("client", bottom, torch.optim.SGD(bottom.parameters(), 0.1))
    for x, y in Batches(*_data(20), batch_size=8):
        vanilla(client, owner.party, x, y)
    assert account.releases == {GAUSSIAN: 1}
    assert guard.rows == {Kind.GRADIENT: 20}


@pytest.mark.parametrize("adjacency", [one for one in Adjacency if one.value.startswith("replace")])
def test_each_local_adjacency_has_a_mechanism_that_serves_it(adjacency: Adjacency) -> None:
    guard = Accounted(BOTH, _account(adjacency.value))
    guard.activation(torch.randn(2, 2))
    guard.label(torch.arange(2))
    assert sum(guard.accounts[0].releases.values()) > 0


@pytest.mark.parametrize("predictions", ["entered", "of others"])
def test_under_a_clients_adjacency_predictions_are_releases_too(predictions: Literal["entered", "of others"]) -> None:
    account = _account("replace one client's data")
    guard = Accounted(MECHANISM, account, over=10, crosses={Kind.ACTIVATION}, predictions=predictions)
    guard.prediction(torch.rand(7, 3))
    assert account.releases[GAUSSIAN] == 7
    assert guard.predicted == (7 if predictions == "of others" else 0)


def test_batches_tell_where_a_pass_begins_even_where_one_was_broken_off() -> None:
    batches = Batches(torch.rand(10, 3), torch.zeros(10), batch_size=4)
    account = _account()
    guard = Accounted(MECHANISM, account, over=batches)
    for _ in range(3):  # a sample may be in the first batch of each
        for x, _ in batches:
            guard.activation(x)
            break
    assert account.releases[GAUSSIAN] == 3
    for x, _ in batches:
        guard.activation(x)
        guard.activation(x)  # sent again: rows beyond those of a pass begin another one
    assert account.releases[GAUSSIAN] == 5


def test_each_frame_of_predictions_is_a_release_of_its_own() -> None:
    account = _account()
    guard = Accounted(MECHANISM, account, over=20)
    for _ in range(4):  # the same five, maybe
        guard.prediction(torch.rand(5, 3))
    assert account.releases[GAUSSIAN] == 4
    guard.activation(torch.rand(8, 3))
    guard.prediction(torch.rand(30, 3))  # a frame of more rows than pass is no sample twice
    assert account.releases[GAUSSIAN] == 6


def test_a_state_put_back_begins_a_new_pass_and_unsends_nothing() -> None:
    account = _account()
    guard = Accounted(MECHANISM, account, over=10)
    guard.activation(torch.rand(7, 3))
    state = guard.state_dict()
    guard.activation(torch.rand(3, 3))
    guard.put_back(state)
    guard.activation(torch.rand(3, 3))  # may be among the first seven
    assert account.releases[GAUSSIAN] == 2


def test_holders_of_features_and_guards_go_on_drawing_when_put_back() -> None:
    learner = Learner("client", nn.Identity(), guard=Guards(ClippedGaussian(1.0, 1.0)), seed=0)
    holder = Features(learner, torch.zeros(4, 3))
    state, ids = holder.state_dict(), torch.arange(4)
    first = holder.forward(ids)
    learner.abandon()
    holder.put_back(state)
    assert not torch.equal(holder.forward(ids), first)
