"""Jobs in spawned worker processes, of which none is left behind, however the work ends."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

__all__ = ["Job", "Reply", "available_cpus", "run_jobs"]

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
GRACE_SECONDS = 3.0  # between asking a worker to end and killing it


@dataclass(frozen=True)
class Job:
    """A call to make in a worker: a top-level function and its arguments, all of which can be pickled."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Reply:
    """What came of a job: the function's value, or an error of many lines where it raised or its worker died."""

    name: str
    value: Any
    error: str
    started: datetime


def run_jobs(
    jobs: Sequence[Job], *, processes: int, started: Callable[[str], None] = lambda name: None
) -> Generator[Reply, None, None]:
    """Yield a reply per job as it ends. Workers are spawned, never forked, and run on one thread each.

    A worker that dies ends its own job only; another one takes its place. Closing this iterator, by an
    exception or an interrupt too, ends every worker within a few seconds. Raises ``ValueError`` if a worker
    cannot start.
    """
    waiting = deque(jobs)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < processes:
                with _interrupts_held():  # else one could hit between a start and its entry in the list
                    workers.append(_Worker(waiting.popleft()))
                started(workers[-1].job.name)
            ready = set(wait([worker.process.sentinel for worker in workers] + [w.connection for w in workers]))
            for worker in [w for w in workers if ready & {w.connection, w.process.sentinel}]:
                reply = worker.reply()
                if reply is None:
                    continue
                if waiting and not worker.dead:
                    worker.give(waiting.popleft())
                    started(worker.job.name)
                else:
                    workers.remove(worker)
                    _stop([worker])
                yield reply
    finally:
        _stop(workers)


def available_cpus() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process, our end of its pipe and the job it has."""

    def __init__(self, job: Job):
        self.connection, far = multiprocessing.get_context("spawn").Pipe()
        self.process: SpawnProcess = multiprocessing.get_context("spawn").Process(target=_serve, args=(far,))
        with _one_thread():
            self.process.start()
        far.close()
        self.ready = self.dead = False
        self.give(job)

    def give(self, job: Job) -> None:
        self.job = job
        self.begun = datetime.now(UTC)
        with suppress(BrokenPipeError):  # a worker that is dead already is noticed by its sentinel
            self.connection.send((job.function, job.arguments))

    def reply(self) -> Reply | None:
        """Return what came of the job, or None if this was only the worker's word that it has started."""
        try:
            if not self.connection.poll():
                raise EOFError
            value, error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return Reply(self.job.name, None, self._death(), self.begun)
        if not self.ready:
            self.ready = True
            return None
        return Reply(self.job.name, value, error, self.begun)

    def _death(self) -> str:
        self.dead = True
        self.process.join(GRACE_SECONDS)
        code = self.process.exitcode
        if not self.ready:
            raise ValueError(
                f"expected a worker process to start, but it ended with exit code {code}; a script that runs "
                "trials with more than one job needs `if __name__ == '__main__':` around them; or use --jobs 1"
            )
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        return f"the worker process {how} in this trial; if memory ran out, use fewer --jobs"


def _stop(workers: Sequence[_Worker]) -> None:
    """Ask the workers to end, wait a little, and kill those that do not."""
    with _interrupts_held():
        for worker in workers:
            worker.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
            worker.process.close()


def _serve(connection: Connection) -> None:
    """Answer jobs until the other end closes. Ctrl-C is for the parent, which then ends us with SIGTERM."""
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    connection.send((None, ""))  # started
    with suppress(_Ended, EOFError, BrokenPipeError):
        while True:
            try:
                function, arguments = connection.recv()
            except EOFError:
                return
            except Exception:  # a job that cannot be unpickled here, such as one whose module does not import
                connection.send((None, traceback.format_exc()))
                continue
            try:
                answer = (function(*arguments), "")
            except Exception:
                answer = (None, traceback.format_exc())
            connection.send(answer)


class _Ended(BaseException):
    """Raised where SIGTERM finds a worker, so that what it has open is closed and cleaned up."""


def _end(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Ended


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the parent was killed: nobody is left to read our results


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that start meanwhile use one thread in every numerical library."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Deliver Ctrl-C only afterwards. Processes that start meanwhile never see it: they inherit the mask."""
    resource_tracker.ensure_running()  # its own start would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
