"""SafeSplit: after every client's turn the server goes on from the last checkpoint that looks like most others.

Rieger, Pegoraro, Kumari, Abera, Knauer and Sadeghi 2025 (NDSS, arXiv:2501.06650), from the paper's description.
"""

import copy
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.fft import dctn
from torch import Tensor

from defenses.poisoning.sessions import ClientSession
from splitlearn import Learner
from splitlearn.members import Weights

__all__ = ["SafeSplitServer", "rotations", "safesplit", "spectrum"]

ClientTurn = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # the top's weights before and after


def safesplit(turns: Sequence[ClientTurn], *, low: float = 0.25) -> int:
    """Return the place of the turn whose end the server goes on from: the last that both analyses find benign.

    ``turns`` are the last N, (weights before, weights after) each, in order. Static: ``spectrum`` of what the turn
    changed, the ``low`` part of its frequencies in each dimension. Dynamic: ``rotations`` of the turn. In each, a
    turn's score is the sum of the distances to the nearest half of the others, and the N // 2 + 1 lowest scores are
    benign; two such sets always meet. With fewer than 3 turns there is no majority, and the last one is returned.
    """
    if not turns:
        raise ValueError("expected at least one turn, got none; call it after a client's turn")
    if not 0 < low <= 1:
        raise ValueError(f"expected a low part of the frequencies in (0, 1], got {low}")
    if len(turns) < 3:
        return len(turns) - 1
    static = _benign(torch.stack([spectrum(*turn, low=low) for turn in turns]))
    dynamic = _benign(torch.stack([rotations(*turn) for turn in turns]))
    return max(static & dynamic)


def spectrum(before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, low: float = 0.25) -> Tensor:
    """Return the low frequencies of a turn's change: the DCT of each floating entry, as a matrix [first, rest]."""
    parts = []
    for name in _moving(before, after):
        change = (after[name].double() - before[name].double()).cpu()
        matrix = change.reshape(len(change), -1) if change.ndim else change.reshape(1, 1)
        found = dctn(matrix.numpy(), norm="ortho")
        rows, columns = (max(1, int(np.ceil(low * size))) for size in found.shape)
        parts.append(torch.from_numpy(found[:rows, :columns].copy()).flatten())
    return torch.cat(parts)


def rotations(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
    """Return by what angle (radians), seen from zero, each floating entry turned; 0 for an entry of zeros."""
    angles = []
    for name in _moving(before, after):
        a, b = before[name].double().flatten().cpu(), after[name].double().flatten().cpu()
        if not a.norm() or not b.norm():
            angles.append(torch.zeros((), dtype=torch.float64))
            continue
        a, b = a / a.norm(), b / b.norm()
        angles.append(2 * torch.atan2((a - b).norm(), (a + b).norm()))  # exact for small angles, unlike acos
    return torch.stack(angles)


class SafeSplitServer:
    """A server for clients in turn that rolls a suspicious client's turn back, by ``safesplit`` of the last turns.

    Each client trains against ``session(its name)``. A turn ends when another client's batch comes, or at ``end_turn``,
    to be called after each round, before evaluation. The last ``window`` turns are kept, rolled back or not; after a
    turn the learner goes on from the end of the one that ``safesplit`` returns, weights and optimizer state.
    ``rolled_back`` lists the clients whose own turn was not the one.

    It protects the shared top from single turns of a minority of malicious clients that change it otherwise than most
    turns do (the paper: backdoors in sequential split learning, a majority of benign clients in every window). It does
    not protect from poison whose turns move the top as honest ones do, and clients of unlike data move it unlike. Half
    of the window is suspicious by construction, so that honest turns are rolled back often, poison or none, and
    learning is slower. Bottoms are not its: what a rolled back client left in its own, or handed on, stays.

    Deviations: the angle of each entry as the rotational distance (the paper's formula we do not have); the whole low
    corner of each entry's DCT; the client's part is not rolled back with the server's.
    """

    def __init__(self, learner: Learner, *, window: int = 9, low: float = 0.25):
        if window < 3 or not 0 < low <= 1:
            raise ValueError(
                f"{learner.name}: expected a window of 3 turns or more and a low part in (0, 1], got {window} and {low}"
            )
        self.learner, self.name = learner, learner.name
        self.low = low
        self.rolled_back: list[str] = []
        self._turns: deque[tuple[Weights, dict[str, Any]]] = deque(maxlen=window)
        self._client: str | None = None
        self._before: Weights = {}
        self._lock = threading.RLock()

    def session(self, client: str) -> ClientSession:
        """Return the party that one client trains against."""
        return ClientSession(client, self.learner, lambda z, y: self._learn(client, z, y))

    def end_turn(self) -> None:
        """End the turn of whoever learned last, and go on from the last benign end; without a turn nothing happens."""
        with self._lock:
            if self._client is None:
                return
            self._turns.append((self._before, copy.deepcopy(self.learner.state_dict())))
            chosen = safesplit([(before, after["stage"]) for before, after in self._turns], low=self.low)
            if chosen < len(self._turns) - 1:
                self.rolled_back.append(self._client)
                self.learner.put_back(self._turns[chosen][1])
            self._client = None

    def predict(self, x: Tensor) -> Tensor:
        """Return the learner's output in evaluation mode."""
        return self.learner.predict(x)

    def _learn(self, client: str, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        with self._lock:
            if client != self._client:
                self.end_turn()
                self._client, self._before = client, self.learner.weights()
            return self.learner.learn(z, y)


def _moving(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    names = [name for name in before if before[name].is_floating_point()]
    if not names or any(name not in after or after[name].shape != before[name].shape for name in before):
        raise ValueError("expected weights of one model before and after a turn, with a floating entry; cut one model")
    return names


def _benign(rows: Tensor) -> set[int]:
    """Return the N // 2 + 1 rows that are nearest to their nearest N // 2 others; non-finite ones come last."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").nan_to_num(nan=torch.inf)
    distances.fill_diagonal_(0)
    half = len(rows) // 2
    scores = distances.sort(dim=1).values[:, : half + 1].sum(1)
    return set(scores.argsort(stable=True)[: half + 1].tolist())
