"""The labels that were sent, read by who knows how they were randomised: the Bayes estimate from the answers.

With answers by randomised response (Warner 1965) and a prior p(y | what else crossed), the likeliest label is that of
the greatest p(y) · Π P[answer | y]. No attack on the answers alone does better.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlearn import Kind, View

__all__ = ["SentLabels"]


@dataclass(frozen=True)
class SentLabels:
    """Honest but curious server that is sent labels with the activations. Returns its estimate of each, [N].

    ``epsilon`` is that of one answer among ``classes``, known to the attacker; None where labels cross as they are.
    ``prior`` maps the activations that crossed in the same requests to logits, [n, …] to [n, classes]: a model that the
    attacker has from elsewhere; None for all labels alike. Each label is taken to have been answered once.
    """

    classes: int
    epsilon: float | None = None
    prior: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.epsilon is not None and not self.epsilon >= 0:
            raise ValueError(f"expected an ε of 0 or more, got {self.epsilon}; None where labels cross as they are")

    def __call__(self, view: View) -> Tensor:
        """Return the likeliest label of each sample in the order in which they crossed in learn requests."""
        answers = view.tensors(Kind.LABEL, verb="learn")
        if not answers:
            raise LookupError("this attack reads the labels of learn requests, and none crossed; record training")
        if view.threat.releases > 1:
            raise ValueError(
                f"expected one answer for each sample, got a threat that averages {view.threat.releases} releases; "
                "labels are not averaged: use Threat(releases=1)"
            )
        sent = torch.cat(answers)
        if self.epsilon is None:
            return sent
        logits = torch.zeros(len(sent), self.classes)
        if self.prior is not None:
            with torch.no_grad():
                logits = self.prior(view.activations(verb="learn")).log_softmax(1).cpu()
            if logits.shape != (len(sent), self.classes):
                raise ValueError(
                    f"expected a prior that gives {self.classes} logits for each of {len(sent)} labels, got "
                    f"{tuple(logits.shape)}"
                )
        # The true label answers e^ε times as likely as any other.
        return (logits + self.epsilon * torch.nn.functional.one_hot(sent.cpu(), self.classes)).argmax(1).to(sent.device)
