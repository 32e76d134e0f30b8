"""Ray: the same records and the same weights as here, whatever dies; nothing printed, no process left behind."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_federation import Table, data, learner, model, same
from torch import Tensor
from typer.testing import CliRunner

from experiments.cli import app
from experiments.experiment import Options
from experiments.ray_engine import RETRIES, ray_jobs
from experiments.record import Leakage, Record
from experiments.runner import Outcome, Task, run
from experiments.store import Store
from experiments.workers import Job, Reply
from splitlearn import Framed, Learner, Member, Remote, fedavg_round, splitfed_v1_round, splitfed_v2_round
from splitlearn.actors import ActorMember, Hosted, connected, hosted
from splitlearn.federation import Round

MAY_DIFFER = {"seconds", "peak_memory_bytes", "versions", "started", "commit"}  # somebody may commit meanwhile
TESTS = Path(__file__).parent
NAMES = ("c0", "c1", "c2")


def trial(seed: int, behaviour: str, trace: str) -> Outcome:
    """What the tests run, here and in workers."""
    with Path(trace).open("a") as file:
        file.write(f"{behaviour} {seed} {os.getpid()} {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}\n")
    before = sum(line.startswith(f"{behaviour} {seed} ") for line in Path(trace).read_text().splitlines()) - 1
    if behaviour == "kill" or (behaviour == "kill-once" and not before):
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "sleep":
        time.sleep(600)
    if behaviour == "fail":
        raise ValueError("broken on\npurpose")
    return Outcome(
        utility={"draw": torch.rand(()).item()},
        leakage=[Leakage(attack="a", family="label", advantage=0.5, metrics={"accuracy": 0.9}, baselines={})],
        traces={"series": torch.rand(3).tolist()},
        images={"original": torch.rand(1, 1, 2, 2)},
    )


def task(folder: Path, seed: int = 0, behaviour: str = "good") -> Task:
    labels = {"seed": seed, "data": "digits", "protocol": "vanilla", "cut": "relu1", "protection": "none"}
    return Task(
        experiment="tiny",
        config={"seed": seed, "behaviour": behaviour},
        command=f"splitlearn run tiny --seeds {seed}",
        labels={**labels, "strength": ""},
        call=partial(trial, seed, behaviour, str(folder / "trace")),
    )


def calls(folder: Path) -> list[list[str]]:
    path = folder / "trace"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def lasting(record: Record) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in MAY_DIFFER}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def offspring(of: int) -> set[int]:
    """Ray's processes below this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    below, found = {of}, set()
    while below := {pid for pid, parent in parents.items() if parent in below}:
        found |= below
    return {pid for pid in found if alive(pid) and b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray on this machine, whose workers find the tests; gone afterwards."""
    before, path = offspring(os.getpid()), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(TESTS)
    try:
        with connected(num_cpus=2) as running:
            ours = offspring(os.getpid()) - before
            yield running
            ours |= offspring(os.getpid()) - before
        until(lambda: not any(map(alive, ours)))
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


# Without Ray


def test_a_worker_need_not_know_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "the folder")
    asked: list[int] = []

    def engine(jobs: Sequence[Job], *, processes: int, started: Callable[..., None]) -> Generator[Reply, None, None]:
        asked.append(processes)
        for job in jobs:
            started(job.name, "again")
            assert b"the folder" not in pickle.dumps(job)
            yield Reply(job.name, job.function(*job.arguments), "", datetime.now(UTC))

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tasks = [task(tmp_path), task(tmp_path, behaviour="fail")]
    summary = run(tasks, store, jobs=0, engine=engine, progress=False)
    assert (summary.done, summary.failed, asked) == (1, 1, [0])
    assert store.images(tasks[0].trial)["original"].shape == (1, 1, 2, 2)
    assert "broken on" in store.traceback(tasks[1].trial)


def test_without_ray_or_a_cluster_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"expected a Ray cluster at 127\.0\.0\.1:1, got: .*refused"),
        connected("127.0.0.1:1"),
    ):
        pass
    with pytest.raises(ValueError, match="expected a Ray cluster at here, got: "), connected("here"):
        pass
    with pytest.raises(ValueError, match="expected a connection to Ray, got none"), hosted({}):
        pass
    monkeypatch.setitem(sys.modules, "ray", None)
    line = r"error: expected the package ray, which is not installed; install it with: pip install 'splitlearn[ray]'"
    wanted = ["run", "parity", "--seeds", "0", "--device", "cpu", "--out", str(tmp_path), "--quiet"]
    done = CliRunner().invoke(app, [*wanted, "--engine", "ray"])
    assert (done.exit_code, done.stderr.splitlines()) == (2, [line])
    done = CliRunner().invoke(app, [*wanted, "--ray-address", "here:1"])
    assert done.stderr.startswith("error: expected --engine ray with --ray-address, got --engine local")
    assert list(ray_jobs([])) == []


def test_members_elsewhere_train_at_once_and_results_keep_their_order() -> None:
    from threading import Barrier

    together = Barrier(2)

    class Elsewhere:
        elsewhere = True

        def __init__(self, name: str, fault: type[Exception] | None = None):
            self.name, self.fault = name, fault

        def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
            together.wait(timeout=30)  # broken where they are asked one after the other
            if self.fault:
                raise self.fault
            return dict(weights), 1

    here = Member(learner("here", model()), None, data(0))
    done = fedavg_round([Elsewhere("b"), here, Elsewhere("a")], Learner("all", model()))
    assert list(done.counts) == ["b", "here", "a"]
    done = fedavg_round([Elsewhere("b"), Elsewhere("a", TimeoutError)], Learner("all", model()))
    assert (list(done.counts), done.dropped) == (["b"], ("a",))
    with pytest.raises(ZeroDivisionError):
        fedavg_round([Elsewhere("b"), Elsewhere("a", ZeroDivisionError)], Learner("all", model()))


# The engine


@pytest.mark.slow
def test_records_are_those_of_the_local_engine(ray: Any, tmp_path: Path) -> None:
    from experiments.catalogue import EXPERIMENTS

    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
    tradeoff = EXPERIMENTS["tradeoff"]
    tasks = tradeoff.tasks(tradeoff.config(epochs=1, protections=("none",)), Options(seeds=(0, 1), device="cpu"))
    tasks += [task(tmp_path), task(tmp_path, behaviour="fail")]
    stores = {}
    for name, engine in (("local", None), ("ray", ray_jobs)):
        stores[name] = Store(tmp_path / name)
        summary = run(tasks, stores[name], jobs=2, engine=engine, progress=False)
        assert (summary.done, summary.failed) == (3, 1)
    for one in tasks:
        records = {name: store.load(one.trial) for name, store in stores.items()}
        assert lasting(records["ray"]) == lasting(records["local"])
        assert records["ray"].versions == records["local"].versions
        assert same(stores["ray"].images(one.trial), stores["local"].images(one.trial))
    assert "in trial" in stores["ray"].traceback(tasks[-1].trial)
    assert {tuple(call[3:]) for call in calls(tmp_path)} == {("1", "1")}


@pytest.mark.slow
def test_a_trial_whose_worker_dies_runs_again_and_not_for_ever(
    ray: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "out")
    tasks = [task(tmp_path, behaviour=name) for name in ("kill-once", "kill", "good")]
    summary = run(tasks, store, jobs=0, engine=ray_jobs)
    assert (summary.done, summary.failed) == (2, 1)
    assert store.finished(tasks[0].trial)
    assert store.load(tasks[1].trial).error == (
        f"the worker process died in this trial, {1 + RETRIES} times; if memory ran out, use fewer --jobs"
    )
    assert sum(call[0] == "kill" for call in calls(tmp_path)) == 1 + RETRIES
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "3 trials, one a CPU at a time, 0 done before"
    assert sum(line.startswith("a worker died: attempt 2 of 4: digits") for line in lines) == 2
    assert len(lines) == 1 + 3 + 1 + RETRIES
    again = run(tasks, store, jobs=1, engine=ray_jobs, progress=False)
    assert (again.done, again.skipped, again.failed) == (0, 2, 1)


@pytest.mark.slow
def test_a_job_that_a_worker_cannot_take_is_an_error_of_that_job(ray: Any, tmp_path: Path) -> None:
    good = Job("good", int, ("7",))
    replies = {reply.name: reply for reply in ray_jobs([Job("bad", int, ("x",)), good], processes=1)}
    assert replies["good"].value == 7
    assert replies["bad"].error.splitlines()[-1] == "ValueError: invalid literal for int() with base 10: 'x'"
    with pytest.raises(ValueError, match="expected no connection to Ray before that to here:1"), connected("here:1"):
        pass


SCRIPT = """
    import signal
    import sys
    from pathlib import Path
    from experiments.ray_engine import ray_jobs
    from experiments.runner import run
    from experiments.store import Store
    from test_ray_engine import task

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        folder = Path(sys.argv[1])
        tasks = [task(folder), task(folder, behaviour="sleep"), task(folder, 1, "sleep"), task(folder, 2, "sleep")]
        try:
            run(tasks, Store(folder / "out"), jobs=2, engine=ray_jobs, progress=False)
        except KeyboardInterrupt as stop:
            sys.exit(str(stop))
"""


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_keeps_what_is_done_and_leaves_no_process(tmp_path: Path, blow: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C at a terminal reaches the whole group
    )
    try:
        until(lambda: sum(call[0] == "sleep" for call in calls(tmp_path)) == 2)
        until(lambda: bool(Store(tmp_path / "out").records()))
        ours = offspring(process.pid)
        assert len(ours) > 3
        if blow == signal.SIGINT:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        said, _ = process.communicate(timeout=60)
        workers = {int(call[2]) for call in calls(tmp_path)}
        until(lambda: not any(map(alive, workers)))
        until(lambda: not any(map(alive, ours)), seconds=150)  # Ray's agents notice a killed driver after a minute
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if blow == signal.SIGINT:
        kept = f"interrupted: 1 of 4 trials kept in {tmp_path / 'out'}; run the same command again to go on"
        assert said.splitlines() == [kept]
    assert [record.status for record in Store(tmp_path / "out").records()] == ["done"]


# Clients in actors


def client(name: str, trace: str | None = None, others: int = 0) -> dict[str, Any]:
    """One client of a ``Table``, with its copy of the top."""
    table = Table()
    place = NAMES.index(name)
    member = table.members()[place]
    if trace is not None:
        member.batches = Traced(member.batches, name, Path(trace), others)
    return {name: member, "top": table.sessions[name], "whole": Member(learner(name, model()), None, data(place))}


def top() -> dict[str, Any]:
    """One server, under a session for each client."""
    return dict.fromkeys((*NAMES, "look"), Table().top)


def client_of(server: Hosted, name: str, trace: str) -> dict[str, Any]:
    """One client of a server that is in another actor."""
    member = client(name, trace)[name]
    member.server = Remote("server", Framed(server), name)
    return {name: member}


def no_client(name: str) -> dict[str, Any]:
    raise LookupError(f"no data of {name}")


class Traced:
    """Batches that leave a file when they begin, and wait until so many others have."""

    def __init__(self, batches: Any, name: str, folder: Path, others: int):
        self.batches, self.name, self.folder, self.others = batches, name, folder, others

    def __iter__(self) -> Iterator[Any]:
        with (self.folder / "order").open("a") as file:
            file.write(f"{self.name} {os.getpid()}\n")
        until(lambda: len((self.folder / "order").read_text().splitlines()) > self.others)
        yield from self.batches


def members_of(carriers: Mapping[str, Hosted], session: str = "") -> list[ActorMember]:
    return [ActorMember(name, Framed(carrier), session or name) for name, carrier in carriers.items()]


@pytest.mark.slow
def test_a_round_over_actors_is_that_in_this_process_to_the_bit_and_at_once(ray: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    here, far = Table(), Table()
    expected: list[Round] = [splitfed_v1_round(here.members(), here.sessions, here.bottom, here.top) for _ in range(2)]
    with hosted({name: partial(client, name, str(tmp_path), 2) for name in NAMES}) as carriers:
        members = members_of(carriers)
        sessions = {name: Remote(name, Framed(carrier), "top") for name, carrier in carriers.items()}
        done = [splitfed_v1_round(members, sessions, far.bottom, far.top) for _ in range(2)]
        whole, twin = Learner("all", model()), Learner("all", model())
        fedavg_round(members_of(carriers, "whole"), whole)
    fedavg_round([client(name)["whole"] for name in NAMES], twin)
    assert repr(done) == repr(expected)
    assert same(far.bottom.weights(), here.bottom.weights())
    assert same(far.top.weights(), here.top.weights())
    assert same(whole.weights(), twin.weights())
    pids = {int(line.split()[1]) for line in (tmp_path / "order").read_text().splitlines()}
    assert len(pids) == 3
    until(lambda: not any(map(alive, pids)))


@pytest.mark.slow
def test_one_server_in_an_actor_is_met_in_its_order(ray: Any, tmp_path: Path) -> None:
    here, far = Table(), Table()
    order = [2, 0, 1]
    splitfed_v2_round(here.members(lambda name: here.top), here.bottom, order=order)
    with hosted({"server": top}) as server:
        makes = {name: partial(client_of, server["server"], name, str(tmp_path)) for name in NAMES}
        with hosted(makes) as carriers:
            splitfed_v2_round(members_of(carriers), far.bottom, order=order)
        weights = Remote("server", Framed(server["server"]), "look").weights()
    assert same(weights, here.top.weights())
    assert [line.split()[0] for line in (tmp_path / "order").read_text().splitlines()] == ["c2", "c0", "c1"]
    assert same(far.bottom.weights(), here.bottom.weights())


@pytest.mark.slow
def test_a_client_whose_actor_dies_drops_out_and_one_that_cannot_begin_is_an_error(ray: Any) -> None:
    far = Table()
    with hosted({name: partial(client, name) for name in NAMES}) as carriers:
        ray.kill(carriers["c1"].actor)
        done = fedavg_round(members_of(carriers, "whole"), Learner("all", model()))
        assert (list(done.counts), done.dropped) == (["c0", "c2"], ("c1",))
    with (
        pytest.raises(ValueError, match="c1: expected parties and members by session to serve, got: no data of c1"),
        hosted({"c0": partial(client, "c0"), "c1": partial(no_client, "c1")}),
    ):
        pass
    assert far.bottom.steps == 0
