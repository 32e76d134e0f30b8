"""What ``splitlearn data`` does: fetch a data set under a progress bar, or list those there are."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from splitlearn.data import DATASETS, download

__all__ = ["fetch", "list_present"]


def fetch(name: str, folder: Path, url: str | None) -> None:
    """Fetch the files of a data set into ``folder``; say where they are and how to use them."""
    console = Console(highlight=False)
    if not DATASETS[name].files:
        console.print(f"{name} is embedded: there is nothing to fetch")
        return
    stderr = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as progress:
        bar = progress.add_task(name, total=None)
        paths = download(
            name,
            data_dir=folder,
            url=url,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)
    console.print(f"use it: splitlearn run tradeoff --data {name} --data-dir {folder}", markup=False, soft_wrap=True)


def list_present(folder: Path) -> None:
    """List the data sets, and whether each is embedded, or its files lie in ``folder``."""

    def present(path: str) -> bool:
        return any((folder / spelling).is_file() for spelling in (path, f"{path}.gz", path.removesuffix(".gz")))

    console = Console(highlight=False)
    width = max(map(len, DATASETS))
    for name, source in DATASETS.items():
        state = "present" if all(present(file.path) for file in source.files) else "absent"
        state = state if source.files else "embedded"
        console.print(f"{name:<{width}}  {state:<8}  {escape(source.summary)}", soft_wrap=True)
    console.print(
        f"looked in {escape(str(folder))} (--data-dir or SPLITLEARN_DATA name another); fetch: splitlearn data NAME",
        soft_wrap=True,
    )
