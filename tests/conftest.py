"""What every test shares: one torch thread a worker, a fixed seed, and real data where there is any."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from privacy.mpc import Servers
from splitlearn.data import Dataset, Splits, split


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real data sets; the test is skipped where there is none."""
    named = os.environ.get("SPLITLEARN_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: set SPLITLEARN_DATA to a folder that holds it")
    return folder


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Two servers and a dealer for all tests of a worker that break none of them; each opens stages of its own."""
    with Servers(timeout=60) as running:
        yield running


@pytest.fixture(scope="session")
def remembering() -> Iterator[Servers]:
    """The same, of parties that remember all that they receive; read (and so forget) it before and after."""
    with Servers(timeout=60, remember=True) as running:
        yield running


@pytest.fixture
def tokens() -> Splits:
    """Splits of a data set of tokens, for what takes numbers alone."""
    x, y = torch.randint(1, 9, (60, 12)), torch.arange(60) % 2
    dataset = Dataset("words", x, y, 2, "tokens", torch.arange(60), names=tuple(map(str, range(9))))
    return split(dataset, private=20, auxiliary=20, test=20)
