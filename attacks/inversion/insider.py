"""Insider: an attack that takes part in the training, as a party in the server's place."""

from abc import ABC, abstractmethod
from typing import NoReturn, Protocol

from attacks.impostor import Impostor
from attacks.inversion.reconstruction import Reconstruction
from splitlearn import Learner, View

__all__ = ["Infiltration", "Insider"]


class Insider(Impostor, ABC):
    """An impostor that afterwards is called as an ``Inversion``.

    A passive attack adds what it learns on the way and answers as the honest server would, bit for bit; an active one
    answers with lies.
    """

    @abstractmethod
    def __call__(self, view: View) -> Reconstruction:
        """Return an estimate of the input behind each activation of the view's predict requests."""


class Infiltration(Protocol):
    """A frozen set of settings, which puts an insider in a server's place.

    ``view`` is what it knows before training (``granted``): samples of its own, for the most part.
    """

    @abstractmethod
    def insider(self, server: Learner, view: View) -> Insider:
        """Return the party that takes the server's place."""

    def __call__(self, view: View) -> NoReturn:
        """Raise ``ValueError``: settings rebuild nothing, their insider does."""
        raise ValueError(
            f"expected an insider that took part in a training, got the settings of {type(self).__name__}; put "
            "insider(server, view) in the server's place first, and call that"
        )
