"""Where a trial ran: versions, the commit of this checkout, and how much memory the process took."""

import platform
import resource
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["commit", "forget_peak_memory", "peak_memory_bytes", "versions"]

PACKAGES = (
    "splitlearn",
    "torch",
    "numpy",
    "scikit-learn",
    "safetensors",
    "zstandard",
    "opacus",
    "tenseal",
    "crypten",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of those packages, installed here, that results depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that is not installed took no part
            continue
    return found


def commit() -> str | None:
    """Return the commit of the checkout that this package runs from, ``-dirty`` where files were changed.

    None where the package is installed without its checkout, or git is absent.
    """
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # A package installed inside somebody else's checkout must not report that one's commit.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True, timeout=10)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def forget_peak_memory() -> None:
    """Start the measurement of ``peak_memory_bytes`` anew, where the system can (Linux)."""
    with suppress(OSError):  # where that is forbidden or unknown, the peak counts from the process's beginning
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process, interpreter and libraries included.

    On Linux since ``forget_peak_memory``; elsewhere since the process began, as ``getrusage`` counts it.
    ``ru_maxrss`` would not do on Linux: it counts earlier trials, and the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
