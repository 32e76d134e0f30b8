"""The gradient at the cut, released by a mechanism: what whoever holds the labels sends back to who does not."""

from dataclasses import dataclass

from torch import Tensor

from privacy.dp.releases import Release
from splitlearn import Guard, Kind

__all__ = ["OnGradient"]


@dataclass(frozen=True)
class OnGradient(Guard):
    """Sends the gradient at the cut as ``mechanism`` sends an activation: each sample's row clipped and noised.

    (The form of gradient perturbation in Yang et al. 2022, "Differentially private label protection in split learning",
    arXiv:2203.02073. Deviation: the whole row is clipped and noised, in place of noise along one direction.)

    - Adjacency: one label is replaced by any other (its input being the receiver's own), or one sample.
    - Sensitivity: 2 · clip, in the unit of a row of the mean loss's gradient: 1/B of the sample's own in a batch of B.
    - Protects: what one returned row tells of the label behind it, from the party below: a client in vertical
      training, the server in the U shape.
    - Does not protect: the loss, where a remote owner reports it beside the gradient (name ``Kind.LOSS`` in
      ``Accounted(crosses=…)``, which enters it as in the clear); nor what the other rows tell. Each is shaped by the
      stage above, so that an ε for each sample holds only where that stage is frozen or in the same account; else the
      unit is the whole client (``Budget.account``).
    """

    mechanism: Guard

    def __post_init__(self) -> None:
        if Kind.ACTIVATION not in getattr(self.mechanism, "releases", {}):
            raise ValueError(
                f"expected a mechanism for activations, got {self.mechanism!r}; such as ClippedGaussian(clip, noise)"
            )

    @property
    def secret(self) -> bool:
        """As the mechanism's."""
        return self.mechanism.secret

    @property
    def releases(self) -> dict[Kind, Release]:
        """What one crossing releases, by kind."""
        return {Kind.GRADIENT: self.mechanism.releases[Kind.ACTIVATION]}  # type: ignore[attr-defined]

    def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
        """Return ``g`` (batch first) with each row clipped and noised."""
        return self.mechanism.activation(g)
