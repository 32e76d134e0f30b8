"""The data sets that scikit-learn itself ships, so that nothing need be downloaded."""

import torch

from splitlearn.data.dataset import Dataset

__all__ = ["load_breast_cancer", "load_digits"]


def load_digits() -> Dataset:
    """Return 1,797 handwritten digits, x [N, 1, 8, 8], its 17 grey levels scaled to [0, 1].

    The test set of UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), without an official
    split of its own.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    x = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return Dataset("digits", x, torch.from_numpy(bunch.target).long(), 10, "image", torch.arange(len(x)))


def load_breast_cancer() -> Dataset:
    """Return 569 tumours, x [N, 30] in the units measured, y 0 malignant and 1 benign.

    UCI's Breast Cancer Wisconsin, Diagnostic (Wolberg et al. 1995). Nothing is scaled here, since there is no
    official training set to fit on: use ``standardise(split(…))``.
    """
    from sklearn import datasets

    bunch = datasets.load_breast_cancer()
    x, y = torch.from_numpy(bunch.data).float(), torch.from_numpy(bunch.target).long()
    names = tuple(str(name) for name in bunch.feature_names)
    return Dataset("breast_cancer", x, y, 2, "table", torch.arange(len(x)), names=names)
