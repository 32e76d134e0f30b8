"""The console command: what it lists, runs and says, and how it ends on bad input."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.experiment import Experiment, Options
from experiments.options import command
from experiments.record import Leakage
from experiments.runner import Outcome, Task

CHOSEN = []  # what the tiny experiment was asked for


@dataclass(frozen=True)
class Config:
    stds: tuple[float, ...] = field(default=(0.1, 0.5), metadata={"help": "Noise on [the] activations."})
    cuts: tuple[str, ...] = ("relu1",)
    widths: tuple[int, ...] = ()
    epochs: int = 3
    lr: float = 0.25
    note: str | None = None
    order: Literal["turns", "parallel"] = "turns"
    shuffle: bool = True

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError(f"expected at least one epoch,\ngot {self.epochs}; raise --epochs")


def trial(seed, std):
    if std > 1:
        raise ValueError("too noisy")
    leak = Leakage(
        attack="decoder",
        family="reconstruction",
        advantage=0.9 - std + seed / 100,
        metrics={"mse": 0.01},
        baselines={"mse_mean_image": 0.07},
    )
    return Outcome({"accuracy": 0.95 - std / 10 + seed / 100}, [leak], {"up": {"activation": 123_456}}, {"train": 1.5})


def tasks(config, options):
    CHOSEN.append((config, options))
    return [
        Task(
            experiment="tiny",
            config={"seed": seed, "std": std},
            command=f"splitlearn run tiny --seeds {seed} --stds {std}",
            labels={
                "seed": seed,
                "data": options.data,
                "protocol": "vanilla",
                "cut": "relu1",
                "protection": "noise" if std else "none",
                "strength": str(std) if std else "",
            },
            call=partial(trial, seed, std),
        )
        for seed in options.seeds
        for std in (0.0, *config.stds)
    ]


def measure():
    print("chatter")  # noqa: T201
    return {"ratio": 1.5}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A catalogue of one thing each, an empty folder to be in, and no data directory named."""
    catalogue = ModuleType("experiments.catalogue")
    catalogue.EXPERIMENTS = {"tiny": Experiment("tiny", "What does noise cost?", Config, tasks)}
    for kind in ("PROTOCOLS", "ATTACKS", "PROTECTIONS", "DETECTORS", "MECHANISMS"):
        setattr(catalogue, kind, {"some": SimpleNamespace(summary=f"one of the {kind.lower()}")})
    catalogue.BUILT_ATTACKS = catalogue.UPDATE_ATTACKS = catalogue.LABEL_ATTACKS = catalogue.LABEL_PROTECTIONS = {}
    catalogue.POISON_ATTACKS = catalogue.POISON_DEFENSES = {}
    catalogue.METHODS = catalogue.TASK_METHODS = catalogue.PARADIGMS = {}
    catalogue.BENCHES = {"speed": SimpleNamespace(summary="how fast", run=measure)}
    monkeypatch.setitem(sys.modules, "experiments.catalogue", catalogue)
    monkeypatch.delenv("SPLITLEARN_DATA", raising=False)
    monkeypatch.delenv("SPLITLEARN_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    CHOSEN.clear()
    return catalogue


def call(*arguments, **environment):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "100", **environment})


def test_the_installed_command_starts_fast_and_anywhere(tmp_path):
    for arguments, wanted in ((["--help"], "splitlearn doctor"), (["--version"], "splitlearn 0.1.0"), ([], "Usage")):
        script = Path(sys.executable).parent / "splitlearn"
        done = subprocess.run([script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert wanted in done.stdout
    code = "import sys, experiments.cli; print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_everything_in_the_real_catalogue_is_listed_and_has_help():
    from experiments.catalogue import (
        ATTACKS,
        BENCHES,
        BUILT_ATTACKS,
        DETECTORS,
        EXPERIMENTS,
        LABEL_ATTACKS,
        LABEL_PROTECTIONS,
        MECHANISMS,
        METHODS,
        POISON_ATTACKS,
        POISON_DEFENSES,
        PROTECTIONS,
        PROTOCOLS,
        TASK_METHODS,
        UPDATE_ATTACKS,
    )
    from splitlearn.data import DATASETS

    lines = call("list").stdout.splitlines()
    for kind in (
        EXPERIMENTS,
        PROTOCOLS,
        ATTACKS,
        UPDATE_ATTACKS,
        LABEL_ATTACKS,
        POISON_ATTACKS,
        POISON_DEFENSES,
        LABEL_PROTECTIONS,
        BUILT_ATTACKS,
        PROTECTIONS,
        DETECTORS,
        MECHANISMS,
        METHODS,
        TASK_METHODS,
        DATASETS,
        BENCHES,
    ):
        for name, thing in kind.items():
            assert any(line.split() == [name, *thing.summary.split()] for line in lines), name
    for group, names in (("run", EXPERIMENTS), ("bench", BENCHES)):
        for name in names:
            assert name in call(group, "--help").stdout
            assert call(group, name, "--help").exit_code == 0


def test_list_narrows_to_a_kind(tiny):
    assert call("list", "experiments").stdout == "Experiments (splitlearn run NAME)\n  tiny  What does noise cost?\n"
    assert call("list", "defenses").stdout == call("list", "protections").stdout
    assert "one of the protections" in call("list", "defenses").stdout
    tiny.BENCHES = {}
    assert call("list", "benches").stdout.endswith("no benches yet\n")


def test_help_shows_every_option_with_its_default(tiny):
    text = " ".join(call("run", "tiny", "--help").stdout.replace("│", " ").split())
    assert "Noise on [the] activations. [default: 0.1,0.5]" in text
    for wanted in ("Options of tiny", "--no-shuffle", "[default: runs/tiny]", "[default: 0,1,2]", "SPLITLEARN_DATA"):
        assert wanted in text


def test_options_become_the_configuration(tiny):
    given = (
        "--stds 0.5,0.75 --cuts relu1,relu2 --widths 8,16 --epochs 2 --lr 0.5 --note a,b --order parallel --no-shuffle"
    )
    common = "--seeds 0-2,7 --data digits --data-dir here --device cpu --out there --jobs 1 --quiet"
    result = call("run", "tiny", *given.split(), *common.split())
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    config, options = CHOSEN[-1]
    assert config == Config((0.5, 0.75), ("relu1", "relu2"), (8, 16), 2, 0.5, "a,b", "parallel", False)
    assert options == Options("digits", Path("here"), (0, 1, 2, 7), "cpu", Path("there"), 1)


def test_without_options_the_defaults_hold(tiny):
    assert call("run", "tiny", "--jobs", "1", SPLITLEARN_DATA="elsewhere").exit_code == 0
    assert CHOSEN[-1] == (Config(), Options(out=Path("runs/tiny"), jobs=1, data_dir=Path("elsewhere")))


def test_a_run_ends_in_a_table_and_in_where_to_look(tiny):
    result = call("run", "tiny", "--jobs", "1", "--stds", "0.2,0.4", "--out", "there")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["unprotected", "*", "3", "0.960", "±", "0.010", "0.910", "±", "0.010", "123", "kB", "1.5", "s"] in rows
    assert ["noise", "0.4", "*", "3", "0.920", "±", "0.010", "0.510", "±", "0.010", "123", "kB", "1.5", "s"] in rows
    assert "9 trials done, 0 failed" in result.stdout
    assert result.stderr.splitlines()[0] == "9 trials, 1 at a time, 0 done before"
    assert [line.partition(":")[0] for line in result.stderr.splitlines()[1:]] == [
        f"{number} of 9 trials" for number in range(1, 10)
    ]
    for name in ("report.html", "tradeoff.png", "results.csv"):
        assert f"  there/{name}\n" in result.stdout
        assert Path("there", name).stat().st_size > 0
    again = call("run", "tiny", "--jobs", "1", "--stds", "0.2,0.4", "--out", "there")
    assert "0 trials done, 9 kept from before, 0 failed" in again.stdout
    assert again.stderr == "9 trials, 1 at a time, 9 done before\n"


def test_failed_trials_are_counted_and_located(tiny):
    result = call("run", "tiny", "--jobs", "1", "--stds", "2", "--seeds", "0", "--quiet")
    assert result.exit_code == 1
    assert "1 trial done, 1 failed" in result.stdout
    (line,) = result.stderr.splitlines()
    told = "failed: digits · vanilla · relu1 · noise 2.0 · seed 0: ValueError: too noisy; see runs/tiny/trials/"
    assert line.startswith(told)
    assert "too noisy" in Path(line.rpartition("see ")[2]).read_text()
    again = call("report", "runs/tiny")
    assert again.exit_code == 0
    assert again.stderr == "1 of 2 trials failed and takes no part; tracebacks: runs/tiny/trials/*/traceback.txt\n"


def test_report_rebuilds_what_was_deleted(tiny):
    call("run", "tiny", "--jobs", "1", "--seeds", "0", "--out", "there", "--quiet")
    page = Path("there/report.html")
    page.unlink()
    result = call("report", "there")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "  there/report.html"
    assert page.exists()


def test_a_bench_prints_one_json_object_alone_on_stdout(tiny):
    result = call("bench", "speed")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"ratio": 1.5}
    assert "chatter" in result.stderr


def test_data_fetches_from_a_mirror_and_says_what_is_there(tiny, monkeypatch):
    from splitlearn.data import DATASETS, File, Source

    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of b"hello"
    source = Source("a greeting", (1, 1, 1), "none", lambda path: None, (File("words/hello.txt", digest),))
    monkeypatch.setitem(DATASETS, "greeting", source)
    Path("mirror").mkdir()
    Path("mirror/hello.txt").write_bytes(b"hello")
    assert "greeting       absent    a greeting\n" in call("data").stdout
    url = Path("mirror").absolute().as_uri()
    result = call("data", "greeting", "--url", url, SPLITLEARN_DATA="store")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "store/words/hello.txt"
    assert "greeting       present   a greeting\n" in call("data", "--data-dir", "store").stdout
    assert call("data", "digits").stdout == "digits is embedded: there is nothing to fetch\n"
    call("data", "greeting", "--url", url)
    assert Path("data/words/hello.txt").read_bytes() == b"hello"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rnu"], "error: no command is named 'rnu': did you mean run?"),
        (["--zzz"], "error: No such option: --zzz; see splitlearn --help"),
        (["run"], "error: expected the name of an experiment: tiny; splitlearn run --help says more"),
        (["run", "tinny"], "error: no experiment is named 'tinny': did you mean tiny?"),
        (["bench", "zzz"], "error: no bench is named 'zzz': expected one of speed"),
        (["data", "minst"], "error: no data set is named 'minst': did you mean mnist?"),
        (["list", "benchs"], "error: no kind is named 'benchs': did you mean benches?"),
        (["run", "tiny", "--epochs", "0"], "error: expected at least one epoch, got 0; raise --epochs"),
        (["run", "tiny", "--epochs", "x"], "see splitlearn run tiny --help"),
        (["run", "tiny", "--order", "x"], "'turns', 'parallel'"),
        (["run", "tiny", "--stds", "a"], "'--stds': expected numbers with commas between, got 'a'"),
        (["run", "tiny", "--widths", "1,,2"], "'--widths': expected whole numbers with commas between, got '1,,2'"),
        (["run", "tiny", "--seeds", "4-0"], "'--seeds': expected seeds such as 0,1,2 or 0-4, got '4-0'"),
        (["run", "tiny", "--seeds", "1,0-2"], "'--seeds': expected at least one seed and each once, got '1,0-2'"),
        (["run", "tiny", "--seeds", ""], "'--seeds': expected at least one seed and each once, got ''"),
        (["run", "tiny", "--jobs", "-1"], "'--jobs'"),
        (["run", "tiny", "--out", "file/folder"], "expected a folder that can be written, got file/folder"),
        (["run", "tiny", "--stds", "0.5,0.5"], "error: expected each configuration once"),
        (["report", "nowhere"], "error: expected the folder of a run, got nowhere"),
        (["report", "."], "error: expected records in trials, got none"),
        (["data", "mitbih"], "name where to get it with --url"),
    ],
)
def test_bad_input_is_one_line_on_stderr(tiny, arguments, line):
    Path("file").touch()
    result = CliRunner().invoke(app, arguments, prog_name="splitlearn")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert line in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tiny):
    for result in (call("--debug", "report", "nowhere"), call("report", "nowhere", SPLITLEARN_DEBUG="1")):
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: expected the folder of a run")


def test_a_mistake_of_ours_is_not_hidden(tiny):
    def broken():
        return {}["figure"]

    tiny.BENCHES["speed"] = SimpleNamespace(summary="", run=broken)
    assert "KeyError: 'figure'; this is a mistake in splitlearn" in call("bench", "speed").stderr
    tiny.BENCHES["speed"] = SimpleNamespace(summary="", run=lambda: 1 / 0)
    assert isinstance(call("bench", "speed").exception, ZeroDivisionError)


def test_a_field_that_no_option_can_express_is_refused():
    @dataclass(frozen=True)
    class Nested:
        inner: dict[str, int] = field(default_factory=dict)

    @dataclass(frozen=True)
    class Clash:
        seeds: int = 1

    with pytest.raises(ValueError, match=r"tiny: option 'inner': expected int, float.*change the field's type"):
        command(Experiment("tiny", "", Nested, tasks), print)
    with pytest.raises(ValueError, match="tiny: option 'seeds' is one of every experiment"):
        command(Experiment("tiny", "", Clash, tasks), print)


def test_ctrl_c_keeps_what_is_done_and_says_so_in_one_line(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import test_cli
            from types import ModuleType
            from experiments.cli import main
            from experiments.experiment import Experiment

            quick = test_cli.trial
            test_cli.trial = lambda seed, std: time.sleep(60) if seed else quick(seed, std)
            catalogue = sys.modules["experiments.catalogue"] = ModuleType("experiments.catalogue")
            catalogue.EXPERIMENTS = {{"tiny": Experiment("tiny", "", test_cli.Config, test_cli.tasks)}}
            main()
            """
        )
    )
    command = [sys.executable, script, "run", "tiny", "--stds", "", "--jobs", "1", "--quiet", "--seeds", "0-2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/tiny/trials/*/record.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=20)
    assert running.returncode == 130
    assert stderr == "interrupted: 1 of 3 trials kept in runs/tiny; run the same command again to go on\n"


def test_noise_says_what_meets_an_epsilon_before_anything_is_trained():
    local = call("noise", "--epsilon", "4", "--releases", "20").stdout
    assert "Gaussian" in local
    assert "4.835" in local  # sqrt(20) over the greatest mu of (4, 1e-5), in closed form
    assert "0.41088" in local  # ε of one of 20 randomised answers
    sampled = call("noise", "--epsilon", "1.5", "--releases", "100", "--sampling", "0.01").stdout
    assert "DP-SGD" in sampled
    assert "Laplace" not in sampled
    for wrong, message in (
        (("--epsilon", "-1"), "expected a finite ε above 0"),
        (("--sampling", "2"), "expected a sampling probability above 0"),
        (("--delta", "0"), "expected δ between 0 and 1"),
    ):
        result = CliRunner().invoke(app, ["noise", *wrong], prog_name="splitlearn")
        assert result.exit_code != 0
        assert message in result.output + str(result.exception)
