"""Protections of labels: each does what its formula says, fits an owner's training, and hides what it says it hides."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from math import inf, isfinite, log, nan, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import kstest, laplace
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import cross_entropy, leaky_relu, mse_loss, one_hot

from defenses import MID, Bottleneck
from defenses.labels import (
    BottleneckedTop,
    CoAE,
    FedPass,
    Isotropic,
    LabelDecorrelation,
    Marvell,
    MaxNorm,
    Mixup,
    marvell,
)
from defenses.labels.fedpass import PassportLinear
from defenses.labels.marvell import Gradients, Spread, best_spread, sum_kl
from defenses.labels.observed import Observed
from privacy.dp import Accounted, Budget, LaplaceLabels, LaplaceRelease
from privacy.dp.audit import audit
from splitlearn import (
    Batches,
    Features,
    Guard,
    Guards,
    Kind,
    Learner,
    concatenated,
    cut,
    load_checkpoint,
    save_checkpoint,
    vertical,
)
from splitlearn.data import load, split
from splitlearn.leakage import leak_auc
from splitlearn.metrics import auc, distance_correlation_squared
from splitlearn.models import digits_cnn

Loss = Callable[[Tensor, Tensor], Tensor]
Top = Callable[[nn.Module], nn.Module]


def same(stage: nn.Module) -> nn.Module:
    return stage


def observing(make: Callable[[], Any]) -> Callable[[], tuple[Guard, Top, Loss]]:
    def build() -> tuple[Guard, Top, Loss]:
        one = make()
        return Guard(), one.top, one.loss

    return build


# One row a protection: name, and what makes guard, top and loss of its owner.
DEFENSES: list[tuple[str, Callable[[], tuple[Guard, Top, Loss]]]] = [
    ("marvell", lambda: (Marvell(), same, cross_entropy)),
    ("marvell, pooled", lambda: (Marvell(pooled=True), same, cross_entropy)),
    ("max-norm", lambda: (MaxNorm(), same, cross_entropy)),
    ("isotropic", lambda: (Isotropic(), same, cross_entropy)),
    ("laplace labels", lambda: (LaplaceLabels(4.0), same, cross_entropy)),
    ("decorrelation", observing(lambda: LabelDecorrelation(1.0))),
    ("bottleneck", observing(lambda: BottleneckedTop(1e-3))),
    ("mixup", observing(Mixup)),
    ("fedpass", lambda: (Guard(), FedPass(seed=0), cross_entropy)),
]
BY_NAME = [pytest.param(make, id=name) for name, make in DEFENSES]


def halves(num: int = 32) -> tuple[Tensor, Tensor]:
    """Return images of which one half is brighter, and which."""
    x, y = torch.rand(num, 1, 8, 8), torch.arange(num) % 2
    x[y == 1, :, 4:] *= 0.3
    x[y == 0, :, :4] *= 0.3
    return x, y


def pair(
    make: Callable[[], tuple[Guard, Top, Loss]], x: Tensor, *, seed: int = 0, start: int = 0, lr: float = 1e-2
) -> tuple[Features, Learner]:
    """Return a client with the inputs ``x`` and the owner of labels and top."""
    torch.manual_seed(start)
    guard, top, loss = make()
    bottom = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    stage = top(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2)))
    adam = torch.optim.Adam
    client = Learner("client", bottom, adam(bottom.parameters(), lr), seed=seed)
    return Features(client, x), Learner("owner", stage, adam(stage.parameters(), lr), guard, loss=loss, seed=seed)


@pytest.mark.parametrize("make", BY_NAME)
def test_an_owner_trains_with_it(make: Callable[[], tuple[Guard, Top, Loss]]) -> None:
    x, y = halves(64)
    client, owner = pair(make, x)
    before = owner.weights()
    for _ in range(60):
        vertical(owner, [client], torch.arange(64), y, join=concatenated)
    predicted = owner.predict(client.predict(torch.arange(64)))
    assert auc(predicted, y) > 0.95
    assert torch.equal(predicted, owner.predict(client.predict(torch.arange(64))))  # nothing is drawn at a prediction
    moved = {name for name, now in owner.weights().items() if not torch.equal(before[name], now)}
    assert moved == {name for name in before if "passports" not in name}
    assert "0x" not in repr(owner.guard)


@pytest.mark.parametrize("make", BY_NAME)
def test_it_resumes_bit_for_bit_and_a_replica_is_its_own(
    make: Callable[[], tuple[Guard, Top, Loss]], tmp_path: Path
) -> None:
    x, y = halves(32)
    rows = [torch.arange(32).roll(4 * k)[:24] for k in range(6)]
    rows[3] = torch.arange(32)[y == 0]  # of one label, right after the checkpoint
    whole = pair(make, x)
    for ids in rows[:3]:
        vertical(whole[1], [whole[0]], ids, y[ids], join=concatenated)
    save_checkpoint(tmp_path / "half", [whole[0].state_dict(), whole[1].state_dict()])
    resumed = pair(make, x, seed=1, start=1)
    for party, state in zip(resumed, load_checkpoint(tmp_path / "half"), strict=True):
        party.load_state_dict(state)
    replica, kept = whole[1].replica("other"), copy.deepcopy(whole[1].state_dict())
    z = torch.rand(8, 4, 8, 8).requires_grad_()
    _, g = replica.learn(z, replica.label(y[:8]))
    assert g is not None
    assert g.shape == z.shape
    assert _equal(kept["guard"], whole[1].guard.state_dict())
    assert _equal(kept["stage"], whole[1].weights())
    for ids in rows[3:]:
        losses = [vertical(owner, [client], ids, y[ids], join=concatenated) for client, owner in (whole, resumed)]
        assert torch.equal(*losses)
    for one, other in zip(whole, resumed, strict=True):
        assert _equal(one.state_dict()["stage"], other.state_dict()["stage"])


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Marvell(0.0), "expected a finite strength above 0"),
        (lambda: Marvell(inf), "expected a finite strength above 0"),
        (lambda: Isotropic(-1.0), "expected a finite ratio of 0 or more"),
        (lambda: LabelDecorrelation(nan), "expected a finite weight of 0 or more"),
        (lambda: BottleneckedTop(-1.0), "expected a finite weight of 0 or more and at least one feature"),
        (lambda: BottleneckedTop(1.0, 0), "expected a finite weight of 0 or more and at least one feature"),
        (lambda: Mixup(0.0), "expected a finite alpha above 0"),
        (lambda: FedPass(0.0), "expected a finite reach above 0"),
        (lambda: FedPass(passports=0), "expected a finite reach above 0"),
        (lambda: CoAE.fitted(1), "expected at least 2 classes"),
        (lambda: CoAE.fitted(2, -1.0), "expected at least 2 classes"),
        (lambda: LaplaceLabels(0.0), "expected a finite ε above 0"),
        (lambda: LaplaceLabels(inf), "expected a finite ε above 0"),
        (lambda: LaplaceLabels(1.0, 1), "expected a finite ε above 0 and at least 2 classes"),
    ],
)
def test_settings_that_are_none(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Marvell: the problem


CASES = [
    Gradients(0.02, 0.02, 1.0, 0.5, 64),
    Gradients(0.02, 0.02, 1.0, 0.1, 64),
    Gradients(0.05, 0.01, 1.0, 0.1, 64),
    Gradients(0.01, 0.05, 1.0, 0.1, 64),
    Gradients(0.5, 0.001, 1.0, 0.3, 500),
    Gradients(0.001, 0.5, 1.0, 0.02, 500),
    Gradients(0.03, 0.0, 1.0, 0.02, 100),  # one positive
    Gradients(0.0, 0.0, 1.0, 0.5, 10),
    Gradients(5.0, 4.0, 1.0, 0.4, 20),
    Gradients(0.2, 0.1, 1.0, 0.4, 1),
]


@pytest.mark.parametrize("seed", range(5))
def test_sum_kl_is_that_of_torch(seed: int) -> None:
    torch.manual_seed(seed)
    dims = 2 + seed
    u, v, *spreads = torch.rand(6).double().tolist()
    mean = torch.randn(dims, dtype=torch.float64)
    of = Gradients(u, v, mean.square().sum().item(), 0.3, dims)
    spread = Spread((spreads[0] + 1, spreads[1] + 1), (spreads[2], spreads[3]))
    line = mean / mean.norm()
    each = []
    for own, along, across, centre in zip((u, v), spread.along, spread.across, (0 * mean, mean), strict=True):
        eye = torch.eye(dims, dtype=torch.float64)
        noise = (along - across) * torch.outer(line, line) + across * eye
        each.append(MultivariateNormal(centre, own * eye + noise))
    expected = kl_divergence(each[0], each[1]) + kl_divergence(each[1], each[0])
    assert sum_kl(of, spread) == pytest.approx(expected.item(), rel=1e-9)


def test_sum_kl_at_its_ends() -> None:
    none = Spread((0.0, 0.0), (0.0, 0.0))
    assert sum_kl(Gradients(0.3, 0.3, 0.0, 0.5, 7), none) == pytest.approx(0, abs=1e-12)
    assert sum_kl(Gradients(0.3, 0.0, 1.0, 0.5, 7), none) == inf
    # In one dimension: 2 · gap / (2 · variance), the two divergences of equal Gaussians.
    assert sum_kl(Gradients(0.25, 0.25, 1.0, 0.5, 1), none) == pytest.approx(4.0)


@pytest.mark.parametrize("strength", [0.5, 4.0, 30.0])
def test_alike_and_equally_frequent_labels_have_the_closed_form(strength: float) -> None:
    """All power along the line, the same for both: sum KL = gap / (u + P)."""
    of = Gradients(0.02, 0.02, 2.5, 0.5, 64)
    spread = best_spread(of, strength * of.gap)
    assert spread.across == (0.0, 0.0)
    assert spread.along == pytest.approx((strength * of.gap, strength * of.gap), rel=1e-9)
    assert sum_kl(of, spread) == pytest.approx(of.gap / (of.u + strength * of.gap), rel=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.8])
@pytest.mark.parametrize("strength", [0.3, 4.0])
def test_alike_labels_split_the_power_as_a_search_says(share: float, strength: float) -> None:
    of = Gradients(0.1, 0.1, 1.0, share, 30)

    def leak(first: float) -> float:
        return sum_kl(of, Spread((first, (strength - (1 - share) * first) / share), (0.0, 0.0)))

    most = strength / (1 - share)
    best = minimize_scalar(leak, bounds=(0.0, most), method="bounded", options={"xatol": 1e-10})
    spread = best_spread(of, strength)
    assert sum_kl(of, spread) == pytest.approx(best.fun, rel=1e-9)
    assert spread.along[0] == pytest.approx(best.x, abs=1e-4)
    total = strength + of.u  # by hand: (b / a)² = (C + (1 − p)·gap) / (C + p·gap)
    ratio = (spread.along[1] + of.v) / (spread.along[0] + of.u)
    assert ratio**2 == pytest.approx((total + 1 - share) / (total + share), rel=1e-9)


@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("of", CASES)
def test_no_other_spread_of_that_power_hides_better(of: Gradients, strength: float) -> None:
    spread = best_spread(of, strength * of.gap)
    least = sum_kl(of, spread)
    assert isfinite(least)
    assert spread.power(of) == pytest.approx(strength * of.gap, rel=1e-6)
    assert all(along >= across >= 0 for along, across in zip(spread.along, spread.across, strict=True))
    torch.manual_seed(0)
    for number in range(1500):
        if number % 2:  # anywhere that is allowed: λ_2 ≤ λ_1, scaled to the power
            draws = torch.distributions.Dirichlet(torch.full((4,), 0.3)).sample().double().tolist()
            across = draws[2] / of.dims, draws[3] / of.dims
            other = Spread((draws[0] + across[0], draws[1] + across[1]), across)
        else:  # close by
            near = torch.randn(4).double().mul(0.05).exp().tolist()
            across = spread.across[0] * near[0], spread.across[1] * near[1]
            along = max(spread.along[0] * near[2], across[0]), max(spread.along[1] * near[3], across[1])
            other = Spread(along, across)
        scale = strength * of.gap / other.power(of)
        other = Spread(
            (scale * other.along[0], scale * other.along[1]), (scale * other.across[0], scale * other.across[1])
        )
        assert sum_kl(of, other) >= least * (1 - 1e-6) - 1e-9


def test_it_does_not_depend_on_the_unit() -> None:
    small, large = (Gradients(0.05 * k, 0.01 * k, k, 0.1, 64) for k in (1e-12, 1e3))
    one, other = best_spread(small, 4e-12), best_spread(large, 4e3)
    for first, second in zip((*one.along, *one.across), (*other.along, *other.across), strict=True):
        assert 1e15 * first == pytest.approx(second, rel=1e-6, abs=1e-9)
    with pytest.raises(ValueError, match="expected a gap between the means and a power above 0"):
        best_spread(Gradients(0.1, 0.1, 0.0, 0.5, 4), 1.0)


def test_it_looks_at_few_spreads(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(marvell, "sum_kl", lambda *arguments: looked.append(1) or sum_kl(*arguments))
    best_spread(CASES[4], 4.0)
    assert 2 < len(looked) < 60  # each a dozen products: some milliseconds a batch


# Marvell: the guard


def two_sides(n: int = 20, ones: int = 5, dims: int = 12) -> tuple[Tensor, Tensor]:
    y = (torch.arange(n) < ones).long()
    return (0.3 * torch.randn(n, dims) + y[:, None]) / n, y


def test_noise_has_the_covariance_that_was_found() -> None:
    g, y = two_sides()
    guard = Marvell(4.0)
    ones, zeros = g[y == 1].double(), g[y == 0].double()
    line = ones.mean(0) - zeros.mean(0)
    gap = line.square().sum().item()
    u, v = (((side - side.mean(0)) ** 2).mean().item() for side in (zeros, ones))
    of = Gradients(u, v, gap, 0.25, 12)
    spread = best_spread(of, 4 * gap)
    draws = torch.stack([guard.gradient(g, y) for _ in range(8000)]).double() - g.double()
    assert draws.square().sum(2).mean().item() == pytest.approx(4 * gap, rel=0.03)
    for label, side in ((0, draws[:, y == 0]), (1, draws[:, y == 1])):
        along = side @ (line / sqrt(gap))
        rest = (side.square().sum(2) - along.square()) / 11
        assert side.mean((0, 1)).abs().max() < 5 * sqrt(spread.along[label] / (8000 * side.shape[1]))
        assert along.square().mean().item() == pytest.approx(spread.along[label], rel=0.05)
        assert rest.mean().item() == pytest.approx(spread.across[label], rel=0.05, abs=1e-12)
        # Each row has noise of its own.
        assert (along[:, 0] * along[:, 1]).mean().abs() < 0.05 * spread.along[label]


def test_pooled_spreads_put_all_noise_on_the_line() -> None:
    g, y = two_sides()
    g[y == 0] *= 3  # one label is much wider
    for pooled in (False, True):
        noise = Marvell(4.0, pooled=pooled).gradient(g, y) - g
        line = g[y == 1].mean(0) - g[y == 0].mean(0)
        across = noise - torch.outer(noise @ line / line.square().sum(), line)
        assert bool(across.abs().max() < 1e-6) is pooled


def test_a_batch_of_one_label_gets_the_last_noise_of_that_label() -> None:
    g, y = two_sides()
    guard = Marvell(4.0)
    guard.gradient(g, y)
    line, along = guard.last["line"], guard.last["along"]
    kept = guard.state_dict()
    for label in (0, 1):
        rows = torch.zeros(4000, 12)
        noise = (guard.gradient(rows, torch.full((4000,), label)) - rows).double() @ line
        assert (4000 * noise).std().item() == pytest.approx(along[label].item(), rel=0.05)
    assert _equal(kept, guard.state_dict())


def test_before_any_batch_of_both_labels_noise_is_all_around() -> None:
    g = torch.randn(5, 10)
    draws = torch.stack([Marvell(4.0).gradient(g, torch.zeros(5, dtype=torch.int64)) - g for _ in range(4000)])
    assert draws.square().mean((0, 1)) == pytest.approx(4 * g.norm(dim=1).max().item() ** 2 / 10, rel=0.1)


def test_labels_that_nothing_tells_apart_get_no_noise() -> None:
    g, y = torch.ones(6, 3), torch.arange(6) % 2
    assert torch.equal(Marvell().gradient(g, y), g)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "expected the labels of the gradient's rows, got none"),
        (torch.tensor([0, 1, 2]), "Marvell is for two classes"),
        (torch.tensor([0.0, 1.0, 1.0]), "expected a label of 0 or 1 a row"),
        (torch.tensor([0, 1]), "expected a label of 0 or 1 a row"),
    ],
)
def test_marvell_is_for_two_labels(y: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Marvell().gradient(torch.ones(3, 2), y)


# Norms and directions


def test_max_norm_makes_rows_as_long_as_the_longest_in_the_mean() -> None:
    g = torch.randn(6, 2, 3) * torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 0.0])[:, None, None]
    draws = torch.stack([MaxNorm().gradient(g) for _ in range(20000)]).double()
    norms = draws.flatten(2).square().sum(2).mean(0)
    greatest = g.flatten(1).norm(dim=1).max().item() ** 2
    assert norms[:5].tolist() == pytest.approx([greatest] * 5, rel=0.06)
    assert not draws[:, 5].any()  # a row of zeros has no direction
    assert torch.allclose(draws.mean(0), g.double(), atol=5 * sqrt(greatest / 20000))
    cosines = torch.cosine_similarity(draws[0, :5].flatten(1), g[:5].double().flatten(1), dim=1)
    assert cosines.abs().tolist() == pytest.approx([1.0] * 5, abs=1e-6)
    longest = g[g.flatten(1).norm(dim=1).argmax()][None]
    assert torch.allclose(MaxNorm().gradient(longest), longest)


def test_isotropic_noise_has_the_longest_rows_norm() -> None:
    g = torch.randn(8, 4, 5)
    noise = torch.stack([Isotropic(1.5).gradient(g) - g for _ in range(2000)]).double()
    expected = 1.5 * g.flatten(1).norm(dim=1).max().item()
    assert noise.flatten(2).square().sum(2).mean().sqrt().item() == pytest.approx(expected, rel=0.01)
    assert torch.equal(Isotropic(0.0).gradient(g), g)


class Kept(Guard):
    """Keeps what goes back, and the labels of its rows."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        self.kept.append((g.clone(), y))
        return g


def leaks(guard: Guard, *, lr: float, seed: int = 0, epochs: int = 15) -> dict[str, float]:
    """Return 95th percentiles of the leak AUC within batches by norms and cosines, and the test AUC.

    Digits, 0 against the rest: 800 private samples in batches of 128, cut at relu2. The cosine is to the batch's first
    positive, which is itself not counted.
    """
    parts = split(load("digits"), private=800, auxiliary=600, test=397, seed=0)
    torch.manual_seed(seed)
    bottom, top = cut(digits_cnn(2), "relu2")
    x, y, kept, adam = parts.private.x, (parts.private.y == 0).long(), Kept(), torch.optim.Adam
    client = Features(Learner("client", bottom, adam(bottom.parameters(), lr), seed=seed), x)
    owner = Learner("owner", top, adam(top.parameters(), lr), Guards(guard, kept), seed=seed)
    batches = Batches(torch.arange(800), y, batch_size=128, seed=seed)
    for _ in range(epochs):
        for ids, labels in batches:
            vertical(owner, [client], ids, labels, join=concatenated)
    norms, cosines, truth, rest, sizes = [], [], [], [], []
    for g, labels in kept.kept:
        rows = g.flatten(1)
        hint = int((labels == 1).nonzero()[0])
        others = torch.arange(len(labels)) != hint
        norms.append(rows.norm(dim=1))
        cosines.append(torch.cosine_similarity(rows, rows[hint : hint + 1], dim=1)[others])
        truth.append(labels)
        rest.append(labels[others])
        sizes.append(len(labels))
    by_norm = leak_auc(torch.cat(norms), torch.cat(truth), sizes)
    by_cosine = leak_auc(torch.cat(cosines), torch.cat(rest), [size - 1 for size in sizes])
    with torch.no_grad():
        scores = top.eval()(bottom(parts.test.x))
    return {
        "norm": by_norm["leak_auc_p95"],
        "cosine": by_cosine["leak_auc_p95"],
        "test": auc(scores, (parts.test.y == 0).long()),
    }


def test_marvell_hides_what_is_read_off_without_it() -> None:
    """Measured over three seeds: 1.00, 1.00, 1.00 without it; .67 to .71, .74 to .75 and .999 to 1.000 with it."""
    without, with_it = leaks(Guard(), lr=3e-4), leaks(Marvell(4.0), lr=3e-4)
    assert min(without["norm"], without["cosine"]) > 0.99
    assert without["test"] > 0.98
    assert with_it["norm"] <= 0.72
    assert with_it["cosine"] <= 0.82
    assert with_it["test"] >= 0.98


def test_norms_or_noise_all_around_leave_directions() -> None:
    """In the first epochs, before samples are learnt."""
    assert leaks(Isotropic(1.0), lr=3e-4, epochs=3)["cosine"] > 0.99
    stretched = leaks(MaxNorm(), lr=3e-4, epochs=3)
    assert stretched["cosine"] > 0.95
    assert stretched["norm"] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_marvell_with_pooled_spreads_holds_where_samples_are_learnt_by_heart(seed: int) -> None:
    """At three times the learning rate: .70 to .72, .63 to .70; unpooled norms leak, .83 to .93."""
    pooled = leaks(Marvell(4.0, pooled=True), lr=1e-3, seed=seed)
    assert pooled["norm"] <= 0.74
    assert pooled["cosine"] <= 0.82
    assert pooled["test"] >= 0.98
    assert leaks(Marvell(4.0), lr=1e-3, seed=seed)["norm"] > pooled["norm"]


# Laplace noise on labels


def test_the_gradient_is_on_the_line_between_those_of_the_labels() -> None:
    torch.manual_seed(1)
    top = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    z, y = torch.randn(9, 5, dtype=torch.float64).requires_grad_(), torch.arange(9) % 2
    soft = LaplaceLabels(0.7).label(y).double()

    def gradient(labels: Tensor) -> Tensor:
        return torch.autograd.grad(cross_entropy(top(z), labels), z)[0]

    zero, one = gradient(torch.zeros_like(y)), gradient(torch.ones_like(y))
    assert (gradient(soft) - (zero + soft[:, 1:] * (one - zero))).abs().max() < 1e-12
    assert (gradient(soft) - gradient(y)).abs().max() > 1e-2
    # And in the outputs it is (p − ỹ) / n.
    outputs = top(z).detach().requires_grad_()
    cross_entropy(outputs, soft).backward()
    assert outputs.grad is not None
    assert torch.allclose(outputs.grad, (outputs.softmax(1) - soft) / 9, atol=1e-12)


def test_with_more_classes_it_is_the_mixture_of_all_gradients() -> None:
    top = nn.Linear(5, 4).double()
    z, y = torch.randn(6, 5, dtype=torch.float64).requires_grad_(), torch.arange(6) % 4
    soft = LaplaceLabels(1.0, 4).label(y).double()
    each = [torch.autograd.grad(cross_entropy(top(z), torch.full_like(y, c)), z)[0] for c in range(4)]
    found = torch.autograd.grad(cross_entropy(top(z), soft), z)[0]
    mixed = sum(soft[:, c : c + 1] * each[c] for c in range(4))
    assert (found - mixed).abs().max() < 1e-6  # a float32 label sums to 1 up to 1e-7
    assert torch.allclose(soft.sum(1), torch.ones(6, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_two_labels_are_laplace_and_unbiased(epsilon: float) -> None:
    guard, draws = LaplaceLabels(epsilon), 40_000
    assert (guard.sensitivity, guard.scale, guard.release) == (1.0, 1 / epsilon, LaplaceRelease(1 / epsilon))
    for label in (0, 1):
        soft = guard.label(torch.full((draws,), label))
        # On a grid of 1/1024: the distribution function differs by at most half a step's mass.
        statistic = kstest(soft[:, 1].numpy(), laplace(label, 1 / epsilon).cdf).statistic
        assert statistic < 1.95 / sqrt(draws) + epsilon / 2 / 2048  # exceeded in one of 1000
        assert soft[:, 1].double().mean() == pytest.approx(label, abs=4 * sqrt(2) / epsilon / sqrt(draws))
        assert torch.equal(soft.sum(1), torch.ones(draws))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_no_noised_label_is_more_than_e_to_epsilon_times_as_likely(epsilon: float) -> None:
    """Exactly, on the grid: the mass of each step, against that of the other label, which moves it by 1024 steps."""
    steps = torch.arange(-6000, 6001).double().numpy()
    law = laplace(0, 1024 / epsilon)

    def mass(at: Any) -> Any:
        below = law.cdf(-abs(at) + 0.5) - law.cdf(-abs(at) - 0.5)
        return torch.from_numpy(below)

    ratios = (mass(steps) / mass(steps - 1024)).log().abs()
    assert ratios.max() <= epsilon * (1 + 1e-9)
    assert ratios.max() > 0.99 * epsilon


@pytest.mark.parametrize("classes", [2, 5])
def test_both_labels_lie_on_one_grid(classes: int) -> None:
    """The lowest bits would tell a label apart that noise was added to in floating point."""
    guard = LaplaceLabels(1.0, classes)
    for label in (0, 1):
        soft = guard.label(torch.full((5000,), label)).double()
        steps = 1024 * (classes if classes > 2 else 1) * soft  # the mean that was taken off is of ``classes`` numbers
        assert (steps - steps.round()).abs().max() < (1e-12 if classes == 2 else 0.02)


@pytest.mark.parametrize(("epsilon", "classes"), [(1.0, 2), (1.0, 4), (3.0, 2)])
def test_an_audit_finds_most_of_its_epsilon_and_no_more(epsilon: float, classes: int) -> None:
    """The likelihood ratio of the labels 0 and 1; with more classes that of the entries before they are centred."""
    guard = LaplaceLabels(epsilon, classes)

    def ratio(soft: Tensor) -> Tensor:
        soft = soft.double()
        if classes == 2:
            return epsilon * (soft[:, 1].abs() - (soft[:, 1] - 1).abs())
        away = [(soft - one_hot(torch.tensor(label), classes)).abs().sum(1) for label in (0, 1)]
        return (away[0] - away[1]) / guard.scale

    bound = audit(lambda which, n: guard.label(torch.full((n,), which)), ratio, delta=0, draws=30_000)
    assert bound.lower <= epsilon
    assert bound.lower > 0.5 * epsilon  # centred noise hides a little more than it is charged for


def test_more_classes_are_unbiased_and_as_noisy_as_their_sensitivity_says() -> None:
    guard, draws = LaplaceLabels(2.0, 5), 40_000
    assert (guard.sensitivity, guard.scale) == (2.0, 1.0)
    soft = guard.label(torch.full((draws,), 3)).double()
    expected = one_hot(torch.tensor(3), 5).double()
    std = sqrt(2 * (1 - 1 / 5))  # of Laplace(1) less the mean of five
    assert (soft.mean(0) - expected).abs().max() < 4.5 * std / sqrt(draws)
    assert soft.std(0).tolist() == pytest.approx([std] * 5, rel=0.03)


def test_every_step_is_entered_and_nothing_but_noised_labels_is_told() -> None:
    x, y = halves(32)
    account = Budget(inf).account("client", "owner", "replace one label", shaped_by=())
    batches, kept = Batches(torch.arange(32), y, batch_size=8), Kept()
    guard = Guards(Accounted(LaplaceLabels(0.5), account, over=batches), kept)
    client, owner = pair(lambda: (guard, same, cross_entropy), x)
    for _ in range(3):
        for ids, labels in batches:
            vertical(owner, [client], ids, labels, join=concatenated)
    assert account.releases == {LaplaceRelease(2.0): 3}
    assert account.claim().epsilon <= 1.5 * (1 + 1e-6)
    assert all(labels.shape == (8, 2) and labels.is_floating_point() for _, labels in kept.kept)
    assert LaplaceLabels(0.5).secret
    assert set(LaplaceLabels(0.5).releases) == {Kind.LABEL}


@pytest.mark.parametrize("y", [torch.tensor([0, 2]), torch.tensor([-100, 0]), torch.tensor([0.0]), torch.tensor([[1]])])
def test_labels_that_are_none_are_not_noised(y: Tensor) -> None:
    with pytest.raises(ValueError, match="expected whole labels"):
        LaplaceLabels(1.0).label(y)
    with pytest.raises(ValueError, match="expected whole labels"):
        CoAE.fitted(2, steps=1).labels(y)


# CoAE


@pytest.mark.parametrize("classes", [2, 10])
def test_codes_are_confused_and_only_the_decoder_reads_them(classes: int) -> None:
    before = torch.get_rng_state()
    code = CoAE.fitted(classes, 1.0, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    y = torch.arange(classes)
    soft = code.labels(y)
    assert torch.allclose(soft.sum(1), torch.ones(classes))
    entropy = -(soft * soft.log()).sum(1) / log(classes)
    assert entropy.min() > 0.95
    assert torch.equal(code.decode(soft.log()).argmax(1), y)
    assert torch.equal(code.decode(soft.log().double() - 5).argmax(1), y)  # logits are read up to a constant
    one, again, other = (CoAE.fitted(classes, seed=seed, steps=50).labels(y) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not soft.requires_grad
    # Without the entropy codes are free, and sharper.
    free = CoAE.fitted(classes, 0.0, seed=3).labels(y)
    assert (-(free * free.log()).sum(1) / log(classes)).mean() < 0.7


def test_its_loss_is_the_papers() -> None:
    """One step of gradient descent from the same start, by hand: Adam's first step has every entry's sign."""
    code, start = CoAE.fitted(3, 0.7, steps=1, lr=1e-4), CoAE.fitted(3, 0.7, steps=1, lr=1e-12)
    truth = torch.eye(3)
    parameters = [*start.encoder.parameters(), *start.decoder.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    soft = start.encoder(truth).softmax(1)
    decoded = -start.decoder(soft).log_softmax(1).diagonal().mean()
    (decoded + 0.7 * (soft * soft.log()).sum(1).mean()).backward()
    for now, was in zip([*code.encoder.parameters(), *code.decoder.parameters()], parameters, strict=True):
        assert was.grad is not None
        sure = was.grad.abs() > 1e-5
        assert torch.equal((now - was)[sure].sign(), -was.grad[sure].sign())


def test_an_owner_trains_on_codes_and_decodes_what_it_learnt() -> None:
    x, y = halves(64)
    code = CoAE.fitted(2)
    client, owner = pair(lambda: (Guard(), same, cross_entropy), x)
    soft = code.labels(y)
    for _ in range(80):
        vertical(owner, [client], torch.arange(64), soft, join=concatenated)
    outputs = owner.predict(client.predict(torch.arange(64)))
    assert (code.decode(outputs).argmax(1) == y).double().mean() > 0.95
    assert (outputs.softmax(1) - 0.5).abs().max() < 0.2  # it learnt codes, which are close to even


# A stage that is observed


def wrapped(protection: Any, stage: nn.Module) -> tuple[nn.Module, Loss]:
    return protection.top(stage), protection.loss


@pytest.mark.parametrize("make", [Mixup, lambda: LabelDecorrelation(1.0), lambda: BottleneckedTop(0.1)])
def test_a_loss_is_for_the_outputs_of_its_own_stage(make: Callable[[], Any]) -> None:
    stage, loss = wrapped(make(), nn.Sequential(nn.Linear(6, 3)))
    z, y = torch.randn(8, 6), torch.arange(8) % 3
    first, second = stage(z), stage(z)
    for outputs in (first, torch.randn(8, 3)):
        with pytest.raises(ValueError, match="expected the outputs that the wrapped stage made last"):
            loss(outputs, y)
    assert loss(second, y).ndim == 0
    with pytest.raises(ValueError, match="expected the outputs"):
        loss(second, y)  # once
    stage.eval()
    with pytest.raises(ValueError, match="in training mode"):
        loss(stage(z), y)
    other = make()  # another protection does not see it
    stage.train()
    with pytest.raises(ValueError, match="give the owner both halves"):
        other.loss(stage(z), y)


@pytest.mark.parametrize("num", [2, 4])
def test_decorrelation_adds_the_distance_correlation_to_labels(num: int) -> None:
    top = nn.Linear(6, num)
    stage, loss = wrapped(LabelDecorrelation(2.5), top)
    z, y = torch.randn(20, 6).requires_grad_(), torch.arange(20) % num
    penalty = distance_correlation_squared(z, one_hot(y, num).float())
    expected = cross_entropy(top(z), y) + 2.5 * penalty
    found = loss(stage(z), y)
    assert torch.allclose(found, expected)
    assert torch.allclose(*(torch.autograd.grad(value, z, retain_graph=True)[0] for value in (found, expected)))
    plain, plain_loss = wrapped(LabelDecorrelation(0.0), top)
    assert torch.equal(plain_loss(plain(z), y), cross_entropy(top(z), y))
    alone = torch.zeros_like(y)  # one label: nothing to be correlated with
    assert torch.allclose(loss(stage(z), alone), cross_entropy(top(z), alone))
    with pytest.raises(ValueError, match="expected at least 4 samples in a batch"):
        loss(stage(z[:3]), y[:3])


def test_decorrelation_makes_activations_tell_less() -> None:
    x, y = halves(64)
    found = []
    for weight in (0.0, 3.0):
        client, owner = pair(observing(partial(LabelDecorrelation, weight)), x)
        for _ in range(60):
            vertical(owner, [client], torch.arange(64), y, join=concatenated)
        z = client.predict(torch.arange(64))
        found.append(distance_correlation_squared(z, one_hot(y).float()).item())
        assert auc(owner.predict(z), y) > 0.9
    assert found[1] < 0.5 * found[0]


def test_mixup_by_hand() -> None:
    """A linear stage: row i gets λ·G_i + (1 − λ)·G_j, where j mixes i in and G = (p − mixed label)·W / n."""
    top = nn.Linear(4, 3).double()
    protection = Mixup(0.8)
    stage, loss = wrapped(protection, top)
    z, y = torch.randn(7, 4, dtype=torch.float64).requires_grad_(), torch.arange(7) % 3
    torch.manual_seed(5)
    found = torch.autograd.grad(loss(stage(z), y), z)[0]
    torch.manual_seed(5)
    share = torch.distributions.Beta(0.8, 0.8).sample().item()
    order = torch.randperm(7)
    assert 0.02 < share < 0.98  # so that something is mixed
    labels = share * one_hot(y, 3) + (1 - share) * one_hot(y[order], 3)
    mixed = share * z + (1 - share) * z[order]
    per_row = (top(mixed).softmax(1) - labels) @ top.weight / 7
    expected = share * per_row
    for second, first in enumerate(order.tolist()):
        expected[first] = expected[first] + (1 - share) * per_row[second]
    assert torch.allclose(found, expected, atol=1e-12)
    stage.eval()
    assert torch.equal(stage(z), top(z))


def test_mixup_draws_its_share_from_beta() -> None:
    stage = Mixup(0.3).top(nn.Identity())
    assert isinstance(stage, Observed)
    shares = torch.tensor([stage.entrance(torch.zeros(2, 1))[1][0] for _ in range(4000)])
    law = torch.distributions.Beta(0.3, 0.3)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.std().item() == pytest.approx(law.stddev.item(), rel=0.05)


@pytest.mark.parametrize(
    ("at", "channels", "dim", "before"), [("relu2", 32, 1, 1), ("relu3", 1024, -1, 1), ("relu4", 64, -1, 0)]
)
def test_a_bottleneck_stands_before_the_first_weights(at: str, channels: int, dim: int, before: int) -> None:
    bottom, top = cut(digits_cnn(3), at)
    z = bottom(torch.rand(6, 1, 8, 8)).detach()
    stage = BottleneckedTop(0.01, 5).top(top)
    assert isinstance(stage, Observed)
    entrance: Any = stage.entrance
    assert len(entrance.before) == before
    assert isinstance(entrance.bottleneck, Bottleneck)
    assert (entrance.bottleneck.mean.in_features, entrance.bottleneck.mean.out_features) == (channels, 5)
    assert stage(z).shape == (6, 3)
    stage.eval()
    mean = entrance.bottleneck(entrance.before(z)).chunk(2, dim)[0]
    back = entrance.back(mean.movedim(dim, -1)).movedim(-1, dim)
    rest: Any = stage.stage
    assert torch.equal(stage(z), rest(back))


def test_its_rate_is_the_divergence_from_a_unit_gaussian() -> None:
    stage, loss = wrapped(BottleneckedTop(0.3, 5), nn.Sequential(nn.Linear(6, 2)))
    assert isinstance(stage, Observed)
    entrance: Any = stage.entrance
    nn.init.normal_(entrance.bottleneck.log_variance.weight)
    z, y = torch.randn(9, 6).requires_grad_(), torch.arange(9) % 2
    torch.manual_seed(2)
    outputs = stage(z)
    mean, log_variance = entrance.bottleneck(z).chunk(2, 1)
    law = Normal(mean, (0.5 * log_variance).exp())
    rate = kl_divergence(law, Normal(0.0, 1.0)).sum(1).mean()
    assert torch.allclose(loss(outputs, y), cross_entropy(outputs, y) + 0.3 * rate, atol=1e-5)
    torch.manual_seed(2)  # what went on was a draw of the guard's on the client's side
    drawn = MID(0.3).activation(torch.cat([mean, log_variance], 1))
    rest: Any = stage.stage
    assert torch.allclose(outputs, rest(entrance.back(drawn)), atol=1e-6)


def test_a_bottleneck_finds_weights_inside_and_needs_some() -> None:
    inside = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Flatten()), nn.Sequential(nn.Linear(12, 2)))
    assert BottleneckedTop(0.1).top(inside)(torch.rand(4, 3, 4)).shape == (4, 2)
    with pytest.raises(ValueError, match="expected a stage with a linear layer or a convolution"):
        BottleneckedTop(0.1).top(nn.Sequential(nn.ReLU(), nn.Flatten()))


def test_a_task_of_ones_own_is_kept() -> None:
    makers: Sequence[Any] = (partial(Mixup, 1.0), partial(LabelDecorrelation, 0.0), partial(BottleneckedTop, 0.0))
    for make in makers:
        protection = make(task=lambda output, y: mse_loss(output[:, 0], y.to(output.dtype)))
        stage, loss = wrapped(protection, nn.Sequential(nn.Linear(5, 1)))
        assert loss(stage(torch.randn(6, 5)), torch.arange(6) % 2) > 0


# FedPass


def test_a_passport_layer_by_hand() -> None:
    linear = nn.Linear(6, 8)
    stage = FedPass(reach=5.0, passports=3, seed=1)(linear)
    assert isinstance(stage, PassportLinear)
    assert torch.equal(stage.weight, linear.weight)
    assert stage.scale_passports.shape == (3, 6)

    def made(passports: Tensor) -> Tensor:
        rows = [stage.decode.weight @ leaky_relu(stage.encode.weight @ (stage.weight @ one)) for one in passports]
        return torch.stack(rows).mean(0)

    x = torch.randn(4, 6)
    expected = made(stage.scale_passports) * (x @ stage.weight.T) + made(stage.shift_passports)
    assert torch.allclose(stage(x), expected, atol=1e-5)
    stage(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in stage.parameters())
    assert {name for name, _ in stage.named_buffers()} == {"scale_passports", "shift_passports"}


def test_passports_are_of_their_range_and_of_a_seed() -> None:
    settings = FedPass(reach=20.0, std=0.5, passports=200, seed=0)
    layer: Any = settings(nn.Linear(400, 3))
    for passports in (layer.scale_passports, layer.shift_passports):
        centres = passports.mean(0)
        assert -20.5 < centres.min() < -18
        assert -2 < centres.max() < 0.5
        assert centres.mean().item() == pytest.approx(-10, abs=4 * 20 / sqrt(12 * 400))
        assert passports.std(0).mean().item() == pytest.approx(0.5, rel=0.03)
    before = torch.get_rng_state()
    again: Any = settings(nn.Linear(400, 3))
    assert torch.equal(again.scale_passports, layer.scale_passports)
    assert not torch.equal(again.scale_passports, again.shift_passports)
    by_chance = [FedPass(20.0)(nn.Linear(4, 3)).get_buffer("scale_passports") for _ in range(2)]
    assert not torch.equal(*by_chance)
    torch.set_rng_state(before)


def test_every_linear_layer_of_a_copy_has_passports() -> None:
    _, top = cut(digits_cnn(4), "relu2")
    stage = FedPass(seed=0)(top)
    assert sum(isinstance(part, PassportLinear) for part in stage.modules()) == 2
    assert not any(isinstance(part, nn.Linear) and name.startswith("fc") for name, part in stage.named_children())
    assert sum(isinstance(part, nn.Linear) for part in top.modules()) == 2  # what was given stays
    signs = torch.cat(
        [part._made_of(part.scale_passports) for part in stage.modules() if isinstance(part, PassportLinear)]
    )
    assert signs.min() < 0 < signs.max()  # some units are turned around
    double = FedPass(seed=0)(top.double())
    assert double(torch.rand(2, 32, 8, 8, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="expected a stage with a linear layer"):
        FedPass()(nn.Sequential(nn.Flatten()))
