"""Membership: the ratio against closed forms, what each point reads, an overfit model told apart, a stranger not."""

import shlex
from dataclasses import replace
from math import log, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn.functional import cross_entropy

from attacks import (
    ActivationPoint,
    GradientPoint,
    LiRA,
    LogitPoint,
    LossThreshold,
    Point,
    halves,
    likelihood_ratio,
)
from experiments import membership
from experiments.catalogue import BUILT_ATTACKS, EXPERIMENTS
from experiments.experiment import Options
from experiments.membership import MEMBERSHIP, Config
from experiments.shadows import halves_of, pool_of, shadows_of
from splitlearn import Framed, Kind, Learner, Recorded, Remote, Service, Threat, View, observe, predict, serve
from splitlearn.leakage import score_membership
from splitlearn.wire import Carrier

ASKS = Threat(queries=True)
POINTS: tuple[Point, ...] = (LogitPoint(), ActivationPoint(), GradientPoint())
SAMPLES, FEATURES, CLASSES, SHADOWS = 160, 12, 4, 16
ONCE = Options(seeds=(0,), jobs=1)
TOY = Config(shadows=4, epochs=1, private=60, auxiliary=40, shadow_jobs=1)


def crossed(bottom: nn.Module, top: nn.Module, x: Tensor, y: Tensor, *, threat: Threat = ASKS, part: int = 7) -> View:
    """What whoever asks reads of samples that are predicted, and sent to be learned from, in parts."""
    client, server = Learner("client", bottom), Learner("server", top)
    carrier: Carrier = serve(Service({"server": server}))
    record = Recorded(Framed(carrier))
    remote = Remote("server", record, "server")
    predict([client, remote], x, batch_size=part)
    for own, labels in zip(x.split(part), y.split(part), strict=True):
        remote.learn(client.predict(own).requires_grad_(), labels)
    return observe(record, threat=threat)


def trained(x: Tensor, y: Tensor, seed: int, steps: int = 120) -> tuple[nn.Module, nn.Module]:
    """A small network that learns these labels by heart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bottom = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        top = nn.Linear(32, CLASSES)
        optimizer = torch.optim.Adam([*bottom.parameters(), *top.parameters()], lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(top(bottom(x)), y).backward()
            optimizer.step()
    return bottom, top


def noise_with_labels() -> tuple[Tensor, Tensor]:
    """Inputs that tell nothing of their labels: who gets these right has seen them."""
    draws = torch.Generator().manual_seed(3)
    return (
        torch.randn(SAMPLES, FEATURES, generator=draws),
        torch.randint(0, CLASSES, (SAMPLES,), generator=draws),
    )


@pytest.fixture(scope="module")
def shadows() -> tuple[Tensor, dict[str, Tensor]]:
    """Which samples each shadow was trained on, and its statistics at each point."""
    x, y = noise_with_labels()
    inside = halves(SHADOWS, SAMPLES, seed=1)
    models = [trained(x[chosen], y[chosen], 10 + number) for number, chosen in enumerate(inside)]
    return inside, {one.name: torch.stack([one.of(*model, x, y) for model in models]) for one in POINTS}


# The ratio


def test_with_variances_of_its_own_the_ratio_is_that_of_two_normal_densities() -> None:
    draws = torch.randn(10, 5, 2, dtype=torch.float64)
    target, inside = torch.randn(5, 2, dtype=torch.float64), halves(10, 5)
    found = likelihood_ratio(target, draws, inside, variance="own")
    for sample in range(5):
        densities = []
        for chosen in (inside[:, sample], ~inside[:, sample]):
            seen = draws[chosen, sample]
            densities.append(Normal(seen.mean(0), seen.std(0)).log_prob(target[sample]).sum())
        torch.testing.assert_close(found[sample], densities[0] - densities[1], rtol=1e-9, atol=1e-9)


def test_a_shared_covariance_is_pooled_over_samples_about_their_own_means() -> None:
    mixing = torch.tensor([[1.0, 0.7], [0.0, 0.3]], dtype=torch.float64)
    draws = torch.randn(12, 6, 2, dtype=torch.float64) @ mixing + 5 * torch.randn(6, 2, dtype=torch.float64)
    target, inside = draws.mean(0) + 0.5, halves(12, 6)
    found = likelihood_ratio(target, draws, inside, variance="shared")
    densities = []
    for mask in (inside, ~inside):
        means = torch.stack([draws[mask[:, sample], sample].mean(0) for sample in range(6)])
        spread = torch.cat([draws[mask[:, sample], sample] - means[sample] for sample in range(6)])
        covariance = spread.T @ spread / (len(spread) - 6)  # a mean a sample was estimated
        densities.append(MultivariateNormal(means, covariance).log_prob(target))
    # The ridge moves correlations by a millionth, the floor deviations by 1e-9.
    torch.testing.assert_close(found, densities[0] - densities[1], rtol=1e-4, atol=1e-4)


def test_few_shadows_share_a_variance_and_many_do_not() -> None:
    for count, variance in ((62, "shared"), (64, "own")):
        draws, target, inside = torch.randn(count, 3, 1), torch.randn(3, 1), halves(count, 3)
        auto = likelihood_ratio(target, draws, inside)
        assert torch.equal(auto, likelihood_ratio(target, draws, inside, variance=variance))  # type: ignore[arg-type]


def test_the_ratio_does_not_go_by_units_and_stands_statistics_that_never_change() -> None:
    draws, target, inside = torch.randn(8, 20, 3), torch.randn(20, 3), halves(8, 20)
    scale, shift = torch.tensor([1e3, 1.0, 1e-3]), torch.tensor([5.0, 0.0, -1.0])
    found = likelihood_ratio(target, draws, inside)
    torch.testing.assert_close(
        likelihood_ratio(target * scale + shift, draws * scale + shift, inside), found, rtol=1e-3, atol=1e-3
    )
    flat = torch.cat([draws, torch.ones(8, 20, 1)], 2)
    with_flat = likelihood_ratio(torch.cat([target, torch.ones(20, 1)], 1), flat, inside)
    torch.testing.assert_close(with_flat, found, rtol=1e-6, atol=1e-6)


def test_each_sample_is_in_half_of_the_shadows() -> None:
    inside = halves(8, 500, seed=2)
    assert inside.sum(0).eq(4).all()
    assert not torch.equal(inside[0], inside[1])
    assert torch.equal(inside, halves(8, 500, seed=2))
    assert not torch.equal(inside, halves(8, 500, seed=3))
    assert 200 < int(inside[0].sum()) < 300  # seven standard deviations of 500 coins are 78


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(4, 2)}, "expected statistics .N, F. of the target"),
        ({"inside": torch.ones(6, 3)}, "expected a mask of bools, got torch.float32"),
        ({"inside": torch.ones(6, 3, dtype=torch.bool)}, "in 2 shadows or more, and out of as many, got one with 0"),
        ({"target": torch.full((3, 2), torch.nan)}, "expected finite statistics"),
    ],
)
def test_what_cannot_be_a_ratio_is_refused(change: dict[str, Tensor], message: str) -> None:
    given = {"target": torch.zeros(3, 2), "shadows": torch.randn(6, 3, 2), "inside": halves(6, 3)} | change
    with pytest.raises(ValueError, match=message):
        likelihood_ratio(**given)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_shadows_are_even_in_number_and_four_at_least(count: int) -> None:
    with pytest.raises(ValueError, match="expected an even number of shadows, 4 or more"):
        halves(count, 10)


# The points


def test_the_margin_is_the_log_odds_of_the_label_and_never_infinite() -> None:
    logits = torch.tensor([[2.0, 0.5], [0.0, 0.0], [0.0, 300.0]])
    view = crossed(nn.Identity(), nn.Identity(), logits, torch.tensor([0, 1, 1]))
    found = LogitPoint().seen(view, torch.tensor([0, 1, 1]))[:, 0]
    assert found.tolist() == [1.5, 0.0, 300.0]
    three = torch.tensor([[1.0, 0.0, 0.0]])
    share = three.softmax(1)[0, 0].item()
    odds = LogitPoint().of(nn.Identity(), nn.Identity(), three, torch.tensor([0])).item()
    assert odds == pytest.approx(log(share / (1 - share)), abs=1e-6)


def test_the_activation_is_read_without_regard_to_its_channels() -> None:
    z, y = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), torch.tensor([0, 0])
    point = ActivationPoint()
    found = point.seen(crossed(nn.Identity(), nn.Linear(4, 2), z, y), y)
    assert found[0].tolist() == pytest.approx([log(5), log(4 / 5), log(7 / 4 / 5), 1 / 4])
    assert torch.isfinite(found).all()  # a dead sample too
    images = torch.randn(3, 8, 4, 4)
    shuffled = images[:, torch.randperm(8)]
    zeros = torch.zeros(3, dtype=torch.int64)
    of = [point.of(nn.Identity(), nn.Identity(), one, zeros) for one in (images, shuffled)]
    torch.testing.assert_close(of[0], of[1])


def test_the_gradient_is_that_of_one_samples_loss() -> None:
    """∂ℓ/∂z = W'(p − onehot(y)), by hand for a linear top, whatever the batch that it came back with."""
    top, z, y = nn.Linear(5, 3), torch.randn(20, 5), torch.arange(20) % 3
    g = (top(z).softmax(1) - nn.functional.one_hot(y, 3)) @ top.weight
    size = g.norm(dim=1)
    by_hand = torch.stack([size.log(), (g.abs().amax(1) / size).log(), (g.abs().mean(1) / size).log()], 1)
    for part in (1, 7, 20):
        found = GradientPoint().seen(crossed(nn.Identity(), top, z, y, part=part), y)
        torch.testing.assert_close(found, by_hand.detach().double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_what_crosses_is_what_a_model_of_ones_own_gives(point: Point) -> None:
    x, y = noise_with_labels()
    model = trained(x, y, 0, steps=5)
    torch.testing.assert_close(point.seen(crossed(*model, x, y), y), point.of(*model, x, y), rtol=1e-4, atol=1e-4)


def test_the_threshold_goes_by_the_loss() -> None:
    x, y = noise_with_labels()
    bottom, top = trained(x, y, 0, steps=5)
    with torch.no_grad():
        loss = cross_entropy(top(bottom(x)).double(), y, reduction="none")
    torch.testing.assert_close(LossThreshold(y)(crossed(bottom, top, x, y)), -loss, rtol=1e-5, atol=1e-5)


# Positive and negative controls


def attacked(
    point: Point, chosen: Tensor, shadows: tuple[Tensor, dict[str, Tensor]], model: tuple[nn.Module, nn.Module]
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of likelihood ratio and threshold against a model."""
    x, y = noise_with_labels()
    view = crossed(*model, x, y)
    ratio = LiRA(point, y, shadows[1][point.name], shadows[0])(view)
    loss = LossThreshold(y)(view)
    return tuple(score_membership(one[chosen], one[~chosen]).metrics for one in (ratio, loss))  # type: ignore[return-value]


@pytest.mark.parametrize(("point", "least"), [(LogitPoint(), 0.95), (ActivationPoint(), 0.56), (GradientPoint(), 0.93)])
def test_a_model_that_learned_labels_by_heart_tells_who_was_there(
    point: Point, least: float, shadows: tuple[Tensor, dict[str, Tensor]]
) -> None:
    x, y = noise_with_labels()
    areas = []
    for seed in range(3):
        chosen = halves(4, SAMPLES, seed=50 + seed)[0]
        ratio, loss = attacked(point, chosen, shadows, trained(x[chosen], y[chosen], 500 + seed))
        areas.append(ratio["auc"])
        assert loss["auc"] > 0.9  # labels of noise: here one threshold does
    assert sum(areas) / 3 >= least  # by chance .5, with a spread of .027


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_model_that_saw_none_of_them_tells_nothing(point: Point, shadows: tuple[Tensor, dict[str, Tensor]]) -> None:
    strangers = torch.randn(SAMPLES // 2, FEATURES)
    chosen = halves(4, SAMPLES, seed=9)[0]
    model = trained(strangers, torch.randint(0, CLASSES, (len(strangers),)), 900)
    spread = sqrt((SAMPLES + 1) / 12) / (SAMPLES / 2)  # of an AUC of scores that know nothing (Mann and Whitney)
    for found in attacked(point, chosen, shadows, model):
        assert found["auc"] == pytest.approx(0.5, abs=3.5 * spread)
        assert found["tpr_at_1pct_low"] <= 0.02


def test_shadows_without_any_signal_tell_nothing() -> None:
    draws, target, inside = torch.randn(32, 2000, 2), torch.randn(2000, 2), halves(32, 2000)
    chosen = torch.arange(2000) < 1000
    scores = likelihood_ratio(target, draws, inside)
    found = score_membership(scores[chosen], scores[~chosen]).metrics
    assert found["auc"] == pytest.approx(0.5, abs=4 * sqrt(2001 / 12) / 1000)
    assert found["tpr_at_1pct_low"] <= 0.01 <= found["tpr_at_1pct_high"]


def test_the_ratio_sees_what_one_threshold_does_not() -> None:
    """Samples that are hard by as much as members are better: to the threshold these are all one."""
    hard = 3 * torch.randn(3000, 1)
    inside, chosen = halves(32, 3000), halves(4, 3000, seed=5)[0]
    draws = hard + inside[..., None] + torch.randn(32, 3000, 1)
    target = hard + chosen[:, None] + torch.randn(3000, 1)
    ratio, plain = likelihood_ratio(target, draws, inside), target[:, 0]
    areas = [score_membership(one[chosen], one[~chosen]).metrics["auc"] for one in (ratio, plain)]
    best = 0.5 * (1 + torch.erf(torch.tensor(0.5)).item())  # Φ(1/√2): two normals a deviation apart
    assert areas[0] == pytest.approx(best, abs=0.04)
    assert areas[1] < 0.62


# What the threat withholds


@pytest.mark.parametrize(
    ("attack", "kind"),
    [(LogitPoint(), Kind.PREDICTION), (ActivationPoint(), Kind.ACTIVATION), (GradientPoint(), Kind.GRADIENT)],
)
def test_what_is_not_granted_is_not_there(attack: Point, kind: Kind) -> None:
    x, y = noise_with_labels()
    lira = LiRA(attack, y, torch.randn(4, SAMPLES, 1), halves(4, SAMPLES))
    blind = Threat(queries=True, sees=frozenset(Kind) - {kind})
    with pytest.raises(LookupError, match=rf"tensors of kind {kind}; grant them with Threat\(sees="):
        lira(crossed(*trained(x, y, 0, steps=1), x, y, threat=blind))
    with pytest.raises(LookupError, match=r"sends candidates of its own; grant that with Threat\(queries=True\)"):
        lira(crossed(*trained(x, y, 0, steps=1), x, y, threat=Threat()))


def test_the_threshold_asks_too() -> None:
    x, y = noise_with_labels()
    model = trained(x, y, 0, steps=1)
    with pytest.raises(LookupError, match="queries=True"):
        LossThreshold(y)(crossed(*model, x, y, threat=Threat()))
    with pytest.raises(ValueError, match="expected one prediction for each of 3 candidates, got 160"):
        LossThreshold(y[:3])(crossed(*model, x, y))


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_an_empty_wire_says_what_to_record(point: Point) -> None:
    nothing = observe(Recorded(Service({})), threat=ASKS)
    with pytest.raises(LookupError, match="none crossed; record the wire while"):
        point.seen(nothing, torch.tensor([0]))


# The experiment


def test_the_experiment_scores_every_point_and_says_who_knows_what() -> None:
    (task,) = membership.tasks(TOY, ONCE)
    outcome = task.call()
    assert [leak.attack for leak in outcome.leakage] == [
        "lira@logits", "loss_threshold@logits", "lira@activation", "lira@gradient",
    ]  # fmt: skip
    for leak in outcome.leakage:
        assert leak.family == "membership"
        assert leak.advantage == pytest.approx(max(0.0, 2 * leak.metrics["auc"] - 1))
        assert leak.metrics["tpr_at_1pct_low"] <= leak.metrics["tpr_at_1pct"] <= leak.metrics["tpr_at_1pct_high"]
        assert "tpr_at_01pct" not in leak.metrics  # 50 others say nothing about one in a thousand
    told = outcome.visible["whoever asks for predictions (loss_threshold@logits)"]
    assert "what crosses for inputs of its own choice" in told
    assert not any("shadows" in line for line in told)
    assert any("shadows" in line for line in outcome.visible["honest-but-curious server (lira@activation)"])
    assert "50 members and 50 others are asked about, with 20% of the labels of both flipped" in outcome.notes[0]
    assert outcome.nbytes["up"]["activation"] > 0


def test_members_are_half_of_the_candidates_and_flips_fall_on_both() -> None:
    (task,) = membership.tasks(replace(TOY, private=0, auxiliary=0), ONCE)
    trial = task.call.args[0]  # type: ignore[attr-defined]
    pool, clean = pool_of(trial, None), pool_of(replace(trial, flipped=0.0), None)
    assert int(pool.members.sum()) == len(pool.members) // 2 == 700
    changed = pool.candidates.y != clean.candidates.y
    assert int(changed.sum()) == 280  # a flipped label is another one
    assert 100 < int((changed & pool.members).sum()) < 180
    target = pool.splits(pool.members)
    assert torch.equal(target.private.x, pool.candidates.x[pool.members])
    assert not torch.isin(target.private.ids, pool.test.ids).any()
    # Shadows' halves have nothing to do with the target's: 700 ± 19 agree.
    assert all(abs(int((half == pool.members).sum()) - 700) < 100 for half in halves_of(trial))


@pytest.mark.parametrize("protection", ["gaussian_noise:0.5", "compression:int8", "mid:0.001"])
def test_it_runs_under_protections_which_the_shadows_know(protection: str) -> None:
    (task,) = membership.tasks(replace(TOY, protections=(protection,), points=("activation",)), ONCE)
    (leak,) = task.call().leakage
    assert 0 <= leak.metrics["auc"] <= 1


def test_a_trial_is_reproduced_by_its_command_and_named_by_what_decides_it() -> None:
    config = replace(TOY, protections=("none", "gaussian_noise:0.5"), shadow_jobs=2)
    found = membership.tasks(config, Options(seeds=(0, 1)))
    assert len({task.trial for task in found}) == 4
    words = shlex.split(found[-1].command)
    assert words[:3] == ["splitlearn", "run", "membership"]
    assert words[words.index("--protections") + 1] == "gaussian_noise:0.5"
    assert "--shadow-jobs" not in words  # it changes nothing
    assert found[0].trial == membership.tasks(replace(config, shadow_jobs=1), Options(seeds=(0,)))[0].trial
    assert EXPERIMENTS["membership"] is MEMBERSHIP
    assert {"lira", "loss_threshold"} <= set(BUILT_ATTACKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": ("logit",)}, "no point is named 'logit'"),
        ({"shadows": 5}, "expected an even number of shadows"),
        ({"flipped": 1.0}, "expected --flipped from 0 to below 1"),
        ({"shadow_jobs": -1}, "expected --shadow-jobs of 0 or more"),
        ({"protections": ("nois",)}, "no protection is named 'nois'"),
        ({"protections": ("noise:x",)}, "expected a noise multiplier"),
        ({"protections": ("patch_shuffle",)}, "expected protections that work on image"),
        ({"cut": "conv9"}, "expected the name of a layer below the cut"),
    ],
)
def test_bad_options_end_before_any_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        membership.tasks(replace(TOY, **change), ONCE)


@pytest.mark.slow
def test_shadows_in_processes_are_those_trained_here() -> None:
    (task,) = membership.tasks(TOY, ONCE)
    trial = task.call.args[0]  # type: ignore[attr-defined]
    here, there = shadows_of(trial, None, 1), shadows_of(trial, None, 2)
    assert len(here) == len(there) == 4
    for one, other in zip(here, there, strict=True):
        assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
def test_on_digits_the_ratio_beats_the_threshold() -> None:
    """The record's figures are means of three seeds: .68 and .05 at least, below .6 for the threshold."""
    (task,) = membership.tasks(Config(points=("logits",)), ONCE)
    ratio, threshold = task.call().leakage
    assert ratio.metrics["auc"] >= 0.66
    assert ratio.metrics["tpr_at_1pct"] >= 0.05
    assert threshold.metrics["auc"] < 0.62
