"""The doctor: what it makes of packages and probes, and that every extra is installed here and works."""

import sys

import pytest
from typer.testing import CliRunner

from experiments import doctor
from experiments.cli import app
from experiments.doctor import EXTRAS, Finding, Requirement, packages, probe, requirements
from experiments.selftest import split_equals_unsplit
from privacy.mpc import compat

PIP = f"{sys.executable} -m pip install"
METADATA = [
    "torch<2.14,>=2.13",
    "rich>=13.9",
    'tenseal<0.4,>=0.3.18; extra == "he"',
    'splitlearn[dp,he,mpc]; extra == "all"',
    "ruff<1,>=0.14; extra == 'dev'",
]


def test_requirements_are_read_from_metadata():
    assert requirements(METADATA) == [
        Requirement("torch", "<2.14,>=2.13"),
        Requirement("rich", ">=13.9"),
        Requirement("tenseal", "<0.4,>=0.3.18", "he"),
        Requirement("crypten", "==0.4.1", "mpc"),
    ]


@pytest.mark.parametrize(
    ("versions", "version", "allowed"),
    [
        (">=2.13,<2.14", "2.13.0+cpu", True),
        (">=2.13,<2.14", "2.14.0", False),
        (">=2.13,<2.14", "2.9.1", False),
        (">=2.0.0,<3", "2.0", True),
        ("==0.4.1", "0.4.1", True),
        ("==0.4.1", "0.4.0", False),
        ("", "1", True),
    ],
)
def test_versions_are_compared_by_their_numbers(versions, version, allowed):
    assert Requirement("some", versions).allows(version) is allowed


def test_what_is_missing_or_unfit_names_the_command_that_mends_it():
    found = {"torch": "2.12.0", "rich": "14.0"}
    assert list(packages(requirements(METADATA), found.get)) == [
        Finding("torch", "broken", "expected <2.14,>=2.13, got 2.12.0", f"{PIP} torch==2.13.0"),
        Finding("rich", "ok", "14.0"),
        Finding("tenseal", "missing", "extra he asks for <0.4,>=0.3.18", f"{PIP} 'splitlearn[he]'", required=False),
        Finding("crypten", "missing", "extra mpc asks for ==0.4.1", f"{PIP} --no-deps crypten==0.4.1", required=False),
    ]


def test_a_probe_outlives_what_it_runs(monkeypatch):
    assert probe("import sys; print('noise'); print(sys.argv[1])", "said") == (True, "said")
    assert probe("assert False, 'wrong'") == (False, "AssertionError: wrong")
    assert probe("import os; os.kill(os.getpid(), 11)") == (False, "the process was killed by signal 11")
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.3)
    assert probe("import time; time.sleep(60)") == (None, "no answer within 0 s: the machine is busy; run it again")


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_is_installed_and_works(extra):
    good, line = probe(EXTRAS[extra])
    assert good, line


def test_the_selftest_compares_bit_for_bit(monkeypatch):
    assert split_equals_unsplit(epochs=1).startswith("13 steps of a split CNN equal unsplit training bit for bit")
    monkeypatch.setattr("experiments.selftest.vanilla", lambda client, server, x, y: y.sum() * 0.0)
    with pytest.raises(ValueError, match=r"after 0 steps conv1\.weight, .* differ"):
        split_equals_unsplit(epochs=1)


def test_a_missing_crypten_is_an_error_that_names_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "crypten", None)
    with pytest.raises(LookupError, match=r"install it: pip install .*--no-deps crypten==0\.4\.1"):
        compat.load_crypten()


def scripted(monkeypatch, *findings):
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    return CliRunner().invoke(app, ["doctor"])


def test_the_doctor_fails_only_for_what_is_required(monkeypatch):
    good = Finding("torch", "ok", "2.13.0")
    result = scripted(monkeypatch, good)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "Everything works.")
    absent = Finding("tenseal", "missing", "extra he asks for it", "pip install 'splitlearn[he]'", required=False)
    result = scripted(monkeypatch, good, absent)
    assert result.exit_code == 0
    assert "missing  tenseal" in result.stdout
    assert "To mend it:\n  pip install 'splitlearn[he]'\n" in result.stdout
    result = scripted(monkeypatch, good, absent, Finding("self-test", "broken", "it differs", "pip install torch"))
    assert result.exit_code == 1
    assert "broken   self-test" in result.stdout


def test_a_slow_check_is_not_broken_and_asks_for_no_installation(monkeypatch):
    slow = doctor._judged("self-test", (None, "no answer within 120 s"), "pip install torch")
    result = scripted(monkeypatch, slow)
    assert result.exit_code == 1  # what was not tested is not known to work
    assert "slow     self-test        no answer within 120 s\n" in result.stdout
    assert "Nothing is broken, but not all could be tested: run it again." in result.stdout
    assert "pip" not in result.stdout


def test_a_missing_requirement_is_told_before_anything_is_run(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", {"torch": "2.13.0"}.get)
    monkeypatch.setattr(doctor, "probe", lambda *_: pytest.fail("nothing can be run without the packages"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1, result.output
    assert "missing  numpy" in result.stdout


@pytest.mark.slow
def test_the_doctor_finds_everything_here_in_order():
    findings = list(doctor.examine())
    assert [finding for finding in findings if finding.state != "ok"] == []
    assert {"python", "torch", "crypten", "imports", "device", "self-test", "extra he", "extra mpc", "extra dp"} <= {
        finding.what for finding in findings
    }
