"""What `import splitlearn` takes beyond `import torch`, each in a fresh process, paired in one run."""

import statistics
import subprocess
import sys
from typing import Any

__all__ = ["import_time"]

TIMED = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import splitlearn; "
TIMED += "print(b - a, time.perf_counter() - b)"


def import_time(*, rounds: int = 7) -> dict[str, Any]:
    """Return the median seconds of `import torch`, and those that `import splitlearn` then adds."""
    pairs = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True)
        torch_seconds, more = map(float, done.stdout.split())
        pairs.append((torch_seconds, more))
    torch_median = statistics.median(seconds for seconds, _ in pairs)
    more_median = statistics.median(more for _, more in pairs)
    return {
        "import_splitlearn_s": more_median,
        "import_torch_s": torch_median,
        "ratio": statistics.median(more / seconds for seconds, more in pairs),
    }
