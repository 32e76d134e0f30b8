"""URVFL: a hijacking server whose lies follow the labels, as an honest server's gradients do.

Yao et al. 2024, "URVFL: undetectable data reconstruction attack on vertical federated learning" (arXiv:2404.19582,
NDSS 2025). Detectors look for gradients that do not depend on labels. This attacker has labelled samples of its own. It
trains encoder (pilot) and decoder as an autoencoder in advance. Then a critic with an auxiliary classifier learns to
tell the pilot's activations from the client's, and the classes of both; the client is sent the gradient by which its
activations look like the pilot's and like those of their label. Deviations from what the authors published:

- theirs is one classifier of twice as many classes: a label, and whose activation it is. It learns by cross-entropy,
  and the client is sent that of its label at the pilot's. Ours are a critic and a classifier which share all but their
  last layers (as in AC-GAN, Odena et al. 2017, arXiv:1610.09585): the critic is FSHA's (WGAN-GP), and the two gradients
  are added up at equal norms, the classifier's times ``label_weight``;
- theirs keeps the epoch of the pretraining with the least held-out error, ours the last step;
- the honest server is trained beside it, for the loss and the predictions that the client sees, and a lie has the norm
  of the honest gradient that it stands for, by which false labels show in it too;
- as in our FSHA the pilot's activations are scaled, and end in a ReLU where the client's do;
- the victim is the one client of vanilla training, whose stage sees whole inputs, not one of several vertical ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attacks.inversion.encoders import stepped
from attacks.inversion.fsha import BETAS, Hijacker, Hijacking, as_long_as
from attacks.inversion.reconstruction import auxiliary_labels
from splitlearn import Kind, Learner, View

__all__ = ["URVFL", "ClassAware"]


@dataclass(frozen=True, kw_only=True)
class URVFL(Hijacking):
    """Malicious server that is sent labels, 0 to ``classes`` − 1; labelled auxiliary samples. For vanilla training.

    Pilot and decoder take ``pretraining`` steps once the first activation tells their shapes, and stay.
    ``label_weight`` is the norm of the classifier's part of a lie over the critic's: the greater, the more honest it
    looks, and the less it pulls.
    """

    classes: int
    pretraining: int = 500
    label_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretraining < 1 or not self.label_weight >= 0 or self.classes < 2:
            raise ValueError(
                f"expected a step of pretraining or more, a label_weight of 0 or more and at least two classes, got "
                f"{self.pretraining}, {self.label_weight} and {self.classes}"
            )

    def insider(self, server: Learner, view: View) -> "ClassAware":
        """Return the party that takes the server's place."""
        return ClassAware(self, server, view)


class ClassAware(Hijacker):
    """The server of URVFL. Pilot and decoder stay as the pretraining left them."""

    settings: URVFL

    def __init__(self, settings: URVFL, server: Learner, view: View):
        super().__init__(settings, server, view)
        view.tensors(Kind.LABEL)  # an error where the threat does not let it read these
        self.y = auxiliary_labels(view, self.x.device, settings.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Raise ``ValueError``: a U shape sends no labels."""
        raise ValueError(f"{self.name}: expected a client that sends labels, got a U shape's; use FSHA there")

    def answer(self, z: Tensor, y: Tensor | None, honest: Tensor, loss: Tensor | None = None) -> Tensor:
        """Take a step of the attack; return a lie as long as the ``honest`` gradient."""
        return self.settings.gradient_scale * as_long_as(honest, self.hijacked(z.to(honest), y))

    def build(self, z: Tensor) -> None:
        """Make the networks, and train pilot and decoder."""
        super().build(z)
        self.classify = nn.Linear(self.critic.score.in_features, self.settings.classes).to(z)
        critics = [*self.critic.parameters(), *self.classify.parameters()]
        self.critic_optimizer = torch.optim.Adam(critics, self.settings.critic_lr, BETAS)
        for _ in range(self.settings.pretraining):
            rows = self.batch()
            error = self.misfit(self.pilot(self.x[rows]), rows)
            stepped(self.optimizer, error)
            self.errors.append(error.item())

    def adapt(self, z: Tensor, y: Tensor | None) -> None:
        """Take one step of critic and classifier."""
        rows = self.batch()
        with torch.no_grad():
            made = self.pilot(self.x[rows])
        loss, gap = self.criticism(made, z)
        stepped(self.critic_optimizer, loss + self.misjudged(made, self.y[rows]) + self.misjudged(z, y))
        self.gaps.append(gap)

    def pull(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the critic's gradient and, weighted, the classifier's, at equal norms."""
        leaf = z.detach().requires_grad_()
        (of_label,) = torch.autograd.grad(self.misjudged(leaf, y), leaf)
        g = super().pull(z, y)
        return g + self.settings.label_weight * as_long_as(g, of_label)

    def misjudged(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the cross-entropy of the labels by the classifier."""
        assert y is not None
        return cross_entropy(self.classify(self.critic.features(z)), y.to(z.device))
