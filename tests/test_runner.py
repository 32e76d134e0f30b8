"""The runner ends every trial in a record, goes on after failures, and leaves no process behind."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments.environment import commit, versions
from experiments.record import Leakage
from experiments.runner import Outcome, Summary, Task, run
from experiments.store import Store


def trial(seed, behaviour, trace):
    """What the tests run, here and in workers."""
    with Path(trace).open("a") as file:
        file.write(f"{behaviour} {seed} {os.getpid()} {torch.get_num_threads()}\n")
    if behaviour == "fail":
        raise ValueError("broken on\npurpose")
    if behaviour == "exit":
        raise SystemExit(3)
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "sleep":
        time.sleep(600)
    if behaviour == "wrong":
        return 7
    return Outcome(
        utility={"accuracy": 0.5, "draw": torch.rand(()).item()},
        leakage=[Leakage(attack="a", family="label", advantage=0.5, metrics={"accuracy": 0.9}, baselines={})],
        nbytes={"up": {"activation": 12}},
        seconds={"train": 0.25},
        visible={"server": ["activations"]},
        notes=["noted"],
        images={"original": torch.ones(1, 1, 2, 2)},
    )


def task(tmp_path, seed=0, behaviour="good"):
    labels = {"seed": seed, "data": "digits", "protocol": "vanilla", "cut": "relu1"}
    return Task(
        experiment="tiny",
        config={"seed": seed, "behaviour": behaviour},
        command=f"splitlearn run tiny --seeds {seed}",
        labels={**labels, "protection": "none", "strength": ""},
        call=partial(trial, seed, behaviour, str(tmp_path / "trace")),
    )


def calls(tmp_path):
    path = tmp_path / "trace"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_a_record_holds_what_the_trial_and_the_runner_know(tmp_path):
    store = Store(tmp_path / "out")
    assert run([task(tmp_path)], store, jobs=1, progress=False) == Summary(done=1, skipped=0)
    (record,) = store.records()
    assert record.status == "done"
    assert record.trial == task(tmp_path).trial
    assert record.config == {"seed": 0, "behaviour": "good"}
    assert record.command == "splitlearn run tiny --seeds 0"
    assert record.leakage[0].advantage == 0.5
    assert record.seconds["train"] == 0.25
    assert record.seconds["total"] > 0
    assert record.peak_memory_bytes > 10_000_000
    assert record.versions["torch"] == versions()["torch"] == torch.__version__
    assert record.visible == {"server": ["activations"]}
    assert record.started.endswith("+00:00")
    assert torch.equal(store.images(record.trial)["original"], torch.ones(1, 1, 2, 2))


def test_failures_are_kept_and_do_not_stop_the_rest(tmp_path):
    store = Store(tmp_path / "out")
    tasks = [task(tmp_path, behaviour=name) for name in ("fail", "exit", "wrong", "good")]
    summary = run(tasks, store, jobs=1, progress=False)
    assert (summary.done, summary.skipped, summary.failed) == (1, 0, 3)
    assert [record.error for record in summary.failures] == [
        "ValueError: broken on purpose",
        "SystemExit: 3",
        "ValueError: expected an Outcome from the trial, got int; return Outcome(…)",
    ]
    assert "in trial" in store.traceback(tasks[0].trial)
    assert store.finished(tasks[3].trial)


def test_finished_trials_are_skipped_and_failed_ones_run_again(tmp_path):
    store = Store(tmp_path / "out")
    tasks = [task(tmp_path, behaviour="fail"), task(tmp_path), task(tmp_path, seed=1)]
    run(tasks[:2], store, jobs=1, progress=False)
    assert run(tasks, store, jobs=1, progress=False, retry_failed=False).failed == 1
    assert [call[:2] for call in calls(tmp_path)] == [["fail", "0"], ["good", "0"], ["good", "1"]]
    summary = run(tasks, store, jobs=1, progress=False)
    assert (summary.done, summary.skipped, summary.failed) == (0, 2, 1)
    assert [call[:2] for call in calls(tmp_path)[3:]] == [["fail", "0"]]


def test_a_trial_draws_the_same_whatever_ran_before_it(tmp_path):
    draws = []
    for name, seeds in (("one", [5]), ("two", [4, 5])):
        store = Store(tmp_path / name)
        run([task(tmp_path, seed) for seed in seeds], store, jobs=1, progress=False)
        draws.append(store.load(task(tmp_path, 5).trial).utility["draw"])
    assert draws[0] == draws[1]


def test_threads_and_randomness_of_the_caller_stay(tmp_path):
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    run([task(tmp_path), task(tmp_path, behaviour="fail")], Store(tmp_path / "out"), jobs=1, progress=False)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_tasks_are_refused_before_any_work(tmp_path):
    store = Store(tmp_path / "out")
    good = task(tmp_path)
    with pytest.raises(ValueError, match="at least one job, got 0"):
        run([good], store, jobs=0)
    with pytest.raises(ValueError, match="each configuration once"):
        run([good, good], store, jobs=1)
    with pytest.raises(ValueError, match="expected labels cut, data"):
        run([Task("tiny", {}, "", {"seed": 1}, good.call)], store, jobs=1)
    with pytest.raises(ValueError, match="labels that fit a record, got strength"):
        run([Task("tiny", {}, "", {**good.labels, "strength": 0.5}, good.call)], store, jobs=1)
    with pytest.raises(ValueError, match="expected a configuration of finite numbers"):
        run([Task("tiny", {"rate": float("nan")}, "", good.labels, good.call)], store, jobs=1)
    with pytest.raises(ValueError, match=r"a worker process can take.*--jobs 1"):
        run([Task("tiny", {}, "", good.labels, lambda: Outcome())], store, jobs=2)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder that can be written"):
        run([good], Store(tmp_path / "file"), jobs=1)
    assert calls(tmp_path) == []


def test_another_experiment_with_the_same_configuration_is_another_trial(tmp_path):
    one = task(tmp_path)
    other = Task("other", one.config, one.command, one.labels, one.call)
    assert one.trial != other.trial
    assert pickle.loads(pickle.dumps(one)).trial == one.trial


def test_plain_lines_tell_of_progress_where_there_is_no_terminal(tmp_path, capsys):
    tasks = [task(tmp_path), task(tmp_path, behaviour="fail")]
    run(tasks, Store(tmp_path / "out"), jobs=1)
    run(tasks[:1], Store(tmp_path / "out"), jobs=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "2 trials, 1 at a time, 0 done before",
        "1 of 2 trials: digits · vanilla · relu1 · none · seed 0 done",
        "2 of 2 trials (1 failed): digits · vanilla · relu1 · none · seed 0 failed",
        "1 trial, 1 at a time, 1 done before",
    ]


def test_kept_trials_of_another_commit_are_told_of(tmp_path, capsys, monkeypatch):
    tasks, store = [task(tmp_path), task(tmp_path, seed=1)], Store(tmp_path / "out")
    for at, todo in (("a" * 40, tasks[:1]), ("b" * 40 + "-dirty", tasks[:1]), ("b" * 40 + "-dirty", tasks)):
        monkeypatch.setattr("experiments.runner.commit", lambda at=at: at)
        run(todo, store, jobs=1)
    told = "1 of them was run by commit aaaaaaa, this is bbbbbbb-dirty; use another --out to run them anew"
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "of them" in line] == [told, told]
    assert lines[:2] == [
        "1 trial, 1 at a time, 0 done before",
        "1 of 1 trial: digits · vanilla · relu1 · none · seed 0 done",
    ]
    run(tasks[1:], store, jobs=1)
    assert "of them" not in capsys.readouterr().err


def test_workers_survive_failures_and_deaths(tmp_path):
    store = Store(tmp_path / "out")
    tasks = [task(tmp_path, behaviour=name) for name in ("kill", "fail", "good")]
    tasks += [task(tmp_path, seed=1), task(tmp_path, seed=2)]
    summary = run(tasks, store, jobs=2, progress=False)
    assert (summary.done, summary.failed) == (3, 2)
    killed = store.load(tasks[0].trial)
    assert killed.status == "failed"
    assert "killed by SIGKILL" in killed.error
    assert store.load(tasks[1].trial).error == "ValueError: broken on purpose"
    pids = {int(pid) for _, _, pid, _ in calls(tmp_path)}
    assert os.getpid() not in pids
    assert len(pids) <= 3  # two workers, and one in place of the killed one
    assert {threads for *_, threads in calls(tmp_path)} == {"1"}
    assert not any(_alive(pid) for pid in pids)
    draw = store.load(task(tmp_path, seed=1).trial).utility["draw"]
    here = Store(tmp_path / "here")
    run([task(tmp_path, seed=1)], here, jobs=1, progress=False)
    assert here.records()[0].utility["draw"] == draw


SCRIPT = """
    import signal
    import sys
    from pathlib import Path
    from experiments.runner import run
    from experiments.store import Store
    from test_runner import task

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        folder = Path(sys.argv[1])
        tasks = [task(folder), task(folder, behaviour="sleep"), task(folder, 1, "sleep"), task(folder, 2, "sleep")]
        try:
            run(tasks, Store(folder / "out"), jobs=int(sys.argv[2]), progress=False)
        except KeyboardInterrupt as stop:
            sys.exit(str(stop))
"""


@pytest.mark.parametrize(("jobs", "blow"), [(1, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGKILL)])
def test_an_interrupt_keeps_what_is_done_and_leaves_no_process(tmp_path, jobs, blow):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), str(jobs)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C at a terminal reaches the whole group, workers included
    )
    try:
        _await(lambda: sum(call[0] == "sleep" for call in calls(tmp_path)) == jobs)
        _await(lambda: Store(tmp_path / "out").records())
        began = time.monotonic()
        if blow == signal.SIGINT:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - began < 20
        _await(lambda: not any(_alive(int(pid)) for _, _, pid, _ in calls(tmp_path)))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if blow == signal.SIGINT:
        kept = f"interrupted: 1 of 4 trials kept in {tmp_path / 'out'}; run the same command again to go on"
        assert err.strip().splitlines() == [kept]
    assert [record.status for record in Store(tmp_path / "out").records()] == ["done"]
    assert list((tmp_path / "out").rglob("*.tmp")) == []


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path
        from experiments.runner import run
        from experiments.store import Store
        from test_runner import task

        folder = Path(sys.argv[1])
        run([task(folder), task(folder, 1)], Store(folder / "out"), jobs=2, progress=False)
        """)
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    run_ = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run_.returncode == 1
    assert "needs `if __name__ == '__main__':`" in run_.stderr.splitlines()[-1]
    assert calls(tmp_path) == []


MEMORY = """
import torch
from experiments.environment import forget_peak_memory, peak_memory_bytes
forget_peak_memory()
before = peak_memory_bytes()
block = torch.ones(60_000_000, dtype=torch.uint8)
del block
high = peak_memory_bytes()
assert high - before > 30_000_000
forget_peak_memory()
assert peak_memory_bytes() < high - 30_000_000
"""


def test_peak_memory_is_that_of_the_trial():
    # In a process of its own: what earlier tests freed may still be resident, and would be taken again.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_commit_is_a_hash_or_none():
    found = commit()
    assert found is None or len(found.removesuffix("-dirty")) == 40


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _await(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
