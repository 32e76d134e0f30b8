"""Groups of commands that know their near names, and the edge at which an error becomes one line."""

import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from experiments.names import unknown

__all__ = ["Commands", "Program"]

BAD_INPUT, INTERRUPTED = 2, 130


class Commands(TyperGroup):
    """A group whose members are named ``kind``; one that is not there is an error that lists the near ones."""

    kind = "command"

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that ``args`` name; ``LookupError`` where there is none."""
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-"):
            raise unknown(self.kind, args[0], names)
        return super().resolve_command(ctx, args)


class _Failure(typer.TyperException):
    """What ends the program: its one line, and the exit code."""

    def __init__(self, line: str, exit_code: int):
        super().__init__(line)
        self.exit_code = exit_code


class Program(Commands):
    """The whole program. Errors of users become one line on stderr, other errors keep their traceback.

    Exit codes: 2 for bad input, 130 when interrupted, else what the command says. The parameter ``debug`` of
    its callback shows every traceback.
    """

    def main(self, args: Sequence[str] | None = None, *arguments: Any, **options: Any) -> NoReturn:
        """Run the command that ``args`` name and leave the program."""
        options["standalone_mode"] = False
        try:
            code = super().main(args, *arguments, **options)
        except typer.TyperException as error:  # a command that cannot be read, or a _Failure
            typer.echo(_line(error), err=True)
            sys.exit(error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what it raises becomes a line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Failure(str(error) or "interrupted", INTERRUPTED) from error  # the runner says what it kept
        except BrokenPipeError:  # the reader has seen enough, as in `splitlearn list | head -1`: typer ends quietly
            raise
        except (ValueError, LookupError, OSError, typer.TyperException) as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            raise _Failure(_line(error), BAD_INPUT) from error


def _line(error: Exception) -> str:
    """Return what to tell the user, on one line."""
    if isinstance(error, _Failure):
        return error.message
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    if type(error) in (KeyError, IndexError):  # hardly the user's doing
        text = f"{type(error).__name__}: {text}; this is a mistake in splitlearn: --debug shows where it happened"
    context = getattr(error, "ctx", None)  # where the command line could not be read
    if context is not None:
        text = f"{text.rstrip('.')}; see {context.command_path} --help"
    return f"error: {' '.join(text.split())}"
