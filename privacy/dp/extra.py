"""What needs the extra ``dp`` is imported when it is used, and its absence is told in one line."""

from importlib import import_module
from typing import Any

__all__ = ["load"]


def load(module: str) -> Any:
    """Return the module, imported; ``LookupError`` with the command that installs it where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise LookupError(
            f"expected {package}, got none ({error}); install it: pip install 'splitlearn[dp]'"
        ) from error
