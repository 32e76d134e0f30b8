"""Guards: the clipped Gaussian mechanism (with a proof) and NoPeek (a heuristic)."""

from math import inf, sqrt

import pytest
import torch
from torch import nn

from defenses import NoPeek
from privacy import ClippedGaussian
from privacy.dp import Accounted, Budget, ClippedLaplace, OnGradient, RandomisedResponse
from splitlearn import Guard, Guards, Learner
from splitlearn.metrics import distance_correlation_squared


def test_rows_are_clipped_one_by_one():
    z = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    sent = ClippedGaussian(clip=1.0, noise_multiplier=0.0).activation(z)
    assert torch.allclose(sent, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert torch.equal(sent[1:], z[1:])  # inside the ball nothing changes, not even by rounding


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_two_samples_never_differ_by_more_than_the_sensitivity(scale):
    guard = ClippedGaussian(clip=2.0, noise_multiplier=0.0)
    torch.manual_seed(0)
    z = scale * torch.randn(200, 3, 4, 4, dtype=torch.float64)
    sent = guard.activation(torch.cat([z, -z])).flatten(1)
    furthest = torch.cdist(sent, sent).max()
    assert furthest <= guard.sensitivity * (1 + 1e-12)  # rounding of float64 alone
    if scale >= 1:
        assert furthest == pytest.approx(guard.sensitivity)  # antipodes reach it: 2 · clip is tight


def test_noise_has_the_stated_spread_and_is_drawn_anew():
    guard = ClippedGaussian(clip=3.0, noise_multiplier=0.5)
    assert guard.std == 0.5 * 2 * 3.0
    torch.manual_seed(0)
    z = torch.zeros(1000, 100)
    first, second = guard.activation(z), guard.activation(z)
    # 100,000 draws: the mean's error is std/316, that of the spread std/447; four of them.
    assert first.mean().abs() < 4 * guard.std / sqrt(1e5)
    assert first.std().item() == pytest.approx(guard.std, rel=4 / sqrt(2e5))
    assert (first - second).std().item() == pytest.approx(sqrt(2) * guard.std, rel=4 / sqrt(2e5))


def test_each_sample_is_clipped_and_noised_whatever_else_is_in_the_batch():
    guard = ClippedGaussian(clip=1.0, noise_multiplier=0.0)
    torch.manual_seed(0)
    z = torch.randn(5, 7, dtype=torch.float64)
    assert torch.allclose(guard.activation(z)[2:3], guard.activation(z[2:3]), rtol=1e-15)


def test_the_gradient_runs_through_the_clipping():
    torch.manual_seed(0)
    guard = ClippedGaussian(clip=1.0, noise_multiplier=0.0)
    z = 3 * torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(guard.activation, (z,))
    (along,) = torch.autograd.grad((guard.activation(z) * z.detach()).sum(), z)
    assert torch.allclose((along * z).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)  # the norm is fixed


def test_a_row_of_zeros_has_a_finite_gradient():
    z = torch.zeros(2, 3, requires_grad=True)
    ClippedGaussian(1.0, 0.1).activation(z).sum().backward()
    assert torch.equal(z.grad, torch.ones(2, 3))


def test_the_noise_comes_from_the_learners_own_generator():
    def predictions(seed):
        torch.manual_seed(seed + 100)  # whatever the global generator does
        learner = Learner("client", nn.Identity(), guard=ClippedGaussian(1.0, 1.0), seed=seed)
        return learner.predict(torch.ones(2, 3)), learner.predict(torch.ones(2, 3))

    assert not torch.equal(*predictions(0))
    assert all(map(torch.equal, predictions(0), predictions(0)))
    assert not torch.equal(predictions(0)[0], predictions(1)[0])


def test_noise_has_a_secret_seed_unless_one_is_given():
    def sent(guard, **seed):
        learner = Learner("client", nn.Sequential(nn.Identity(), nn.Dropout(0.5)), guard=guard, **seed)
        return learner.forward(torch.ones(8, 32)).detach(), learner.label(torch.zeros(64, dtype=torch.int64))

    noise, answers = ClippedGaussian(1.0, 1.0), RandomisedResponse(1.0, 3)
    secret = [
        noise, ClippedLaplace(1.0, 1.0), OnGradient(noise), answers, Guards(Guard(), answers),
        Accounted(noise, Budget().account("server", "ann", "replace one input", shaped_by=())),
    ]  # fmt: skip
    for guard in secret:
        assert guard.secret
        assert not all(map(torch.equal, sent(guard), sent(guard)))
        assert all(map(torch.equal, sent(guard, seed=0), sent(guard, seed=0)))
    for guard in (None, NoPeek(1.0), Guards(Guard(), NoPeek(1.0))):  # without noise it is 0, as ever
        assert all(map(torch.equal, sent(guard), sent(guard, seed=0)))


def test_zcdp_of_one_release():
    assert ClippedGaussian(7.0, 1.0).zcdp == 0.5  # sensitivity²/(2 std²), whatever the clip
    assert ClippedGaussian(7.0, 0.1).zcdp == pytest.approx(50)
    assert ClippedGaussian(7.0, 0.0).zcdp == inf
    assert not any("epsilon" in name for guard in (ClippedGaussian(1.0, 1.0), NoPeek(1.0)) for name in dir(guard))


def test_half_precision_neither_overflows_nor_widens():
    z = torch.full((1, 512), 6e4, dtype=torch.float16)  # its norm is over the greatest float16
    sent = ClippedGaussian(1.0, 0.0).activation(z)
    assert sent.dtype == torch.float16
    assert sent.float().norm() == pytest.approx(1, abs=0.05)  # entries of .044 are spaced by 3e-5


def test_an_activation_of_one_number_is_clipped():
    assert ClippedGaussian(2.0, 0.0).activation(torch.tensor([1.0, -5.0])).tolist() == [1.0, -2.0]


def test_what_cannot_be_protected():
    with pytest.raises(ValueError, match="1 entries that are nan or inf"):
        ClippedGaussian(1.0, 1.0).activation(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="floating-point"):
        ClippedGaussian(1.0, 1.0).activation(torch.tensor([[1, 2]]))
    for clip in (0.0, -1.0, inf, float("nan")):
        with pytest.raises(ValueError, match="finite clip above 0"):
            ClippedGaussian(clip, 1.0)
    for noise_multiplier in (-1.0, inf, float("nan")):
        with pytest.raises(ValueError, match="finite noise_multiplier"):
            ClippedGaussian(1.0, noise_multiplier)


def test_nopeek_adds_the_weighted_distance_correlation():
    torch.manual_seed(0)
    x, z = torch.rand(16, 1, 4, 4), torch.rand(16, 8)
    assert torch.equal(NoPeek(2.5).penalty(x, z), 2.5 * distance_correlation_squared(x, z))
    assert torch.allclose(NoPeek(2.5).penalty(x, 3 * x), torch.tensor(2.5))  # a similar copy depends on it wholly
    assert torch.equal(NoPeek(2.5).activation(z), z)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_nopeek_refuses_a_batch_without_an_estimator(num):
    with pytest.raises(ValueError, match=f"at least 4 samples in a batch for NoPeek, got {num}"):
        NoPeek(1.0).penalty(torch.rand(num, 5), torch.rand(num, 2))
    assert NoPeek(1.0).penalty(torch.rand(4, 5), torch.rand(4, 2)) is not None


def _trained(guard: Guard | None, *, steps: int = 60) -> nn.Linear:
    """Return a layer trained for one of its inputs, whose gradient from above is zero: the penalty alone moves it."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    learner = Learner("client", layer, torch.optim.Adam(layer.parameters(), 0.05), guard)
    for _ in range(steps):
        z = learner.forward(torch.randn(32, 6))
        learner.backward(torch.zeros_like(z))
    return layer


def test_nopeek_makes_activations_depend_less_on_inputs():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    before, after = (distance_correlation_squared(x, _trained(guard)(x)) for guard in (None, NoPeek(1.0)))
    assert before > 0.5
    assert after < 0.6 * before


def test_nopeek_of_no_weight_changes_nothing():
    assert torch.equal(_trained(NoPeek(0.0), steps=3).weight, _trained(None, steps=3).weight)


def test_nopeek_of_what_makes_no_sense():
    for weight in (-1.0, inf, float("nan")):
        with pytest.raises(ValueError, match="finite weight of 0 or more"):
            NoPeek(weight)
    with pytest.raises(ValueError, match="embed tokens"):
        NoPeek(1.0).penalty(torch.ones(8, 5, dtype=torch.int64), torch.rand(8, 2))
