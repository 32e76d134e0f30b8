"""A member that is killed in mid-round and goes on where it was."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitlearn.checkpoint import load_checkpoint, save_checkpoint
from splitlearn.frames import Kind
from splitlearn.members import Member, Weights
from splitlearn.party import Learner
from splitlearn.remote import Remote
from splitlearn.service import Answer
from splitlearn.train import Batches
from splitlearn.transport.gate import round_tag
from splitlearn.wire import ROUND

__all__ = ["LastingMember"]

SKIPPED = 16  # request numbers between rounds: one that was left out may have asked more than its file knows of


class LastingMember(Member):
    """A ``Member`` that keeps a checkpoint at ``path`` after every batch, and after a restart goes on from there.

    Made anew as it was made the first time, it takes over the file that it finds. A round is known by the weights that
    it starts from, and each request says of which it is (``Gate``). Given the same weights again, the member goes on
    after the last batch that the file knows of, or returns what it had. What it asked of the server after that is asked
    again, to the bit, and so answered as before; the server's ``Service`` must remember as many exchanges as a batch
    takes. ``run`` names the training: a file of another one is refused. ``salt`` is that of rounds' tags. ``finished``
    is set by the verb ``finish``, with which a fed server ends a training.
    """

    def __init__(
        self,
        learner: Learner,
        server: Remote | None,
        batches: Batches,
        path: Path,
        *,
        run: str = "",
        salt: str = "",
        local: Collection[str] = (),
        told: Callable[[str], None] = lambda line: None,
    ):
        super().__init__(learner, server, batches, local=local)
        self.path, self.finished, self.rounds = path, False, 0
        self._remote, self._own_batches, self._told, self._run, self._salt = server, batches, told, run, salt
        self._start, self._at, self._count, self._total = "", 0, 0, 0.0
        self._epoch = batches.epoch
        if path.is_file():
            self._take(load_checkpoint(path))
            told(f"goes on from {path}: round {self.rounds}, batch {self._at}")

    @property
    def answers(self) -> Mapping[str, Answer]:
        """The verb ``finish``, beside those of every member."""
        return {"finish": self._finish}

    def round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        """Train from ``weights`` over all batches, or what is left of them; return weights and sample count.

        After an error the member is as its file says, randomness and all: what it then asks again is the same.
        """
        try:
            return self._round(weights)
        except (ValueError, LookupError, OSError) as error:
            if self.path.is_file():
                self._take(load_checkpoint(self.path))
            self._told(f"round {self.rounds} is interrupted: {error}")
            raise

    def _round(self, weights: Mapping[str, Tensor]) -> tuple[Weights, int]:
        start = round_tag(weights, self._salt)
        if self._remote is not None:
            self._remote.enter(f"{self.name}{ROUND}{start}")
        if start != self._start:
            self.begin(weights)
            self._start, self._at, self._count, self._total = start, 0, 0, 0.0
            if self._remote is not None:
                self._remote.steps += SKIPPED
            self.rounds, self._epoch = self.rounds + 1, self._own_batches.epoch
            self._keep()
        self._own_batches.epoch = self._epoch
        for number, (x, y) in enumerate(self._own_batches):
            if number < self._at:
                continue
            loss = self.step(x, y)
            self._at, self._count, self._total = number + 1, self._count + len(x), self._total + loss * len(x)
            self._keep()
        self.loss = self._total / self._count if self._count else float("nan")
        return self.result(), self._count

    def _finish(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.finished = True
        return {Kind.COUNT: torch.tensor(self._count)}

    def _keep(self) -> None:
        save_checkpoint(
            self.path,
            {
                "member": self.state_dict(), "asked": 0 if self._remote is None else self._remote.steps,
                "start": self._start, "at": self._at, "count": self._count, "total": self._total,
                "run": self._run, "rounds": self.rounds, "epoch": self._epoch,
            },
        )  # fmt: skip

    def _take(self, state: Mapping[str, Any]) -> None:
        if state["run"] != self._run:
            raise ValueError(
                f"expected the state of this training at {self.path}, got that of another one; give another folder"
            )
        self.load_state_dict(state["member"])
        if self._remote is not None:
            self._remote.steps = state["asked"]
        self._start, self._at, self._count = state["start"], state["at"], state["count"]
        self._total, self.rounds, self._epoch = state["total"], state["rounds"], state["epoch"]
