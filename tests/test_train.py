"""Batches, fit, early stopping, checkpoints: an interrupted training resumes to the bit-same result."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitlearn import Batches, Guard, Learner, cut, epochs_of, evaluate, fit, predict, save_checkpoint, vanilla, wire
from splitlearn.train import History

X = torch.linspace(-1, 1, 80).reshape(20, 4)
Y = (X.sum(1) > 0).long() + (X[:, 0] > 0.5).long()


class Noise(Guard):
    def activation(self, z: Tensor) -> Tensor:
        return z + 0.05 * torch.randn_like(z)


class Run:
    """A split training with dropout, a stochastic guard, batch norm and Adam."""

    def __init__(self, *, across: bool = False) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
        bottom, top = cut(model, 3)
        self.client = Learner("client", bottom, torch.optim.Adam(bottom.parameters(), lr=0.01), Noise())
        self.server = Learner("server", top, torch.optim.Adam(top.parameters(), lr=0.01))
        self.batches = Batches(X, Y, batch_size=6, drop_last=True)
        seen = wire(self.server).party if across else self.server
        self.chain = [self.client, seen]
        self.epoch = epochs_of(lambda x, y: vanilla(self.client, seen, x, y), self.batches)
        self.state = {"client": self.client, "server": self.server, "batches": self.batches}

    def score(self) -> float:
        return evaluate(self.chain, X, Y)["accuracy"]


def equal(a: Any, b: Any) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(left, right) for left, right in zip(a, b, strict=True))
    return bool(a == b)


def states(run: Run) -> dict[str, Any]:
    return copy.deepcopy({name: holder.state_dict() for name, holder in run.state.items()})


# Batches


def test_the_order_of_an_epoch_depends_on_seed_and_number_alone() -> None:
    def order(batches: Batches) -> list[int]:
        return [int(i) for x, _ in batches for i in x]

    numbers = torch.arange(10)
    first, second = (Batches(numbers, numbers, batch_size=3, seed=5) for _ in range(2))
    epochs = [order(first) for _ in range(3)]
    torch.manual_seed(99)
    assert [order(second) for _ in range(3)] == epochs
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    second.load_state_dict({"epoch": 1})
    assert order(second) == epochs[1]
    assert order(Batches(numbers, numbers, batch_size=3, seed=6)) != epochs[0]
    before = torch.get_rng_state()
    order(first)
    assert torch.equal(before, torch.get_rng_state())


def test_samples_stay_with_their_labels_and_the_rest_may_be_dropped() -> None:
    numbers = torch.arange(10)
    for drop_last, sizes in ((False, [4, 4, 2]), (True, [4, 4])):
        batches = Batches(numbers, 10 * numbers, batch_size=4, drop_last=drop_last)
        assert len(batches) == len(sizes)
        found = list(batches)
        assert [len(x) for x, _ in found] == sizes
        assert all(torch.equal(10 * x, y) for x, y in found)


@pytest.mark.parametrize(
    ("x", "y", "size", "drop_last", "message"),
    [
        (4, 3, 2, False, "as many labels as samples and at least one, got 4 samples, 3 labels"),
        (0, 0, 2, False, "at least one, got 0 samples"),
        (4, 4, 0, False, "batch size of 1 or more, got 0"),
        (4, 4, 5, True, "at most 4 samples with drop_last, got 5"),
    ],
)
def test_batches_that_cannot_be_made(x: int, y: int, size: int, drop_last: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(torch.zeros(x), torch.zeros(y), batch_size=size, drop_last=drop_last)


# fit


def test_fit_says_what_happened_and_reports_progress() -> None:
    losses, scores = iter([3.0, 2.0, 1.0]), iter([0.1, 0.5, 0.4])
    told: list[tuple[int, int, float, float | None]] = []
    history = fit(
        lambda: next(losses), epochs=3, validate=lambda: next(scores), progress=lambda *facts: told.append(facts)
    )
    assert history == History([3.0, 2.0, 1.0], [0.1, 0.5, 0.4], best_epoch=2, stopped_early=False)
    assert told == [(1, 3, 3.0, 0.1), (2, 3, 2.0, 0.5), (3, 3, 1.0, 0.4)]
    fit(lambda: 1.0, epochs=1, progress=lambda *facts: told.append(facts))
    assert told[-1] == (1, 1, 1.0, None)


def test_the_loss_of_an_epoch_is_the_mean_over_samples() -> None:
    batches = Batches(torch.arange(5.0), torch.zeros(5), batch_size=2)
    assert epochs_of(lambda x, y: x.mean(), batches)() == pytest.approx(2.0)  # 0 to 4, the last batch of one


class Counter:
    """Something with a state: how often it was stepped."""

    def __init__(self) -> None:
        self.value = 0
        self.tensor = torch.zeros(1)

    def step(self) -> float:
        self.value += 1
        self.tensor += 1
        return float(self.value)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": self.tensor}  # aliases what training changes

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.tensor = state["value"], state["tensor"].clone()


def test_early_stopping_puts_the_best_back() -> None:
    counter, scores = Counter(), [0.1, 0.3, 0.2, 0.3, 0.25, 9.0]
    history = fit(counter.step, epochs=6, state={"it": counter}, validate=lambda: scores[counter.value - 1], patience=3)
    assert history.stopped_early
    assert history.best_epoch == 2  # an equal score later is no better one
    assert len(history.losses) == len(history.scores) == 5
    assert counter.value == counter.tensor == 2
    counter = Counter()
    history = fit(counter.step, epochs=4, state={"it": counter}, validate=lambda: -counter.value, patience=9)
    assert not history.stopped_early
    assert counter.value == 1  # the best, though training ran to its end


@pytest.mark.parametrize("across", [False, True], ids=["local", "framed"])
@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_training_resumes_to_the_bit_same_result(
    tmp_path: Path, stop: int, patience: int | None, across: bool
) -> None:
    whole, calls = Run(), 0
    arguments: dict[str, Any] = {"epochs": 6, "patience": patience}
    expected = fit(whole.epoch, state=whole.state, validate=whole.score, **arguments)

    def interrupted() -> float:
        nonlocal calls
        calls += 1
        if calls > stop:
            x, y = next(iter(broken.batches))
            vanilla(broken.client, broken.server, x, y)  # in the middle of the epoch
            broken.client.forward(x)
            raise KeyboardInterrupt
        return broken.epoch()

    broken, path = Run(), tmp_path / "deep" / "run.ckpt"
    if len(expected.losses) > stop:
        with pytest.raises(KeyboardInterrupt):
            fit(interrupted, state=broken.state, validate=broken.score, checkpoint=path, **arguments)
    resumed = Run(across=across)
    history = fit(resumed.epoch, state=resumed.state, validate=resumed.score, checkpoint=path, **arguments)
    assert history == expected
    assert equal(states(resumed), states(whole))
    again = fit(broken.epoch, state=broken.state, validate=broken.score, checkpoint=path, **arguments)
    assert again == expected  # in the interrupted process too, its open step notwithstanding
    assert equal(states(broken), states(whole))


def test_a_finished_training_is_not_run_again_and_may_be_extended(tmp_path: Path) -> None:
    path, run = tmp_path / "run.ckpt", Run()
    history = fit(run.epoch, epochs=2, state=run.state, checkpoint=path)

    def never() -> float:
        raise AssertionError("ran again")

    fresh = Run()
    assert fit(never, epochs=2, state=fresh.state, checkpoint=path) == history
    assert equal(states(fresh), states(run))
    longer, whole = Run(), Run()
    extended = fit(longer.epoch, epochs=4, state=longer.state, checkpoint=path)
    assert extended == fit(whole.epoch, epochs=4, state=whole.state)
    assert equal(states(longer), states(whole))
    with pytest.raises(ValueError, match=r"run.ckpt holds 4 epochs, expected at most 2; ask for more"):
        fit(never, epochs=2, state=Run().state, checkpoint=path)


def test_an_early_stop_stays_one_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"

    def run() -> tuple[Counter, History]:
        counter = Counter()
        history = fit(
            counter.step,
            epochs=9,
            state={"it": counter},
            validate=lambda: -counter.value,
            patience=2,
            checkpoint=path,
        )
        return counter, history

    first, history = run()
    again, same_history = run()
    assert history == same_history
    assert len(history.losses) == 3
    assert first.value == again.value == 1


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    score: Callable[[], float] = lambda: 0.5  # noqa: E731
    fit(Counter().step, epochs=1, state={"it": Counter()}, validate=score, checkpoint=path)
    with pytest.raises(
        ValueError, match=r"run.ckpt holds the state of it, expected client, server; resume with the same"
    ):
        fit(Counter().step, epochs=2, state={"client": Counter(), "server": Counter()}, checkpoint=path)
    with pytest.raises(ValueError, match="was written without patience, expected it with"):
        fit(Counter().step, epochs=2, state={"it": Counter()}, validate=score, patience=1, checkpoint=path)
    other = tmp_path / "weights.ckpt"
    save_checkpoint(other, {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"weights.ckpt is a checkpoint, but not of a training"):
        fit(Counter().step, epochs=2, state={"it": Counter()}, checkpoint=other)
    narrow, wide = (Learner("p", nn.Linear(4, width)) for width in (2, 3))
    fit(Counter().step, epochs=1, state={"p": narrow}, checkpoint=tmp_path / "p.ckpt")
    with pytest.raises(ValueError, match=r"p: expected the weights of its own stage, 'weight' of shape \(3, 4\)"):
        fit(Counter().step, epochs=2, state={"p": wide}, checkpoint=tmp_path / "p.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 1}, "patience needs validate"),
        ({"patience": 1, "validate": lambda: 0.0}, "patience needs validate=…, state=…"),
        ({"patience": 0, "validate": lambda: 0.0, "state": {"it": Counter()}}, "at least one epoch of patience"),
        ({"checkpoint": Path("never")}, "a checkpoint needs state"),
        ({"state": {"it": Counter(), "far": wire(Learner("p", nn.Identity())).party}}, "state=…, got far without one"),
        ({"validate": lambda: float("nan")}, "expected validate.. to return a score, got nan after epoch 1"),
    ],
)
def test_settings_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(lambda: 0.0, epochs=1, **arguments)


# predict and evaluate


def test_prediction_in_batches_equals_one_pass_and_leaves_training_alone() -> None:
    run, twin = Run(), Run()
    run.epoch(), twin.epoch()
    before = states(run)
    whole = run.server.predict(run.client.predict(X))
    assert predict(run.chain, X, batch_size=7).shape == whole.shape
    before["client"].pop("predict_rng")  # evaluation draws from this one
    after = states(run)
    after["client"].pop("predict_rng")
    assert equal(before, after)
    assert run.epoch() == twin.epoch()
    quiet = [Learner("client", run.client.stage), run.server]
    assert torch.allclose(predict(quiet, X, batch_size=3), predict(quiet, X), atol=1e-6)


def test_evaluate_scores_the_joint_prediction() -> None:
    one_hot = nn.functional.one_hot(Y, 3).float()
    scores = evaluate([Learner("p", nn.Identity())], one_hot, Y, batch_size=6)
    assert scores["accuracy"] == scores["macro_f1"] == 1.0
    wrong = evaluate([Learner("p", nn.Identity())], one_hot.roll(1, 1), Y)
    assert wrong["accuracy"] == 0.0
