"""Scores of utility and of leakage, each leakage score beside what an attacker who saw nothing reaches.

Leakage is read on one axis, the advantage over that baseline, in [0, 1]: 0 is no better than having seen nothing.
Inputs have the batch first, on one device. Scores of a whole set are floats, scores per sample tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "LeakageScore",
    "accuracy",
    "accuracy_advantage",
    "auc",
    "distance_correlation_squared",
    "macro_f1",
    "membership_advantage",
    "mse_per_sample",
    "psnr_per_sample",
    "quantiles",
    "reconstruction_advantage",
    "score_reconstruction",
    "ssim_per_sample",
    "utility",
]

SSIM_WINDOW = 11  # side of the Gaussian window, standard deviation 1.5 pixels (Wang et al. 2004)
SSIM_SMALL_WINDOW = 7  # for images of which a side is shorter than 11


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Return the share of samples, in [0, 1], whose greatest of the logits [N, C] stands at the label y [N]."""
    _check_labels(logits, y)
    return (logits.argmax(1) == y).double().mean().item()


def macro_f1(logits: Tensor, y: Tensor) -> float:
    """Return the mean F1 score, in [0, 1], over the classes that occur among labels y [N] or predictions.

    F1 of a class is 2·TP / (2·TP + FP + FN); the predictions are the greatest of the logits [N, C].
    """
    _check_labels(logits, y)
    guess, num_classes = logits.argmax(1), logits.shape[1]
    hits = torch.bincount(y[guess == y], minlength=num_classes)
    total = torch.bincount(y, minlength=num_classes) + torch.bincount(guess, minlength=num_classes)
    return (2 * hits.double() / total)[total > 0].mean().item()


def auc(scores: Tensor, y: Tensor) -> float:
    """Return the area under the ROC curve, in [0, 1]; .5 is chance.

    ``scores`` are either [N], higher for label 1, or logits [N, C]. For two classes it is the chance that a
    sample of class 1 scores above one of class 0, ties counting half (Hanley and McNeil 1982). For more it is the
    mean over the classes that occur in ``y`` of each one's softmax against the rest. Raises ``ValueError`` where
    ``y`` holds one class only.
    """
    if scores.ndim == 1:
        scores = torch.stack([torch.zeros_like(scores), scores], 1)
    _check_labels(scores, y)
    present = y.unique().tolist()
    if len(present) < 2:
        raise ValueError(
            f"expected labels of at least two classes, got only {present}; AUC needs both: take more samples"
        )
    if scores.shape[1] == 2:
        return _auc(scores[:, 1].double() - scores[:, 0].double(), y == 1)
    shares = scores.double().softmax(1)
    return sum(_auc(shares[:, label], y == label) for label in present) / len(present)


def utility(logits: Tensor, y: Tensor) -> dict[str, float]:
    """Return ``accuracy``, ``macro_f1`` and, where the labels are of two classes or more, ``auc``."""
    scores = {"accuracy": accuracy(logits, y), "macro_f1": macro_f1(logits, y)}
    if len(y.unique()) > 1:
        scores["auc"] = auc(logits, y)
    return scores


def mse_per_sample(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return the mean squared error of each sample, [N], of the estimates ``x_hat`` of ``x``, both [N, *]."""
    _check_pair(x, x_hat)
    return (x_hat - x).square().flatten(1).mean(1)


def psnr_per_sample(x: Tensor, x_hat: Tensor, data_range: float = 1.0) -> Tensor:
    """Return the peak signal-to-noise ratio of each sample in decibels, [N]; infinite where nothing differs."""
    return 10 * (data_range**2 / mse_per_sample(x, x_hat)).log10()


def ssim_per_sample(x: Tensor, x_hat: Tensor, data_range: float = 1.0) -> Tensor:
    """Return the structural similarity of each image, [N], in [-1, 1], averaged over channels.

    Wang, Bovik, Sheikh and Simoncelli 2004, K = (.01, .03): Gaussian window of 11 pixels (7 where a side is
    shorter than 11) and standard deviation 1.5, over the places where it fits. Images are [N, C, H, W] of at
    least 7×7 pixels. Window and range are never taken from the data.
    """
    from pytorch_msssim import ssim

    _check_pair(x, x_hat)
    if x.ndim != 4 or min(x.shape[2:]) < SSIM_SMALL_WINDOW:
        raise ValueError(
            f"expected images [N, C, H, W] of at least {SSIM_SMALL_WINDOW} pixels a side, got {tuple(x.shape)}; "
            "SSIM is not defined for these: use mse_per_sample"
        )
    window = SSIM_WINDOW if min(x.shape[2:]) >= SSIM_WINDOW else SSIM_SMALL_WINDOW
    return ssim(x, x_hat, data_range=data_range, size_average=False, win_size=window, win_sigma=1.5)


def quantiles(values: Tensor, at: Sequence[float] = (0.1, 0.5, 0.9)) -> dict[str, float]:
    """Return the quantiles of ``values`` [N] as ``{"q10": …}``: each the nearest value that occurs, so inf may."""
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected one value a sample, [N] with N ≥ 1, got shape {tuple(values.shape)}")
    found = values.double().quantile(torch.tensor(at, dtype=torch.float64), interpolation="nearest").tolist()
    return {f"q{round(100 * place)}": value for place, value in zip(at, found, strict=True)}


@dataclass(frozen=True)
class LeakageScore:
    """What an attack found out, beside what one finds out who saw nothing; ``advantage`` in [0, 1] is over that."""

    metrics: dict[str, float]
    baselines: dict[str, float]
    advantage: float


def score_reconstruction(
    x: Tensor,
    x_hat: Tensor,
    *,
    auxiliary_x: Tensor,
    auxiliary_y: Tensor | None = None,
    y: Tensor | None = None,
    labels_known: bool = False,
) -> LeakageScore:
    """Return the score of the estimates ``x_hat`` of the private ``x``, both [N, *]; images are on [0, 1].

    Each metric is a mean over samples, with quantiles such as ``mse_q10`` beside it. Baselines (``mse_mean_image``,
    ``mse_class_mean_image``) are means of the attacker's auxiliary samples [M, *], never of the private ones. The
    advantage, 1 − MSE / MSE of the baseline, is
    over the mean image; with ``labels_known`` (to that attacker, which needs ``y`` and ``auxiliary_y``) over the
    better of the mean and the class-mean image. PSNR and SSIM are for images [N, C, H, W] alone, SSIM for those
    of at least 7×7 pixels. A private class without auxiliary samples is guessed as the mean image.
    """
    if auxiliary_x.shape[1:] != x.shape[1:] or not len(auxiliary_x):
        raise ValueError(
            f"expected auxiliary samples of the private ones' shape {tuple(x.shape[1:])}, at least one, "
            f"got {tuple(auxiliary_x.shape)}; pass auxiliary_x of the same data set"
        )
    if labels_known and (y is None or auxiliary_y is None):
        raise ValueError("expected y and auxiliary_y with labels_known=True, got none; the class mean needs them")
    x, x_hat, auxiliary_x = x.detach().double(), x_hat.detach().double(), auxiliary_x.detach().double()
    metrics: dict[str, float] = {}
    for name, values in _reconstruction_metrics(x, x_hat).items():
        metrics[name] = values.mean().item()
        metrics |= {f"{name}_{place}": value for place, value in quantiles(values).items()}
    mean = auxiliary_x.mean(0)
    guesses = {"mean_image": mean.expand_as(x)}
    if y is not None and auxiliary_y is not None:
        _check_counts(x, y, auxiliary_x, auxiliary_y)
        means = {label: auxiliary_x[auxiliary_y == label].mean(0) for label in auxiliary_y.unique().tolist()}
        guesses["class_mean_image"] = torch.stack([means.get(label, mean) for label in y.tolist()])
    baselines = {
        f"{metric}_{guess}": values.mean().item()
        for guess, guessed in guesses.items()
        for metric, values in _reconstruction_metrics(x, guessed).items()
    }
    baseline = baselines["mse_mean_image"]
    if labels_known:
        baseline = min(baseline, baselines["mse_class_mean_image"])
    return LeakageScore(metrics, baselines, reconstruction_advantage(metrics["mse"], baseline))


def reconstruction_advantage(mse: float, baseline: float) -> float:
    """Return 1 − mse / baseline, cut to [0, 1]; 0 where the baseline makes no error."""
    return 0.0 if baseline == 0 else _cut_to_unit(1 - mse / baseline)


def accuracy_advantage(accuracy: float, baseline: float) -> float:
    """Return (accuracy − baseline) / (1 − baseline), cut to [0, 1]; 0 where the baseline makes no error."""
    return 0.0 if baseline == 1 else _cut_to_unit((accuracy - baseline) / (1 - baseline))


def membership_advantage(auc: float) -> float:
    """Return 2 · AUC − 1, cut to [0, 1]."""
    return _cut_to_unit(2 * auc - 1)


def distance_correlation_squared(x: Tensor, z: Tensor) -> Tensor:
    """Return the bias-corrected squared distance correlation of ``x`` [N, *] and ``z`` [N, *], N ≥ 4, a scalar.

    Székely and Rizzo 2013 ("The distance correlation t-test of independence in high dimension") and 2014
    ("Partial distance correlation with methods for dissimilarities", arXiv:1310.2926): Euclidean distances,
    U-centred, unrooted. At most 1; around 0, and as often below as above, where x and z are independent (the
    usual estimator is biased upwards: it reads .99 on independent Gaussians of 784 dimensions at N = 64). 0 where
    all samples of one side are equally far apart, which says nothing about the other.

    Differentiable in both; the gradient of the distance of two equal samples is taken as 0.
    """
    num = len(x)
    if len(z) != num or num < 4:
        raise ValueError(
            f"expected the same samples, at least 4, on both sides, got {num} and {len(z)}; enlarge the batch"
        )
    if not (x.is_floating_point() and z.is_floating_point()):
        raise ValueError(f"expected floating point samples, got {x.dtype} and {z.dtype}; embed tokens first")
    a, a_noise = _u_centred_distances(x)
    b, b_noise = _u_centred_distances(z)
    # The sums over i ≠ j have the common factor 1 / (n (n − 3)), which cancels.
    a_variance, b_variance = a.square().sum(), b.square().sum()
    flat = (a_variance <= a_noise) | (b_variance <= b_noise)
    one = torch.ones_like(a_variance)
    scale = torch.where(flat, one, a_variance).sqrt() * torch.where(flat, one, b_variance).sqrt()
    return torch.where(flat, torch.zeros_like(one), (a * b).sum() / scale)


def _u_centred_distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the U-centred Euclidean distances [N, N], and the sum of squares that rounding alone could make."""
    num, x = len(x), x.unsqueeze(-1).flatten(1)  # a number a sample is a row of one
    x = x if x.dtype is torch.float64 else x.float()  # in half precision most of the differences would be lost
    # Without the matrix product: that one loses small distances, and its root has no gradient at 0.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    rows = distances.sum(1) / (num - 2)
    centred = distances - rows[:, None] - rows[None, :] + distances.sum() / ((num - 1) * (num - 2))
    centred = centred * (1 - torch.eye(num, dtype=x.dtype, device=x.device))
    rounding = 8 * torch.finfo(x.dtype).eps * distances.detach().amax()
    return centred, (num * rounding).square()


def _reconstruction_metrics(x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
    metrics = {"mse": mse_per_sample(x, x_hat)}
    if x.ndim == 4:
        if x.min() < 0 or x.max() > 1:
            raise ValueError(
                f"expected images on [0, 1], got values from {x.min().item():.3g} to {x.max().item():.3g}; "
                "undo the normalisation of originals and estimates before scoring"
            )
        metrics["psnr"] = psnr_per_sample(x, x_hat)
        if min(x.shape[2:]) >= SSIM_SMALL_WINDOW:
            metrics["ssim"] = ssim_per_sample(x, x_hat)
    return metrics


def _auc(scores: Tensor, positive: Tensor) -> float:
    above, below = scores[positive].contiguous(), scores[~positive].sort().values
    wins = torch.searchsorted(below, above) + torch.searchsorted(
        below, above, right=True
    )  # twice, so that ties count half
    return wins.double().mean().item() / (2 * len(below))


def _cut_to_unit(value: float) -> float:
    if value != value:  # max and min would make 0 of it: no leakage
        raise ValueError("expected scores that are numbers, got nan; look at the attack's estimates and the baseline")
    return min(1.0, max(0.0, value))


def _check_labels(logits: Tensor, y: Tensor) -> None:
    if logits.ndim != 2 or y.shape != logits.shape[:1] or not len(y):
        raise ValueError(
            f"expected logits [N, C] and labels [N], N ≥ 1, got {tuple(logits.shape)} and {tuple(y.shape)}; "
            "one row a sample"
        )
    if y.is_floating_point() or not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise ValueError(
            f"expected whole labels from 0 to {logits.shape[1] - 1}, got {y.dtype} from {y.min().item()} to "
            f"{y.max().item()}; match the last layer's width to the number of classes"
        )
    if not torch.isfinite(logits).all():
        raise ValueError("expected finite logits, got nan or inf; lower the learning rate, or look at the inputs")


def _check_pair(x: Tensor, x_hat: Tensor) -> None:
    if x.shape != x_hat.shape or x.ndim < 2 or not x.numel():
        raise ValueError(
            f"expected originals and estimates of one shape [N, …], got {tuple(x.shape)} and {tuple(x_hat.shape)}; "
            "pair each estimate with its original"
        )
    if not torch.isfinite(x).all():
        raise ValueError("expected finite originals, got nan or inf; clean the data before scoring")
    if not torch.isfinite(x_hat).all():
        raise ValueError("expected finite estimates, got nan or inf; the attack diverged: lower its step size")


def _check_counts(x: Tensor, y: Tensor, auxiliary_x: Tensor, auxiliary_y: Tensor) -> None:
    if y.shape != x.shape[:1] or auxiliary_y.shape != auxiliary_x.shape[:1]:
        raise ValueError(
            f"expected one label a sample, got {tuple(y.shape)} for {len(x)} private and {tuple(auxiliary_y.shape)} "
            f"for {len(auxiliary_x)} auxiliary samples"
        )
