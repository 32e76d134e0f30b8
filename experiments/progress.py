"""Progress over trials on stderr: a bar on a terminal, a plain line a trial elsewhere."""

from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "counted"]


def counted(count: int, noun: str) -> str:
    """Return how many there are of what ``noun`` names, such as ``1 trial`` or ``2 trials``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class Progress:
    """Shows how far a run of ``total`` trials is; ``opening`` are lines to begin with, such as what is kept."""

    def __init__(self, total: int, *, opening: Sequence[str] = (), visible: bool = True):
        self._console = Console(stderr=True, quiet=not visible, highlight=False)
        self._total, self._opening = total, tuple(opening)
        self._done = self._failed = 0
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
        """Write the opening lines and show the bar."""
        for line in self._opening:
            self.say(line)
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
                self.say(f"failed: {title}")
        else:
            failures = f" ({self._failed} failed)" if self._failed else ""
            self.say(f"{self._done} of {counted(self._total, 'trial')}{failures}: {title} {result}")

    def say(self, line: str) -> None:
        """Write a line beside the bar."""
        self._console.print(line, markup=False, soft_wrap=True)
