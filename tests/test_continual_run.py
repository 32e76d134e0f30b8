"""One task after the other, end to end at toy size: every method, what each costs, records and the picture."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from experiments.continual import TASK_METHODS, TRAINED, Config, _memory, tasks
from experiments.experiment import Options
from experiments.report import build
from experiments.runner import Outcome, run
from experiments.store import Store
from experiments.training import build_model, load_splits
from experiments.unlike import accuracy
from splitlearn.party import Learner

ONCE = Options(seeds=(0,))
TOY = Config(
    protocols=("vanilla",), methods=("naive",), classes_per_task=5, clients=2, epochs=2, local_epochs=1, fisher=5,
    private=100, lr=1e-3,
)  # fmt: skip
SPECS = ("naive", "replay:20", "ewc:10", "joint")


def outcome_of(config: Config, seed: int = 0) -> Outcome:
    (task,) = tasks(config, Options(seeds=(seed,)))
    assert shlex.split(task.command)[:3] == ["splitlearn", "run", "continual"]
    return task.call()


def total(outcome: Outcome) -> int:
    return sum(sum(kinds.values()) for kinds in outcome.nbytes.values())


def fisher_bytes(outcome: Outcome) -> int:
    (said,) = (note for note in outcome.notes if "Fisher" in note)
    return int(said.split()[3])


@pytest.mark.parametrize("protocol", TRAINED)
@pytest.mark.parametrize("spec", SPECS)
def test_every_method_runs_under_every_protocol(protocol: str, spec: str) -> None:
    outcome = outcome_of(replace(TOY, protocols=(protocol,), methods=(spec,)))
    assert list(outcome.utility) == ["accuracy", "accuracy_learned", "forgetting", "backward_transfer"]
    assert list(outcome.traces) == ["accuracy on task 1", "accuracy on task 2"]
    last = [series[-1] for series in outcome.traces.values()]
    assert outcome.utility["accuracy"] == pytest.approx(sum(last) / 2)
    first = outcome.traces["accuracy on task 1"]
    assert outcome.utility["forgetting"] == pytest.approx(first[0] - first[1])
    assert outcome.utility["backward_transfer"] == pytest.approx(first[1] - first[0])
    assert total(outcome) > 0
    assert ("server" if protocol == "vanilla" else "fed server") in outcome.visible
    second = outcome.traces["accuracy on task 2"]
    assert outcome.utility["accuracy_learned"] == pytest.approx((first[0] + second[1]) / 2)
    assert set(outcome.seconds) == {"train", "evaluate"}
    assert not [note for note in outcome.notes if note.startswith("stopped")]


@pytest.mark.parametrize("protocol", TRAINED)
@pytest.mark.parametrize("spec", SPECS)
def test_a_training_that_diverges_at_once_ends_with_the_model_that_it_began_with(protocol: str, spec: str) -> None:
    outcome = outcome_of(replace(TOY, protocols=(protocol,), methods=(spec,), lr=1e12))
    (said,) = (note for note in outcome.notes if note.startswith("stopped in task 1"))
    assert "after 0 rounds of it" in said
    assert "finite" in said
    splits = load_splits("digits", None, sizes=(TOY.private, 600, 397))
    model, test = [Learner("model", build_model(splits, seed=0))], splits.test
    begun = [accuracy(model, test.x[rows], test.y[rows]) for rows in (test.y < 5, test.y >= 5)]
    assert [outcome.traces[f"accuracy on task {n}"] for n in (1, 2)] == [[one, one] for one in begun]
    assert outcome.utility["forgetting"] == 0


@pytest.mark.parametrize("protocol", TRAINED)
def test_a_training_that_diverges_in_a_later_task_keeps_what_was_learned_before(protocol: str) -> None:
    config = replace(TOY, protocols=(protocol,), optimizer="sgd", lr=0.01)
    naive, torn = (outcome_of(replace(config, methods=(spec,))) for spec in ("naive", "ewc:1e30"))
    (said,) = (note for note in torn.notes if note.startswith("stopped in task 2"))
    assert "after 0 rounds of it" in said
    for n in (1, 2):
        after = naive.traces[f"accuracy on task {n}"][0]
        assert torn.traces[f"accuracy on task {n}"] == [after, after]


def test_who_replays_forgets_less_than_who_does_not() -> None:
    config = replace(TOY, private=200, epochs=8)
    naive, replay, joint = (outcome_of(replace(config, methods=(spec,))) for spec in ("naive", "replay:60", "joint"))
    assert naive.utility["forgetting"] > 0.3
    assert replay.utility["accuracy"] > naive.utility["accuracy"] + 0.1
    assert replay.utility["forgetting"] < naive.utility["forgetting"] - 0.1
    assert joint.utility["accuracy"] > naive.utility["accuracy"] + 0.1
    assert total(joint) > total(naive)


@pytest.mark.parametrize("protocol", TRAINED)
def test_weights_that_are_held_by_nothing_learn_as_without(protocol: str) -> None:
    config = replace(TOY, protocols=(protocol,))
    naive, idle, held = (outcome_of(replace(config, methods=(spec,))) for spec in ("naive", "ewc:0", "ewc:100000"))
    assert idle.traces == naive.traces
    assert held.traces != naive.traces
    assert total(idle) - total(naive) == fisher_bytes(idle)
    assert (fisher_bytes(idle) > 0) is (protocol == "vanilla")


def test_fisher_information_costs_a_step_a_sample_after_all_tasks_but_the_last() -> None:
    few, more = (fisher_bytes(outcome_of(replace(TOY, methods=("ewc:1",), fisher=n))) for n in (2, 4))
    activation = 32 * 8 * 8 * 4  # and as large a gradient back
    assert 2 * 2 * activation < few < 2 * 2 * activation * 1.1
    assert more == pytest.approx(2 * few, rel=0.01)


def test_members_keep_as_many_samples_together_as_one_client() -> None:
    for protocol, clients in (("vanilla", 1), ("fedavg", 3)):
        (task,) = tasks(replace(TOY, protocols=(protocol,), methods=("replay:20",), clients=3), ONCE)
        trial = task.call.args[0]  # type: ignore[attr-defined]
        memories = [_memory(trial, number) for number in range(clients)]
        assert sum(memory.capacity for memory in memories if memory is not None) == 20


def test_a_method_becomes_a_trial_a_strength() -> None:
    found = tasks(replace(TOY, methods=tuple(TASK_METHODS)), ONCE)
    named = [(name, strength) for name, one in TASK_METHODS.items() for strength in one.strengths]
    assert [(task.config["method"], task.config["strength"]) for task in found] == named
    # What is done about forgetting stands where a protection does, so that ratios are to naive training.
    labels = [(task.labels["protection"], task.labels["strength"]) for task in found]
    assert labels == [("none" if name == "naive" else name, strength) for name, strength in named]


def test_a_trial_is_the_same_twice_whatever_torch_drew_before() -> None:
    config = replace(TOY, protocols=("fedavg",), methods=("replay:20",))
    torch.manual_seed(1)
    first = outcome_of(config)
    torch.manual_seed(2)
    again = outcome_of(config)
    assert (again.traces, again.nbytes) == (first.traces, first.nbytes)
    assert outcome_of(config, seed=1).traces != first.traces


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"methods": ("relpay",)}, "did you mean replay"),
        ({"methods": ()}, "at least one of --methods"),
        ({"protocols": ("fedavgg",)}, "did you mean fedavg"),
        ({"protocols": ()}, "at least one of --protocols"),
        ({"methods": ("naive:1",)}, "naive without a strength"),
        ({"methods": ("replay:0",)}, "replay of a number of samples"),
        ({"methods": ("replay:1.5",)}, "replay of a number of samples"),
        ({"methods": ("ewc:-1",)}, "ewc at a strength of 0 or more"),
        ({"methods": ("ewc:x",)}, "ewc at a strength"),
        ({"methods": ("replay:1",), "protocols": ("fedavg",)}, "for each of 2 clients, got 1"),
        ({"classes_per_task": 3}, "--classes-per-task that divides 10"),
        ({"classes_per_task": 10}, "2 tasks or more, got 10"),
        ({"epochs": 0}, "--epochs of 1"),
        ({"local_epochs": 0}, "--local-epochs of 1"),
        ({"fisher": 0}, "--fisher of 1"),
        ({"lr": 0.0}, "--lr greater than 0"),
        ({"optimizer": "adma"}, "no optimizer is named"),
        ({"cut": "relu9"}, "got 'relu9'"),
        ({"protocols": ("fedavg",), "clients": 80}, "each of 80 clients, .* raise --private, or lower --clients"),
        ({"private": 5, "classes_per_task": 1}, "got none; raise --private or --classes-per-task"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(wrong: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, LookupError), match=said):
        tasks(replace(TOY, **wrong), ONCE)  # type: ignore[arg-type]


@pytest.mark.parametrize(("judged_on", "other"), [("test", "auxiliary"), ("auxiliary", "test")])
def test_what_models_are_judged_on_has_to_have_every_task(
    judged_on: Literal["test", "auxiliary"], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load_splits("digits", None)
    part = getattr(splits, judged_on)
    poor = replace(splits, **{judged_on: part.subset(torch.nonzero(part.y < 5).flatten())})
    monkeypatch.setattr("experiments.continual.load_splits", lambda *args, **_: poor)
    with pytest.raises(ValueError, match=f"got none; raise --classes-per-task, or use --judged-on {other}"):
        tasks(replace(TOY, judged_on=judged_on), ONCE)


def test_the_report_shows_each_task_over_time(tmp_path: Path) -> None:
    config = replace(TOY, methods=("naive", "replay:20"), epochs=1, protocols=TRAINED)
    assert run(tasks(config, Options(seeds=(0, 1))), Store(tmp_path), jobs=1, progress=False).failed == 0
    page = build(tmp_path).read_text()
    assert (tmp_path / "continual.png").stat().st_size > 10_000
    assert 'id="continual"' in page
    assert "backward transfer" in page
