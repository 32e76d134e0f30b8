"""What a private sample is, by how long its sealed frames are: a classifier of sizes and times of own samples.

Website fingerprinting's idea, on the frames of split inference: traffic under encryption still has its lengths and
times (Dyer et al. 2012, "Peek-a-Boo, I Still See You", whose countermeasure of padding is met here too). The host of an
enclave sends samples of its own as any client may, and so learns what padding or codec does to sizes; it needs to know
neither. Of several classifiers the one counts that does best on own samples held out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attacks.inversion.fsha import Inference
from splitlearn import View

__all__ = ["SizeGuess"]

FOLDS = 5  # by which a classifier is chosen
LEAST = 16  # own samples without which nothing can be learned
NEIGHBOURS = (5, 15, 45)


@dataclass(frozen=True)
class SizeGuess:
    """The host of an enclave, who reads sizes and times of sealed frames, and sends labelled samples of its own.

    Threat: ``Threat(sees=frozenset(), queries=True, auxiliary=True, auxiliary_labels=True)``. The class, 0 to
    ``classes`` − 1, or any other attribute, stands where the labels do (``auxiliary_y``). An exchange is one sample.
    """

    classes: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"expected 2 classes or more, got {self.classes}; what has one value is known")

    def __call__(self, view: View) -> Inference:
        """Return scores [exchanges, classes]; ``evidence`` holds the classifier and its cross-validated accuracy.

        Where all own samples look alike, and where no classifier does better than the most frequent class, that is
        the answer.
        """
        x, y = view.auxiliary_x, view.auxiliary_y.cpu().numpy()
        if len(x) < LEAST or len(x) != len(y):
            raise ValueError(
                f"expected at least {LEAST} own samples, each with its class, got {len(x)} and {len(y)}; grant more"
            )
        if not 0 <= int(y.min()) <= int(y.max()) < self.classes:
            raise ValueError(
                f"expected classes from 0 to {self.classes - 1}, got {y.min()} to {y.max()}; raise classes"
            )
        seen = view.sizes.numpy()
        own = view.query_sizes(x).numpy()
        folds = np.random.default_rng(self.seed).permutation(len(own)) % FOLDS
        candidates = self._candidates(len(own)) if (own != own[0]).any() else {}
        right = {"most frequent": _most_frequent_right(y, folds)}
        right |= {name: _cross_validated(one, own, y, folds) for name, one in candidates.items()}
        best = max(right, key=lambda name: right[name])  # the most frequent class where nothing beats it
        evidence: dict[str, float | str] = {"classifier": best, "held_out_accuracy": right[best]}
        if best == "most frequent":
            shares = np.bincount(y, minlength=self.classes) / len(y)
            return Inference(torch.from_numpy(shares).expand(len(seen), -1).clone(), evidence)
        fitted = candidates[best].fit(own, y)
        scores = torch.zeros(len(seen), self.classes, dtype=torch.float64)
        if len(seen):
            scores[:, torch.from_numpy(fitted.classes_)] = torch.from_numpy(fitted.predict_proba(seen))
        return Inference(scores, evidence)

    def _candidates(self, num: int) -> dict[str, Any]:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.naive_bayes import GaussianNB
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        found: dict[str, Any] = {
            f"{k} neighbours": make_pipeline(StandardScaler(), KNeighborsClassifier(k))
            for k in NEIGHBOURS
            if 2 * k < num
        }
        found["Gaussians"] = make_pipeline(StandardScaler(), GaussianNB())
        found["boosting"] = HistGradientBoostingClassifier(
            max_iter=20, max_leaf_nodes=8, early_stopping=False, random_state=self.seed
        )
        return found


def _cross_validated(classifier: Any, own: np.ndarray, y: np.ndarray, folds: np.ndarray) -> float:
    hits = 0
    for fold in range(FOLDS):
        rest, held_out = folds != fold, folds == fold
        if (y[rest] == y[rest][0]).all() or (own[rest] == own[rest][0]).all():  # nothing to learn from
            hits += int((y[held_out] == np.bincount(y[rest]).argmax()).sum())
            continue
        hits += int((classifier.fit(own[rest], y[rest]).predict(own[held_out]) == y[held_out]).sum())
    return hits / len(y)


def _most_frequent_right(y: np.ndarray, folds: np.ndarray) -> float:
    return sum(int((y[folds == fold] == np.bincount(y[folds != fold]).argmax()).sum()) for fold in range(FOLDS)) / len(
        y
    )
