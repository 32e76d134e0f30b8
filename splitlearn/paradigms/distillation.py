"""Knowledge distillation: from a teacher in the cloud, between two peers, and among a federation by its answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from splitlearn.federation import Aggregator, FedMember, fedavg_round, mean
from splitlearn.members import Member, Weights
from splitlearn.party import Learner, Party
from splitlearn.rounds import Round
from splitlearn.train import Batches, Predictor

__all__ = [
    "UNLABELLED", "Consensus", "Distilled", "DistillingMember", "distil", "distillation_loss", "distillation_round",
    "mutual", "taught",
]  # fmt: skip

UNLABELLED = -1  # the label of a sample that the teacher alone says something on
LOGITS = "logits"


def distillation_loss(logits: Tensor, teacher: Tensor, y: Tensor, *, alpha: float, temperature: float) -> Tensor:
    """Return α·CE(y) + (1 − α)·T²·KL(teacher ‖ student), both softened by T (Hinton et al. 2015, arXiv:1503.02531).

    ``logits`` and ``teacher`` (batch, classes), ``y`` (batch,). The divergence is a mean over all samples, the
    cross-entropy over those with a label: ``UNLABELLED`` is none. T² keeps the gradients' scale.
    """
    soft, goal = log_softmax(logits / temperature, 1), log_softmax(teacher / temperature, 1)
    divergence = temperature**2 * kl_div(soft, goal, log_target=True, reduction="batchmean")
    if bool((y < UNLABELLED).any()):
        raise ValueError(f"expected labels of 0 or more, or {UNLABELLED} for none, got {int(y.min())}")
    known = y != UNLABELLED
    if not bool(known.any()) or alpha == 0:
        return (1 - alpha) * divergence
    return alpha * cross_entropy(logits[known], y[known]) + (1 - alpha) * divergence


@dataclass(frozen=True)
class Distilled:
    """The loss of a Learner that is taught: of labels from ``taught`` the distillation loss, else cross-entropy.

    ``alpha`` in [0, 1] is what labels count for; ``temperature`` above 0.
    """

    alpha: float = 0.5
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not 0 <= self.alpha <= 1 or not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"expected alpha from 0 to 1 and a temperature above 0, got {self.alpha} and {self.temperature}"
            )

    def __call__(self, output: Tensor, label: Tensor) -> Tensor:
        """Return the mean loss over the batch."""
        if label.dim() == 1:
            return cross_entropy(output, label)
        y, teacher = label[:, 0].to(torch.int64), label[:, 1:]
        return distillation_loss(output, teacher, y, alpha=self.alpha, temperature=self.temperature)


def taught(y: Tensor, logits: Tensor) -> Tensor:
    """Return labels (batch,) and a teacher's logits (batch, classes) as one label (batch, 1 + classes)."""
    if y.dim() != 1 or logits.dim() != 2 or len(y) != len(logits):
        raise ValueError(
            f"expected labels (batch,) and logits (batch, classes), got {tuple(y.shape)} and {tuple(logits.shape)}"
        )
    label = y.to(logits.device, logits.dtype)
    if not torch.equal(label.to(y.dtype), y.to(logits.device)):
        raise ValueError(f"expected labels that {logits.dtype} holds exactly, got {int(y.max())}; give wider logits")
    return torch.cat([label[:, None], logits], 1)


def distil(student: Party, teacher: Predictor, x: Tensor, y: Tensor) -> Tensor:
    """The student learns from labels and from what the teacher says (Hinton et al. 2015, arXiv:1503.02531).

    The student's loss is ``Distilled``. A teacher across a wire is sent ``x`` itself: give it public samples alone.
    Returns the mean loss over the batch.
    """
    return student.learn(x, taught(student.label(y), teacher.predict(x)))[0]


def mutual(first: Party, second: Party, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two peers teach each other while they learn (deep mutual learning, Zhang et al. 2018, arXiv:1706.00384).

    Both losses are ``Distilled``, α = ½ and T = 1 in the paper (up to a factor of 2). Deviations: both answer before
    either steps, where the paper asks the first again after its step; and they answer in evaluation mode.
    """
    of_first, of_second = first.predict(x), second.predict(x)
    mine, _ = first.learn(x, taught(first.label(y), of_second))
    other, _ = second.learn(x, taught(second.label(y), of_first))
    return mine, other


class DistillingMember(Member):
    """A member that tells what its model says on public samples, and never its weights.

    A round: it digests the consensus on ``public`` (N, …), if there is one yet, then trains on its own ``batches``, and
    answers with its logits (N, classes). Members' models may differ. The learner's loss is ``Distilled``.
    """

    def __init__(
        self,
        learner: Learner,
        batches: Iterable[tuple[Tensor, Tensor]],
        public: Tensor,
        *,
        digests: int = 1,
        batch_size: int = 32,
        seed: int = 0,
    ):
        super().__init__(learner, None, batches)
        if not isinstance(learner.loss, Distilled):
            raise ValueError(f"{learner.name}: expected a learner whose loss is Distilled, got {learner.loss!r}")
        if digests < 1:
            raise ValueError(f"{learner.name}: expected to digest once or more, got {digests}")
        self.public, self.digests = public, digests
        numbers = torch.arange(len(public))
        self._order = Batches(numbers, numbers, batch_size=batch_size, seed=seed)

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Take in the consensus, ``logits``, train, and return own logits and the sample count."""
        if set(weights) != {LOGITS} or len(weights[LOGITS]) != len(self.public):
            raise ValueError(
                f"{self.name}: expected logits on {len(self.public)} public samples, got "
                f"{ {name: tuple(w.shape) for name, w in weights.items()} }; begin with a Consensus"
            )
        consensus = weights[LOGITS]
        if bool(consensus.any()):  # zeros: nobody has said anything yet
            none = torch.full((len(self.public),), UNLABELLED)
            for _ in range(self.digests):
                for rows, _ in self._order:
                    self.learner.learn(self.public[rows], taught(none[rows], consensus[rows]))
        count, total = 0, 0.0
        for x, y in self.batches:
            count, total = count + len(x), total + self.step(x, y) * len(x)
        self.loss = total / count if count else float("nan")
        return {LOGITS: self.learner.predict(self.public)}, count


class Consensus:
    """What a federation says on public samples: logits (N, classes), zeros before anyone has."""

    def __init__(self, samples: int, classes: int, dtype: torch.dtype = torch.float32):
        self.name, self.logits = "consensus", torch.zeros(samples, classes, dtype=dtype)

    def weights(self) -> Weights:
        """Return the logits, as an entry."""
        return {LOGITS: self.logits.clone()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the logits."""
        self.logits = weights[LOGITS].detach().clone()


def distillation_round(members: Sequence[FedMember], consensus: Consensus, *, aggregate: Aggregator = mean) -> Round:
    """Members answer on public samples and learn from each other's answers; no weights cross.

    (FedMD, Li & Wang 2019, arXiv:1910.03581.) FedAvg of logits in place of weights, so that any aggregator, wire and
    member of it will do. Deviations: answers are weighted by samples, the paper's are not; members start as they are,
    where the paper's first learn the labels of the public samples; all public samples are asked in every round, not a
    part; the consensus is digested by the softened divergence of ``Distilled``.
    """
    return fedavg_round(members, consensus, aggregate=aggregate)  # type: ignore[arg-type]
