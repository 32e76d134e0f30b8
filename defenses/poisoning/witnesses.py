"""Witnesses: a server that learns from a sample only where tops trained on other clients find its label likely.

Ours. The vote of models of which each poisoner reaches one is that of Deep Partition Aggregation (Levine & Feizi 2021,
arXiv:2006.14768); here it filters what one shared top learns from, in SplitFed V2.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softmax

from defenses.poisoning.sessions import ClientSession, finite_rows, learned_from
from splitlearn import Learner

__all__ = ["WitnessedServer"]


class WitnessedServer:
    """A server for SplitFed V2, or any clients in turn, that asks witnesses before it learns from a client's batch.

    ``server = WitnessedServer(learner, names)``, and each ``Member`` trains against ``server.session(its name)``.
    Clients fall into ``groups``, dealt round in the order named. Each group has a witness: a copy of the top that
    learns from the batches of its group alone, unfiltered, and starts as ``learner`` does. Of a client's batch, the
    witnesses of all other groups say how likely each label is, and the median of that is the sample's score in [0, 1].
    The one top that counts, ``learner``, learns from samples that score ``floor`` or more, unless more than
    ``tolerance`` of all samples of the client so far scored less: then from none of its batch, until its share falls.
    Back to the client goes the gradient of what was learned from, zeros for the rest.

    For the first ``warm_up`` batches of all clients together the witnesses know too little: nothing is filtered, the
    ``learner`` rests, and what goes back is the gradient of the client's own witness. It then begins where it started.
    Take about five epochs: fewer, and honest clients of rare classes lose samples.

    It protects the shared top from labels that do not fit the input as most of the others know it (backdoors by
    patches, label flips), and a client's bottom from learning along. From malicious clients that stay in fewer than
    half of the witnesses asked: (groups - 2) // 2 of them at the worst, whatever they send, since the median then lies
    among the honest witnesses' values. It does not protect from

    - poison whose labels fit (clean-label backdoors: a trigger on inputs of the target class alone);
    - what malicious bottoms do to the average of bottoms, on which every witness rests: aggregate those robustly;
    - activations that are not any input's and look to all witnesses like the class that they are labelled with;
    - loss of rare honest samples: a class that one client alone has is taken for poison.

    The server still sees all activations and labels; it holds and trains ``groups`` + 1 tops, and asks all but one for
    each batch. ``scores`` says what it thinks of a batch. Outputs are logits [n, classes].
    """

    def __init__(
        self,
        learner: Learner,
        clients: Sequence[str],
        *,
        groups: int = 10,
        floor: float = 0.1,
        warm_up: int = 300,
        tolerance: float = 0.2,
    ):
        if len(set(clients)) < len(clients) or not 4 <= groups <= len(clients):
            raise ValueError(
                f"{learner.name}: expected clients of different names and 4 groups or more of at least one each, got "
                f"{len(clients)} clients, {len(set(clients))} names and {groups} groups"
            )
        if not (0 < floor < 1 and 0 < tolerance <= 1) or warm_up < 0:
            raise ValueError(
                f"{learner.name}: expected a floor in (0, 1), a tolerance in (0, 1] and a warm-up of 0 batches or "
                f"more, got {floor}, {tolerance} and {warm_up}"
            )
        self.learner, self.name = learner, learner.name
        self.floor, self.warm_up, self.tolerance = floor, warm_up, tolerance
        self.group = {client: place % groups for place, client in enumerate(clients)}
        self.witnesses = [learner.replica(f"{learner.name}/witness{number}") for number in range(groups)]
        self.batches = 0
        self._asked = dict.fromkeys(clients, 0)
        self._doubted = dict.fromkeys(clients, 0)
        self._lock = threading.Lock()  # sessions may be served at once; all share the witnesses

    def session(self, client: str) -> ClientSession:
        """Return the party that one client trains against."""
        self._check_known(client)
        return ClientSession(f"{self.name}/{client}", self.learner, lambda z, y: self._learn(client, z, y))

    def doubted(self) -> dict[str, float]:
        """Return the share of each client's samples since the warm-up that scored below the floor."""
        return {client: self._share(client) for client in self._asked}

    def scores(self, client: str, z: Tensor, y: Tensor) -> Tensor:
        """Return how likely the witnesses of the other groups find the labels [n]: the median, in [0, 1].

        0 for a sample whose activation is not finite. Nothing moves.
        """
        self._check_known(client)
        finite = finite_rows(z)
        found = torch.zeros(len(z), device=z.device)
        if finite.any():
            z, y = z.detach()[finite], y.to(z.device)[finite]
            asked = [witness for number, witness in enumerate(self.witnesses) if number != self.group[client]]
            said = [softmax(witness.predict(z), 1).to(z.device).gather(1, y[:, None])[:, 0] for witness in asked]
            # The lower of two middle values, so that of 2m witnesses m must agree before a label passes.
            found[finite] = torch.stack(said).nan_to_num(0.0).median(0).values.to(found.dtype)
        return found

    def predict(self, x: Tensor) -> Tensor:
        """Return the learner's output in evaluation mode; before the end of the warm-up it has learned nothing."""
        return self.learner.predict(x)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return {
            "learner": self.learner.state_dict(),
            "witnesses": {str(number): witness.state_dict() for number, witness in enumerate(self.witnesses)},
            "batches": self.batches,
            "asked": dict(self._asked),
            "doubted": dict(self._doubted),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; the next step is then bit for bit the same."""
        if len(state["witnesses"]) != len(self.witnesses) or set(state["asked"]) != set(self._asked):
            raise ValueError(
                f"{self.name}: expected the state of {len(self.witnesses)} witnesses and the same clients, got "
                f"{len(state['witnesses'])} witnesses and {len(state['asked'])} clients; resume with the same ones"
            )
        self.learner.load_state_dict(state["learner"])
        for number, witness in enumerate(self.witnesses):
            witness.load_state_dict(state["witnesses"][str(number)])
        self.batches, self._asked, self._doubted = state["batches"], dict(state["asked"]), dict(state["doubted"])

    def _learn(self, client: str, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        with self._lock:
            self.batches += 1
            resting = self.batches <= self.warm_up
            finite = finite_rows(z)
            kept = finite if resting else self.scores(client, z, y) >= self.floor
            if not resting:
                self._asked[client] += len(y)
                self._doubted[client] += int((~kept).sum())
                if self._share(client) > self.tolerance:
                    kept = torch.zeros_like(kept)
            own = self.witnesses[self.group[client]]
            loss, g = learned_from(own, z, y, finite)
            return (loss, g) if resting else learned_from(self.learner, z, y, kept)

    def _share(self, client: str) -> float:
        return self._doubted[client] / self._asked[client] if self._asked[client] else 0.0

    def _check_known(self, client: str) -> None:
        if client not in self.group:
            raise LookupError(
                f"{self.name}: expected one of the {len(self.group)} clients that it was made for, got {client!r}; "
                "name every client at the start, so that each has a group"
            )
