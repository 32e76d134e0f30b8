"""dFIL against closed forms and brute force, and the two bounds on reconstruction against attackers that meet them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from privacy.dp.clipping import clipped
from privacy.dp.fisher import bayesian_mse_bound, dfil, dfil_of, mse_bound
from privacy.dp.gaussian import ClippedGaussian
from privacy.dp.laplace import ClippedLaplace
from splitlearn import Guard

close = torch.testing.assert_close

DRAWS = 20_000


def orthonormal(num_out: int, num_in: int) -> Tensor:
    return torch.linalg.qr(torch.randn(num_out, num_in, dtype=torch.float64)).Q


def linear(w: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ w.T


def jacobians(encode: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Each sample's Jacobian [outputs, inputs], one sample and one row at a time."""
    found = []
    for one in x:
        j = torch.autograd.functional.jacobian(lambda row: encode(row[None])[0], one)
        assert isinstance(j, Tensor)
        found.append(j.reshape(-1, one.numel()))
    return found


def brute_force(encode: Callable[[Tensor], Tensor], x: Tensor, noise: float) -> Tensor:
    return torch.stack([j.square().sum() / (j.shape[1] * noise**2) for j in jacobians(encode, x)])


def close_to_mean(draws: Tensor, expected: float) -> bool:
    """Whether the mean of independent ``draws`` is within 4 standard errors of what is expected."""
    return abs(draws.mean().item() - expected) <= 4 * draws.std().item() / len(draws) ** 0.5


@pytest.mark.parametrize("num_out", [6, 11], ids=["square", "wider"])
def test_an_orthonormal_map_under_noise_of_five_leaks_a_twenty_fifth(num_out: int) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    found = dfil(linear(orthonormal(num_out, 6)), x, std=5.0)
    close(found, torch.full((4,), 0.04, dtype=torch.float64), rtol=1e-10, atol=0.0)
    close(mse_bound(found), torch.full((4,), 25.0, dtype=torch.float64), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(("num_out", "num_in"), [(3, 8), (8, 3), (5, 5), (1, 4), (4, 1)])
def test_a_linear_map_is_its_closed_form(num_out: int, num_in: int) -> None:
    w, x = torch.randn(num_out, num_in, dtype=torch.float64), torch.randn(3, num_in, dtype=torch.float64)
    trace = torch.trace(w.T @ w).expand(3)
    close(dfil(linear(w), x, std=0.7), trace / (num_in * 0.7**2), rtol=1e-10, atol=0.0)
    close(dfil(linear(w), x, laplace_scale=0.3), trace / (num_in * 0.3**2), rtol=1e-10, atol=0.0)


def test_inputs_and_outputs_without_further_axes_are_one_entry_each() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    close(dfil(torch.square, x, std=2.0), x.square())
    close(dfil(lambda x: x.square().sum(1), x[:, None], std=2.0), x.square())
    close(dfil(lambda x: torch.stack([x, 2 * x], 1), x, std=1.0), torch.full((3,), 5.0))


def test_releases_multiply() -> None:
    w, x = torch.randn(4, 5), torch.randn(2, 5)
    close(dfil(linear(w), x, std=1.0, releases=9), 9 * dfil(linear(w), x, std=1.0))
    # As much as the mean of nine, whose noise is a third.
    close(dfil(linear(w), x, std=1.0, releases=9), dfil(linear(w), x, std=1 / 3))


def test_inside_the_ball_clipping_changes_nothing_and_outside_it_projects_and_scales() -> None:
    w, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    stage = nn.Linear(4, 5, bias=False).double()
    stage.load_state_dict({"weight": w})
    inside, outside = ClippedGaussian(clip=100.0, noise_multiplier=0.01), ClippedGaussian(clip=0.5, noise_multiplier=1)
    close(dfil_of(stage, inside, x), dfil(stage, x, std=inside.std), rtol=1e-10, atol=0.0)
    expected = []
    for z in x @ w.T:
        unit = z / z.norm()
        j = 0.5 / z.norm() * (torch.eye(5, dtype=torch.float64) - unit[:, None] * unit) @ w
        expected.append(j.square().sum() / (4 * outside.std**2))
    close(dfil_of(stage, outside, x), torch.stack(expected), rtol=1e-10, atol=0.0)


def test_clipping_in_l1_is_its_closed_form_and_takes_the_scale_of_the_guard() -> None:
    x, guard = torch.randn(3, 4, dtype=torch.float64) + 1, ClippedLaplace(clip=0.5, noise_multiplier=2)
    expected = []
    for z in x:
        j = 0.5 / z.abs().sum() * (torch.eye(4, dtype=torch.float64) - z[:, None] * z.sign() / z.abs().sum())
        expected.append(j.square().sum() / (4 * guard.scale**2))
    found = dfil_of(nn.Identity(), guard, x)
    close(found, torch.stack(expected), rtol=1e-10, atol=0.0)
    close(dfil_of(nn.Identity(), guard, x, releases=3), 3 * found, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("norm_at_zero", [ClippedGaussian(1.0, 1.0), ClippedLaplace(1.0, 1.0)])
@pytest.mark.parametrize("num_out", [2, 5], ids=["by rows", "by columns"])
def test_a_row_of_zeros_is_inside_the_ball(norm_at_zero: ClippedGaussian | ClippedLaplace, num_out: int) -> None:
    stage = nn.Linear(3, num_out, bias=False)
    expected = stage.weight.square().sum() / (3 * 4)
    close(dfil_of(stage, norm_at_zero, torch.zeros(1, 3)), expected.detach()[None])


@pytest.mark.parametrize("channels", [4, 12], ids=["fewer outputs", "fewer inputs"])
def test_a_convolutional_stage_is_what_brute_force_finds(channels: int) -> None:
    stage = nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5)
    ).double()
    stage(torch.randn(16, 2, 6, 6, dtype=torch.float64))  # moves the statistics away from 0 and 1
    x, fixed = torch.randn(3, 2, 6, 6, dtype=torch.float64), copy.deepcopy(stage).eval()
    clip = fixed(x).flatten(1).norm(dim=1).mean().item()  # some are within, some are not
    guard = ClippedGaussian(clip=clip, noise_multiplier=0.8)
    found = dfil_of(stage, guard, x)
    close(found, brute_force(lambda x: clipped(fixed(x), clip, 2), x, guard.std), rtol=1e-10, atol=0.0)


def test_an_encoder_that_torch_has_no_forward_mode_for_is_as_exact() -> None:
    attention = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True).double().eval()
    stage = nn.Sequential(attention, nn.Linear(4, 7).double())
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    close(dfil(stage, x, std=1.0), brute_force(stage, x, 1.0), rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("num_out", [5, 9], ids=["by rows", "by columns"])
@pytest.mark.parametrize("chunk", [1, 4, 7, 10_000])
def test_chunks_change_nothing(num_out: int, chunk: int) -> None:
    stage, sizes = nn.Sequential(nn.Linear(7, num_out), nn.Tanh()).double(), []

    def encode(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return stage(x)

    x = torch.randn(6, 7, dtype=torch.float64)
    found = dfil(encode, x, std=1.0, chunk=chunk)
    close(found, brute_force(stage, x, 1.0), rtol=1e-10, atol=0.0)
    assert max(sizes[1:]) <= chunk  # the first call, of two rows, checks the encoder
    assert sum(sizes[1:]) == 6 * min(7, num_out)


def test_nothing_of_the_stage_moves() -> None:
    stage = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    stage[1].eval()
    state = {name: value.clone() for name, value in stage.state_dict().items()}
    x = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        found = dfil_of(stage, ClippedGaussian(1.0, 1.0), x)
    assert not found.requires_grad
    assert x.grad is None
    assert [module.training for module in stage] == [True, False, True, True]
    assert stage.training
    assert all(weight.grad is None and weight.requires_grad for weight in stage.parameters())
    assert all(torch.equal(value, state[name]) for name, value in stage.state_dict().items())
    with pytest.raises(ValueError, match="finite inputs"):
        dfil_of(stage, ClippedGaussian(1.0, 1.0), torch.full((4, 3), torch.nan))
    assert [module.training for module in stage] == [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_is_the_inputs(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4096).to(dtype)
    found = dfil(lambda x: x[:, :1] * 2 + x[:, 1:2], x, std=0.125)
    assert found.dtype is dtype
    assert found.tolist() == [5 * 64 / 4096] * 2  # powers of two, and a five: exact in each type


@pytest.mark.parametrize("releases", [1, 4])
def test_least_squares_meets_the_bound_on_an_orthonormal_map(releases: int) -> None:
    w, x, std = orthonormal(7, 4), torch.randn(1, 4, dtype=torch.float64), 0.6
    bound = mse_bound(dfil(linear(w), x, std=std, releases=releases)).item()
    z = (x @ w.T + std * torch.randn(DRAWS, releases, 7, dtype=torch.float64)).mean(1)
    errors = (z @ w - x).square().mean(1)
    assert close_to_mean(errors, bound)
    assert not close_to_mean(errors, 1.1 * bound)  # so many draws could tell


def test_least_squares_meets_cramer_and_rao_above_the_bound_on_any_other_map() -> None:
    w, x, std = torch.randn(7, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64), 0.6
    bound = mse_bound(dfil(linear(w), x, std=std)).item()
    z = x @ w.T + std * torch.randn(DRAWS, 7, dtype=torch.float64)
    errors = (z @ torch.linalg.pinv(w).T - x).square().mean(1)
    assert close_to_mean(errors, std**2 * torch.linalg.inv(w.T @ w).trace().item() / 4)
    assert errors.mean() - 4 * errors.std() / DRAWS**0.5 > bound


def test_under_laplace_noise_the_median_of_many_releases_comes_near_the_bound_and_the_mean_makes_twice_it() -> None:
    releases, scale = 1001, 0.5
    bound = mse_bound(dfil(lambda x: x + 0, torch.zeros(1, 1), laplace_scale=scale, releases=releases)).item()
    z = torch.distributions.Laplace(0.0, scale).sample((5_000, releases))
    errors = z.median(1).values.square()
    assert close_to_mean(z.mean(1).square(), 2 * bound)
    assert errors.mean() + 4 * errors.std() / len(errors) ** 0.5 > bound
    # The median is the maximum likelihood estimate, efficient as the releases grow; 5 % off at as many, and 4
    # standard errors of 2 % each.
    assert errors.mean() < 1.15 * bound


def test_the_posterior_mean_meets_the_bayesian_bound_on_a_linear_gaussian_model() -> None:
    w, std, prior_std = 1.5 * orthonormal(6, 4), 0.8, 0.5
    x = 3 + prior_std * torch.randn(DRAWS, 4, dtype=torch.float64)
    z = x @ w.T + std * torch.randn(DRAWS, 6, dtype=torch.float64)
    leakage = dfil(linear(w), x[:16], std=std)
    bound = bayesian_mse_bound(leakage, prior_information=1 / prior_std**2)
    assert bound.shape == ()
    assert bound.item() == pytest.approx(1 / (1.5**2 / 0.8**2 + 1 / 0.25))
    precision = w.T @ w / std**2 + torch.eye(4, dtype=torch.float64) / prior_std**2
    posterior_mean = 3 + (z - 3 * w.sum(1)) @ w / std**2 @ torch.linalg.inv(precision)
    errors = (posterior_mean - x).square().mean(1)
    assert close_to_mean(errors, bound.item())
    assert not close_to_mean(errors, 1.1 * bound.item())


def test_a_guess_at_the_prior_mean_beats_the_unbiased_bound_and_never_the_bayesian_one() -> None:
    x = 0.1 * torch.randn(DRAWS, 4, dtype=torch.float64)
    leakage = dfil(lambda x: x + 0, x[:16], std=5.0)
    mse = x.square().mean().item()
    assert mse < mse_bound(leakage).min() / 1000
    # The bound lies 4 in 10 000 below the variance, less than so many draws resolve: hold each to its own figure.
    assert bayesian_mse_bound(leakage, prior_information=100.0).item() == pytest.approx(1 / (100 + 1 / 25))
    assert close_to_mean(x.square().mean(1), 0.01)


def test_the_bayesian_bound_takes_the_mean_leakage() -> None:
    leakage = torch.tensor([1.0, 3.0])
    assert bayesian_mse_bound(leakage, prior_information=2.0).item() == 0.25


def test_no_leakage_is_no_bound_at_all_and_a_step_reads_as_none() -> None:
    assert mse_bound(torch.tensor([0.0, 0.5, torch.inf])).tolist() == [torch.inf, 2.0, 0.0]
    assert dfil(torch.round, torch.rand(2, 3), std=1.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({}, "expected std or laplace_scale, got neither"),
        ({"std": 1.0, "laplace_scale": 2.0}, "got both, 1.0 and 2.0"),
        ({"std": 0.0}, "finite std above 0, got 0.0"),
        ({"std": float("nan")}, "finite std above 0, got nan"),
        ({"laplace_scale": -1.0}, "finite laplace_scale above 0, got -1.0"),
    ],
)
def test_the_noise_must_be_one(noise: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dfil(lambda x: x + 0, torch.rand(2, 3), **noise)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "floating-point type, got torch.int64; tokens have no derivative"),
        (torch.tensor([[1.0, torch.inf]]), "finite inputs, got 1 entries that are nan or inf"),
        (torch.rand(0, 3), r"at least one, got shape \(0, 3\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
    ],
)
def test_the_inputs_must_be_samples_of_finite_numbers(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dfil(lambda x: x + 0, x, std=1.0)


@pytest.mark.parametrize("num", [1, 5])
@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (
            nn.BatchNorm1d(3),
            "depend on its own sample, got one that depends on another's; put batch norm in evaluation",
        ),
        (nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3)), "depend on its own sample"),
        (lambda x: (x + 1).detach(), "got one without a gradient"),
        (lambda x: torch.ones(len(x), 2, requires_grad=True) * 2, "depends on the input, got one that does not"),
        (lambda x: x.sum(), r"one row a sample, got shape \(\)"),
        (torch.sqrt, "finite Jacobian, got nan or inf for 1 of"),
    ],
    ids=["batch norm", "normalised after", "detached", "constant", "summed", "root of 0"],
)
def test_the_encoder_must_be_differentiable_row_by_row(
    encode: Callable[[Tensor], Tensor], message: str, num: int
) -> None:
    x = torch.rand(num, 3) + 0.1
    x[-1, 0] = 0.0
    with pytest.raises(ValueError, match=message):
        dfil(encode, x, std=1.0)


def test_counts_must_be_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least 1 release and a chunk of at least 1 row, got 0 and 256"):
        dfil(lambda x: x + 0, torch.rand(2, 3), std=1.0, releases=0)
    with pytest.raises(ValueError, match="got 1 and 0"):
        dfil(lambda x: x + 0, torch.rand(2, 3), std=1.0, chunk=0)


def test_the_guard_must_bring_a_known_noise() -> None:
    with pytest.raises(ValueError, match=r"got ClippedGaussian\(clip=1.0, noise_multiplier=0\); without noise"):
        dfil_of(nn.Identity(), ClippedGaussian(1.0, 0), torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"a ClippedGaussian or a ClippedLaplace, got Guard; .* or use dfil"):
        dfil_of(nn.Identity(), Guard(), torch.rand(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.tensor([-1.0]), torch.tensor([torch.nan]), torch.tensor([1]), torch.ones(0)])
def test_a_bound_needs_leakage_that_is_one(value: Tensor) -> None:
    with pytest.raises(ValueError, match="expected dFIL of 0 or more"):
        mse_bound(value)
    with pytest.raises(ValueError, match="expected dFIL of 0 or more"):
        bayesian_mse_bound(value, prior_information=1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_prior_needs_finite_information(value: float) -> None:
    with pytest.raises(ValueError, match=r"finite prior_information above 0, got .* 1 / variance for a Gaussian"):
        bayesian_mse_bound(torch.ones(2), prior_information=value)
