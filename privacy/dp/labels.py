"""Label differential privacy: randomised response on labels, and losses that undo its bias.

Warner 1965; Ghazi, Golowich, Kumar, Manurangsi and Zhang 2021, "Deep learning with label differential privacy"
(arXiv:2102.06062), for the setting.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from privacy.dp.releases import Release, ResponseRelease
from splitlearn import Guard, Kind

__all__ = ["ForwardCrossEntropy", "RandomisedResponse", "UnbiasedCrossEntropy"]


@dataclass(frozen=True)
class RandomisedResponse(Guard):
    """Sends each label as it is with probability e^ε / (e^ε + classes − 1), else another one, all equally likely.

    - Adjacency: one label is replaced by any other; inputs are public, or in an account of their own. Local.
    - Protects: the label of each sample, from whoever is sent it, with ε-DP and δ = 0 for each answer.
    - Does not protect: inputs; nor a label that is answered anew in every epoch, whose answers compose (an attacker
      counts them). Draw once, ``y = response.label(y)`` before the first epoch, and train on the answers: all that
      follows is post-processing, whatever trains on them. As a guard it answers anew at every step.
    - Nor does it hide what inputs give away: a model that learns well predicts the true labels of its training
      samples, since labels follow from inputs. That is inference about a population, and no breach of label DP.
    """

    epsilon: float
    classes: int
    release: ResponseRelease = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "release", ResponseRelease(self.epsilon, self.classes))

    @property
    def secret(self) -> bool:
        """Yes: who knows the seed takes the noise off."""
        return True

    @property
    def releases(self) -> dict[Kind, Release]:
        """What one crossing releases, by kind."""
        return {Kind.LABEL: self.release}

    def label(self, y: Tensor) -> Tensor:
        """Return an answer for each label of ``y`` (whole numbers from 0 to classes − 1), drawn anew."""
        if y.is_floating_point():
            raise ValueError(f"expected whole labels from 0 to {self.classes - 1} to randomise, got {y.dtype}")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.classes:
            raise ValueError(
                f"expected whole labels from 0 to {self.classes - 1} to randomise, got {y.dtype} from "
                f"{y.min().item()} to {y.max().item()}; RandomisedResponse(classes=…) is their number"
            )
        lies = torch.rand(y.shape, device=y.device, dtype=torch.float64) >= self.release.truth
        shift = torch.randint(1, self.classes, y.shape, device=y.device)
        return torch.where(lies, (y + shift) % self.classes, y)


@dataclass(frozen=True)
class UnbiasedCrossEntropy:
    """Cross-entropy on randomised labels whose mean over the answers is that on the true ones.

    (Natarajan, Dhillon, Ravikumar and Tewari 2013, "Learning with noisy labels"; Patrini et al. 2017,
    arXiv:1609.03683, the backward correction.) ℓ̃(ỹ) = (ℓ(ỹ) − other · Σ ℓ(c)) / (truth − other), averaged over the
    batch. Unbiased, but unbounded below: with much noise a model that can memorise makes it ever smaller.
    """

    response: RandomisedResponse

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of logits [N, classes] against answers [N]."""
        release = self.response.release
        losses = -log_softmax(output, dim=1)
        own = losses.gather(1, y[:, None])[:, 0]
        return ((own - release.other * losses.sum(1)) / (release.truth - release.other)).mean()


@dataclass(frozen=True)
class ForwardCrossEntropy:
    """Cross-entropy of the answers that the model's predictions would give (Patrini et al. 2017, arXiv:1609.03683).

    The forward correction: −log(other + (truth − other) · p(ỹ)), averaged over the batch. Its minimum is at the true
    class probabilities, as that of cross-entropy on true labels; bounded below, and the steadier of the two.
    """

    response: RandomisedResponse

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of logits [N, classes] against answers [N]."""
        release = self.response.release
        answers = release.other + (release.truth - release.other) * output.softmax(1)
        return nll_loss(answers.log(), y)
