"""The public face: the names that others may rely on, pinned; and a light import."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import splitlearn

NAMES = [
    "Ans", "Batches", "Emulated", "Encoder", "ErrorFeedback", "Features", "Float16", "Framed", "Grants", "Guard",
    "Guards", "Int8", "Joined", "Kind", "Learner", "Member", "Message", "Metered", "Palette", "Party", "PerKind",
    "RandomK", "Recorded", "Remote", "RemoteMember", "Service", "Threat", "TopK", "Transport", "Uniform", "View",
    "Zstd", "apart_round", "batch_norm_entries", "concatenated", "cut", "decode", "encode", "epochs_of", "evaluate",
    "fedavg_round", "fit", "granted", "in_turn_round", "infer", "join", "load_checkpoint", "mean", "observe",
    "parallel", "parallel_round", "predict", "recut", "sample", "save_checkpoint", "serve", "splitfed_v1_round",
    "splitfed_v2_round", "splitfed_v3_round", "summed", "u_shaped", "vanilla", "vertical", "wire",
]  # fmt: skip


MODULES = [found.name for found in pkgutil.walk_packages(splitlearn.__path__, "splitlearn.")]


def test_the_public_names_are_these() -> None:
    assert sorted(splitlearn.__all__) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_says_what_it_is(name: str) -> None:
    thing = getattr(splitlearn, name)
    text = inspect.getdoc(thing)
    assert text
    assert text.partition("\n")[0].endswith((".", ":"))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_lists_its_names(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.__all__ lists {public}, which is not there"


def test_import_brings_none_of_the_heavy_packages() -> None:
    heavy = ["tenseal", "crypten", "opacus", "ray", "matplotlib", "plotly", "sklearn", "pydantic", "typer"]
    code = f"import sys, splitlearn; print(*sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
