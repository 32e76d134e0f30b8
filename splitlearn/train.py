"""Training loops around any protocol: fit, evaluate, early stopping, checkpoints and resume."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from splitlearn.checkpoint import load_checkpoint, save_checkpoint

__all__ = [
    "Batches", "History", "Predictor", "Progress", "Stateful", "TrainingStopped", "epochs_of", "evaluate", "fit",
    "predict",
]  # fmt: skip

Progress = Callable[[int, int, float, float | None], None]  # epoch done, epochs in all, loss, score


class TrainingStopped(Exception):  # noqa: N818 - a reason to stop, such as a budget that is spent, not a fault
    """Raised inside an epoch to end the training in good order: ``fit`` returns what was done, and says why."""


class Stateful(Protocol):
    """What a checkpoint carries: anything with ``state_dict`` and ``load_state_dict``."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""


class Predictor(Protocol):
    """What a prediction passes through: any party, or several asked as one."""

    def predict(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` in evaluation mode."""


class Batches:
    """Yields shuffled (x, y) batches; the order of epoch n depends on ``seed`` and n alone."""

    def __init__(self, x: Tensor, y: Tensor, *, batch_size: int, seed: int = 0, drop_last: bool = False):
        if len(x) != len(y) or not len(x):
            raise ValueError(
                f"expected as many labels as samples and at least one, got {len(x)} samples, {len(y)} labels"
            )
        if batch_size < 1:
            raise ValueError(f"expected a batch size of 1 or more, got {batch_size}")
        if drop_last and batch_size > len(x):
            raise ValueError(f"expected a batch size of at most {len(x)} samples with drop_last, got {batch_size}")
        self.x, self.y, self.batch_size, self.seed, self.drop_last = x, y, batch_size, seed, drop_last
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        return len(self.x) // self.batch_size if self.drop_last else -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.x), generator=generator)
        for rows in order.split(self.batch_size)[: len(self)]:
            yield self.x[rows], self.y[rows]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the epoch to come."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.epoch = state["epoch"]


@dataclass
class History:
    """What a training did: the mean loss of each epoch, and each validation score."""

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    best_epoch: int | None = None  # of the best score, counted from 1
    stopped_early: bool = False
    stopped_by: str = ""  # why an epoch ended the training (``TrainingStopped``); its own steps stay made


def epochs_of(
    step: Callable[[Tensor, Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> Callable[[], float]:
    """Return a function that runs one epoch of ``step(x, y) -> loss`` and returns the mean loss a sample."""

    def epoch() -> float:
        total, count = 0.0, 0
        for x, y in batches:
            total, count = total + step(x, y).item() * len(x), count + len(x)
        return total / count

    return epoch


def fit(
    epoch: Callable[[], float],
    *,
    epochs: int,
    state: Mapping[str, Stateful] | None = None,
    validate: Callable[[], float] | None = None,
    patience: int | None = None,
    checkpoint: Path | str | None = None,
    progress: Progress | None = None,
) -> History:
    """Run ``epoch`` (an epoch or a round; returns its mean loss) ``epochs`` times and return what happened.

    ``state`` names all that training changes: parties, members, batches. With ``checkpoint`` it is saved after
    every epoch, and a file that is there is resumed from, to the bit-same result; a finished run is not run again.
    ``validate`` returns a score (greater is better); with ``patience`` training stops after as many epochs without
    a better one, and at the end the best state is put back. Where the epoch or its validation raises
    ``TrainingStopped``, training ends: the history says why, what it had changed by then stays, and the checkpoint is
    that of the last whole epoch.
    """
    if epochs < 1:
        raise ValueError(f"expected at least one epoch, got {epochs}")
    holders = dict(state or {})
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if stateless := [name for name, holder in holders.items() if not hasattr(holder, "state_dict")]:
        raise ValueError(
            f"expected what has a state_dict in state=…, got {', '.join(stateless)} without one; pass the party "
            "itself, not how it is seen across a wire"
        )
    if patience is not None and (validate is None or not holders or patience < 1):
        raise ValueError("patience needs validate=…, state=… to put the best back, and at least one epoch of patience")
    if checkpoint is not None and not holders:
        raise ValueError("a checkpoint needs state={name: party or batches, …}: all that training changes")
    history, best, done = History(), None, 0
    if checkpoint is not None and checkpoint.exists():
        history, best, done = _resumed(checkpoint, holders, epochs=epochs, keeps_best=patience is not None)
    while done < epochs and not history.stopped_early:
        try:
            loss = epoch()
            score = validate() if validate is not None else None
        except TrainingStopped as stop:
            history.stopped_by = str(stop)
            break
        history.losses.append(loss)
        done += 1
        if score is not None:
            if score != score:
                raise ValueError(
                    f"expected validate() to return a score, got nan after epoch {done}; look at its inputs"
                )
            if history.best_epoch is None or score > max(history.scores):
                history.best_epoch = done
                best = _states(holders) if patience is not None else None
            history.scores.append(score)
            history.stopped_early = patience is not None and done - history.best_epoch >= patience
        if checkpoint is not None:
            saved = {"done": done, "history": asdict(history), "best": best, "state": _states(holders)}
            save_checkpoint(checkpoint, saved)
        if progress is not None:
            progress(done, epochs, history.losses[-1], history.scores[-1] if history.scores else None)
    if best is not None:
        for name, holder in holders.items():  # a party's randomness goes on: noise that was sent is not sent again
            getattr(holder, "put_back", holder.load_state_dict)(best[name])
    return history


def predict(chain: Sequence[Predictor], x: Tensor, *, batch_size: int = 256) -> Tensor:
    """Return the outputs of the parties, bottom first, one after the other, on ``x``; in evaluation mode."""
    outputs = []
    for part in x.split(batch_size):
        for party in chain:
            part = party.predict(part)
        outputs.append(part)
    return torch.cat(outputs)


def evaluate(chain: Sequence[Predictor], x: Tensor, y: Tensor, *, batch_size: int = 256) -> dict[str, float]:
    """Return accuracy, macro-F1 and, where defined, AUC of the parties' joint prediction on (x, y)."""
    from splitlearn.metrics import utility

    return utility(predict(chain, x, batch_size=batch_size).to(y.device), y)


def _states(holders: Mapping[str, Stateful]) -> dict[str, Any]:
    # A state may alias what training changes next: keep a snapshot.
    return {name: _snapshot(holder.state_dict()) for name, holder in holders.items()}


def _snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _snapshot(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_snapshot(entry) for entry in value)
    return value


def _resumed(
    checkpoint: Path, holders: Mapping[str, Stateful], *, epochs: int, keeps_best: bool
) -> tuple[History, Any, int]:
    saved = load_checkpoint(checkpoint)
    if not isinstance(saved, dict) or set(saved) != {"done", "history", "best", "state"}:
        raise ValueError(f"{checkpoint} is a checkpoint, but not of a training; give another path")
    if set(saved["state"]) != set(holders):
        raise ValueError(
            f"{checkpoint} holds the state of {', '.join(saved['state'])}, expected {', '.join(holders)}; "
            "resume with the same parties, or give another path"
        )
    history, done = History(**saved["history"]), saved["done"]
    if done > epochs:
        raise ValueError(f"{checkpoint} holds {done} epochs, expected at most {epochs}; ask for more, or start again")
    kept_best = saved["best"] is not None
    if history.scores and kept_best != keeps_best:
        raise ValueError(
            f"{checkpoint} was written {'without' if keeps_best else 'with'} patience, expected it "
            f"{'with' if keeps_best else 'without'}; resume with the same settings, or give another path"
        )
    for name, holder in holders.items():
        holder.load_state_dict(saved["state"][name])
    return history, saved["best"], done
