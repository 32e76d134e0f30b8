"""The runner: trials one after another or in worker processes, each ending in a record, whatever happens."""

import pickle
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from experiments.environment import commit, forget_peak_memory, peak_memory_bytes, versions
from experiments.progress import Progress, counted
from experiments.record import Leakage, Record, trial_hash
from experiments.store import Store, files
from experiments.workers import Job, Reply, available_cpus, run_jobs

__all__ = ["Engine", "Outcome", "Summary", "Task", "failure", "run"]

Engine = Callable[..., Generator[Reply, None, None]]  # called as run_jobs is; processes may be 0: as many as it has

Kept = tuple[Record, dict[str, bytes]]  # a trial's record, and all of its files
LABELS = frozenset({"seed", "data", "protocol", "cut", "protection", "strength"})


@dataclass(frozen=True)
class Outcome:
    """What a trial itself knows at its end: fields of ``Record``, and images for ``Store.save``."""

    utility: dict[str, float] = field(default_factory=dict)
    leakage: list[Leakage] = field(default_factory=list)
    nbytes: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    delta: float | None = None
    epsilon_lower: float | None = None
    mse_bound: float | None = None
    accounts: list[str] = field(default_factory=list)
    visible: dict[str, list[str]] = field(default_factory=dict)
    traces: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    images: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One trial to run. ``call`` is a ``functools.partial`` of a top-level function: a worker can take that.

    ``labels`` are the record's seed, data, protocol, cut, protection ("none" where there is none), strength.
    """

    experiment: str
    config: dict[str, Any]
    command: str
    labels: dict[str, Any]
    call: Callable[[], Outcome]

    @cached_property
    def trial(self) -> str:
        """The hash of experiment and full configuration."""
        try:
            return trial_hash({"experiment": self.experiment, "config": self.config})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected a configuration of finite numbers, strings, lists and dicts, got {self.config}: {error}"
            ) from error

    @property
    def title(self) -> str:
        """The trial in a few words, for whoever follows a run."""
        return _title(self.labels)


@dataclass(frozen=True)
class Summary:
    """What a run did: trials done now, skipped since they were done before, and those that failed."""

    done: int
    skipped: int
    failures: tuple[Record, ...] = ()

    @property
    def failed(self) -> int:
        """How many trials failed."""
        return len(self.failures)


def failure(record: Record, store: Store) -> str:
    """Return a line on a failed trial: which one, why, and where its traceback lies."""
    where = store.root / "trials" / record.trial / "traceback.txt"
    return f"failed: {_title(vars(record))}: {record.error}; see {where}"


def run(
    tasks: Sequence[Task],
    store: Store,
    *,
    jobs: int,
    engine: Engine | None = None,
    progress: bool = True,
    retry_failed: bool = True,
) -> Summary:
    """Run the tasks that are not done yet, ``jobs`` at a time, and keep a record of each.

    A trial that fails keeps its traceback and does not stop the rest; nor does a worker that is killed. With
    one job, trials run in this process on all its cores; with more, in spawned processes on one thread each;
    with an ``engine``, wherever that runs them, and 0 jobs are one a CPU that it has. Torch's generator starts
    every trial at its seed, so that no trial depends on those before it. Failures of an earlier run count as
    failures of this one where ``retry_failed`` is false.

    Raises ``ValueError`` before any work for tasks that cannot be run or a folder that cannot be written, and
    ``KeyboardInterrupt`` with one line on what was kept when interrupted; no worker outlives this call.
    """
    if jobs < (0 if engine else 1):
        raise ValueError(f"expected at least one job, got {jobs}; use --jobs 1")
    _check(tasks, picklable=engine is not None or jobs > 1)
    store.prepare()
    earlier = {task.trial: record for task in tasks if (record := store.load(task.trial)) is not None}
    waiting = [
        task for task in tasks if task.trial not in earlier or (earlier[task.trial].status == "failed" and retry_failed)
    ]
    failures = [record for record in earlier.values() if record.status == "failed" and not retry_failed]
    skipped = len(tasks) - len(waiting) - len(failures)
    kept = [record for record in earlier.values() if record.status == "done"]
    done = 0
    present = commit()
    at_once = str(jobs) if jobs else "one a CPU"
    opening = [
        f"{counted(len(tasks), 'trial')}, {at_once} at a time, {skipped} done before",
        *_older(kept, present),
    ]
    try:
        with Progress(len(waiting), opening=opening, visible=progress) as bar:
            if engine is None and jobs == 1:
                finished = _here(waiting, present, bar)
            else:
                finished = _aside(waiting, present, engine or run_jobs, jobs, bar)
            with closing(finished):
                for task, (record, contents) in finished:
                    store.write(task.trial, contents)
                    done += record.status == "done"
                    failures += [record] if record.status == "failed" else []
                    bar.finished(task.title, failed=record.status == "failed")
    except KeyboardInterrupt:
        finished_now = sum(store.finished(task.trial) for task in tasks)
        raise KeyboardInterrupt(
            f"interrupted: {finished_now} of {counted(len(tasks), 'trial')} kept in {store.root}; "
            "run the same command again to go on"
        ) from None
    return Summary(done, skipped, tuple(failures))


def _title(labels: Mapping[str, Any]) -> str:
    parts = [labels[name] for name in ("data", "protocol", "cut")]
    parts.append(f"{labels['protection']} {labels['strength']}".strip())
    return " · ".join([*(part for part in parts if part), f"seed {labels['seed']}"])


def _older(kept: Iterable[Record], present: str | None) -> list[str]:
    """Return a line on the records that another commit than the present one wrote; none where all are of this one."""
    others = [record.commit for record in kept if record.commit != present]
    if not others:
        return []
    were = "was" if len(others) == 1 else "were"
    commits = ", ".join(sorted({_short(commit) for commit in others}))
    return [
        f"{len(others)} of them {were} run by commit {commits}, this is {_short(present)}; "
        "use another --out to run them anew"
    ]


def _short(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    digits, dash, state = commit.partition("-")
    return f"{digits[:7]}{dash}{state}"


def _check(tasks: Sequence[Task], *, picklable: bool) -> None:
    seen: dict[str, Task] = {}
    for task in tasks:
        if set(task.labels) != LABELS:
            raise ValueError(f"expected labels {', '.join(sorted(LABELS))}, got {', '.join(sorted(task.labels))}")
        if task.trial in seen:
            raise ValueError(f"expected each configuration once, got {task.title} twice; take one away")
        seen[task.trial] = task
        try:
            _record(task, None, datetime.now(UTC), status="done")
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(
                f"expected labels that fit a record, got {first['loc'][0]} = {first['input']!r}: {first['msg']}"
            ) from error
        if picklable:
            try:
                pickle.dumps(task.call)
            except Exception as error:
                raise ValueError(
                    f"expected a call that a worker process can take, got {task.call!r} ({error}); "
                    "use functools.partial of a top-level function, or --jobs 1"
                ) from error


def _here(tasks: Iterable[Task], present: str | None, bar: Progress) -> Generator[tuple[Task, Kept], None, None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, available_cpus()))
    try:
        for task in tasks:
            bar.started(task.title)
            yield task, _execute(task, present)
    finally:
        torch.set_num_threads(threads)


def _aside(
    tasks: Sequence[Task], present: str | None, engine: Engine, jobs: int, bar: Progress
) -> Generator[tuple[Task, Kept], None, None]:
    """Yield tasks and what to keep of them as an engine's workers, which need not see our folder, finish them."""
    known = {task.trial: task for task in tasks}

    def started(trial: str, again: str = "") -> None:
        bar.started(known[trial].title)
        if again:
            bar.say(f"{again}: {known[trial].title}")

    work = [Job(task.trial, _execute, (task, present)) for task in tasks]
    replies = engine(work, processes=jobs, started=started)
    with closing(replies):
        for reply in replies:
            task = known[reply.name]
            if reply.error:  # the worker could not tell: it died, or could not take the trial
                error = reply.error.splitlines()[-1]
                record = _record(task, present, reply.started, status="failed", error=error)
                yield task, (record, files(record, traceback=reply.error))
            else:
                yield task, reply.value


def _execute(task: Task, present: str | None) -> Kept:
    """Run one trial in this process; return its record and its files. Only an interrupt gets out."""
    started, clock = datetime.now(UTC), time.perf_counter()
    forget_peak_memory()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.labels["seed"])
            outcome = task.call()
        if not isinstance(outcome, Outcome):
            raise ValueError(f"expected an Outcome from the trial, got {type(outcome).__name__}; return Outcome(…)")
        measured = {name: value for name, value in vars(outcome).items() if name != "images"}
        measured["seconds"] = {**outcome.seconds, "total": time.perf_counter() - clock}
        record = _record(task, present, started, status="done", peak_memory_bytes=peak_memory_bytes(), **measured)
        return record, files(record, outcome.images)
    except (Exception, SystemExit) as error:
        last = " ".join("".join(traceback.format_exception_only(error)).split())
        spent = {"seconds": {"total": time.perf_counter() - clock}, "peak_memory_bytes": peak_memory_bytes()}
        record = _record(task, present, started, status="failed", error=last, **spent)
        return record, files(record, traceback=traceback.format_exc())


def _record(task: Task, present: str | None, started: datetime, **fields: Any) -> Record:
    return Record(
        experiment=task.experiment,
        trial=task.trial,
        config=task.config,
        command=task.command,
        started=started.isoformat(timespec="seconds"),
        commit=present,
        versions={**versions(), "torch threads": str(torch.get_num_threads())},
        **task.labels,
        **fields,
    )
