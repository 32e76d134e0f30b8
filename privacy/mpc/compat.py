"""How CrypTen 0.4.1 (Knott et al. 2021, arXiv:2109.00984) is imported where torch is newer than it; only we know."""

import importlib
import sys
import warnings
from importlib.util import find_spec
from types import ModuleType

__all__ = ["INSTALL", "LOOPBACK", "load_crypten"]

# By name: gloo would else look up this machine's own, which may not resolve, and may not be the loopback.
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
INSTALL = "pip install 'splitlearn[mpc]' && pip install --no-deps crypten==0.4.1"
# CrypTen's ONNX converter looks for torch's registry of symbolic functions where it used to lie.
_OLD_PLACE = "torch.onnx._internal.registration"
_NEW_PLACE = "torch.onnx._internal.torchscript_exporter.registration"


def load_crypten() -> ModuleType:
    """Return the module ``crypten``, imported; everything of it works but the import of ONNX models.

    The old name of a module that torch has moved is put into ``sys.modules`` and stays there. Raises
    ``LookupError`` with the command that installs CrypTen where it, or what it needs, is missing.
    """
    try:
        if find_spec(_OLD_PLACE) is None:
            sys.modules[_OLD_PLACE] = importlib.import_module(_NEW_PLACE)
        with warnings.catch_warnings():
            # Its sources hold a stray backslash, about which Python warns when it compiles them.
            for category in (DeprecationWarning, SyntaxWarning):
                warnings.filterwarnings("ignore", "invalid escape sequence", category)
            return importlib.import_module("crypten")
    except ImportError as error:
        raise LookupError(f"expected CrypTen, got none that imports ({error}); install it: {INSTALL}") from error
