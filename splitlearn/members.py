"""Members of a federation: what takes part in a round, in this process or across a wire."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from splitlearn.frames import Kind
from splitlearn.party import Learner, Party
from splitlearn.protocols import vanilla
from splitlearn.remote import Asked
from splitlearn.service import keyed, named
from splitlearn.wire import Transport

__all__ = ["TICKET", "FedMember", "Member", "RemoteMember", "Weights", "batch_norm_entries"]

Weights = dict[str, Tensor]
TICKET = "ticket"  # an entry in place of weights that a member has left elsewhere, for an aggregator to fetch


class FedMember(Protocol):
    """What takes part in a round. One that raises ``ConnectionError`` or ``TimeoutError`` is left out."""

    name: str

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Train from ``weights`` on own data; return the new weights and the number of samples behind them."""


class Member:
    """A member that trains a Learner: the bottom against ``server``, or the whole model where that is None.

    ``batches`` yields (x, y) anew on every round. Entries named in ``local`` stay with the member: they are neither
    taken from the fed server nor sent to it. Batch norm's, for example (FedBN, Li et al. 2021, arXiv:2102.07623);
    see ``batch_norm_entries``. The fed server's copy then keeps the local entries that it started with: evaluate
    through a member. The optimizer's state is the member's own and outlives the round.
    """

    def __init__(
        self,
        learner: Learner,
        server: Party | None,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        local: Collection[str] = (),
    ):
        if isinstance(batches, Iterator):
            raise ValueError(
                f"{learner.name}: expected batches that can be gone through every round, got an iterator; "
                "pass a list or Batches(x, y, …)"
            )
        if unknown := sorted(set(local) - set(learner.stage.state_dict())):
            raise ValueError(
                f"{learner.name}: expected local entries of its own stage, got {', '.join(unknown)}; "
                f"it has {', '.join(learner.stage.state_dict())}"
            )
        self.name = learner.name
        self.learner, self.server, self.batches, self.local = learner, server, batches, frozenset(local)
        self.loss = float("nan")  # mean over the samples of the last round

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Train from ``weights`` over all batches; return the new weights, less the local, and the sample count."""
        self.begin(weights)
        count, total = 0, 0.0
        for x, y in self.batches:
            count, total = count + len(x), total + self.step(x, y) * len(x)
        self.loss = total / count if count else float("nan")
        return self.result(), count

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Take over a round's start, but for the local entries."""
        own = self.learner.weights()
        self.learner.load_weights({**weights, **{name: own[name] for name in self.local}})

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on one batch; return its mean loss."""
        try:
            if self.server is None:
                return self.learner.learn(x, self.learner.label(y))[0].item()
            return vanilla(self.learner, self.server, x, y).item()
        except BaseException:
            self.learner.abandon()  # a lost server, or Ctrl-C: the next round starts clean
            raise

    def result(self) -> Weights:
        """Return what goes to the fed server: the weights, less the local entries."""
        return {name: w for name, w in self.learner.weights().items() if name not in self.local}

    def state_dict(self) -> dict[str, Any]:
        """Return the learner's state, and that of the batches where they have one."""
        batches = self.batches.state_dict() if hasattr(self.batches, "state_dict") else {}
        return {"learner": self.learner.state_dict(), "batches": batches}

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned, but for the learner's randomness, which goes on."""
        self.learner.put_back(state["learner"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.learner.load_state_dict(state["learner"])
        if hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(state["batches"])


class RemoteMember(Asked):
    """A member on the other end of a transport.

    With ``updates`` it answers with the difference to the weights that it was given, which a codec may pack;
    without, with the weights themselves, bit for bit. Raises ``ValueError`` for an answer that does not fit.
    """

    def __init__(self, name: str, transport: Transport, session: str, *, updates: bool = False):
        super().__init__(name, transport, session)
        self._updates = updates

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Have the member train from ``weights``; return its new weights and its number of samples."""
        reply = self._ask("update" if self._updates else "round", keyed(weights, Kind.WEIGHTS))
        whole, changes = named(reply, Kind.WEIGHTS), named(reply, Kind.UPDATE)
        count = reply.get(Kind.COUNT)
        if count is None or count.numel() != 1 or count.is_floating_point() or int(count) < 0:
            raise ValueError(f"{self.name}: expected a count of samples in its answer, got {count}")
        for name, tensor in [*whole.items(), *changes.items()]:
            if name != TICKET and (name not in weights or tensor.shape != weights[name].shape):
                raise ValueError(
                    f"{self.name}: expected entries of the weights that it was given, got {name!r} of shape "
                    f"{tuple(tensor.shape)}; train one model in all members"
                )
        changed = {name: weights[name] + change.to(weights[name].device) for name, change in changes.items()}
        return {**whole, **changed}, int(count)


def batch_norm_entries(stage: nn.Module) -> frozenset[str]:
    """Return the names of all entries of batch-norm layers, for ``Member(local=…)``."""
    kinds = nn.modules.batchnorm._BatchNorm
    layers = [(name, layer) for name, layer in stage.named_modules() if isinstance(layer, kinds)]
    return frozenset(f"{name}.{entry}" if name else entry for name, layer in layers for entry in layer.state_dict())
