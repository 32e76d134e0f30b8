"""SplitOut: gradients unlike those of an honest training that the client simulates on a little of its own data.

Erdoğan, Tekşen, Çeliktenyıldız, Küpçü and Çiçek 2023 ("SplitOut: out-of-the-box training-hijacking detection in split
learning via outlier detection", arXiv:2302.08618).
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from defenses.detectors.detector import Detector, first_gradient
from defenses.detectors.policies import Fast
from splitlearn import Learner, vanilla

__all__ = ["SplitOut", "honest_gradients"]

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def honest_gradients(
    learner: Learner,
    top: nn.Module,
    optimizer: Optimizers,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 1,
) -> Tensor:
    """Return the first layer's gradients [steps, n] of an honest training, simulated by the client on ``batches``.

    A copy of ``learner`` trains against a copy of ``top``, with ``optimizer(parameters)`` for it; neither of the two
    moves. ``top`` is the client's guess at the server's stage. The steps should be as many as the client wants to
    watch: gradients that grow later than the simulation reaches are outliers, of an honest server too. One epoch of a
    share of 1 % is the paper's, for large data sets; a smaller set takes a larger share or several ``epochs``.
    """
    if epochs < 1:
        raise ValueError(f"expected at least one epoch of simulation, got {epochs}")
    client = learner.replica(f"{learner.name}, simulated")
    client.guard = learner.guard.simulated()
    top = copy.deepcopy(top)
    server = Learner("simulated server", top, optimizer(top.parameters()), loss=learner.loss)
    gradients = []
    for _ in range(epochs):
        for x, y in batches:
            vanilla(client, server, x, y)
            gradients.append(first_gradient(client))
    return torch.stack(gradients) if gradients else torch.empty(0, 0, dtype=torch.float64)


class SplitOut(Detector):
    """Tells by their local outlier factor whether gradients are unlike ``honest`` ones; changes nothing.

    ``honest`` are gradients of the first layer [steps, n], from ``honest_gradients``. One score for each batch from
    the ``window``-th on: the share of outliers among the last ``window`` gradients, above ``threshold`` is suspicious.
    Each factor is over all honest gradients, as in the paper (n_neighbors is their number less one), and an outlier
    is what scikit-learn calls one. It needs no labels, so that it also watches the bottom of the U shape.

    The factor sees how long a gradient is as much as where it points: servers that train another task with gradients
    of the usual size, such as one of random labels, pass.

    Deviations: the simulation starts at the client's own weights, not at new ones; several epochs.
    """

    above, needs_labels = True, False

    def __init__(
        self, learner: Learner, honest: Tensor, *, window: int = 10, threshold: float = 0.5, stop: bool = False
    ):
        super().__init__(learner, threshold=threshold, policy=Fast(), stop=stop)
        width = len(first_gradient(learner))
        if window < 1:
            raise ValueError(f"expected a window of at least one gradient, got {window}; the paper takes 10")
        if honest.ndim != 2 or len(honest) < 3 or honest.shape[1] != width:
            raise ValueError(
                f"expected at least 3 honest gradients of {width} entries, got {tuple(honest.shape)}; simulate more "
                "batches with honest_gradients(learner, …)"
            )
        self.window = window
        self._recent: list[bool] = []
        self._fit(honest)

    def _fit(self, honest: Tensor) -> None:
        from sklearn.neighbors import LocalOutlierFactor

        self._honest = honest.detach().to("cpu", torch.float64)
        self._factor = LocalOutlierFactor(n_neighbors=len(honest) - 1, novelty=True).fit(self._honest.numpy())

    def _taken(self, g: Tensor) -> tuple[Tensor | None, float | None]:
        back = self.learner.backward(g)
        gradient = first_gradient(self.learner)
        outlier = bool(self._factor.predict(gradient[None].numpy())[0] == -1)
        self._recent = [*self._recent, outlier][-self.window :]
        return back, sum(self._recent) / self.window if len(self._recent) == self.window else None

    def _evidence(self) -> dict[str, Any]:
        return {"recent": list(self._recent), "honest": self._honest.clone()}

    def _load_evidence(self, evidence: Mapping[str, Any]) -> None:
        self._recent = list(evidence["recent"])
        self._fit(evidence["honest"])
