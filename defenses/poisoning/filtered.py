"""A server that filters clients: it learns nothing from those of whom a filter found too many samples suspicious."""

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from defenses.poisoning.sessions import ClientSession, finite_rows, learned_from
from defenses.poisoning.suspects import Suspects, flagged_shares
from splitlearn import Learner

__all__ = ["FilteredServer"]


class FilteredServer:
    """A server for SplitFed V1 or V2 that leaves out clients by what a filter says of the last round's activations.

    ``server = FilteredServer(top, {name: top for name in names}, NeighbourGraph())`` for V2, with the copies
    (``top.replica(name)``) in place of ``top`` for V1; each ``Member`` trains against ``server.session(its name)``, and
    ``end_round()`` is called after each round. From the end of round ``warm_up`` on, the filter is called with all
    activations [N, …] and labels [N] of the round; a client of whose samples it flags more than ``most`` is left out of
    the next round: it gets zeros, and nobody learns from it. It is judged anew after every round. With ``deep`` the
    filter sees what comes out before the top's last layer, else the activations as they came.

    ``left_out`` lists who was, a list a judged round; ``shares`` is what part of each client's samples was flagged in
    the last. It protects the top from clients that send what the filter tells from honest samples, once the filter has
    something to go by: what the top learned before, and what those clients send to a fed server, is not its concern.
    The server keeps a round's activations and labels, which it is sent in any case, but no checkpoint of its verdicts.
    In V1 a copy of the top that learned from nobody still takes part in the average, as one that stayed where it was.

    Ours: the filters' papers clean a data set and train anew, which a server that sees each batch once cannot.
    """

    def __init__(
        self,
        top: Learner,
        learners: Mapping[str, Learner],
        suspect: Callable[[Tensor, Tensor], Suspects],
        *,
        most: float = 0.25,
        warm_up: int = 12,
        deep: bool = True,
        least: int = 50,
    ):
        if not learners or not 0 <= most < 1 or warm_up < 1:
            raise ValueError(
                f"{top.name}: expected at least one client, most in [0, 1) and a warm-up of 1 round or more, got "
                f"{len(learners)}, {most} and {warm_up}"
            )
        self.top, self.name, self.learners, self.suspect = top, top.name, dict(learners), suspect
        self.most, self.warm_up, self.deep, self.least = most, warm_up, deep, least
        self.rounds = 0
        self.left_out: list[list[str]] = []
        self.shares: dict[str, float] = {}
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._lock = threading.Lock()

    def session(self, client: str) -> ClientSession:
        """Return the party that one client trains against."""
        if client not in self.learners:
            raise LookupError(
                f"{self.name}: expected one of the {len(self.learners)} clients that it was made for, got {client!r}"
            )
        own = self.learners[client]
        return ClientSession(f"{self.name}/{client}", own, lambda z, y: self._learn(client, own, z, y))

    def end_round(self) -> None:
        """Judge every client by the round that ends; one that sent nothing in it is not left out."""
        with self._lock:
            self.rounds += 1
            seen, self._seen = self._seen, {}
            if self.rounds < self.warm_up or not seen:
                return
            names = [client for client, parts in seen.items() for z, _ in parts for _ in range(len(z))]
            z, y = (torch.cat([part[place] for parts in seen.values() for part in parts]) for place in (0, 1))
            self.shares = flagged_shares(self.verdict(z, y), names)
            self.left_out.append([client for client, share in self.shares.items() if share > self.most])

    def verdict(self, z: Tensor, y: Tensor) -> Tensor:
        """Return which samples [N] the filter flags by activations [N, …] and labels [N].

        Always those that are not finite, or not before the last layer; all others none, where they are fewer than
        ``least``.
        """
        features = self._features(z)
        fine = finite_rows(z) & finite_rows(features)
        flagged = ~fine.cpu()
        if int(fine.sum()) >= self.least:
            flagged[fine.cpu()] = self.suspect(features[fine], y.to(z.device)[fine]).flagged.cpu()
        return flagged

    def predict(self, x: Tensor) -> Tensor:
        """Return the top's output in evaluation mode."""
        return self.top.predict(x)

    def _learn(self, client: str, own: Learner, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        with self._lock:
            self._seen.setdefault(client, []).append((z.detach().clone(), y.detach().clone()))
            left = bool(self.left_out) and client in self.left_out[-1]
            if left:
                return learned_from(own, z, y, torch.zeros(len(z), dtype=torch.bool, device=z.device))
            return own.learn(z, y)

    def _features(self, z: Tensor) -> Tensor:
        stage = self.top.stage
        if not self.deep or not isinstance(stage, nn.Sequential) or len(stage) < 2:
            return z
        was = stage.training
        with torch.no_grad():
            found = stage[:-1].eval()(z)
        stage.train(was)
        return found
