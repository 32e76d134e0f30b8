"""SplitSpy: a hijacking server that spots the false labels by which SplitGuard would have caught it.

Fu et al. 2023, "Focusing on Pinocchio's nose: a Gradients Scrutinizer to thwart split-learning hijacking attacks using
intrinsic attributes" (NDSS), the adaptive attack of that paper. SplitGuard (Erdoğan, Küpçü & Çiçek 2022,
arXiv:2108.09052) sends false labels now and then, which change an honest server's gradients and not a hijacker's. This
server trains a shadow of the honest model beside the hijacking, on what the client sends. A batch whose labels the
shadow finds wrong is answered as the honest server would. Ours are:

- the shadow is the honest server itself, false batches included, as that would be trained;
- labels are false where the shadow's loss is above ``suspicion`` times that of guessing by the labels' shares;
- until its loss on regular batches is below that, false ones cannot be told, and every answer is honest;
- a lie has the norm of the honest gradient that it stands for.

The Gradients Scrutinizer still catches it: a lie knows no labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.inversion.fsha import FSHA, Hijacker, as_long_as
from attacks.inversion.insider import Infiltration
from splitlearn import Kind, Learner, View

__all__ = ["SplitSpy", "Spy"]

DEFAULT = FSHA()
PACE = 0.1  # weight of a batch in the running mean of the shadow's loss


@dataclass(frozen=True)
class SplitSpy(Infiltration):
    """Malicious server that is sent labels; unlabelled auxiliary samples. Puts FSHA (``hijack``) in the server's place.

    For vanilla training with classes. ``suspicion`` is the share of the loss of an uninformed guess above which the
    labels of a batch are taken for false: the greater, the more lies are told, and the more false batches are missed.
    """

    hijack: FSHA = DEFAULT
    suspicion: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.suspicion <= 1:
            raise ValueError(f"expected a suspicion above 0 and up to 1, got {self.suspicion}; leave it out for 0.5")

    def insider(self, server: Learner, view: View) -> "Spy":
        """Return the party that takes the server's place."""
        return Spy(self, server, view)


class Spy(Hijacker):
    """The server of SplitSpy. ``suspected`` counts the batches, since it began to lie, that it answered honestly."""

    def __init__(self, settings: SplitSpy, server: Learner, view: View):
        super().__init__(settings.hijack, server, view)
        self.suspicion = settings.suspicion
        self.lies = self.suspected = 0
        self._counts = torch.zeros(0, dtype=torch.float64)
        self._regular: float | None = None  # running mean of the shadow's loss on batches that it believes
        view.tensors(Kind.LABEL)  # an error where the threat does not let it read these

    def forward(self, x: Tensor) -> Tensor:
        """Raise ``ValueError``: a U shape sends no labels."""
        raise ValueError(f"{self.name}: expected a client that sends labels, got a U shape's; use FSHA there")

    def answer(self, z: Tensor, y: Tensor | None, honest: Tensor, loss: Tensor | None = None) -> Tensor:
        """Return the honest gradient where the labels look false, or cannot be judged yet, and a lie elsewhere."""
        assert y is not None
        assert loss is not None
        lie = self.hijacked(z.to(honest), y)
        limit = self.suspicion * self._uninformed(y)
        false = loss.item() > limit
        ready = self._regular is not None and self._regular < limit
        if not (ready and false):
            before = loss.item() if self._regular is None else self._regular
            self._regular = (1 - PACE) * before + PACE * loss.item()
        if not ready or false:
            self.suspected += ready
            return honest
        self.lies += 1
        return self.settings.gradient_scale * as_long_as(honest, lie)

    def _uninformed(self, y: Tensor) -> float:
        """Return the entropy of the labels sent so far: the loss of who knows their shares and nothing else."""
        if y.is_floating_point() or y.ndim != 1:
            raise ValueError(
                f"{self.name}: expected class labels, one a sample, got {y.dtype} of shape {tuple(y.shape)}; use FSHA"
            )
        counts = torch.bincount(y.cpu(), minlength=len(self._counts)).double()
        counts[: len(self._counts)] += self._counts
        self._counts, shares = counts, counts[counts > 0] / counts.sum()
        return -(shares * shares.log()).sum().item()

    def evidence(self) -> dict[str, float | str]:
        """Return the signs that it was tried, with how many answers were lies, and how many batches it suspected."""
        return {**super().evidence(), "lies": float(self.lies), "suspected": float(self.suspected)}
