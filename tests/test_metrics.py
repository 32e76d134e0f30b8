import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from sklearn.metrics import f1_score, roc_auc_score

from splitlearn import metrics
from splitlearn.metrics import (
    accuracy_advantage,
    auc,
    distance_correlation_squared,
    membership_advantage,
    mse_per_sample,
    psnr_per_sample,
    quantiles,
    reconstruction_advantage,
    score_reconstruction,
    ssim_per_sample,
    utility,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class TestUtility:
    def test_by_hand(self):
        logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]])
        scores = utility(logits, torch.tensor([0, 1, 1, 1]))
        # Class 0: one hit, one false alarm: F1 = 2/3. Class 1: two hits, one miss: F1 = 4/5. Pairs won: 2 of 3.
        assert scores == pytest.approx({"accuracy": 3 / 4, "macro_f1": (2 / 3 + 4 / 5) / 2, "auc": 2 / 3})

    @pytest.mark.parametrize("num_classes", [2, 5])
    def test_agrees_with_scikit_learn(self, num_classes):
        y = torch.arange(200) % num_classes
        logits = (torch.randn(200, num_classes) + torch.eye(num_classes)[y]).round(decimals=1)  # with ties
        probabilities = logits.double().softmax(1).numpy()
        oracle = probabilities[:, 1] if num_classes == 2 else probabilities
        scores = utility(logits, y)
        assert scores["macro_f1"] == pytest.approx(f1_score(y, logits.argmax(1), average="macro"), abs=1e-12)
        # One against the rest has ties that the softmax's rounding breaks, hence not the last digits.
        assert scores["auc"] == pytest.approx(roc_auc_score(y, oracle, multi_class="ovr"), abs=1e-4)

    def test_macro_f1_counts_the_classes_that_occur(self):
        y, guess = torch.tensor([0, 0, 3, 3]), torch.tensor([0, 5, 3, 3])
        expected = f1_score(y, guess, average="macro", zero_division=0)
        assert metrics.macro_f1(torch.eye(8)[guess], y) == pytest.approx(expected)

    def test_auc_of_scores_of_ties_and_of_a_reversed_ranking(self):
        y = torch.tensor([0, 1, 0, 1])
        assert auc(torch.tensor([0.1, 0.9, 0.2, 0.8]), y) == 1
        assert auc(torch.tensor([0.9, 0.1, 0.8, 0.2]), y) == 0
        assert auc(torch.ones(4), y) == 0.5

    def test_auc_over_the_classes_that_occur(self):
        y = torch.tensor([0, 2, 0, 2])
        assert auc(torch.eye(4)[y], y) == 1

    def test_one_class_has_no_auc(self):
        logits, y = torch.randn(6, 3), torch.ones(6, dtype=torch.int64)
        assert set(utility(logits, y)) == {"accuracy", "macro_f1"}
        with pytest.raises(ValueError, match=r"at least two classes, got only \[1\]"):
            auc(logits, y)

    @pytest.mark.parametrize(
        ("logits", "y", "message"),
        [
            (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "from 0 to 1, got torch.int64 from 0 to 2"),
            (torch.zeros(3, 2), torch.tensor([0.0, 1, 0]), "whole labels"),
            (torch.zeros(3, 2), torch.tensor([0, 1]), r"got \(3, 2\) and \(2,\)"),
            (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "N ≥ 1"),
            (torch.full((2, 2), math.nan), torch.tensor([0, 1]), "finite logits"),
        ],
    )
    def test_bad_input(self, logits, y, message):
        for score in (metrics.accuracy, metrics.macro_f1, auc, utility):
            with pytest.raises(ValueError, match=message):
                score(logits, y)


def ssim_by_hand(x, y, window, sigma=1.5):
    """Wang et al. 2004 on one channel, place by place."""
    at = np.arange(window) - window // 2
    weights = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    values = []
    for i in range(x.shape[0] - window + 1):
        for j in range(x.shape[1] - window + 1):
            p, q = x[i : i + window, j : j + window], y[i : i + window, j : j + window]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq, c = (
                (weights * (p - mp) ** 2).sum(),
                (weights * (q - mq) ** 2).sum(),
                (weights * (p - mp) * (q - mq)).sum(),
            )
            values.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return np.mean(values)


class TestReconstruction:
    def test_mse_and_psnr_by_hand(self):
        x = torch.zeros(2, 1, 1, 2)
        x_hat = torch.tensor([[[[0.1, 0.3]]], [[[0.0, 0.0]]]])
        assert mse_per_sample(x, x_hat).tolist() == pytest.approx([0.05, 0])
        assert psnr_per_sample(x, x_hat).tolist() == pytest.approx([10 * math.log10(1 / 0.05), math.inf])
        assert psnr_per_sample(x, x_hat, data_range=255)[0].item() == pytest.approx(10 * math.log10(255**2 / 0.05))

    @pytest.mark.parametrize("shape", [(4, 1, 28, 28), (3, 3, 32, 32), (2, 1, 11, 17)])
    def test_ssim_agrees_with_scikit_image(self, shape):
        x = torch.rand(shape, dtype=torch.float64)
        x_hat = (x + 0.2 * torch.randn(shape, dtype=torch.float64)).clamp(0, 1)
        # scikit-image's mean leaves out the border in which its window (11 pixels for sigma 1.5) does not fit.
        settings = {"channel_axis": 0, "data_range": 1.0, "gaussian_weights": True, "sigma": 1.5}
        oracle = [
            structural_similarity(one, other, use_sample_covariance=False, **settings)
            for one, other in zip(x.numpy(), x_hat.numpy(), strict=True)
        ]
        # The window's weights are computed in single precision.
        assert ssim_per_sample(x, x_hat).tolist() == pytest.approx(oracle, abs=1e-6)

    @pytest.mark.parametrize(("side", "window"), [(7, 7), (8, 7), (10, 7), (11, 11)])
    def test_ssim_of_small_images_by_hand(self, side, window):
        x = torch.rand(3, 1, side, side, dtype=torch.float64)
        x_hat = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
        oracle = [ssim_by_hand(one[0], other[0], window) for one, other in zip(x.numpy(), x_hat.numpy(), strict=True)]
        assert ssim_per_sample(x, x_hat).tolist() == pytest.approx(oracle, abs=1e-6)

    def test_ssim_takes_its_range_from_nobody(self):
        x, x_hat = torch.rand(2, 1, 8, 8) * 0.1, torch.rand(2, 1, 8, 8) * 0.1
        assert torch.allclose(
            ssim_per_sample(x * 255, x_hat * 255, data_range=255), ssim_per_sample(x, x_hat), atol=1e-4
        )
        assert (ssim_per_sample(x, x_hat) - ssim_per_sample(x, x_hat, data_range=0.1)).abs().min() > 0.01
        assert torch.equal(ssim_per_sample(x, x), torch.ones(2))

    @pytest.mark.parametrize("shape", [(2, 1, 6, 8), (2, 1, 128), (2, 30)])
    def test_ssim_is_not_defined(self, shape):
        with pytest.raises(ValueError, match="at least 7 pixels a side"):
            ssim_per_sample(torch.rand(shape), torch.rand(shape))

    def test_bad_pairs(self):
        x = torch.rand(2, 1, 8, 8)
        for score in (mse_per_sample, psnr_per_sample, ssim_per_sample):
            with pytest.raises(ValueError, match="one shape"):
                score(x, x[:1])
            with pytest.raises(ValueError, match="finite estimates"):
                score(x, x / 0)

    def test_quantiles_occur_and_may_be_infinite(self):
        assert quantiles(torch.arange(11.0)) == {"q10": 1, "q50": 5, "q90": 9}
        assert quantiles(torch.tensor([1.0, math.inf, math.inf])) == {"q10": 1, "q50": math.inf, "q90": math.inf}
        with pytest.raises(ValueError, match="one value a sample"):
            quantiles(torch.zeros(0))


class TestScore:
    def images(self, num=40):
        y = torch.arange(num) % 2
        return (0.1 * torch.rand(num, 1, 8, 8) + 0.6 * y[:, None, None, None]), y

    def test_by_hand(self):
        x, x_hat = torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([[0.5], [1.0], [0.5]])
        aux, aux_y, y = torch.tensor([[0.0], [0.5], [1.0]]), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 7])
        score = score_reconstruction(x, x_hat, auxiliary_x=aux, auxiliary_y=aux_y, y=y)
        assert score.metrics == pytest.approx({"mse": 0.5 / 3, "mse_q10": 0, "mse_q50": 0.25, "mse_q90": 0.25})
        # The mean is .5; class 0 is 0, class 1 is .75, and class 7, of which there is no auxiliary sample, the mean.
        assert score.baselines == pytest.approx({"mse_mean_image": 0.25, "mse_class_mean_image": (0.0625 + 0.25) / 3})
        assert score.advantage == pytest.approx(1 / 3)
        known = score_reconstruction(x, x_hat, auxiliary_x=aux, auxiliary_y=aux_y, y=y, labels_known=True)
        assert known.advantage == 0  # the guess by class is better than this attack
        assert (known.metrics, known.baselines) == (score.metrics, score.baselines)

    def test_the_baselines_score_nothing_and_the_truth_everything(self):
        (x, y), (aux, aux_y) = self.images(), self.images()
        beside = {"auxiliary_x": aux, "auxiliary_y": aux_y, "y": y}
        by_class = torch.stack([aux[aux_y == label].mean(0) for label in y.tolist()])
        assert score_reconstruction(x, aux.mean(0).expand_as(x), **beside).advantage == 0
        assert score_reconstruction(x, by_class, labels_known=True, **beside).advantage == 0
        assert score_reconstruction(x, by_class, **beside).advantage > 0.9
        truth = score_reconstruction(x, x, **beside)
        assert truth.advantage == 1
        assert truth.metrics["ssim"] == pytest.approx(1)
        assert truth.metrics["psnr"] == math.inf

    def test_images_have_every_metric_beside_its_baselines(self):
        x, y = self.images()
        aux, aux_y = self.images()
        x_hat = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
        score = score_reconstruction(x, x_hat, auxiliary_x=aux, auxiliary_y=aux_y, y=y)
        names = ["mse", "psnr", "ssim"]
        assert set(score.metrics) == {f"{n}{q}" for n in names for q in ("", "_q10", "_q50", "_q90")}
        assert set(score.baselines) == {f"{n}_{b}" for n in names for b in ("mean_image", "class_mean_image")}
        assert score.metrics["ssim"] == pytest.approx(ssim_per_sample(x, x_hat).mean().item(), abs=1e-5)
        assert score.metrics["mse_q10"] < score.metrics["mse"] < score.metrics["mse_q90"]
        assert "mse_class_mean_image" not in score_reconstruction(x, x_hat, auxiliary_x=aux).baselines

    @pytest.mark.parametrize(
        ("shape", "names"),
        [((5, 1, 8, 4), {"mse", "psnr"}), ((5, 1, 128), {"mse"}), ((5, 30), {"mse"})],
    )
    def test_what_is_not_defined_is_left_out(self, shape, names):
        x = torch.rand(shape)
        score = score_reconstruction(x, torch.rand(shape), auxiliary_x=torch.rand(shape))
        assert {name for name in score.metrics if "_" not in name} == names
        assert score.baselines.keys() == {f"{name}_mean_image" for name in names}

    def test_bad_input(self):
        x = torch.rand(4, 1, 8, 8)
        with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), at least one, got \(4, 1, 8, 7\)"):
            score_reconstruction(x, x, auxiliary_x=x[..., :7])
        with pytest.raises(ValueError, match="labels_known=True"):
            score_reconstruction(x, x, auxiliary_x=x, labels_known=True)
        with pytest.raises(ValueError, match=r"on \[0, 1\], got values from -1 to 1"):
            score_reconstruction(torch.linspace(-1, 1, 256).reshape(4, 1, 8, 8), x, auxiliary_x=x)
        with pytest.raises(ValueError, match="one label a sample"):
            score_reconstruction(x, x, auxiliary_x=x, auxiliary_y=torch.zeros(3), y=torch.zeros(4))
        with pytest.raises(ValueError, match="finite estimates"):
            score_reconstruction(x, x * math.nan, auxiliary_x=x)


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        (reconstruction_advantage(0.02, 0.08), 0.75),
        (reconstruction_advantage(0.0, 0.08), 1),
        (reconstruction_advantage(0.09, 0.08), 0),
        (reconstruction_advantage(0.0, 0.0), 0),
        (accuracy_advantage(0.55, 0.1), 0.5),
        (accuracy_advantage(0.05, 0.1), 0),
        (accuracy_advantage(1.0, 1.0), 0),
        (membership_advantage(0.75), 0.5),
        (membership_advantage(0.4), 0),
    ],
)
def test_advantages(advantage, expected):
    assert advantage == pytest.approx(expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: reconstruction_advantage(math.nan, 0.08),
        lambda: reconstruction_advantage(0.02, math.nan),
        lambda: accuracy_advantage(math.nan, 0.1),
        lambda: accuracy_advantage(0.5, math.nan),
        lambda: membership_advantage(math.nan),
    ],
)
def test_a_score_that_is_no_number_is_not_called_no_leakage(make):
    with pytest.raises(ValueError, match="scores that are numbers, got nan"):
        make()


def test_originals_that_are_not_finite_are_refused():
    x = torch.rand(3, 4)
    with pytest.raises(ValueError, match="expected finite originals"):
        score_reconstruction(x.where(x != x[1, 1], math.inf), x, auxiliary_x=x)


def test_distance_correlation_of_numbers_and_in_half_precision():
    x, z = torch.rand(2, 32, generator=torch.Generator().manual_seed(0))
    found = distance_correlation_squared(x, z)
    assert torch.equal(found, distance_correlation_squared(x[:, None], z[:, None]))
    for dtype in (torch.float16, torch.bfloat16):
        coarse = [one.to(dtype) for one in (x, z)]
        assert torch.equal(
            distance_correlation_squared(*coarse), distance_correlation_squared(*map(torch.Tensor.float, coarse))
        )


def distances_by_hand(x):
    return [[math.dist(p, q) for q in x] for p in x]


def dcor_by_hand(x, z, *, corrected):
    """Székely and Rizzo: U-centred (corrected) or double-centred (biased), in plain loops."""
    n, centred = len(x), []
    for d in (distances_by_hand(x.tolist()), distances_by_hand(z.tolist())):
        rows, total = [sum(row) for row in d], sum(map(sum, d))
        if corrected:
            row, all_ = 1 / (n - 2), 1 / ((n - 1) * (n - 2))
        else:
            row, all_ = 1 / n, 1 / n**2
        centred.append(
            [
                [0 if corrected and i == j else d[i][j] - row * (rows[i] + rows[j]) + all_ * total for j in range(n)]
                for i in range(n)
            ]
        )
    a, b = centred

    def inner(p, q):
        return sum(p[i][j] * q[i][j] for i in range(n) for j in range(n))

    return inner(a, b) / math.sqrt(inner(a, a) * inner(b, b))


class TestDistanceCorrelation:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_agrees_with_plain_loops(self, dtype):
        for num in (4, 5, 13):
            x = torch.randn(num, 3, dtype=dtype)
            z = torch.cat([x[:, :1].square(), torch.randn(num, 4, dtype=dtype)], 1)
            expected = dcor_by_hand(x, z, corrected=True)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            assert distance_correlation_squared(x, z).item() == pytest.approx(expected, abs=tolerance)

    def test_sees_what_a_linear_correlation_does_not(self):
        x = torch.rand(400, 1, dtype=torch.float64) * 2 - 1
        # √(dCov²(X, X²) / …) is .491 for the uniform distribution on [−1, 1]; at n = 400 it scatters by about .02.
        assert distance_correlation_squared(x, x.square()).sqrt().item() == pytest.approx(0.491, abs=0.04)
        assert math.sqrt(dcor_by_hand(x[:100], x[:100].square(), corrected=False)) == pytest.approx(0.491, abs=0.08)

    def test_is_unbiased_where_the_usual_estimator_is_not(self):
        draws = [(torch.randn(64, 784), torch.randn(64, 784)) for _ in range(40)]
        values = torch.stack([distance_correlation_squared(x, z) for x, z in draws])
        assert values.mean().abs() < 4 * values.std() / math.sqrt(40)
        assert values.abs().max() < 0.2
        assert 8 <= (values < 0).sum() <= 32  # half of 40, within four standard deviations
        x, z = draws[0]
        assert math.sqrt(dcor_by_hand(x, z, corrected=False)) > 0.95

    def test_is_one_for_shifted_scaled_and_rotated_copies(self):
        x = torch.randn(16, 2, 3, dtype=torch.float64)
        turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        assert distance_correlation_squared(x, x.flatten(1) @ turn * 3 + 5).item() == pytest.approx(1, abs=1e-12)

    def test_is_symmetric_and_does_not_depend_on_scale(self):
        x, z = torch.randn(9, 4), torch.randn(9, 2)
        value = distance_correlation_squared(x, z)
        assert torch.allclose(distance_correlation_squared(z, x), value, atol=1e-6)
        for scale in (1e-12, 1e12):
            assert torch.allclose(distance_correlation_squared(x * scale, z), value, atol=1e-5)

    def test_gradients(self):
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        z = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(distance_correlation_squared, (x, z))

    def test_equal_samples_have_a_finite_gradient(self):
        x, z = torch.randn(8, 3), torch.randn(8, 2)
        x[3:6], z[1:4] = x[2], z[0]
        x.requires_grad_(), z.requires_grad_()
        distance_correlation_squared(x, z).backward()
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(z.grad).all()
        assert z.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        "flat",
        [torch.zeros(8, 5), torch.full((8, 5), 0.3), torch.eye(8), torch.eye(8) * 1e4 + 1],
        ids=["zeros", "constant", "equidistant", "equidistant and large"],
    )
    def test_without_variance_it_is_zero_and_so_is_its_gradient(self, flat):
        z, flat = torch.randn(8, 2, requires_grad=True), flat.clone().requires_grad_()
        for value in (distance_correlation_squared(flat, z), distance_correlation_squared(z, flat)):
            assert value.item() == 0
            value.backward()
        assert not flat.grad.any()
        assert not z.grad.any()

    def test_a_diverged_activation_is_not_hidden(self):
        assert distance_correlation_squared(torch.randn(8, 2), torch.full((8, 2), math.nan)).isnan()

    @pytest.mark.parametrize(
        ("x", "z", "message"),
        [
            (torch.rand(3, 2), torch.rand(3, 2), "at least 4, on both sides, got 3 and 3"),
            (torch.rand(5, 2), torch.rand(6, 2), "got 5 and 6"),
            (torch.ones(5, 2, dtype=torch.int64), torch.rand(5, 2), "embed tokens first"),
        ],
    )
    def test_bad_input(self, x, z, message):
        with pytest.raises(ValueError, match=message):
            distance_correlation_squared(x, z)


def test_the_import_is_light():
    code = "import sys, splitlearn.metrics; print({'sklearn', 'pytorch_msssim', 'skimage'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
