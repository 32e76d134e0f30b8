"""FedProx: a member is held near what its round started from."""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from splitlearn.members import Member, Weights
from splitlearn.paradigms.hooks import add_before_steps, trained
from splitlearn.party import Learner, Party

__all__ = ["ProximalMember"]


class ProximalMember(Member):
    """A member whose loss has μ/2·‖w − w_start‖² more (FedProx, Li et al. 2020, arXiv:1812.06127).

    ``mu`` of 0 or more; at 0 it is a ``Member``, bit for bit. Of a split model the term is on the member's own bottom.
    Entries in ``local`` go free: there is no global model of them. Outside its rounds nothing is pulled. Deviation: the
    paper also lets slow members do less work; give them fewer batches for that.
    """

    def __init__(
        self,
        learner: Learner,
        server: Party | None,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        mu: float,
        local: Collection[str] = (),
    ):
        super().__init__(learner, server, batches, local=local)
        if not 0 <= mu < float("inf"):
            raise ValueError(f"{learner.name}: expected mu of 0 or more, got {mu}; for example 0.01")
        self.mu = mu
        self._parameters = trained(learner, but=local)
        self._start: list[Tensor] | None = None
        add_before_steps(learner, self._pull, but=local)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Take over a round's start, and hold on to it."""
        super().begin(weights)
        self._start = [parameter.detach().clone() for parameter in self._parameters]

    def result(self) -> Weights:
        """Return what goes to the fed server, and let go of the start."""
        self._start = None
        return super().result()

    def _pull(self) -> list[Tensor] | None:
        if self._start is None or not self.mu:
            return None
        return [self.mu * (own - start) for own, start in zip(self._parameters, self._start, strict=True)]
