"""SCAFFOLD: control variates take the members' drift out of their steps."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from splitlearn.federation import Aggregator, mean
from splitlearn.members import FedMember, Member, Weights
from splitlearn.paradigms.hooks import add_before_steps, trained
from splitlearn.party import Learner, Party
from splitlearn.rounds import Round, check_names, collect, finished

__all__ = ["ScaffoldMember", "no_control", "scaffold_round"]

CONTROL = (
    "control/"  # before the name of an entry: the server's control on the way down, a member's change on the way up
)


class ScaffoldMember(Member):
    """A member that corrects each step by c − c_i and answers with its weights and the change of its control c_i.

    (SCAFFOLD, Karimireddy et al. 2020, arXiv:1910.06378, option II: c_i⁺ = c_i − c + (x − y)/(K·η).) Its optimizer must
    be SGD without momentum or weight decay, whose steps that formula undoes. Of a split model the controls are of the
    member's own bottom; entries in ``local`` have none. A member that drops out in mid-round keeps its control. One
    whose answer is lost on the way has moved it already: the server's then lacks that change.
    """

    def __init__(
        self,
        learner: Learner,
        server: Party | None,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        local: Collection[str] = (),
    ):
        super().__init__(learner, server, batches, local=local)
        self._parameters = trained(learner, but=local)
        groups = learner.optimizer.param_groups if learner.optimizer is not None else []
        plain = not any(group.get(what) for group in groups for what in ("momentum", "weight_decay", "maximize"))
        if not isinstance(learner.optimizer, torch.optim.SGD) or not plain or len(groups) != 1:
            raise ValueError(
                f"{learner.name}: expected SGD without momentum or weight decay for SCAFFOLD, got {learner.optimizer!r}"
            )
        own = {id(parameter): name for name, parameter in learner.stage.named_parameters()}
        self._names = [own[id(parameter)] for parameter in self._parameters]
        self._control = {name: torch.zeros_like(p) for name, p in zip(self._names, self._parameters, strict=True)}
        self._correction: list[Tensor] | None = None
        add_before_steps(learner, lambda: self._correction, but=local)

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Train from the weights under the server's control; both come and go as entries, ``control/NAME``."""
        start = {name: w for name, w in weights.items() if not name.startswith(CONTROL)}
        control = {name[len(CONTROL) :]: w for name, w in weights.items() if name.startswith(CONTROL)}
        if missing := [name for name in self._names if name not in control]:
            raise ValueError(f"{self.name}: expected a control for each parameter, got none for {', '.join(missing)}")
        control = {name: control[name].to(self._control[name].device) for name in self._names}
        self._correction = [control[name] - self._control[name] for name in self._names]
        before = self.learner.steps
        try:
            found, count = super().round(start)
        finally:
            self._correction = None
        steps = self.learner.steps - before
        change = {name: torch.zeros_like(own) for name, own in self._control.items()}
        if steps:
            rate = steps * self.learner.optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
            for name, parameter in zip(self._names, self._parameters, strict=True):
                moved = (start[name].to(parameter.device) - parameter.detach()) / rate
                change[name] = moved - control[name]
                self._control[name] = self._control[name] + change[name]
        return {**found, **{f"{CONTROL}{name}": one for name, one in change.items()}}, count

    def state_dict(self) -> dict:
        """Return the learner's state and the control."""
        return {**super().state_dict(), "control": dict(self._control)}

    def put_back(self, state: Mapping) -> None:
        """Take over what ``state_dict`` returned, but for the learner's randomness, which goes on."""
        super().put_back(state)
        self._control = {name: own.clone() for name, own in state["control"].items()}

    def load_state_dict(self, state: Mapping) -> None:
        """Take over what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._control = {name: own.clone() for name, own in state["control"].items()}


def scaffold_round(
    members: Sequence[FedMember],
    model: Party,
    control: Mapping[str, Tensor],
    *,
    total: int | None = None,
    lr: float = 1.0,
    aggregate: Aggregator = mean,
) -> tuple[Round, Weights]:
    """Run one round of SCAFFOLD; return it and the server's next control (Karimireddy et al. 2020, arXiv:1910.06378).

    ``control`` is by parameter name, zeros at first (``no_control``); ``total`` members share it, ``members`` are those
    of this round; ``lr`` is the server's rate, on parameters alone: buffers are averaged. ``aggregate`` makes the
    weights alone: a robust one does not keep a bad member's change out of the control. Deviation: weights and controls
    are averaged by samples, as FedAvg's weights are, which with controls at zero it equals bit for bit. The paper
    averages both evenly; one of each would not cancel, and diverges where members' amounts differ enough.
    """
    check_names(members)
    total = len(members) if total is None else total
    if total < len(members):
        raise ValueError(f"expected a total of {len(members)} members or more, got {total}")
    start = model.weights()
    sent = {**start, **{f"{CONTROL}{name}": own for name, own in control.items()}}
    answers, counts, done = finished(*collect(members, sent, at_once=True))
    found = aggregate([_models(one) for one in answers], counts, start)
    if lr != 1.0:
        found = {
            name: start[name] + lr * (w.to(start[name].device) - start[name]) if name in control else w
            for name, w in found.items()
        }
    model.load_weights({**start, **found})
    share = len(answers) / total
    changes = mean([_changes(one) for one in answers], counts)
    return done, {
        name: own + share * changes[name].to(own.device) if name in changes else own for name, own in control.items()
    }


def no_control(model: Learner) -> Weights:
    """Return controls of zero for each parameter of the model."""
    return {name: torch.zeros_like(parameter) for name, parameter in model.stage.named_parameters()}


def _models(answer: Mapping[str, Tensor]) -> Weights:
    return {name: w for name, w in answer.items() if not name.startswith(CONTROL)}


def _changes(answer: Mapping[str, Tensor]) -> Weights:
    return {name[len(CONTROL) :]: w for name, w in answer.items() if name.startswith(CONTROL)}
