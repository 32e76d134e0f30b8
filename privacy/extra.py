"""What needs an extra is imported when it is used, and its absence is told in one line."""

from importlib import import_module
from typing import Any

__all__ = ["load"]

EXTRAS = {"opacus": "dp", "dp_accounting": "dp", "tenseal": "he"}


def load(module: str) -> Any:
    """Return the module, imported; ``LookupError`` with the command that installs it where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise LookupError(
            f"expected {package.replace('_', '-')}, got none ({error}); install it: "
            f"pip install 'splitlearn[{EXTRAS[package]}]'"
        ) from error
