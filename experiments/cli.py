"""The console command ``splitlearn``. Names become objects here, and nowhere else.

What is heavy (torch, and with it the catalogue) is imported only in the commands that need it.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from experiments import plan_command, remote_commands
from experiments.commands import Commands, Program
from experiments.names import find

if TYPE_CHECKING:
    from experiments.experiment import Experiment, Options
    from experiments.runner import Engine

__all__ = ["app", "main"]

DEBUG = "SPLITLEARN_DEBUG"
PIPED_COLUMNS = 120


class _Splitlearn(Program):
    """The program's commands, in the order in which they are met."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return [
            "list", "run", "plan", "report", "bench", "noise", "data", "certs", "server", "fed-server", "client",
            "doctor",
        ]  # fmt: skip


class _Experiments(Commands):
    """One command an experiment."""

    kind = "experiment"

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the experiments."""
        from experiments.catalogue import EXPERIMENTS

        return list(EXPERIMENTS)

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return the command of one experiment, made from its configuration."""
        from experiments.catalogue import EXPERIMENTS
        from experiments.options import command

        return command(EXPERIMENTS[name], _run)


class _Benches(Commands):
    """One command a benchmark."""

    kind = "bench"

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the benchmarks."""
        from experiments.catalogue import BENCHES

        return list(BENCHES)

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return the command of one benchmark."""
        from experiments.catalogue import BENCHES

        single = typer.Typer(add_completion=False)
        described = single.command(name, help=escape(BENCHES[name].summary), rich_help_panel="Benches")
        described(lambda: _bench(name, BENCHES[name].run))
        return typer.main.get_command(single)


app = typer.Typer(
    cls=_Splitlearn,
    help="Privacy-preserving split learning: how much leaks, what protects, and what that costs.",
    epilog="Start with `splitlearn list`, or `splitlearn run tradeoff`. Something amiss? `splitlearn doctor`.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
runs = typer.Typer(cls=_Experiments, invoke_without_command=True)
benches = typer.Typer(cls=_Benches, invoke_without_command=True)
app.add_typer(runs, name="run", help="Run an experiment, and end in a report.", subcommand_metavar="NAME [OPTIONS]")
DataDir = Annotated[Path | None, typer.Option(envvar="SPLITLEARN_DATA", metavar="DIR", help="Default: ./data")]


def main() -> None:
    """Run the command that the command line names."""
    app(prog_name="splitlearn")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"splitlearn {version('splitlearn')}")
        raise typer.Exit


@app.callback()
def _program(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, metavar="", help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG, metavar="", help="Show the traceback of an error.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@runs.callback()
def _which_experiment(ctx: typer.Context) -> None:
    _expect_name(ctx, "an experiment")


@benches.callback()
def _which_bench(ctx: typer.Context) -> None:
    _expect_name(ctx, "a bench")


@app.command("list")
def _list(
    kind: Annotated[
        str,
        typer.Argument(
            help="experiments, protocols, attacks, protections, mechanisms, data or benches; all where left out."
        ),
    ] = "",
) -> None:
    """List what there is, a line each: experiments, protocols, attacks, defenses, mechanisms, data sets, benches."""
    kinds = _catalogue()
    kind = {"defenses": "protections", "datasets": "data"}.get(kind, kind)
    if kind:
        kinds = {kind: find("kind", kind, kinds)}
    console = _console()
    for number, (name, (title, entries)) in enumerate(kinds.items()):
        console.print(f"{'' if number == 0 else chr(10)}[bold]{title}[/bold]")
        width = max(map(len, entries), default=0)
        for entry, summary in entries.items():
            console.print(f"  [cyan]{entry:<{width}}[/cyan]  {escape(summary)}", soft_wrap=True)
        if not entries:
            console.print(f"  no {name} yet")


@app.command("report")
def _report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that a run wrote its records to.")],
) -> None:
    """Rebuild pictures, results.csv and report.html from the records in a folder."""
    from experiments import report
    from experiments.progress import counted
    from experiments.store import Store

    if not folder.is_dir():
        raise LookupError(f"expected the folder of a run, got {folder}, which is none; see runs/, or --out of the run")
    report.build(folder)
    _show_files(folder)
    records, _ = Store(folder).survey()
    failed = sum(record.status == "failed" for record in records)
    if failed:
        told = f"{failed} of {counted(len(records), 'trial')} failed and {'takes' if failed == 1 else 'take'} no part"
        typer.echo(f"{told}; tracebacks: {folder / 'trials' / '*' / 'traceback.txt'}", err=True)


app.add_typer(
    benches, name="bench", help="Run a benchmark; the last line is one JSON object.", subcommand_metavar="NAME"
)


@app.command("noise")
def _noise(
    epsilon: Annotated[float, typer.Option(help="The ε that all releases together are to meet.")] = 4.0,
    delta: Annotated[float, typer.Option(help="Its δ, well below one over the number of samples.")] = 1e-5,
    releases: Annotated[int, typer.Option(help="How often each sample is released: epochs, or steps.", min=1)] = 1,
    sampling: Annotated[
        float, typer.Option(help="For DP-SGD: the probability of a sample to be in a batch; 1 for local noise.")
    ] = 1.0,
    classes: Annotated[int, typer.Option(help="Classes of randomised response.", min=2)] = 10,
) -> None:
    """Say which noise meets an ε over so many releases of each sample, before anything is trained."""
    from rich.table import Table

    from experiments.planning import plan

    what = "releases of each sample" if sampling == 1 else f"steps, each sample in one with probability {sampling:g}"
    table = Table(title=f"ε = {epsilon:g} at δ = {delta:g} over {releases} {what}", box=None)
    for heading in ("mechanism", "least", "of", "ε by RDP"):
        table.add_column(heading, justify="right" if heading in ("least", "ε by RDP") else "left")
    for name, unit, figure, rdp in plan(epsilon, delta, releases, sampling=sampling, classes=classes):
        table.add_row(name, f"{figure:.5g}", unit, f"{rdp:.4g}")
    _console().print(table)


@app.command("data")
def _data(
    name: Annotated[str, typer.Argument(help="The data set; where left out, those there are.")] = "",
    data_dir: DataDir = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A mirror: the file, or the folder that holds it; https, http or file."),
    ] = None,
) -> None:
    """Download a data set, or list those there are and which of them are present."""
    from experiments.fetch import fetch, list_present
    from splitlearn.data import DATASETS

    folder = data_dir if data_dir is not None else Path("data")
    if name:
        find("data set", name, DATASETS)
        fetch(name, folder, url)
    else:
        list_present(folder)


app.command("plan")(plan_command.plan)
app.command("certs")(remote_commands.certs)
app.command("server")(remote_commands.server)
app.command("fed-server")(remote_commands.fed_server)
app.command("client")(remote_commands.client)


@app.command("doctor")
def _doctor() -> None:
    """Say what is installed, what is missing and the command that mends it; run a ten-second self-test."""
    from experiments.doctor import Finding, examine

    console = _console()
    colours = {"ok": "green", "missing": "yellow", "slow": "yellow", "broken": "red"}
    bad: list[Finding] = []
    with console.status("looking …"):
        for finding in examine():
            mark = f"[{colours[finding.state]}]{finding.state:<8}[/]"
            console.print(f"{mark} {finding.what:<16} {escape(finding.detail)}", soft_wrap=True)
            bad += [finding] if finding.state != "ok" else []
    if not bad:
        console.print("\nEverything works.")
        return
    remedies = list(dict.fromkeys(finding.remedy for finding in bad if finding.remedy))
    console.print("\nTo mend it:" if remedies else "\nNothing is broken, but not all could be tested: run it again.")
    for remedy in remedies:
        console.print(f"  {escape(remedy)}", soft_wrap=True)
    if any(finding.required for finding in bad):
        raise typer.Exit(1)
    if any(finding.state == "slow" for finding in bad):
        return
    console.print("All that is required works; only extras want mending.")


def _run(experiment: "Experiment", config: Any, options: "Options", quiet: bool) -> None:
    """Run what is not done yet, build the report, and end in a table and in where to look."""
    from experiments import report
    from experiments.closing import closing_tables
    from experiments.progress import counted
    from experiments.runner import failure, run
    from experiments.store import Store

    engine, jobs = _engine(options)
    tasks = experiment.tasks(config, options)
    store = Store(options.out)
    summary = run(tasks, store, jobs=jobs, engine=engine, progress=not quiet)
    report.build(options.out)
    console = _console()
    for table in closing_tables(record for task in tasks if (record := store.load(task.trial)) is not None):
        console.print(table)
    kept = f", {summary.skipped} kept from before" if summary.skipped else ""
    console.print(f"{counted(summary.done, 'trial')} done{kept}, {summary.failed} failed")
    _show_files(options.out)
    for record in summary.failures:
        typer.echo(failure(record, store), err=True)
    if summary.failed:
        raise typer.Exit(1)


def _engine(options: "Options") -> tuple["Engine | None", int]:
    """Return what runs the trials, None for this machine's processes, and how many at once."""
    if options.engine == "ray":
        from experiments.ray_engine import ray_jobs

        return partial(ray_jobs, address=options.ray_address), options.jobs
    if options.ray_address is not None:
        raise ValueError(f"expected --engine ray with --ray-address, got --engine {options.engine}; add --engine ray")
    from experiments.workers import available_cpus

    return None, options.jobs or available_cpus()


def _bench(name: str, measure: Callable[[], Mapping[str, Any]]) -> None:
    """Measure, and print the figures as one JSON object, alone on stdout."""
    progress = Console(stderr=True, highlight=False)
    begun = time.monotonic()
    progress.print(f"bench {name}: measuring …")
    with redirect_stdout(sys.stderr):
        figures = measure()
    progress.print(f"bench {name}: {time.monotonic() - begun:.0f} s")
    typer.echo(json.dumps(figures, allow_nan=False))


def _catalogue() -> dict[str, tuple[str, dict[str, str]]]:
    """Return, by kind, its title and the line that describes each thing."""
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
        PARADIGMS,
        POISON_ATTACKS,
        POISON_DEFENSES,
        PROTECTIONS,
        PROTOCOLS,
        TASK_METHODS,
        UPDATE_ATTACKS,
    )
    from splitlearn.data import DATASETS

    kinds: dict[str, tuple[str, Mapping[str, Any]]] = {
        "experiments": ("Experiments (splitlearn run NAME)", EXPERIMENTS),
        "protocols": ("Protocols", PROTOCOLS),
        "paradigms": ("Paradigms (splitlearn run paradigms --paradigms NAME)", PARADIGMS),
        "attacks": ("Attacks", {**ATTACKS, **UPDATE_ATTACKS, **LABEL_ATTACKS, **BUILT_ATTACKS}),
        "protections": ("Protections (defenses)", PROTECTIONS),
        "label_protections": ("Protections of labels (splitlearn run label_leakage)", LABEL_PROTECTIONS),
        "poisoning": ("Poisoning (splitlearn run poisoning --attacks NAME)", POISON_ATTACKS),
        "poison_defenses": ("Defenses against poisoning (splitlearn run poisoning --defenses NAME)", POISON_DEFENSES),
        "methods": ("Methods (splitlearn run non_iid, continual --methods NAME)", {**METHODS, **TASK_METHODS}),
        "detectors": ("Detectors (splitlearn run detection --detectors NAME)", DETECTORS),
        "mechanisms": ("Mechanisms with an ε (splitlearn run privacy_utility --mechanisms NAME)", MECHANISMS),
        "data": ("Data sets (splitlearn data NAME)", DATASETS),
        "benches": ("Benches (splitlearn bench NAME)", BENCHES),
    }
    return {
        kind: (title, {name: thing.summary for name, thing in things.items()})
        for kind, (title, things) in kinds.items()
    }


def _expect_name(ctx: typer.Context, what: str) -> None:
    if ctx.invoked_subcommand is None:
        names = ctx.command.list_commands(ctx)  # type: ignore[attr-defined]
        raise LookupError(f"expected the name of {what}: {', '.join(names)}; {ctx.command_path} --help says more")


def _show_files(folder: Path) -> None:
    for name in (
        "report.html",
        "privacy.png",
        "encryption.png",
        "shares.png",
        "detection.png",
        "labels.png",
        "poisoning.png",
        "backdoor.png",
        "protection_grid.png",
        "paradigms.png",
        "non_iid.png",
        "continual.png",
        "compression.png",
        "early_exits.png",
        "enclave.png",
        "controller.png",
        "tradeoff.png",
        "reconstructions.png",
        "results.csv",
    ):
        if (folder / name).exists():
            typer.echo(f"  {folder / name}")


def _console() -> Console:
    """Return where tables are printed; into a pipe or a file they are not squeezed to a terminal's 80 columns."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPED_COLUMNS)


if __name__ == "__main__":
    main()
