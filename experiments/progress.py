"""Progress over trials on stderr: a bar on a terminal, now and then a plain line elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress"]

LINE_SECONDS = 5.0  # at least this long between plain lines


class Progress:
    """Shows how far a run of ``total`` trials is; ``skipped`` ones were done before and are not among them."""

    def __init__(self, total: int, *, skipped: int = 0, visible: bool = True):
        self._console = Console(stderr=True, quiet=not visible, highlight=False)
        self._total, self._skipped = total, skipped
        self._done = self._failed = 0
        self._last_line = float("-inf")
        self._bar = Bar(
            TextColumn("trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("·"),
            TimeElapsedColumn(),
            TextColumn("gone, about"),
            TimeRemainingColumn(),
            TextColumn("left · {task.description}", markup=False),
            console=self._console,
            transient=False,
            disable=not (visible and self._console.is_terminal),
        )

    def __enter__(self) -> Self:
        """Show the bar, and say what is not run again."""
        if self._skipped:
            self._say(f"{self._skipped} trials were done before and are kept")
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()

    def started(self, title: str) -> None:
        """Show a trial that runs now."""
        self._bar.update(self._task, description=title)

    def finished(self, title: str, *, failed: bool) -> None:
        """Count a trial that ended."""
        self._done += 1
        self._failed += failed
        self._bar.update(self._task, advance=1)
        result = "failed" if failed else "done"
        if self._console.is_terminal:
            if failed:
                self._say(f"failed: {title}")
        elif self._done == self._total or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            failures = f" ({self._failed} failed)" if self._failed else ""
            self._say(f"{self._done} of {self._total} trials{failures}: {title} {result}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
