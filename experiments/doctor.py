"""What is installed, what is missing and the command that mends it, and a short test that it all works.

Nothing heavy is imported here: each check runs in a Python of its own, so that a broken package, even one that
takes its process down, is a finding and not the end of the doctor.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

__all__ = ["EXTRAS", "Finding", "Requirement", "examine", "packages", "probe", "requirements"]

PIP = f"{sys.executable} -m pip install"
TORCH = "torch==2.13.0"  # the version that everything is tested with
CRYPTEN = "crypten==0.4.1"  # not among our requirements, since its own cannot be installed
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}  # where it is not the package's name
PROBE_SECONDS = 120.0

IMPORT = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
DEVICE = """
import torch
names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
why = "sees no GPU" if torch.version.cuda else "is built without CUDA"
print(", ".join(f"cuda:{number} {name}" for number, name in enumerate(names)) or f"cpu (this torch {why})")
"""
SELFTEST = "from experiments.selftest import split_equals_unsplit; print(split_equals_unsplit())"
EXTRAS = {
    "he": """
import torch
from privacy.he import EncryptedLayer, Keys, LayerHolder
torch.manual_seed(0)
plain, x = torch.nn.Linear(8, 3), torch.rand(4, 8)
error = (EncryptedLayer(Keys(), LayerHolder("server", plain))(x) - plain(x)).abs().max().item()
assert error < 1e-3, f"an encrypted layer is wrong by {error}"
print(f"an encrypted layer answers to within {error:.0e}")
""",
    "mpc": """
import torch
from privacy.mpc import Servers, SharedStage
torch.manual_seed(0)
plain, x = torch.nn.Linear(8, 3), torch.rand(4, 8)
with Servers() as servers:
    error = (SharedStage(servers, plain).predict(x) - plain(x)).abs().max().item()
assert error < 1e-3, f"a layer on shares is wrong by {error}"
print(f"two servers and a dealer answer on shares to within {error:.0e}")
""",
    "net": """
import tempfile
from pathlib import Path
import torch
from splitlearn import Framed, Remote, Service, serve
from splitlearn.transport import Connection, Credentials, Host, issue, make_authority

class Echo:
    name = "a"
    def forward(self, x):
        return x

with tempfile.TemporaryDirectory() as folder:
    certs = Path(folder)
    make_authority(certs)
    issue(certs, "server", hosts=["localhost"])
    issue(certs, "a")
    host = Host("localhost:0", Credentials.read(certs, "server"), {"a": serve(Service({"a": Echo()}))})
    connection = Connection(f"localhost:{host.start()}", Credentials.read(certs, "a"), patience=20)
    x = torch.rand(4)
    assert torch.equal(Remote("server", Framed(connection.ask), "a").forward(x), x), "what came back is something else"
    connection.close()
    host.stop(0)
print("a frame went to a server and back by mutual TLS")
""",
    "ray": """
import ray
print(f"Ray {ray.__version__} is importable")
""",
    "dp": """
import dp_accounting
from opacus.accountants import RDPAccountant
accountant = RDPAccountant()
for _ in range(100):
    accountant.step(noise_multiplier=1.0, sample_rate=0.01)
epsilon = accountant.get_epsilon(delta=1e-5)
assert 0 < epsilon < 5, f"100 steps of DP-SGD cost an epsilon of {epsilon}"
print(f"Opacus accounts for 100 steps of DP-SGD: epsilon {epsilon:.2f} at delta 1e-5")
""",
}


@dataclass(frozen=True)
class Finding:
    """What one check found. ``remedy`` is the command that mends it; only ``required`` ones make the doctor fail.

    ``slow`` is a check that was not through in time: it tells nothing of what it checks, and has no remedy.
    """

    what: str
    state: Literal["ok", "missing", "slow", "broken"]
    detail: str
    remedy: str = ""
    required: bool = True


@dataclass(frozen=True)
class Requirement:
    """A package, the versions of it that do (``>=2.13,<2.14``), and the extra that asks for it, "" for none."""

    package: str
    versions: str
    extra: str = ""

    def allows(self, version: str) -> bool:
        """Return whether a version does; only its numbers count."""
        return all(_COMPARE[sign](_numbers(version), _numbers(bound)) for sign, bound in _BOUND.findall(self.versions))


_BOUND = re.compile(r"(==|>=|<)\s*([\w.]+)")
_COMPARE: dict[str, Callable[[list[int], list[int]], bool]] = {
    "==": lambda a, b: a == b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
}


def examine() -> Iterator[Finding]:
    """Yield every finding, the slow ones last: about ten seconds in all."""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Finding("machine", "ok", f"{platform.platform()}, {_cores()} cores, {_memory()}")
    wanted = requirements(metadata.requires("splitlearn") or [])
    found = list(packages(wanted, _installed))
    yield from found
    if any(finding.required and finding.state != "ok" for finding in found):
        return  # what follows could only say it again
    absent = {finding.what for finding in found if finding.state == "missing"}
    extras = [extra for extra in EXTRAS if not any(need.extra == extra and need.package in absent for need in wanted)]
    modules = [_module(need.package) for need in wanted if not need.extra]
    with ThreadPoolExecutor(min(2, _cores())) as pool:
        imports = pool.submit(probe, IMPORT, *modules)
        device = pool.submit(probe, DEVICE)
        selftest = pool.submit(probe, SELFTEST)
        tested = [(extra, pool.submit(probe, EXTRAS[extra])) for extra in extras]
        again = f"{PIP} --force-reinstall"
        yield _judged("imports", imports.result(), f"{again} splitlearn", otherwise="every required package imports")
        yield _judged("device", device.result(), f"{again} {TORCH}")
        yield _judged("self-test", selftest.result(), f"{again} {TORCH}")
        for extra, result in tested:
            broken = " ".join(f"'{need.package}{need.versions}'" for need in wanted if need.extra == extra)
            yield _judged(f"extra {extra}", result.result(), f"{again} --no-deps {broken}", required=False)


def requirements(lines: Sequence[str]) -> list[Requirement]:
    """Return what an installed package's metadata asks for, the tools of developers and bundles of extras apart."""
    found = []
    for line in lines:
        bare, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", bare)
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        assert name is not None, line
        if name[0] != "splitlearn" and (extra is None or extra[1] in EXTRAS):
            found.append(Requirement(name[0], bare[name.end() :].strip(), extra[1] if extra else ""))
    crypten, version = CRYPTEN.split("==")
    return [*found, Requirement(crypten, f"=={version}", "mpc")]


def packages(wanted: Sequence[Requirement], installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """Yield a finding for each requirement, given the version of a package that is ``installed``, or None."""
    for need in wanted:
        version = installed(need.package)
        exact = TORCH if need.package == "torch" else f"'{need.package}{need.versions}'"
        remedy = f"{PIP} 'splitlearn[{need.extra}]'" if need.extra else f"{PIP} {exact}"
        if need.package == "crypten":
            remedy = f"{PIP} --no-deps {CRYPTEN}"
        asks = f"extra {need.extra} asks for {need.versions}" if need.extra else f"expected {need.versions}"
        required = not need.extra
        if version is None:
            yield Finding(need.package, "missing", asks, remedy, required)
        elif not need.allows(version):
            remedy = remedy if need.package == "crypten" else f"{PIP} {exact}"
            yield Finding(need.package, "broken", f"{asks}, got {version}", remedy, required)
        else:
            yield Finding(need.package, "ok", version + (f" (extra {need.extra})" if need.extra else ""))


def probe(code: str, *arguments: str) -> tuple[bool | None, str]:
    """Run ``code`` in a Python of its own; return whether it ended well, and the last line that it wrote.

    None where it did not end within ``PROBE_SECONDS``, which says nothing of what it tests.
    """
    # -P: a folder of the user's named as one of our packages must not take its place.
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, *arguments]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PROBE_SECONDS:.0f} s: the machine is busy; run it again"
    if done.returncode < 0:
        return False, f"the process was killed by signal {-done.returncode}"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def _judged(
    what: str, result: tuple[bool | None, str], remedy: str, *, otherwise: str = "", required: bool = True
) -> Finding:
    good, line = result
    if good is None:
        return Finding(what, "slow", line, required=required)
    if good:
        return Finding(what, "ok", line or otherwise)
    return Finding(what, "broken", line, remedy, required)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _module(package: str) -> str:
    return MODULES.get(package, package.replace("-", "_"))


def _numbers(version: str) -> list[int]:
    leading = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in leading[0].split(".")] if leading else []
    while numbers and numbers[-1] == 0:  # 2.0 is 2
        numbers.pop()
    return numbers


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    """Return how much memory there is, in words."""
    table = Path("/proc/meminfo")
    if table.exists():
        kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", table.read_text(), re.MULTILINE))
        total, free = (int(kilobytes[name]) * 1024 / 1e9 for name in ("MemTotal", "MemAvailable"))
        return f"{total:.1f} GB of memory, {free:.1f} GB free"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return f"{total:.1f} GB of memory"
