"""The command ``splitlearn plan``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from experiments.plan import Plan

__all__ = ["plan"]

BOUNDS, GRID, SITE, RUN = "Bounds", "What is tried", "Where it will run", "How it is measured"
NO_BOUND = float("inf")


def plan(
    data: Annotated[
        str, typer.Option(metavar="NAME|FILE.npz", help="Data set (splitlearn list data), or an archive with x and y.")
    ] = "digits",
    model: Annotated[
        str,
        typer.Option(
            metavar="FILE.py:NAME", help="Function that makes your nn.Sequential; else the zoo's for the data."
        ),
    ] = "",
    minimise: Annotated[
        str, typer.Option(help="seconds, joules, nbytes, leakage or loss.", metavar="NAME")
    ] = "seconds",
    whole_front: Annotated[
        bool, typer.Option("--whole-front", help="Measure all that are not hopeless, not only until the plan is known.")
    ] = False,
    max_loss: Annotated[float, typer.Option(help="Points of accuracy lost, of 100.", rich_help_panel=BOUNDS)] = 2.0,
    max_leakage: Annotated[float, typer.Option(help="Of inputs, from 0 to 1.", rich_help_panel=BOUNDS)] = 0.5,
    max_seconds: Annotated[
        float, typer.Option(help="Per sample.", rich_help_panel=BOUNDS, show_default=False)
    ] = NO_BOUND,
    max_joules: Annotated[
        float, typer.Option(help="Of the device, per sample.", rich_help_panel=BOUNDS, show_default=False)
    ] = NO_BOUND,
    max_bytes: Annotated[
        float, typer.Option(help="Both ways, per sample.", rich_help_panel=BOUNDS, show_default=False)
    ] = NO_BOUND,
    edge: Annotated[
        str,
        typer.Option(
            help="microcontroller, raspberry_pi, phone, laptop, server_gpu; here: this machine, measured now.",
            rich_help_panel=SITE,
            metavar="NAME",
        ),
    ] = "phone",
    cloud: Annotated[str, typer.Option(help="The other end, likewise.", rich_help_panel=SITE, metavar="NAME")] = (
        "server_gpu"
    ),
    network: Annotated[
        str, typer.Option(help="lan, wifi, 4g, 5g or satellite.", rich_help_panel=SITE, metavar="NAME")
    ] = "wifi",
    batch: Annotated[int, typer.Option(help="Samples in a frame.", rich_help_panel=SITE)] = 1,
    training: Annotated[
        bool,
        typer.Option("--training/--prediction", help="What is priced.", rich_help_panel=SITE),
    ] = False,
    cuts: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="Last layers below a cut; weighted: one below each layer with weights; all: every place.",
            rich_help_panel=GRID,
        ),
    ] = "weighted",
    compressions: Annotated[
        str,
        typer.Option(
            metavar="NAME,…", help="As in --protections compression:NAME of an experiment.", rich_help_panel=GRID
        ),
    ] = "none,int8,ans4,ans2",
    protections: Annotated[
        str, typer.Option(metavar="NAME:STRENGTH,…", help="See splitlearn list protections.", rich_help_panel=GRID)
    ] = "none,noise:0.02,noise:0.05,nopeek:3",
    attacks: Annotated[
        str, typer.Option(metavar="NAME,…", help="Attacks on what crosses.", rich_help_panel=RUN)
    ] = "decoder",
    epochs: Annotated[int, typer.Option(help="Of each whole training.", rich_help_panel=RUN)] = 15,
    batch_size: Annotated[int, typer.Option(help="Samples in a training batch.", rich_help_panel=RUN)] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.", rich_help_panel=RUN)] = 1e-3,
    private: Annotated[int, typer.Option(help="Private samples; 0: the usual number.", rich_help_panel=RUN)] = 0,
    auxiliary: Annotated[
        int, typer.Option(help="The attacker's samples; 0: the usual number.", rich_help_panel=RUN)
    ] = 0,
    seeds: Annotated[str, typer.Option(metavar="INTEGER,…", help="0,1,2 or 0-4.", rich_help_panel=RUN)] = "0,1,2",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …", rich_help_panel=RUN)] = "auto",
    jobs: Annotated[int, typer.Option(help="Trials at once; 0: one a core.", rich_help_panel=RUN)] = 0,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="SPLITLEARN_DATA", metavar="DIR", help="Default: ./data", rich_help_panel=RUN)
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for records, picture and report.", rich_help_panel=RUN)
    ] = Path("runs/plan"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.", rich_help_panel=RUN)] = False,
) -> None:
    """Say where to cut a model, what to compress and how to protect it, within your bounds."""
    from experiments import plan as planning
    from experiments.options import listed
    from experiments.options import seeds as read_seeds
    from experiments.plan_data import load_for
    from experiments.planner import Bounds
    from experiments.training import device_of
    from experiments.workbench import Settings
    from experiments.workers import available_cpus

    path, _, name = model.rpartition(":")
    if model and not path:
        raise ValueError(f"expected --model FILE.py:NAME, got {model!r}; as in --model my_model.py:make")
    answer = planning.plan(
        planning.FromFile(Path(path).absolute(), name) if model else None,
        load_for(data, data_dir, private=private, auxiliary=auxiliary),
        data=Path(data).stem,
        edge=edge,
        cloud=cloud,
        network=network,
        batch=batch,
        training=training,
        bounds=Bounds(max_loss, max_leakage, max_seconds, max_joules, max_bytes),
        minimise=minimise,
        whole_front=whole_front,
        cuts=listed(str)(cuts),
        compressions=listed(str)(compressions),
        protections=listed(str)(protections),
        settings=Settings(
            epochs=epochs, batch_size=batch_size, lr=lr, attacks=listed(str)(attacks), seeds=read_seeds(seeds),
            device=device_of(device),
        ),
        out=out,
        jobs=jobs or available_cpus(),
        progress=not quiet,
    )  # fmt: skip
    _show(answer, out)


def _show(answer: "Plan", out: Path) -> None:
    from rich.console import Console

    from experiments import report
    from experiments.closing import plain

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=120)
    console.print(plain(answer.table))
    for number, line in enumerate(answer.advice):
        console.print(line, markup=False, style="bold" if number == 0 else "")
    shown = [answer.picture, out / "plan.txt"]
    if answer.found.measured:
        shown.append(report.build(out))
    for path in shown:
        typer.echo(f"  {path}")
