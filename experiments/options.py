"""A command from an experiment: each field of its configuration is an option, beside those of every experiment."""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from experiments.experiment import Experiment, Options

__all__ = ["command", "listed", "seeds"]

Execute = Callable[[Experiment, Any, Options, bool], None]
COMMON_PANEL = "Options of every experiment"


def command(experiment: Experiment, execute: Execute) -> Any:
    """Return the command that calls ``execute(experiment, config, options, quiet)`` with what the user chose.

    Raises ``ValueError`` for a field whose type or name the command line cannot take.
    """
    common = _common(experiment)
    own = _own(experiment, taken={parameter.name for parameter in common})

    def call(**values: Any) -> None:
        config = experiment.config(**{parameter.name: values[parameter.name] for parameter in own})
        quiet = values.pop("quiet")
        chosen = {parameter.name: values[parameter.name] for parameter in common if parameter.name in values}
        execute(experiment, config, Options(**chosen), quiet)

    parameters = [*own, *common]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    single = typer.Typer(add_completion=False)
    single.command(experiment.name, help=escape(experiment.summary), rich_help_panel="Experiments")(call)
    return typer.main.get_command(single)


def seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of ``0,1,2`` or ``0-4`` or both, in that order; each once."""
    numbers: list[int] = []
    for part in _parts(text):
        bounds = re.fullmatch(r"(\d+)-(\d+)", part)
        if bounds is not None and int(bounds[1]) <= int(bounds[2]) < int(bounds[1]) + 10_000:
            numbers.extend(range(int(bounds[1]), int(bounds[2]) + 1))
        elif part.isdecimal():
            numbers.append(int(part))
        else:
            raise typer.BadParameter(f"expected seeds such as 0,1,2 or 0-4, got {text!r}")
    if not numbers or len(set(numbers)) < len(numbers):
        raise typer.BadParameter(f"expected at least one seed and each once, got {text!r}")
    return tuple(numbers)


def listed(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """Return what reads a comma list of ``kind`` (int, float or str)."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in _parts(text))
        except ValueError as error:
            raise typer.BadParameter(f"expected {_PLURAL[kind]} with commas between, got {text!r}") from error

    return read


_PLURAL = {int: "whole numbers", float: "numbers", str: "names"}
_ONE = {int: "INTEGER", float: "NUMBER", str: "NAME", bool: "", Path: "PATH"}


def _common(experiment: Experiment) -> list[inspect.Parameter]:
    """Return the parameters of ``Options``, and ``quiet``."""

    def option(name: str, annotation: Any, default: Any, text: str, **more: Any) -> inspect.Parameter:
        flag = f"--{name.replace('_', '-')}"
        info = typer.Option(default, flag, help=text, rich_help_panel=COMMON_PANEL, **more)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation)

    base = Options()
    return [
        option("data", str, experiment.data, "Data set, one of `splitlearn list data`.", metavar="NAME"),
        option(
            "data_dir", Path | None, None, "Folder with the data sets' files.", envvar="SPLITLEARN_DATA", metavar="DIR"
        ),
        option("seeds", str, _text(base.seeds), "Seeds: 0,1,2 or 0-4.", parser=seeds, metavar="SEED,…"),
        option("device", str, base.device, "cpu, cuda, cuda:1 …; auto: a GPU where there is one.", metavar="NAME"),
        option("out", Path, Path("runs") / experiment.name, "Folder for records and report.", metavar="DIR"),
        option("jobs", int, base.jobs, "Trials at once; 0: one a core.", metavar="INTEGER", min=0),
        option("engine", Literal["local", "ray"], base.engine, "Where trials run: processes here, or Ray's workers."),
        option(
            "ray_address", str | None, None, "Ray cluster; where left out, one is started here.", metavar="HOST:PORT"
        ),
        option("quiet", bool, False, "Show no progress.", metavar=""),
    ]


def _own(experiment: Experiment, taken: set[str]) -> list[inspect.Parameter]:
    """Return a parameter for each field of the experiment's configuration."""
    hints = get_type_hints(experiment.config)
    parameters = []
    for field in fields(experiment.config):
        where = f"{experiment.name}: option {field.name!r}"
        if field.name in taken:
            raise ValueError(f"{where} is one of every experiment; give the field of its configuration another name")
        annotation, more = _read(hints[field.name], where)
        default = _default(field)
        if isinstance(default, tuple):
            default = _text(default)
        info = typer.Option(
            default,
            _flag(field.name, annotation),
            help=escape(field.metadata.get("help", "")),
            rich_help_panel=f"Options of {experiment.name}",
            **more,
        )
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, kind, default=info, annotation=annotation))
    return parameters


def _read(hint: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """Return the annotation that typer knows and what else it must be told, for a field of this type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis and arguments[0] in _PLURAL:
        return str, {"parser": listed(arguments[0]), "metavar": f"{_ONE[arguments[0]]},…"}
    alone = [argument for argument in arguments if argument is not type(None)]
    plain = alone[0] if origin in (Union, UnionType) and len(alone) == 1 else hint
    if origin is Literal:
        return hint, {}
    if plain in _ONE:
        return hint, {"metavar": _ONE[plain]}
    raise ValueError(
        f"{where}: expected int, float, str, bool, Path, a Literal, one of these or None, or tuple[int, ...] and "
        f"its like, got {hint}; change the field's type"
    )


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return ... if field.default is MISSING else field.default


def _flag(name: str, annotation: Any) -> str:
    flag = name.replace("_", "-")
    return f"--{flag}/--no-{flag}" if annotation is bool else f"--{flag}"


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _text(values: tuple[Any, ...]) -> str:
    return ",".join(str(value) for value in values)
